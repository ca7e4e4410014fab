"""`copus watch`: a run while it goes on, from its run directory alone, wherever its workers are."""

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from copus.event_lines import read_decision
from copus.events import DecisionTaken, Event, Profile, Reconfigure, Start, Step
from copus.job import JobError
from launch.engines import EngineState, engine_state
from launch.engines.ticket import FILE as TICKET
from launch.follow import Follower
from launch.json_output import as_json_line
from launch.run_directory import find_run
from launch.run_state import state_of
from launch.runs import RunSummary, as_values
from launch.status import RunStatus
from launch.wording import describe_event
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 1.0
"""Time between two looks at the run."""
ASK_SECONDS = 10.0
"""Time between two questions to a scheduler."""
LAST_EVENTS = 6
"""Events shown in words."""
ALTERNATIVES = 5
"""Candidates of the last decision that are shown, the current one among them."""


class Watched:
    """All that one frame shows. Feed it events in order."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.status = RunStatus()
        self.losses: list[float] = []
        """Training loss of every step that counts."""
        self.told: deque[str] = deque(maxlen=LAST_EVENTS)
        """The last events in words."""
        self.predicted: float | None = None
        """Samples a second that were expected of the configuration that runs, before it ran."""
        self._read: tuple[DecisionTaken, Decision | None] | None = None
        self._known: EngineState | None = None
        self._next_question = 0.0
        self.state = state_of(run, self.status, ask=self._ask)
        self._losses_at: list[int] = []
        self._measured: dict[Configuration, float] = {}
        self._unsaid: deque[str] = deque(maxlen=1000)

    def update(self, events: list[Event]) -> None:
        """Take in new events, and look whether the run is alive."""
        for event in events:
            self.status.update([event])
            self._take(event)
        self.state = state_of(self.run, self.status, ask=self._ask)

    def _ask(self, run: Path) -> EngineState:
        """What the engine says. A scheduler is not asked every second, and one that is slow said nothing new."""
        if not (run / TICKET).exists():  # no scheduler has the run
            return engine_state(run)
        if self._known is None or time.monotonic() >= self._next_question:
            state = engine_state(run)
            if self._known is None or state.phase != "unknown":
                self._known = state
            self._next_question = time.monotonic() + ASK_SECONDS
        return self._known

    def _take(self, event: Event) -> None:
        match event:
            case Start():
                while self._losses_at and self._losses_at[-1] > event.samples_consumed:  # trained on again
                    self._losses_at.pop()
                    self.losses.pop()
                self.predicted = self._measured.get(event.configuration)
            case Step() if event.loss is not None:
                self.losses.append(event.loss)
                self._losses_at.append(event.samples_consumed)
            case Profile() if event.step_seconds:
                self._measured[event.configuration] = event.configuration.global_batch / event.step_seconds
            case Reconfigure():
                asked = self.status.decision is not None and self.status.decision.number == event.decision
                expected = self.score(event.after) if asked else None
                self.predicted = expected.samples_per_second if expected else self._measured.get(event.after)
        trying = isinstance(event, Reconfigure) and event.trial  # the trial says so when it ends
        if not trying and (not isinstance(event, DecisionTaken) or event.switch):  # "stay" is no news
            words = describe_event(event, self.status.start.seq_len if self.status.start else None)
            if words is not None:
                line = f"{time.strftime('%H:%M:%S', time.localtime(event.time))}  {words}"
                self.told.append(line)
                self._unsaid.append(line)

    def news(self) -> list[str]:
        """The events in words that were not asked for yet."""
        lines = list(self._unsaid)
        self._unsaid.clear()
        return lines

    @property
    def decision(self) -> Decision | None:
        """The newest, read when it is asked for."""
        taken = self.status.decision
        if taken is None:
            return None
        if self._read is None or self._read[0] is not taken:
            made = read_decision(self.run, taken)
            self._read = taken, made.decision if made else None
        return self._read[1]

    def score(self, configuration: Configuration) -> CandidateScore | None:
        """What the newest decision knew of a configuration."""
        decision = self.decision
        candidates = decision.candidates if decision else []
        return next((each for each in candidates if each.configuration == configuration), None)

    def alternatives(self) -> list[CandidateScore]:
        """The best candidates of the newest decision, and always the configuration that runs, best first."""
        decision = self.decision
        if decision is None:
            return []
        scored = [each for each in decision.candidates if each.goodput is not None]
        scored.sort(key=lambda each: each.goodput or 0.0, reverse=True)
        running = self.score(self.status.configuration) if self.status.configuration else None
        if running is None or running in scored[:ALTERNATIVES]:
            return scored[:ALTERNATIVES]
        return [*scored[: ALTERNATIVES - 1], running]


def watch(run_text: str | None, *, once: bool = False, as_json: bool = False, web: bool = False) -> int:
    """Show a run until it has ended. Returns 1 if it failed or crashed. Raises JobError if there is no such run.

    As JSON it is a stream, an object a line whenever something has changed; with `once` a single object.
    """
    run = find_run(run_text)
    if web:
        if once or as_json:
            raise JobError("--web is a page in a browser: leave out --once and --json")
        from launch.web import serve

        return serve(run)
    follower, watched = Follower(run), Watched(run)
    watched.update(follower.read())
    if as_json:
        _stream(follower, watched, once)
        return 1 if watched.state.name in ("failed", "crashed") else 0
    from launch.progress import SteadyConsole

    console = SteadyConsole(highlight=False)
    if once:
        from launch.watch_frame import frame

        console.print(frame(watched, console.width))
    elif console.is_terminal:
        _live(follower, watched, console)
    else:
        _lines(follower, watched, console)
    return 1 if watched.state.name in ("failed", "crashed") else 0


def frame_as_values(watched: Watched) -> dict[str, object]:
    """What one frame shows as plain values, for `--json`."""
    status, changed = watched.status, watched.status.time or 0.0
    noise = status.noise
    return {
        **as_values(RunSummary(watched.run, watched.state, status, changed)),
        "noise": {name: getattr(noise, name) if noise else None for name in ("value", "low", "high")},
        "samples_per_second": status.samples_per_second,
        "predicted_samples_per_second": watched.predicted,
        "remaining_seconds": status.remaining_seconds if watched.state.alive else None,
        "alternatives": [each.model_dump(mode="json") for each in watched.alternatives()],
        "events": list(watched.told),
    }


def _stream(follower: Follower, watched: Watched, once: bool) -> None:
    """An object a line for each change, until the run has ended."""
    said: dict[str, object] = {}
    while True:
        values = frame_as_values(watched)
        if values != said:
            print(as_json_line(values), flush=True)
            said = values
        if once or not watched.state.alive:
            return
        time.sleep(REFRESH_SECONDS)
        watched.update(follower.read())


def _live(follower: Follower, watched: Watched, console: "Console") -> None:
    """Redraw until the run has ended; the last frame stays."""
    from rich.live import Live

    from launch.watch_frame import frame

    with Live(console=console, auto_refresh=False, get_renderable=lambda: frame(watched, console.width)) as live:
        live.refresh()
        while watched.state.alive:
            time.sleep(REFRESH_SECONDS)
            watched.update(follower.read())
            live.refresh()


def _lines(follower: Follower, watched: Watched, console: "Console") -> None:
    """A line for each change, for a pipe or a file."""
    from launch.watch_frame import headline

    said = ""
    while True:
        for line in watched.news():
            console.print(line, markup=False, soft_wrap=True)
        if watched.state.name != said:
            console.print(headline(watched), markup=False, soft_wrap=True)
            said = watched.state.name
        if not watched.state.alive:
            return
        time.sleep(REFRESH_SECONDS)
        watched.update(follower.read())
