"""What published runs say of the constants of the cost model: their medians, and what the software that trains, the
precision and the accelerator multiply them by.

A random effect for each (partial pooling): where rows tell little of one, its multipliers stay near 1, as the mean of
all; of one that no row is from, nothing is known but how much the others differ, and intervals are that much wider.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

FILE = Path(__file__).parent / "effects.yaml"
GROUPS = ("stack", "precision", "accelerator", "feature")
"""Kinds of effects. A run has one stack, one precision and one accelerator, and any number of features."""
USUAL_PRECISION = "half"
"""bf16, fp16 and fp32, which the constants are for."""


class Effect(NamedTuple):
    """Of one level of a group on one constant."""

    multiplier: float
    """Of the constant."""
    log_sd: float
    """Standard deviation of its logarithm, as far as the rows do not tell."""


@dataclass(frozen=True)
class Effects:
    """What published runs say of the constants: their medians, and multipliers by group, level and constant."""

    constants: Mapping[str, float] = field(default_factory=dict)
    """Medians for a level of every group that nothing is known of; those of `profiles.cost.constants` where none is
    given."""
    between: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Standard deviation of the logarithm between the levels of a group, by group and constant."""
    levels: Mapping[str, Mapping[str, Mapping[str, Effect]]] = field(default_factory=dict)
    """By group, level and constant."""

    def of(
        self,
        stack: str | None,
        precision: str,
        accelerator: str,
        names: tuple[str, ...],
        features: tuple[str, ...] = (),
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sum of the logarithms of the multipliers of each constant in `names`, and its variance."""
        mean, variance = np.zeros(len(names)), np.zeros(len(names))
        single = zip(GROUPS, (stack, precision_family(precision), accelerator), strict=False)
        for group, level in [*single, *(("feature", feature) for feature in features)]:
            if (group, level) == ("precision", USUAL_PRECISION):
                continue
            effects = self.levels.get(group, {}).get(level or "", {})
            for name, sd in self.between.get(group, {}).items():
                effect = effects.get(name, Effect(1.0, sd))
                mean[names.index(name)] += np.log(effect.multiplier)
                variance[names.index(name)] += effect.log_sd**2
        return mean, variance


def precision_family(precision: str) -> str:
    """The level of a precision: fp4, mxfp8 (scaled in blocks), fp8 or `USUAL_PRECISION`."""
    text = precision.lower()
    if "fp4" in text:
        return "fp4"
    if "fp8" in text or "mx" in text:
        return "mxfp8" if "mx" in text or "block" in text else "fp8"
    return USUAL_PRECISION


@cache
def usual_effects() -> Effects:
    """Those of `effects.yaml`, learned from all published rows by `benchmarks.throughput_priors`."""
    groups = yaml.safe_load(FILE.read_text())
    return Effects(
        constants=groups["constants"],
        between={group: groups[group].pop("between") for group in GROUPS},
        levels={
            group: {
                level: {name: Effect(*values) for name, values in constants.items()}
                for level, constants in groups[group].items()
            }
            for group in GROUPS
        },
    )


def stacks() -> list[str]:
    """Software stacks that rows were learned from."""
    return sorted(usual_effects().levels["stack"])
