"""What one frame of `copus watch` shows, from a run's events."""

import time
from collections import deque
from pathlib import Path

from copus.event_lines import read_decision
from copus.events import DecisionTaken, Event, Profile, Reconfigure, Start, Step
from launch.engines import EngineState, engine_state
from launch.engines.ticket import FILE as TICKET
from launch.run_state import state_of
from launch.status import RunStatus
from launch.wording import describe_event
from profiles.configuration import Configuration
from profiles.decision import CandidateScore, Decision

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
        return next((candidate for candidate in candidates if candidate.configuration == configuration), None)

    def alternatives(self) -> list[CandidateScore]:
        """The best candidates of the newest decision, and always the configuration that runs, best first."""
        decision = self.decision
        if decision is None:
            return []
        scored = [candidate for candidate in decision.candidates if candidate.goodput is not None]
        scored.sort(key=lambda candidate: candidate.goodput or 0.0, reverse=True)
        running = self.score(self.status.configuration) if self.status.configuration else None
        if running is None or running in scored[:ALTERNATIVES]:
            return scored[:ALTERNATIVES]
        return [*scored[: ALTERNATIVES - 1], running]
