"""How far steps of the running job are off their predictions: which part of that is the machine, and how sure it is."""

import math
from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from profiles.configuration import Configuration
from profiles.step_regression import Block, Floats, Posterior, regress

RECENT = 64
"""Steps that the noise of a step is estimated from."""
NOISE = 0.1
"""Noise of a step (standard deviation of its logarithm) before there are `SETTLED` of them."""
LEAST_NOISE = 0.005
"""The least that it is taken to be."""
SETTLED = 5
"""Steps that it takes to estimate the noise."""
BLOCK_STEPS = 8
"""Successive steps of one configuration whose median counts as one observation: it ignores a step that met a pause."""
MOST_BLOCKS = 64
"""Blocks that are remembered. Of more, old neighbours are merged."""
CHANGE_STEPS = 10.0
"""Steps that a change of configuration takes as long as: the move itself, and first steps that are not fed."""
DRIFT = 0.02
"""What the machine is expected to drift by before the run has shown it: a standard deviation, as a logarithm."""

Covariance = Callable[[Configuration, Configuration], float]
"""Covariance of the logarithms of two configurations' prediction errors."""


class Effects(NamedTuple):
    """Standard deviations of the logarithms of what makes a step longer or shorter than predicted."""

    run: float = 0.3
    """Everything in this run: other tenants than when the table was measured, what measuring the noise costs."""
    layout: float = 0.02
    """A layout, at all batches."""
    passes: float = 0.01
    """A layout and micro-batch."""
    configuration: float = 0.01
    """One configuration, besides the error of its own prediction."""


def independent(one: Configuration, other: Configuration) -> float:
    """The covariance of predictions that were each measured for themselves."""
    return 0.0


class OnlineCorrection:
    """Logarithm of seen ÷ predicted = machine(t) + miss of the configuration + noise of the step.

    - The machine (contention, heat, all that differs from the time of the table) is a random walk with Student-t
      changes: it mostly stays as it is, may drift, and jumps when a tenant comes or goes. How much it changes from
      step to step is learned. So a slow episode is the machine's: a configuration that runs in it is judged by the
      steps of others just before and after, and what was seen long ago says little about now.
    - The misses are a Gaussian process: those of one layout are alike, and so are those of predictions that come from
      one cost model (`shared`). Steps of one configuration say most about itself, less about others of its layout.
      If misses come out larger than assumed, the process widens by as much (`profiles.cost.model` does the same).
    - The noise is Student-t too: a step that met a pause says nothing.

    All of it is one linear regression on at most `MOST_BLOCKS` blocks of steps, solved anew when it is asked, with the
    weights of heavy tails by expectation maximization (Lange, Little and Taylor 1989).
    """

    def __init__(
        self,
        effects: Effects | None = None,
        shared: Covariance = independent,
        drift: float = DRIFT,
    ) -> None:
        """`shared` is the covariance of the errors of two predictions, `drift` the standard deviation of the machine's
        drift to expect before the run has shown it. Raises ValueError unless all sizes are positive."""
        self._sizes = effects or Effects()
        if not min(drift, *self._sizes) > 0:
            raise ValueError("drift and the sizes of effects have to be positive")
        self._shared = shared
        self._expected_drift = drift
        self._places: dict[Configuration, int] = {}
        self._errors: list[float] = []
        self._alikes = np.zeros((0, 0))
        self._blocks: list[Block] = []
        self._open: list[float] = []
        """The steps of the last block, while it grows."""
        self._clock = 0.0
        self._seen_steps = 0.0
        self._steps: Counter[Configuration] = Counter()
        self._jumps: deque[float] = deque(maxlen=RECENT)
        self._last: tuple[Configuration, float] | None = None
        self._near_known: dict[Configuration, Floats] = {}
        self._forget_solution()

    def observe(
        self,
        configuration: Configuration,
        predicted_seconds: float,
        step_seconds: float,
        error: float = 0.0,
        count: float = 1.0,
    ) -> None:
        """Feed an ordinary step, or the mean of `count`; `error` is the standard error of the prediction's logarithm,
        of which the last one given counts.

        Raises ValueError unless both times are positive and finite.
        """
        if not (0 < predicted_seconds < math.inf and 0 < step_seconds < math.inf):
            raise ValueError(
                f"predicted_seconds({predicted_seconds}) and step_seconds({step_seconds}) have to be positive and "
                "finite"
            )
        if self._last and self._last[0] == configuration:
            self._jumps.append(abs(math.log(step_seconds / self._last[1])))
        elif self._last:
            self._clock += CHANGE_STEPS * step_seconds
        self._last = configuration, step_seconds
        self._steps[configuration] += 1
        place, off = self._place(configuration, error), math.log(step_seconds / predicted_seconds)
        start, self._clock = self._clock, self._clock + step_seconds * count
        self._seen_steps += count
        if self._open and self._blocks[-1].place == place and self._blocks[-1].steps + count <= BLOCK_STEPS:
            self._open.append(off)
            last = self._blocks[-1]
            grown = last._replace(off=median(self._open), steps=last.steps + count, end=self._clock)
            self._blocks[-1] = grown
        else:
            self._open = [off]
            self._add(Block(place, -1, off, count, start, self._clock, 0.0))
        self._forget_solution()

    def observe_comparison(
        self,
        candidate: Configuration,
        running: Configuration,
        log_ratio: float,
        error: float,
        errors: tuple[float, float] = (0.0, 0.0),
        steps: int = 1,
    ) -> None:
        """Feed what a trial measured: the logarithm of the candidate's step time over the running one's, less that of
        the two predictions, with its standard error. How the machine was is not in it.

        `errors` are those of the two predictions, `steps` the candidate's timed steps. Raises ValueError unless the
        ratio is finite and the error positive and finite.
        """
        if not (math.isfinite(log_ratio) and 0 < error < math.inf):
            raise ValueError(f"log_ratio({log_ratio}) has to be finite, its error({error}) positive and finite")
        one, other = (self._place(c, e) for c, e in zip((candidate, running), errors, strict=True))
        self._steps[candidate] += steps
        self._open = []
        self._add(Block(one, other, log_ratio, 1.0, self._clock, self._clock, error))
        self._forget_solution()

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

    @property
    def drift(self) -> float:
        """Standard deviation of the machine over the run, as a logarithm: times measured at two moments differ by √2
        times as much."""
        return self._solve().drift

    def factor(self, configuration: Configuration) -> float:
        """What to multiply the prediction by; 1 while nothing has been seen."""
        return math.exp(float(self._weights(configuration) @ self._solve().mean))

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
        posterior, weights = self._solve(), self._weights(configuration)
        unknown = self._unknown(configuration, configuration, error)
        if beside is not None:
            weights = weights - self._weights(beside)
            unknown += self._unknown(beside, beside, error_beside) - 2 * self._unknown(configuration, beside)
        return math.sqrt(max(unknown * posterior.excess + float(weights @ posterior.covariance @ weights), 0.0))

    def _weights(self, configuration: Configuration) -> Floats:
        """What its expectation takes of each part of the state: the whole machine, and misses as the process says."""
        weights = self._weights_known.get(configuration)
        if weights is None:
            place = self._places.get(configuration)
            weights = np.zeros(1 + len(self._places))
            if place is None:
                weights[1:] = self._near(configuration) @ self._solve().inverse
            else:
                weights[1 + place] = 1.0
            weights[0] = 1.0
            self._weights_known[configuration] = weights
        return weights

    def _unknown(self, one: Configuration, other: Configuration, error: float = 0.0) -> float:
        """The covariance of two misses that is left when all misses of what has run are known; `error` is that of the
        prediction if both are the same."""
        if one in self._places or other in self._places:
            return 0.0
        prior = self._variance(error) if one == other else self._alike(one, other)
        return prior - float(self._weights(one)[1:] @ self._near(other))

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

    def _near(self, configuration: Configuration) -> Floats:
        """Covariances of its miss with those of what has run."""
        near = self._near_known.get(configuration)
        if near is None:
            near = np.array([self._alike(configuration, ran) for ran in self._places])
            self._near_known[configuration] = near
        return near

    def _place(self, configuration: Configuration, error: float) -> int:
        """Where its miss stands in the state, added if it is new."""
        place = self._places.get(configuration)
        if place is None:
            near = np.array([self._alike(configuration, ran) for ran in self._places])
            self._alikes = np.block([[self._alikes, near[:, None]], [near[None, :], np.zeros((1, 1))]])
            place = self._places[configuration] = len(self._places)
            self._errors.append(error)
            self._near_known = {}
        self._errors[place] = error
        return place

    def _add(self, block: Block) -> None:
        """Remember a block. If that is one too many, neighbours of the older half are merged by twos."""
        self._blocks.append(block)
        if len(self._blocks) <= MOST_BLOCKS:
            return
        old, merged = self._blocks[: MOST_BLOCKS // 2], list[Block]()
        del self._blocks[: len(old)]
        while old:
            block = old.pop(0)
            if old and block.versus == old[0].versus == -1 and block.place == old[0].place:
                block = block.merged(old.pop(0))
            merged.append(block)
        # If nothing could be merged the oldest is forgotten.
        self._blocks = (merged if len(merged) < MOST_BLOCKS // 2 else merged[1:]) + self._blocks

    def _forget_solution(self) -> None:
        self._solution: Posterior | None = None
        self._weights_known: dict[Configuration, Floats] = {}

    def _solve(self) -> Posterior:
        """The posterior of the state, worked out once for all questions until something new is seen."""
        if self._solution is not None:
            return self._solution
        size = len(self._places)
        prior = self._alikes + np.diag([self._variance(error) for error in self._errors])
        # What predictions share may have been worked out anew since they ran: no direction has less than nothing.
        values, vectors = np.linalg.eigh(prior) if size else (np.zeros(0), np.zeros((0, 0)))
        values = np.maximum(values, self._sizes.configuration**2)
        prior = (vectors * values) @ vectors.T
        mean_seconds = self._clock / self._seen_steps if self._seen_steps else 1.0
        self._solution = regress(self._blocks, self.noise, mean_seconds, prior, self._sizes.run, self._expected_drift)
        return self._solution

    def state(self) -> dict[str, Any]:
        """Everything, as plain values for a checkpoint."""
        return {
            "ran": [configuration.model_dump() for configuration in self._places],
            "errors": list(self._errors),
            "blocks": [list(block) for block in self._blocks],
            "open": list(self._open),
            "clock": self._clock,
            "seen_steps": self._seen_steps,
            "steps": [(configuration.model_dump(), steps) for configuration, steps in self._steps.items()],
            "jumps": list(self._jumps),
            "last": self._last and (self._last[0].model_dump(), self._last[1]),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; an empty dict changes nothing."""
        if "blocks" not in state:
            return
        self._places, self._errors, self._alikes = {}, [], np.zeros((0, 0))
        for values, error in zip(state["ran"], state["errors"], strict=True):
            self._place(Configuration.model_validate(values), error)
        self._blocks = [Block(int(place), int(versus), *values) for place, versus, *values in state["blocks"]]
        self._open = list(state["open"])
        self._clock, self._seen_steps = state["clock"], state["seen_steps"]
        self._steps = Counter({Configuration.model_validate(values): steps for values, steps in state["steps"]})
        self._jumps = deque(state["jumps"], maxlen=RECENT)
        self._last = state["last"] and (Configuration.model_validate(state["last"][0]), state["last"][1])
        self._forget_solution()
