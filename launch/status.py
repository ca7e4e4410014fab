"""What a run is doing, from its events: the state that every live view shows."""

from collections import deque
from collections.abc import Iterable

from copus.events import (
    Branch,
    Checkpoint,
    DecisionTaken,
    End,
    Evaluate,
    Event,
    Failure,
    Noise,
    Profile,
    Reconfigure,
    Start,
    Step,
    Trial,
    Warned,
)
from launch.wording import describe_move, describe_trial
from profiles.configuration import Configuration

RECENT_STEPS = 20
"""Steps that the shown throughput is the mean of; forgotten at a move, which is no step time."""


class RunStatus:
    """The newest of everything. Feed it events in order."""

    def __init__(self) -> None:
        self.start: Start | None = None
        self.profile: Profile | None = None
        """The last measurement, while nothing else has run since."""
        self.branch: Branch | None = None
        """The last branch of a calibration."""
        self.warning: Warned | None = None
        self.configuration: Configuration | None = None
        self.step: Step | None = None
        self.steps = self.skipped_steps = 0
        """Steps in the log, and those of them whose gradients were not finite; both with what was done again."""
        self.noise: Noise | None = None
        self.evaluation: Evaluate | None = None
        self.first_evaluation: Evaluate | None = None
        self.checkpoint: Checkpoint | None = None
        self.decision: DecisionTaken | None = None
        """The newest, without its candidates."""
        self.last_change: str | None = None
        self.failure: Failure | None = None
        self.end: End | None = None
        self.moves: list[Reconfigure] = []
        """Lasting changes that count: neither what a restart went back behind, nor moves for a trial, unless the job
        stayed."""
        self.trials: list[Trial] = []
        """Those that ended, and that count."""
        self.trying: Reconfigure | None = None
        """The newest move for a trial that has not ended."""
        self.time: float | None = None
        """When the newest event was written."""
        self.samples_consumed = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)

    def forget_ending(self) -> None:
        """Workers are about to be started (again): how they ended the last time says nothing any more."""
        self.failure = self.end = self.profile = None
        self._recent.clear()

    def update(self, events: Iterable[Event]) -> None:
        """Take in events."""
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        if not isinstance(event, Failure):  # it may come from a rank that does not count samples
            self.samples_consumed = event.samples_consumed
        self.time = event.time
        match event:
            case Start():
                self.forget_ending()  # an attempt that the agent restarted
                self.moves = [move for move in self.moves if move.samples_consumed <= event.samples_consumed]
                self.trials = [trial for trial in self.trials if trial.samples_consumed <= event.samples_consumed]
                self.trying = None
                self.start = event
                self.configuration = event.configuration
            case Profile():
                self.profile = event
            case Step():
                self.step = event
                self.steps += 1
                self.skipped_steps += event.skipped
                self.profile = None
                self._recent.append((event.global_batch, event.seconds))
            case Noise():
                self.noise = event
            case Evaluate():
                self.evaluation = event
                self.first_evaluation = self.first_evaluation or event
            case DecisionTaken():
                self.decision = event
                self.last_change = f"decision {event.number}: {event.reason}"
            case Reconfigure():
                self.configuration = event.after
                if event.trial:
                    self.trying = event
                else:
                    self.moves.append(event)
                self.last_change = describe_move(event)
                self._recent.clear()
            case Trial():
                self.trials.append(event)
                if self.trying is not None and event.outcome == "stayed":
                    self.moves.append(self.trying)
                self.trying = None
                self.last_change = describe_trial(event)
            case Checkpoint():
                self.checkpoint = event
            case Branch():
                self.branch = event
            case Warned():
                self.warning = event
            case Failure():
                if event.fatal and (self.failure is None or event.user_error > self.failure.user_error):
                    self.failure = event  # the first one is the cause, unless a later one names it
            case End():
                self.end = event

    @property
    def fraction(self) -> float:
        """Share of the run's samples that are done, 0 to 1."""
        return min(1.0, self.samples_consumed / self.start.total_samples) if self.start else 0.0

    @property
    def samples_per_second(self) -> float | None:
        """Mean throughput of the newest steps of the current configuration."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(samples for samples, _ in self._recent) / seconds if seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization at that throughput, 0 to 1; None if the peak is not rated."""
        peak = self.start.peak_samples_per_second if self.start else None
        return self.samples_per_second / peak if peak and self.samples_per_second is not None else None

    @property
    def remaining_seconds(self) -> float | None:
        """Time to the end of the run: at the current throughput, or to the limit of `training.max_minutes`."""
        if self.start is None or self.samples_per_second is None:
            return None
        seconds = max(0, self.start.total_samples - self.samples_consumed) / self.samples_per_second
        if self.start.max_minutes is not None and self.time is not None:
            seconds = min(seconds, max(0.0, self.start.time + self.start.max_minutes * 60 - self.time))
        return seconds
