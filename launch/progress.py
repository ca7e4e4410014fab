"""Live progress of a run: a panel on a terminal, plain lines elsewhere."""

import os
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from copus.event_lines import read_decision
from copus.events import Branch, Evaluate, Event, Failure, Profile, Reconfigure, Restart, Trial, Warned
from launch.explain import trade
from launch.run_directory import shown
from launch.status import RunStatus
from launch.tables import facts_grid, progress_bar
from launch.wording import describe_branch, describe_event, describe_loss, describe_measurement
from profiles.formatting import count, duration, noise_interval, percent, three_digits

LINE_SECONDS = 10.0
"""Time between plain lines."""


class SteadyConsole(Console):
    """Goes quiet when its reader goes: a run ends as it should although `| tee`, on a Ctrl-C, was faster."""

    def on_broken_pipe(self) -> None:
        """What rich calls then; its own version ends the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Progress:
    """Shows a `RunStatus` while it is entered. Without a terminal it writes whole lines and no control codes."""

    def __init__(self, console: Console, run: Path, status: RunStatus) -> None:
        self._console = console
        self._run = run
        self._status = status
        self.waiting = "starting the workers"
        """What is shown until the workers have begun, and while they are `held`."""
        self.held = False
        """Whether the job waits in a queue, maybe again."""
        self._said = ""
        self._began = time.monotonic()
        self._next_line = self._began
        self._live = (
            Live(console=console, auto_refresh=False, get_renderable=self._panel) if console.is_terminal else None
        )

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def elapsed_seconds(self) -> float:
        """Since this command started."""
        return time.monotonic() - self._began

    def say(self, line: str) -> None:
        """One line that stays. The same line again is left out: a queue may be long."""
        if line != self._said:
            self._console.print(Text(line), soft_wrap=True)
        self._said = line

    def show(self, events: list[Event]) -> None:
        """Show the status as it is after these new events."""
        seq_len = self._status.start.seq_len if self._status.start else None
        for event in events:
            if self._tells(event):
                self.say(describe_event(event, seq_len) or "")
            if isinstance(event, Reconfigure) and not event.trial and (reason := self._reason(event)):
                self.say(f"  {reason}")
        if self._live:
            self._live.refresh()
        else:
            self._plain()

    def _tells(self, event: Event) -> bool:
        """Whether an event gets a line that stays; of fatal failures only the first, the others follow from it."""
        if isinstance(event, Failure):
            # What the user has to fix is the command's own last line.
            return not event.fatal or (event is self._status.failure and not event.user_error)
        if isinstance(event, Branch | Profile | Evaluate):  # the panel shows these
            return not self._live
        if isinstance(event, Reconfigure):  # what a trial was for is said when it ends
            return not event.trial
        return isinstance(event, Trial | Restart | Warned)

    def _reason(self, move: Reconfigure) -> str | None:
        """Why the planner made a move, in one line; None if it is not the planner's newest."""
        taken = self._status.decision
        made = read_decision(self._run, taken) if taken and taken.number == move.decision else None
        if made is None or (gain := trade(made.decision)) is None:
            return None
        noise = made.decision.noise
        scale = "not measured yet" if noise.value is None else noise_interval(noise.value, noise.low, noise.high)
        return f"noise scale {scale}: {gain}"

    def _plain(self) -> None:
        if time.monotonic() < self._next_line or self._status.profile or self._status.branch:
            # measurements and branches have lines of their own
            return
        self._next_line = time.monotonic() + LINE_SECONDS
        self.say(" · ".join(f"{name} {value}".strip() for name, value in self._facts()))

    def _tokens(self, samples: int) -> str:
        return count(samples * self._status.start.seq_len) if self._status.start else f"{samples} sequences"

    def _facts(self) -> list[tuple[str, str]]:
        """Name and value of everything that is known, in the order that people look for it."""
        status = self._status
        if status.profile:
            return [("", describe_measurement(status.profile))]
        if status.branch:
            return [("", describe_branch(status.branch))]
        if status.start is None or self.held:
            return [("", self.waiting)]
        step, noise, evaluation = status.step, status.noise, status.evaluation
        facts = [
            ("", f"{status.fraction:.1%}"),
            ("tokens", f"{self._tokens(status.samples_consumed)} of {self._tokens(status.start.total_samples)}"),
            ("loss", describe_loss(step.loss) if step else "…"),
            ("validation", describe_loss(evaluation.loss) if evaluation else "…"),
            ("noise", noise_interval(noise.value, noise.low, noise.high) if noise else "unknown yet"),
        ]
        if status.configuration:
            configuration = status.configuration
            facts += [
                ("batch", str(configuration.global_batch)),
                ("layout", configuration.layout.label + " (trial)" * (status.trying is not None)),
                ("micro-batch", str(configuration.micro_batch)),
            ]
        if status.skipped_steps:
            facts.append(("skipped", f"{status.skipped_steps} of {status.steps} steps, not finite"))
        if status.samples_per_second is not None:
            facts.append(("samples/s", three_digits(status.samples_per_second)))
        if status.mfu is not None:
            facts.append(("MFU", percent(status.mfu)))
        facts.append(("elapsed", duration(self.elapsed_seconds)))
        if status.remaining_seconds is not None and status.end is None:
            facts.append(("left", duration(status.remaining_seconds)))
        return facts

    def _panel(self) -> RenderableType:
        status = self._status
        facts = self._facts()
        heading = Text.assemble((shown(self._run), "bold"), f"   {duration(self.elapsed_seconds)}")
        if status.profile:
            return Group(heading, progress_bar(status.profile.done / status.profile.total, facts[0][1]))
        if len(facts) == 1:  # not training yet
            return Group(heading, Text(facts[0][1]))
        bar = progress_bar(status.fraction, facts[0][1])
        last = Text(status.last_change or "no decision yet", style="dim", overflow="ellipsis", no_wrap=True)
        return Group(heading, bar, facts_grid(facts[1:]), last)
