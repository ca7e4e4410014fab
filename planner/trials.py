"""Trials: a configuration that never ran is timed for a few steps beside the one that runs, within a budget."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from planner.forecast import QUANTILE_90
from planner.menu import Floats
from profiles.configuration import Configuration
from profiles.layout import Layout

SETTLING_STEPS = 2
"""Steps after a move that are not timed: buffers, caches and communicators are warming up."""
FEWEST_STEPS = 3
"""Timed steps on each side before a trial may end: a median of three ignores one step that something delayed."""
MOST_STEPS = 8
"""Timed steps on each side after which a trial ends, whatever it has shown."""
EXPECTED_STEPS = 5
"""Timed steps that a trial is expected to need in the candidate, and again after the return."""
BEYOND_DOUBT = 2.0
"""Standard errors by which the candidate has to beat, or miss, the break-even before the trial ends early."""
DRIFT = 0.03
"""Standard deviation of the logarithm of the machine's speed between neighbouring windows of a few steps, as long as
only one side of the candidate has been timed."""
LEAST_NOISE = 0.005
"""Standard deviation of the logarithm of a step that is assumed at least: the few steps of a trial may happen to
agree."""

Verdict = Literal["continue", "stay", "return", "end"]


class Ratio(NamedTuple):
    """Step time of the candidate over that of the running configuration."""

    log: float
    """Its natural logarithm."""
    error: float
    """Standard error of the logarithm."""

    @property
    def ends(self) -> tuple[float, float, float]:
        """The ratio and its 90 % interval: value, low, high."""
        value, factor = math.exp(self.log), math.exp(QUANTILE_90 * self.error)
        return value, value / factor, value * factor


class Trial:
    """Steps of the running configuration just before, of the candidate, and of the running configuration just after.

    Comparing the candidate with the mean of before and after cancels a steady drift of the machine. If the steps before
    suffice to show that the candidate wins, the job stays in it and never goes back.
    """

    def __init__(
        self,
        decision: int,
        candidate: Configuration,
        running: Configuration,
        before: Sequence[float],
        break_even: float,
    ) -> None:
        """`before` are the seconds of the last steps of `running`; `break_even` is the ratio of step times, candidate
        over running, at which both have the same Goodput."""
        self.decision = decision
        self.candidate = candidate
        self.running = running
        self.steps = 0
        """Optimizer steps since the move to the candidate."""
        self.seconds = 0.0
        """Duration of these steps and of the moves between them."""
        self.move_seconds = 0.0
        """The share of the moves."""
        self._before = list(before)
        self._there: list[float] = []
        self._after: list[float] = []
        self._break_even = math.log(break_even)
        self._settling = SETTLING_STEPS
        self._returned = False

    def observe_move(self, seconds: float, returned: bool = False) -> None:
        """The job moved to the candidate, or back from it."""
        self.move_seconds += seconds
        self.seconds += seconds
        self._settling = SETTLING_STEPS
        self._returned = returned

    def observe_step(self, seconds: float) -> Verdict:
        """A step was made: go on, stay in the candidate, return to the running configuration, or end after that."""
        self.steps += 1
        self.seconds += seconds
        if self._settling:
            self._settling -= 1
            return "continue"
        timed = self._after if self._returned else self._there
        timed.append(seconds)
        if len(timed) < FEWEST_STEPS:
            return "continue"
        ratio = self.ratio
        assert ratio is not None, "steps of the candidate were timed"
        distance = ratio.log - self._break_even
        doubt = abs(distance) < BEYOND_DOUBT * ratio.error
        if doubt and len(timed) < MOST_STEPS:
            return "continue"
        if self._returned:
            return "end"
        return "return" if doubt or distance > 0 else "stay"

    @property
    def ratio(self) -> Ratio | None:
        """What the trial has shown so far; None until a step of the candidate was timed.

        Medians, because one delayed step must not decide, and the mean absolute deviation from them as the error: the
        median of n steps varies by √(π/2n) of a step's own deviation. Half of what the running configuration changed
        between before and after is what a drift that was not steady may have left.
        """
        sides = [np.log(side) for side in (self._before, self._after) if side]
        if not self._there or not sides:
            return None
        there = np.log(self._there)
        running, level = [float(np.median(side)) for side in sides], float(np.median(there))
        scatter = np.concatenate([there - level, *(side - middle for side, middle in zip(sides, running, strict=True))])
        freedom = len(scatter) - len(sides) - 1  # each side has lost one to its median
        noise = max(math.sqrt(math.pi / 2) * float(np.abs(scatter).sum()) / freedom, LEAST_NOISE)
        counts = 1 / len(there) + sum(1 / len(side) for side in sides) / len(sides) ** 2
        drift = DRIFT if len(sides) == 1 else (running[1] - running[0]) / 2
        error = math.hypot(noise * math.sqrt(math.pi / 2 * counts), drift)
        return Ratio(level - sum(running) / len(running), error)


def expected_seconds(candidate_step: Floats, running_step: Floats, move: Floats) -> Floats:
    """What a trial is expected to take, in seconds: both moves, and the steps on both sides of the way back."""
    return 2 * move + (SETTLING_STEPS + EXPECTED_STEPS) * (candidate_step + running_step)


class TrialLedger:
    """What trials have cost a run, what they may cost, and what was tried."""

    def __init__(self, budget: float) -> None:
        """`budget` is the share of the elapsed time that trials may take."""
        self._budget = budget
        self._elapsed = 0.0
        self._spent = 0.0
        self._recent: deque[float] = deque(maxlen=MOST_STEPS)
        self._tried: set[tuple[Layout, int]] = set()

    @property
    def recent(self) -> list[float]:
        """Seconds of the last timed steps of what runs: at most as many as a trial compares with."""
        return list(self._recent)

    @property
    def allowance(self) -> float:
        """Seconds that a trial may take now; 0 until enough steps were timed to compare it with."""
        if len(self._recent) < FEWEST_STEPS:
            return 0.0
        return max(self._budget * self._elapsed - self._spent, 0.0)

    def tried(self, configuration: Configuration) -> bool:
        """Whether a trial has timed this layout and micro-batch: its other batches follow from one."""
        return (configuration.layout, configuration.micro_batch) in self._tried

    def observe_step(self, seconds: float, timed: bool) -> None:
        """Training went on for so long; `timed` is True for a settled step of what runs."""
        self._elapsed += seconds
        if timed:
            self._recent.append(seconds)

    def observe_move(self, seconds: float) -> None:
        """Another configuration runs from now on."""
        self._elapsed += seconds
        self._recent.clear()

    def close(self, trial: Trial) -> None:
        """A trial is over."""
        self._spent += trial.seconds
        self._tried.add((trial.candidate.layout, trial.candidate.micro_batch))

    def state(self) -> dict[str, Any]:
        """Everything that a resumed job needs, as plain values."""
        tried = [(layout.model_dump(), micro_batch) for layout, micro_batch in self._tried]
        return {"elapsed": self._elapsed, "spent": self._spent, "tried": tried}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        self._elapsed, self._spent = state.get("elapsed", 0.0), state.get("spent", 0.0)
        self._tried = {(Layout.model_validate(layout), micro_batch) for layout, micro_batch in state.get("tried", ())}
