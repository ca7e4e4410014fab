"""The norm test: a batch for which the gradient's noise is at most η times the gradient (2412.21124)."""

from typing import Literal

import numpy as np

from planner.menu import Floats
from planner.situation import Choice, Situation
from profiles.formatting import three_digits
from profiles.noise_scale import StepNorms

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


def unbiased_batch(noise_scale: Floats, eta: float) -> Floats:
    """The batch that passes the same test with |G|² itself: b* = tr Σ / (η²·|G|²) = B_simple / η², in sequences."""
    return noise_scale / eta**2


class NormTest:
    """Grows the batch until the norm test passes; keeps the layout.

    The batch never shrinks and never exceeds what may be chosen, as in the authors' code. Batches are rounded up to the
    next one that may be chosen. Of the configurations of the present layout with that batch the fastest runs; if no
    throughput is known, the one with the present micro-batch, which accumulates more of them. Knows nothing of Goodput:
    it is what COPUS is compared with.
    """

    name = "norm-test"
    weighs_error = False
    needs_noise = False  # nor throughputs; the unbiased form waits for the noise scale by itself
    picks_start = False

    def __init__(self, form: NormTestForm, eta: float, every: int) -> None:
        self.form = form
        self.eta = eta
        self.every = every

    def asked_batch(self, situation: Situation) -> np.ndarray | None:
        """Sequences that pass the test, shape (R,); None if no step was measured since the last decision, or if the
        unbiased form does not know the noise scale yet."""
        if self.form == "unbiased":
            is_measured = np.isfinite(situation.critical_batch).all()
            return unbiased_batch(situation.noise_scale, self.eta) if is_measured else None
        return None if situation.plug_in is None else situation.plug_in / self.eta**2

    def choose(self, situation: Situation) -> Choice:
        """The fastest configuration of this layout with the batch that the test asks for, or the current one."""
        asked = self.asked_batch(situation)
        if situation.number % self.every or asked is None:
            return Choice(situation.current)
        batch = situation.menu.global_batch
        larger = situation.same_layout() & (batch > situation.running_batch[:, None])
        enough = np.where(larger & (batch >= asked[:, None]), batch, np.inf).min(axis=1)
        wanted = np.where(np.isfinite(enough), enough, np.where(larger, batch, 0.0).max(axis=1))
        grown = situation.fastest(larger & (batch == wanted[:, None]))
        return Choice(np.where(asked > situation.running_batch, grown, situation.current))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What the test asks for, or why there is none."""
        if situation.number % self.every:
            return f"no norm test at this decision, but at every {self.every}th"
        asked = self.asked_batch(situation)
        if asked is None:
            missing = "no step was measured since the last one" if self.form == "paper" else "it needs the noise scale"
            return f"no norm test: {missing}"
        running = int(situation.running_batch[0])
        result = f"the norm test ({self.form}, η {self.eta:g}) asks for a batch of {three_digits(float(asked[0]))}"
        if asked[0] <= running:
            return f"{result}; it is {running} and never shrinks"
        if choice.index[0] == situation.current[0]:
            return f"{result}, but nothing beyond {running} may run in this layout"
        return result

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Goodput is not what decides."""
        return "the norm test looks at the batch alone"
