"""How evenly the tokens of a step spread over the experts of a model. No torch."""

from typing import NamedTuple

import numpy as np

from profiles.model_shape import ModelShape


class ExpertLoad(NamedTuple):
    """The load of the experts in one step."""

    imbalance: float
    """Tokens of the busiest expert over the mean of its layer, in the layer where that is largest; 1 is even."""
    dropped: float
    """Share of pairs of a token and one of its experts that `model.capacity_factor` cut off; 0 without one."""


def expert_load(tokens: np.ndarray, model: ModelShape, global_batch: int) -> ExpertLoad:
    """From the tokens that each expert got in a step of so many sequences, of shape (layers with experts, experts)."""
    mean = np.maximum(tokens.mean(axis=1), 1e-9)
    routed = global_batch * model.seq_len * model.experts_per_token * len(tokens)
    return ExpertLoad(float((tokens.max(axis=1) / mean).max()), max(0.0, 1 - float(tokens.sum()) / routed))
