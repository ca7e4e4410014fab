"""Squared gradient norms of the steps between two decisions."""

from pydantic import PositiveInt

from profiles.record import Record


class StepNorms(Record):
    """Plain means over the steps that were measured since the last decision, without smoothing.

    A step of J parts of n sequences, with part gradients g_j, mean gradient ḡ and S = Σ_j|g_j|² − J·|ḡ|², gives |ḡ|²
    and n·S/(J − 1), the worker variance of the norm test (2412.21124) scaled to one sequence.
    """

    grad_sq: float
    """Mean of |ḡ|², which noise makes larger than |G|² by tr Σ / batch."""
    noise_trace: float
    """Mean of n·S/(J − 1), an unbiased estimate of tr Σ."""
    steps: PositiveInt
    """Steps that the means are over."""
