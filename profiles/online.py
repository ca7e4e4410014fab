"""What the steps of the running job say about predicted step times: how far these are off, and how sure that is."""

import math
from collections import Counter, deque
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from profiles.configuration import Configuration
from profiles.layout import Layout

RECENT = 20
"""Steps that the noise of a step is judged by, and in which a configuration is new."""
NOISE = 0.1
"""Noise of a step (standard deviation of its logarithm) before there are so many."""
LEAST_NOISE = 0.005
"""What it is at least."""
SETTLED = 5
"""Steps that it takes to know the noise."""
FAR = 3.0
"""Standard deviations that are far."""
PAUSE = 2
"""Steps in a row that are far off, and mean nothing: a checkpoint, a slow disk. After more of them the table is wrong
about a configuration that is new, or the machine has changed under one that is not."""
FREEDOM = 4.0
"""Configurations that the assumed sizes of effects are worth: how soon what was seen sets the width of intervals."""


class Effects(NamedTuple):
    """Standard deviations of the logarithms of what makes a step longer or shorter than predicted."""

    machine: float = 0.15
    """Everything runs slower: contention, heat. It comes and goes."""
    layout: float = 0.02
    """A layout does, at all batches."""
    passes: float = 0.01
    """A layout and micro-batch do."""
    configuration: float = 0.01
    """One configuration does, besides the error of its own prediction."""


_Effect = tuple[Layout | None, int | None, int | None]
"""Layout, micro-batch, global batch; None for all of them."""
MACHINE: _Effect = (None, None, None)
"""The effect that is shared by all configurations."""


class OnlineCorrection:
    """Logarithm of seen ÷ predicted = machine + layout + layout and micro-batch + configuration + noise of the step.

    A Kalman filter: all effects are normal; that of the machine wanders, and back to 0 (an Ornstein-Uhlenbeck process),
    so that how the machine was is forgotten, and what was wrong in the table is not. Steps of one configuration
    therefore say most about itself, less about others of its layout, and about other layouts only how the machine is.
    Where effects come out larger than they were assumed to be, all intervals widen by as much (as in
    `profiles.cost.model`).
    """

    def __init__(self, half_life_steps: float = 10_000.0, effects: Effects | None = None) -> None:
        """Raises ValueError unless all are positive."""
        sizes = effects or Effects()
        if not min(half_life_steps, *sizes) > 0:
            raise ValueError("half_life_steps and the sizes of effects have to be positive")
        self._keep = 0.5 ** (1 / half_life_steps)
        self._sizes = sizes
        self._places: dict[_Effect, int] = {}
        self._wanders = np.zeros(0, dtype=bool)
        self._prior = np.zeros(0)
        self._mean = np.zeros(0)
        self._covariance = np.zeros((0, 0))
        self._steps: Counter[Configuration] = Counter()
        self._jumps: deque[float] = deque(maxlen=RECENT)
        self._last: tuple[Configuration, float] | None = None
        self._far = 0.0

    def observe(
        self,
        configuration: Configuration,
        predicted_seconds: float,
        step_seconds: float,
        error: float = 0.0,
        count: float = 1.0,
    ) -> None:
        """Feed an ordinary step, or the mean of `count`; `error` is the standard error of the prediction's logarithm.

        Raises ValueError unless both times are positive and finite.
        """
        if not (0 < predicted_seconds < math.inf and 0 < step_seconds < math.inf):
            raise ValueError(
                f"predicted_seconds({predicted_seconds}) and step_seconds({step_seconds}) have to be positive and "
                "finite"
            )
        if self._last and self._last[0] == configuration:
            self._jumps.append(abs(math.log(step_seconds / self._last[1])))
        self._last = configuration, step_seconds
        keep = np.where(self._wanders, self._keep**count, 1.0)
        self._mean = self._mean * keep
        self._covariance = self._covariance * np.outer(keep, keep) + np.diag(self._prior * (1 - keep**2))
        effects = _effects(configuration)
        for effect, variance in zip(effects, self._variances(error), strict=True):
            self._add(effect, variance)
        places = [self._places[effect] for effect in effects]
        towards = self._covariance[:, places].sum(axis=1)
        own = float(towards[places].sum())
        off = math.log(step_seconds / predicted_seconds) - float(self._mean[places].sum())
        noise = self.noise**2 / count
        self._steps[configuration] += 1
        self._far = self._far + count if abs(off) > FAR * math.sqrt(own + noise) else 0.0
        if 0 < self._far <= PAUSE:
            return
        if self._far:
            self._far = 0.0
            blamed = places[1:] if self._steps[configuration] <= RECENT else places[:1]
            share = self._prior[blamed] / self._prior[blamed].sum()
            self._covariance[blamed, blamed] += off * off * share
            towards = self._covariance[:, places].sum(axis=1)
            own = float(towards[places].sum())
        gain = towards / (own + noise)
        self._mean = self._mean + gain * off
        self._covariance = self._covariance - np.outer(gain, towards)

    def steps(self, configuration: Configuration) -> int:
        """How often it was fed."""
        return self._steps[configuration]

    @property
    def noise(self) -> float:
        """Standard deviation of the logarithm of a step, from how much successive ones differ: neither a drift nor a
        pause changes it."""
        if len(self._jumps) < SETTLED:
            return NOISE
        return max(median(self._jumps) / (0.6745 * math.sqrt(2)), LEAST_NOISE)

    def factor(self, configuration: Configuration) -> float:
        """What to multiply the prediction by; 1 while nothing has been seen."""
        known = [self._places[effect] for effect in _effects(configuration) if effect in self._places]
        return math.exp(float(self._mean[known].sum()))

    def error(
        self,
        configuration: Configuration,
        error: float = 0.0,
        beside: Configuration | None = None,
        error_beside: float = 0.0,
    ) -> float:
        """Standard error of the logarithm of a corrected prediction, whose own is `error`.

        With `beside` of its ratio to that of another configuration: what both share, such as the machine, cancels.
        """
        signs = dict.fromkeys(_effects(configuration), 1.0)
        priors = dict(zip(signs, self._variances(error), strict=True))
        if beside is not None:
            priors |= dict(zip(_effects(beside), self._variances(error_beside), strict=True))
            for effect in _effects(beside):
                signs[effect] = signs.get(effect, 0.0) - 1.0
        unknown = sum(sign**2 * priors[effect] for effect, sign in signs.items() if effect not in self._places)
        known = [(self._places[effect], sign) for effect, sign in signs.items() if sign and effect in self._places]
        if known:
            places, weights = np.array([place for place, _ in known]), np.array([sign for _, sign in known])
            unknown += float(weights @ self._covariance[np.ix_(places, places)] @ weights)
        return math.sqrt(max(unknown, 0.0) * self._excess)

    @property
    def _excess(self) -> float:
        """How much larger squared effects are than they were assumed to be, at least 1."""
        if not self._steps:
            return 1.0
        return max(1.0, (FREEDOM + float(self._mean**2 @ (1 / self._prior))) / (FREEDOM + len(self._steps)))

    def _variances(self, error: float) -> list[float]:
        machine, layout, passes, configuration = (size**2 for size in self._sizes)
        return [machine, layout, passes, configuration + error**2]

    def _add(self, effect: _Effect, variance: float) -> None:
        if effect in self._places:
            return
        size = len(self._prior)
        self._places[effect] = size
        self._wanders = np.append(self._wanders, effect == MACHINE)
        self._prior = np.append(self._prior, variance)
        self._mean = np.append(self._mean, 0.0)
        self._covariance = np.pad(self._covariance, (0, 1))
        self._covariance[size, size] = variance

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "effects": [(layout and layout.model_dump(), *batches) for layout, *batches in self._places],
            "prior": self._prior.tolist(),
            "mean": self._mean.tolist(),
            "covariance": self._covariance.tolist(),
            "steps": [(each.model_dump(), steps) for each, steps in self._steps.items()],
            "jumps": list(self._jumps),
            "last": self._last and (self._last[0].model_dump(), self._last[1]),
            "far": self._far,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        if not state:
            return
        effects = [
            (None if layout is None else Layout.model_validate(layout), micro_batch, global_batch)
            for layout, micro_batch, global_batch in state["effects"]
        ]
        self._places = {effect: place for place, effect in enumerate(effects)}
        self._wanders = np.array([effect == MACHINE for effect in effects], dtype=bool)
        self._prior, self._mean = np.array(state["prior"]), np.array(state["mean"])
        self._covariance = np.array(state["covariance"]).reshape(len(effects), len(effects))
        self._steps = Counter({Configuration.model_validate(each): steps for each, steps in state["steps"]})
        self._jumps = deque(state["jumps"], maxlen=RECENT)
        self._last = state["last"] and (Configuration.model_validate(state["last"][0]), state["last"][1])
        self._far = state["far"]


def _effects(configuration: Configuration) -> tuple[_Effect, _Effect, _Effect, _Effect]:
    """What bears on a configuration, as in `Effects`."""
    layout, micro_batch = configuration.layout, configuration.micro_batch
    return (
        MACHINE,
        (layout, None, None),
        (layout, micro_batch, None),
        (layout, micro_batch, configuration.global_batch),
    )
