"""How much a sample teaches, as the batch grows."""

from dataclasses import dataclass


def statistical_efficiency(global_batch: float, critical_batch: float) -> float:
    """SE = 1 / (1 + B/φ), between 0 and 1: the progress of a sample at batch B over that of a sample at a tiny batch.

    Both are in sequences; at B = φ a sample makes half of the progress. From McCandlish et al. 2018 (1812.06162, eq.
    2.7: a step of batch B makes a share 1 / (1 + B_noise/B) of the largest progress). Pollux (OSDI'21, §3.1) has the
    same ratio, relative to a base batch; COPUS (2604.26687) sets φ = c · B_simple. Raises ValueError unless both are
    positive.
    """
    if global_batch <= 0 or critical_batch <= 0:
        raise ValueError(f"global_batch({global_batch}) and critical_batch({critical_batch}) have to be positive")
    return 1 / (1 + global_batch / critical_batch)


@dataclass(frozen=True)
class Doubling:
    """What twice the batch would bring, for the same progress."""

    global_batch: int
    """The batch that would be doubled, sequences."""
    steps_ratio: float
    """Optimizer steps that it takes, over those at the present batch: 0.5 far below the critical batch, 1 far above."""
    samples_ratio: float
    """Sequences that it takes, over those at the present batch: 1 far below the critical batch, 2 far above."""

    @property
    def break_even(self) -> float:
        """It saves time if a step of twice the batch takes less than this many times as long."""
        return 1 / self.steps_ratio


def doubling(global_batch: int, critical_batch: float) -> Doubling:
    """What twice the batch would bring at a critical batch φ: by SE = 1 / (1 + B/φ) the same progress takes
    (φ + 2B) / (φ + B) times the sequences, in half as many steps. Raises ValueError unless both are positive."""
    samples = statistical_efficiency(global_batch, critical_batch) / statistical_efficiency(
        2 * global_batch, critical_batch
    )
    return Doubling(global_batch, steps_ratio=samples / 2, samples_ratio=samples)
