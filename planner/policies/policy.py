"""Policies: what runs from now on. The same ones decide in a job and in a simulation."""

from typing import Protocol

import numpy as np

from planner.config import PlannerConfig
from planner.policies.cbs import CriticalBatch, CriticalBatchDoubling
from planner.policies.goodput import Goodput
from planner.policies.norm_test import NormTest
from planner.policies.schedules import LateSwitch, Ramp, Seesaw
from planner.policies.smallest_saturating import SmallestSaturating
from planner.situation import Choice, Situation
from profiles.formatting import percent


class Policy(Protocol):
    """Chooses, for any number of runs at once. Deterministic, and without a memory of its own."""

    name: str
    """Its name in `planner.policy` of the job file."""
    weighs_error: bool
    """Whether it looks at how well a throughput is known. One that does may try what the cost model alone knows of."""
    needs_noise: bool
    """Whether it waits for a noise scale. A schedule does not, nor for measured throughputs."""
    picks_start: bool
    """Whether it may begin in another configuration than that of the job file."""

    def choose(self, situation: Situation) -> Choice:
        """The candidate that each run uses from now on."""

    def reason(self, situation: Situation, choice: Choice) -> str:
        """Why the first run does what it does, as a clause."""

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Why the first run did not choose this candidate, whose goodput is no less than the current one's."""


class Static:
    """Keeps the configuration that runs."""

    name = "static"
    weighs_error = False
    needs_noise = True
    picks_start = False

    def choose(self, situation: Situation) -> Choice:
        """The current configuration."""
        return Choice(situation.current)

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What the best candidate would gain."""
        index, gain = _best(situation)
        if gain[0] > 0:
            label = situation.menu.configurations[int(index[0])].label
            outcome = f"{label} would gain {percent(float(gain[0]))}"
        else:
            outcome = "no configuration is better than the current one"
        return f"{outcome}; the static policy never moves"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """The gain that is forgone."""
        return f"gain {percent(situation.gain(index))}, but the policy is static"


class Copus:
    """The best Goodput, when it improves on the current one by `min_gain` (COPUS, 2604.26687: 10 %)."""

    name = "copus"
    weighs_error = False
    needs_noise = True
    picks_start = True

    def __init__(self, min_gain: float) -> None:
        self.min_gain = min_gain

    def choose(self, situation: Situation) -> Choice:
        """The best candidate, or the current one if the gain is too small."""
        index, gain = _best(situation)
        return Choice(np.where((gain > 0) & (gain >= self.min_gain), index, situation.current))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """The gain, or what it falls short of."""
        index, gain = _best(situation)
        label, best_gain = situation.menu.configurations[int(index[0])].label, float(gain[0])
        if best_gain <= 0:
            return "no configuration is better than the current one"
        if best_gain < self.min_gain:
            limit = percent(self.min_gain)
            return f"{label} is the best, but its gain of {percent(best_gain)} over the current is below {limit}"
        return f"goodput of {label} is {1 + best_gain:.2f}× the current"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """The gain, and what it falls short of."""
        gain = situation.gain(index)
        if gain <= 0:
            return "no gain"
        if gain < self.min_gain:
            return f"gain {percent(gain)} is below {percent(self.min_gain)}"
        return f"gain {percent(gain)}, less than the chosen one's"


def _best(situation: Situation) -> tuple[np.ndarray, np.ndarray]:
    """The candidate with the best goodput, of equals the smaller batch (2507.07101), and its gain: shapes (R,)."""
    goodputs = situation.goodput(situation.critical_batch)
    best = goodputs.max(axis=1, keepdims=True)
    index = np.where(goodputs >= best, situation.menu.global_batch, np.inf).argmin(axis=1)
    current = np.take_along_axis(goodputs, situation.current[:, None], axis=1)
    return index, (best / current - 1)[:, 0]


def make_policy(config: PlannerConfig) -> Policy:
    """The policy that the job file names."""
    match config.policy:
        case "static":
            return Static()
        case "copus":
            return Copus(config.min_gain)
        case "goodput":
            return Goodput()
        case "norm-test":
            return NormTest(config.norm_test_form, config.norm_test_eta, config.norm_test_every)
        case "cbs":
            return CriticalBatch(config.cbs_layout)
        case "ramp":
            return Ramp(config.ramp_start, config.ramp_increment, config.ramp_samples)
        case "seesaw":
            return Seesaw()
        case "smallest-saturating":
            return SmallestSaturating()
        case "late-switch":
            return LateSwitch(config.late_switch_at)
        case "cbs-doubling":
            return CriticalBatchDoubling()
