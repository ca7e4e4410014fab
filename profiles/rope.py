"""Frequencies of rotary position embeddings (2104.09864), and how they are scaled for longer sequences."""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from profiles.record import PositiveInt, Record

if TYPE_CHECKING:  # numpy takes a tenth of a second, and every command reads this file
    import numpy as np
    from numpy.typing import NDArray

_OWN_FIELDS = {
    "linear": (),
    "llama3": ("original_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
"""Fields that a kind of scaling has beside `kind` and `factor`."""


class RopeScaling(Record):
    """How rotary frequencies are scaled."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all frequencies are divided by `factor` (2306.15595). llama3: only the low ones are (Llama 3.1). yarn:
    only the low ones are, and scores of attention grow (YaRN, 2309.00071)."""
    factor: float = Field(ge=1)
    """Divisor of the low frequencies."""
    original_seq_len: PositiveInt | None = None
    """Sequence length before scaling (llama3, yarn)."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies with fewer turns than this in `original_seq_len` tokens are divided by `factor` (llama3)."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies with more turns than this in `original_seq_len` tokens stay (llama3)."""
    beta_fast: float = Field(default=32.0, gt=0)
    """Frequencies with more turns than this in `original_seq_len` tokens stay (yarn)."""
    beta_slow: float = Field(default=1.0, gt=0)
    """Frequencies with fewer turns than this in `original_seq_len` tokens are divided by `factor` (yarn)."""
    attention_factor: float | None = Field(default=None, gt=0)
    """Multiplies sines and cosines (yarn); None means 0.1 · ln(factor) + 1."""
    truncate: bool = True
    """Whether the bounds of the ramp between scaled and unscaled frequencies are rounded to whole dimensions (yarn)."""

    @model_validator(mode="after")
    def _check_fields(self) -> "RopeScaling":
        for name, field in type(self).model_fields.items():
            own = name in ("kind", "factor", *_OWN_FIELDS[self.kind])
            if not own and getattr(self, name) != field.default:
                raise ValueError(f"{name}({getattr(self, name)}) is no setting of {self.kind} scaling")
        if self.kind != "linear" and self.original_seq_len is None:
            raise ValueError(f"kind({self.kind}) needs original_seq_len")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor({self.low_freq_factor:g}) is not less than high_freq_factor"
                f"({self.high_freq_factor:g})"
            )
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow({self.beta_slow:g}) is not less than beta_fast({self.beta_fast:g})")
        return self


def frequencies(width: int, base: float, scaling: RopeScaling | None) -> "NDArray[np.float64]":
    """Radians per token of each of the `width` / 2 pairs of dimensions that are rotated, the fastest first."""
    import numpy as np

    unscaled = np.asarray(base ** (-np.arange(0, width, 2) / width))
    if scaling is None:
        return unscaled
    if scaling.kind == "linear":
        return unscaled / scaling.factor
    assert scaling.original_seq_len is not None
    if scaling.kind == "llama3":
        turns = scaling.original_seq_len * unscaled / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
    else:
        first, last = (
            width * np.log(scaling.original_seq_len / (turns * 2 * np.pi)) / (2 * np.log(base))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0.0), min(last, width - 1.0)
        kept = 1 - np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0, 1)
    return unscaled * (kept + (1 - kept) / scaling.factor)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What sines and cosines are multiplied with: YaRN's √(1/t) (2309.00071, eq. 22), 1 for all others."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
