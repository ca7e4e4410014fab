"""The smallest batch that uses the accelerators, whatever the noise (2507.07101)."""

import numpy as np

from planner.situation import Choice, Situation
from planner.small_batch import SATURATED
from profiles.formatting import percent, three_digits


class SmallestSaturating:
    """Runs the smallest batch that reaches 95 % of the best throughput, in its fastest configuration (2507.07101). It
    asks neither for a noise scale nor for measured times."""

    name = "smallest-saturating"
    weighs_error = False
    needs_noise = False
    picks_start = True

    def choose(self, situation: Situation) -> Choice:
        """What runs, if it is fast enough and no smaller batch is."""
        speed, batch = situation.samples_per_second, situation.menu.global_batch
        saturated = (speed > 0) & (speed >= SATURATED * speed.max(axis=1, keepdims=True))
        wanted = np.where(saturated, batch, np.inf).min(axis=1)
        eligible = saturated & (batch == wanted[:, None])
        stays = np.take_along_axis(eligible, situation.current[:, None], axis=1)[:, 0]
        return Choice(np.where(stays, situation.current, situation.fastest(eligible)))

    def reason(self, situation: Situation, choice: Choice) -> str:
        """The batch, and its throughput beside the best one of those that are known."""
        index, speed = int(choice.index[0]), situation.samples_per_second[0]
        if not speed.max() > 0:
            return "no throughput is known, so no batch is known to be enough"
        chosen, best, known = situation.menu.configurations[index], float(speed.max()), int((speed > 0).sum())
        among = f", of {known} of {len(speed)} candidates: of the others none is known" if known < len(speed) else ""
        return (
            f"{chosen.global_batch} is the smallest batch that reaches {percent(SATURATED)} of the best throughput: "
            f"{three_digits(float(speed[index]))} of {three_digits(best)} samples/s{among}"
        )

    def verdict(self, situation: Situation, choice: Choice, index: int) -> str:
        """Unknown, too large, or too slow."""
        if not situation.samples_per_second[0, index] > 0:
            return "its throughput is not known"
        larger = situation.menu.global_batch[index] > situation.menu.global_batch[choice.index[0]]
        return "a smaller batch is as fast" if larger else f"below {percent(SATURATED)} of the best throughput"
