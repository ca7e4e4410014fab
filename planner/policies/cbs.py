"""The batch follows the critical batch in one layout: the baselines of COPUS."""

from typing import Literal

import numpy as np

from planner.situation import Choice, Situation
from profiles.formatting import percent, three_digits

CbsLayout = Literal["present", "pessimistic", "optimistic"]


class CriticalBatch:
    """Trains at B = φ, rounded to the nearest batch that may be chosen (as a ratio), in a layout that never changes.

    COPUS (2604.26687) compares itself with adaptive batches in the layout that is best at one end of their range.
    Here, `pessimistic` is the layout that is fastest at the smallest batch, as if the batch would not grow;
    `optimistic` the one that is fastest at the largest; `present` the one that runs. The names are the paper's, the
    definition our reading.
    """

    name = "cbs"
    weighs_error = False
    needs_noise = True
    picks_start = True

    def __init__(self, layout: CbsLayout = "present") -> None:
        self.layout = layout

    def _allowed(self, situation: Situation) -> np.ndarray:
        """Which candidates have the layout, shape (R, C)."""
        if self.layout == "present":
            return situation.same_layout()
        menu = situation.menu
        end = menu.global_batch.min() if self.layout == "pessimistic" else menu.global_batch.max()
        best = situation.fastest(np.broadcast_to(menu.global_batch == end, situation.samples_per_second.shape))
        return np.asarray(menu.layout == menu.layout[best, None])

    def choose(self, situation: Situation) -> Choice:
        """The fastest configuration of the layout with the batch that is nearest to φ."""
        allowed = self._allowed(situation)
        batch = situation.menu.global_batch
        distance = np.where(allowed, np.abs(np.log(batch / situation.critical_batch[:, None])), np.inf)
        nearest = batch[distance.argmin(axis=1)]
        return Choice(situation.fastest(allowed & (batch == nearest[:, None])))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """What is followed."""
        return f"the batch follows the critical batch, {three_digits(float(situation.critical_batch[0]))} sequences"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Goodput is not what decides."""
        return f"gain {percent(situation.gain(index))}, but cbs follows the critical batch alone"


class CriticalBatchDoubling:
    """Keeps the layout and doubles the batch when the critical batch reaches twice the present one (batch size warm-up
    of Merrill et al., 2505.23971: "doubled when the measured critical batch exceeds 2·B"). The batch never shrinks.
    """

    name = "cbs-doubling"
    weighs_error = False
    needs_noise = True
    picks_start = False

    def choose(self, situation: Situation) -> Choice:
        """The fastest configuration of this layout with twice the batch, or no move."""
        doubled = 2 * situation.running_batch
        wanted = situation.same_layout() & (situation.menu.global_batch == doubled[:, None])
        return Choice(np.where(situation.critical_batch >= doubled, situation.fastest(wanted), situation.current))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """How far the critical batch is from the next doubling."""
        critical, batch = float(situation.critical_batch[0]), int(situation.running_batch[0])
        return f"the batch doubles when the critical batch, {three_digits(critical)} now, reaches {2 * batch}"

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Goodput is not what decides."""
        return f"gain {percent(situation.gain(index))}, but cbs-doubling looks at the critical batch alone"
