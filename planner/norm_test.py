"""The norm test: a batch for which the gradient's noise is at most η times the gradient (2412.21124)."""

from typing import TYPE_CHECKING, Literal

from planner.wording import percent, sequences
from profiles.decision import CandidateScore
from profiles.noise_scale import NoiseScale
from profiles.step_norms import StepNorms

if TYPE_CHECKING:
    from planner.policy import Situation  # which makes the policies, this one among them

NormTestForm = Literal["paper", "unbiased"]


def plug_in_batch(norms: StepNorms, eta: float) -> float:
    """The paper's test with its worker variance: b = n·S / ((J − 1)·η²·|ḡ|²), in sequences, S = Σ_j|g_j|² − J·|ḡ|².

    The test asks for E|g − G|² ≤ η²|G|² and puts the step's own gradient ḡ in the place of G (Lau et al., 2412.21124,
    §4; the factor n turns the variance between workers of n sequences each into that of one sequence). As |ḡ|² is
    larger than |G|² by tr Σ/b, the answer at batch b is too low: about 1 / (1 + B_simple/b) of the right one, and some
    b/η² at most however noisy the gradients are. Raises ValueError unless |ḡ|² is positive.
    """
    if norms.grad_sq <= 0:
        raise ValueError(f"grad_sq({norms.grad_sq}) has to be positive")
    return norms.noise_trace / (eta**2 * norms.grad_sq)


def unbiased_batch(noise: NoiseScale, eta: float) -> float:
    """The batch that passes the same test with |G|² itself: b* = tr Σ / (η²·|G|²) = B_simple / η², in sequences."""
    assert noise.value is not None
    return noise.value / eta**2


class NormTest:
    """Grows the batch until the norm test passes; keeps the layout.

    The batch never shrinks and never exceeds what may be chosen, as in the authors' code. Batches are rounded up to the
    next one that may be chosen. Of the configurations of the present layout with that batch the fastest runs: another
    micro-batch where that is faster. Knows nothing of Goodput: it is what COPUS is compared with.
    """

    name = "norm-test"

    def __init__(self, form: NormTestForm, eta: float, every: int) -> None:
        self.form = form
        self.eta = eta
        self.every = every

    def asked_batch(self, situation: "Situation") -> float | None:
        """Sequences that pass the test; None where no step was measured since the last decision."""
        if self.form == "unbiased":
            return unbiased_batch(situation.noise, self.eta)
        norms = situation.step_norms
        return None if norms is None or norms.grad_sq <= 0 else plug_in_batch(norms, self.eta)

    def choose(self, situation: "Situation") -> tuple[CandidateScore, str]:
        """The fastest configuration of this layout with the batch that the test asks for, or the current one."""
        current = situation.current
        if situation.number % self.every:
            return current, f"no norm test at this decision, but at every {self.every}th"
        asked = self.asked_batch(situation)
        if asked is None:
            return current, "no norm test: no step was measured since the last one"
        running = current.configuration.global_batch
        found = f"the norm test ({self.form}, η {self.eta:g}) asks for a batch of {sequences(asked)}"
        if asked <= running:
            return current, f"{found}; it is {running} and never shrinks"
        larger = [
            score
            for score in situation.ranked
            if score.configuration.layout == current.configuration.layout
            and score.configuration.global_batch > running
            and score.samples_per_second is not None
        ]
        if not larger:
            return current, f"{found}, but nothing beyond {running} may run in this layout"
        batches = {score.configuration.global_batch for score in larger}
        batch = min((batch for batch in batches if batch >= asked), default=max(batches))
        fastest = max(
            (score for score in larger if score.configuration.global_batch == batch),
            key=lambda score: (score.samples_per_second or 0.0, -score.configuration.micro_batch),
        )
        return fastest, found

    def verdict(self, candidate: CandidateScore) -> str:
        """Goodput is not what decides."""
        return f"gain {percent(candidate.gain or 0.0)}, but the norm test looks at the batch alone"
