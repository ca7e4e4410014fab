"""Policies: given scored candidates, which configuration runs from now on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from planner.config import PlannerConfig
from planner.norm_test import NormTest
from planner.wording import percent
from profiles.decision import CandidateScore
from profiles.noise_scale import NoiseScale
from profiles.step_norms import StepNorms


@dataclass(frozen=True)
class Situation:
    """What a policy may look at."""

    samples_consumed: int
    """Sequences trained on so far."""
    noise: NoiseScale
    """The noise scale; its value is known."""
    critical_batch: float
    """φ in sequences."""
    current: CandidateScore
    """What runs. Its goodput is known, its gain is 0."""
    ranked: Sequence[CandidateScore]
    """Every candidate that may be chosen, `current` among them, best goodput first."""
    number: int = 0
    """Number of this decision."""
    step_norms: StepNorms | None = None
    """Norms of the steps since the last decision; None where none was measured."""


class Policy(Protocol):
    """Chooses. Deterministic: the same situation gives the same choice."""

    name: str
    """As in `planner.policy` of the job file."""

    def choose(self, situation: Situation) -> tuple[CandidateScore, str]:
        """The candidate that runs from now on (`situation.current` for no move), and the reason as a clause."""

    def verdict(self, candidate: CandidateScore) -> str:
        """Why this candidate, which scores no less than the current one, was not chosen."""


class Static:
    """Keeps the configuration that runs."""

    name = "static"

    def choose(self, situation: Situation) -> tuple[CandidateScore, str]:
        """The current configuration."""
        best = situation.ranked[0]
        if best.gain:
            found = f"{best.configuration.label} would gain {percent(best.gain)}"
        else:
            found = "no configuration is better than the current one"
        return situation.current, f"{found}; the static policy never moves"

    def verdict(self, candidate: CandidateScore) -> str:
        """The gain that is forgone."""
        return f"gain {percent(candidate.gain or 0.0)}, but the policy is static"


class Copus:
    """The best Goodput, when it improves on the current one by `min_gain` (COPUS, 2604.26687: 10 %)."""

    name = "copus"

    def __init__(self, min_gain: float) -> None:
        self.min_gain = min_gain

    def choose(self, situation: Situation) -> tuple[CandidateScore, str]:
        """The best candidate, or the current one where the gain is too small."""
        best, current = situation.ranked[0], situation.current
        gain = best.gain or 0.0
        if gain <= 0:
            return current, "no configuration is better than the current one"
        label = best.configuration.label
        if gain < self.min_gain:
            limit = percent(self.min_gain)
            return current, f"{label} is the best, but its gain of {percent(gain)} over the current is below {limit}"
        return best, f"goodput of {label} is {1 + gain:.2f}× the current"

    def verdict(self, candidate: CandidateScore) -> str:
        """The gain, and what it falls short of."""
        gain = candidate.gain or 0.0
        if gain <= 0:
            return "no gain"
        if gain < self.min_gain:
            return f"gain {percent(gain)} is below {percent(self.min_gain)}"
        return f"gain {percent(gain)}, less than the chosen one's"


def make_policy(config: PlannerConfig) -> Policy:
    """The policy that the job file names."""
    match config.policy:
        case "static":
            return Static()
        case "copus":
            return Copus(config.min_gain)
        case "norm-test":
            return NormTest(config.norm_test_form, config.norm_test_eta, config.norm_test_every)
