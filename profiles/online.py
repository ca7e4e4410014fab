"""What the steps of the running job say about predicted step times: how far these are off, and how sure that is."""

import math
from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.configuration import Configuration

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

Covariance = Callable[[Configuration, Configuration], float]
"""Of the logarithms of two configurations' prediction errors."""


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


def independent(one: Configuration, other: Configuration) -> float:
    """The covariance of predictions that were each measured for themselves."""
    return 0.0


class OnlineCorrection:
    """Logarithm of seen ÷ predicted = machine + miss of the configuration + noise of the step.

    The machine wanders, and back to 0 (an Ornstein-Uhlenbeck process): how it was is forgotten, and what was wrong in
    the table is not. The misses are a Gaussian process: those of one layout are alike, and so are those of predictions
    that come from one cost model (`shared`). A Kalman filter follows the machine and the misses of what has run; from
    these the process tells the others. So steps of one configuration say most about itself, less about others of its
    layout, and about other layouts how the machine is and how wrong the cost model. Where misses come out larger than
    they were assumed to be, all intervals widen by as much (as in `profiles.cost.model`).
    """

    def __init__(
        self,
        half_life_steps: float = 10_000.0,
        effects: Effects | None = None,
        shared: Covariance = independent,
    ) -> None:
        """`shared` is the covariance of the errors of two predictions. Raises ValueError unless all are positive."""
        sizes = effects or Effects()
        if not min(half_life_steps, *sizes) > 0:
            raise ValueError("half_life_steps and the sizes of effects have to be positive")
        self._keep = 0.5 ** (1 / half_life_steps)
        self._sizes = sizes
        self._shared = shared
        self._places: dict[Configuration, int] = {}
        self._know(np.zeros((0, 0)))
        # The state of the filter: the machine, and the misses in the order of `_places`.
        self._mean = np.zeros(1)
        self._covariance = np.array([[sizes.machine**2]])
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
        self._wander(count)
        if configuration not in self._places:
            self._add(configuration, error)
        place = 1 + self._places[configuration]
        towards, own = self._towards(place)
        off = math.log(step_seconds / predicted_seconds) - float(self._mean[0] + self._mean[place])
        noise = self.noise**2 / count
        self._steps[configuration] += 1
        self._far = self._far + count if abs(off) > FAR * math.sqrt(own + noise) else 0.0
        if 0 < self._far <= PAUSE:
            return
        if self._far:
            self._far = 0.0
            blamed = place if self._steps[configuration] <= RECENT else 0
            self._covariance[blamed, blamed] += off * off
            towards, own = self._towards(place)
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
        return math.exp(float(self._weights(configuration) @ self._mean))

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
        if configuration == beside:
            return 0.0
        weights = self._weights(configuration)
        unknown = self._unknown(configuration, configuration, error)
        if beside is not None:
            weights = weights - self._weights(beside)
            unknown += self._unknown(beside, beside, error_beside) - 2 * self._unknown(configuration, beside)
        variance = unknown + float(weights @ self._covariance @ weights)
        return math.sqrt(max(variance, 0.0) * self._excess)

    def _weights(self, configuration: Configuration) -> NDArray[np.float64]:
        """What its expectation takes of each part of the state: the whole machine, and misses as the process says."""
        weights = self._weights_known.get(configuration)
        if weights is None:
            place = self._places.get(configuration)
            weights = np.zeros(len(self._mean))
            if place is None:
                weights[1:] = self._near(configuration) @ self._inverse
            else:
                weights[1 + place] = 1.0
            weights[0] = 1.0
            self._weights_known[configuration] = weights
        return weights

    def _unknown(self, one: Configuration, other: Configuration, error: float = 0.0) -> float:
        """The covariance of two misses that is left when all misses of what has run are known; `error` is that of the
        prediction where both are the same."""
        if one in self._places or other in self._places:
            return 0.0
        prior = self._variance(error) if one == other else self._alike(one, other)
        return prior - float(self._weights(one)[1:] @ self._near(other))

    @property
    def _excess(self) -> float:
        """How much larger squared misses are than they were assumed to be, at least 1."""
        if not self._places:
            return 1.0
        machine, misses = self._mean[0] / self._sizes.machine, self._mean[1:]
        squares = float(machine**2 + misses @ self._inverse @ misses)
        return max(1.0, (FREEDOM + squares) / (FREEDOM + len(self._places)))

    def _variance(self, error: float) -> float:
        """Of a miss, before anything was seen."""
        _, layout, passes, configuration = self._sizes
        return layout**2 + passes**2 + configuration**2 + error**2

    def _alike(self, one: Configuration, other: Configuration) -> float:
        """Covariance of the misses of two different configurations, before anything was seen."""
        total = self._shared(one, other)
        if one.layout == other.layout:
            total += self._sizes.layout**2
            if one.micro_batch == other.micro_batch:
                total += self._sizes.passes**2
        return total

    def _near(self, configuration: Configuration) -> NDArray[np.float64]:
        """Covariances of its miss with those of what has run."""
        near = self._near_known.get(configuration)
        if near is None:
            near = np.array([self._alike(configuration, each) for each in self._places])
            self._near_known[configuration] = near
        return near

    def _add(self, configuration: Configuration, error: float) -> None:
        """Take the miss of a configuration into the state, as the others' tell it."""
        near = self._near(configuration)
        weights = near @ self._inverse
        # What a prediction shares with others may have been worked out anew since those ran: never less than nothing.
        left = max(self._variance(error) - float(weights @ near), self._sizes.configuration**2)
        self._mean = np.append(self._mean, weights @ self._mean[1:])
        across = self._covariance[:, 1:] @ weights
        own = float(weights @ across[1:]) + left
        self._covariance = np.block([[self._covariance, across[:, None]], [across[None, :], np.array([[own]])]])
        self._places[configuration] = len(self._places)
        self._know(np.block([[self._prior, near[:, None]], [near[None, :], np.array([[weights @ near + left]])]]))

    def _know(self, prior: NDArray[np.float64]) -> None:
        """Take the covariance of the misses of what has run, before anything was seen."""
        self._prior = prior
        self._inverse = np.linalg.inv(prior)
        # Worked out once for all decisions until something new runs.
        self._near_known: dict[Configuration, NDArray[np.float64]] = {}
        self._weights_known: dict[Configuration, NDArray[np.float64]] = {}

    def _wander(self, count: float) -> None:
        """The machine, some steps later."""
        keep = self._keep**count
        self._mean[0] *= keep
        self._covariance[0] *= keep
        self._covariance[:, 0] *= keep
        self._covariance[0, 0] += self._sizes.machine**2 * (1 - keep**2)

    def _towards(self, place: int) -> tuple[NDArray[np.float64], float]:
        """Covariances of the state with the next step of a configuration, and the variance of that, noise left out."""
        towards = self._covariance[:, 0] + self._covariance[:, place]
        return towards, float(towards[0] + towards[place])

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "ran": [each.model_dump() for each in self._places],
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
        self._places = {Configuration.model_validate(each): place for place, each in enumerate(state["ran"])}
        self._know(np.array(state["prior"]).reshape(len(self._places), len(self._places)))
        self._mean, self._covariance = np.array(state["mean"]), np.array(state["covariance"])
        self._steps = Counter({Configuration.model_validate(each): steps for each, steps in state["steps"]})
        self._jumps = deque(state["jumps"], maxlen=RECENT)
        self._last = state["last"] and (Configuration.model_validate(state["last"][0]), state["last"][1])
        self._far = state["far"]
