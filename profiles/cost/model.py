"""The cost model: formulas with constants, a Gaussian process on what they miss, and intervals for both."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import least_squares

from profiles.accelerator import Accelerator, link, on_network
from profiles.cluster import Cluster
from profiles.configurations import Configurations
from profiles.cost.constants import NAMES, prior
from profiles.cost.effects import Effects, stacks
from profiles.cost.errors import Errors
from profiles.cost.residual import Smoothness, coordinates, covariance
from profiles.cost.step_time import parts, step_seconds
from profiles.cost.timings import Timings
from profiles.cost.work import Floats, Work, work
from profiles.layout import ContextExchange, ExpertDispatch
from profiles.model_shape import ModelShape
from profiles.optimizer_state import OptimizerState

CHUNK = 4096
"""Configurations that are worked on at once: their arrays stay in the processor's cache."""
ROBUST = 1.0
"""Standard deviations beyond which a miss, of a row or of a constant from its prior, counts less and less (soft L1)."""
OUTLIER = 2.5
"""Standard deviations of a miss beyond which a row says less about its neighbours."""
STEP = 1.5
"""Half the distance of the secants that stand for derivatives, in standard deviations of a constant. So wide because
what a constant can do matters, not what it does at its mean: a launch time that hides behind the work now may not do so
on this cluster."""


_DISPATCH_IN_WORDS: dict[ExpertDispatch, str] = {
    "alltoall": "a copy to each expert (alltoall)",
    "allgather": "all to all ranks (allgather)",
    "flex": "once to a node and to each rank there (DeepEP, HybridEP)",
}


@dataclass(frozen=True)
class Predicted:
    """Predictions of N configurations."""

    seconds: Floats
    """Duration of a step: the median of what is expected."""
    low: Floats
    """Lower end of the interval; nan where none was asked for."""
    high: Floats
    """Upper end."""
    breakdown: dict[str, Floats]
    """Seconds of each part (`profiles.cost.step_time.PARTS`); they add up to `seconds`."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""


@dataclass(frozen=True)
class _Rows:
    """What is left of the rows of a fit."""

    places: Floats
    residual: Floats
    jacobian: Floats
    solved: Floats
    whole: tuple[Floats, bool]
    spread: float
    shards: int


class CostModel:
    """Predicts step times from any number of measured rows, none included. Immutable: `fit` returns another one."""

    def __init__(
        self,
        smoothness: Smoothness | None = None,
        *,
        optimizer: OptimizerState | None = None,
        stack: str | None = None,
        features: tuple[str, ...] = (),
        effects: Effects | None = None,
        context: ContextExchange = "ring",
        dispatch: ExpertDispatch = "alltoall",
        inside_node: str | None = None,
        between_nodes: str | None = None,
    ) -> None:
        """`optimizer` is what the update reads and writes (None: AdamW's). `stack` is the software that trains, one of
        `profiles.cost.effects.stacks()`; of None or another one nothing is known. `features` are levels of the group
        of that name there: what published recipes switch on, and the backends here do not have. `effects` replace what
        is known of all of these, precisions and accelerators. `context` is how context parallel ranks exchange keys and
        values, `dispatch` how tokens come to experts on other ranks.
        `inside_node` and `between_nodes` (names in `links.yaml`) replace the links in the accelerators' files.

        Raises ValueError for a link that is not there.
        """
        self._how = smoothness or Smoothness()
        self._stack, self._features, self._effects = stack, features, effects
        self._optimizer = optimizer or OptimizerState()
        self._context, self._dispatch = context, dispatch
        self._links = {
            place: link(name)
            for place, name in (("inside_node", inside_node), ("between_nodes", between_nodes))
            if name
        }
        self._z = np.zeros(len(NAMES))
        self._rows: _Rows | None = None

    def fit(self, timings: Sequence[Timings]) -> "CostModel":
        """A model that also knows these rows, which replace those of an earlier fit; they were all measured with one
        software.

        Maximum of the posterior: robust least squares of the logarithms' errors, correlated as in
        `profiles.cost.residual`, with the constants' priors. Shards that were timed alone say something of compute,
        launch and optimizer, and nothing of the network but what scales all times (`time_scale`). Raises ValueError for
        a time that is not positive and finite.
        """
        fitted = CostModel(
            self._how,
            optimizer=self._optimizer,
            stack=self._stack,
            features=self._features,
            effects=self._effects,
            context=self._context,
            dispatch=self._dispatch,
        )
        fitted._links = self._links
        informative = [timing for timing in timings if len(timing.step_seconds)]
        if not informative:
            return fitted
        seconds = np.concatenate([timing.step_seconds for timing in informative])
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError("step_seconds has to be positive and finite")
        done = Work.concatenate(
            [
                self._work(timing.model, timing.cluster, timing.configurations, timing.precision)
                for timing in informative
            ]
        )
        means = np.concatenate(
            [
                np.tile(self._prior(timing.cluster, timing.precision)[0], (len(timing.step_seconds), 1))
                for timing in informative
            ]
        )
        sd = self._prior(informative[0].cluster, informative[0].precision)[1]
        shard = np.concatenate([np.full(len(timing.step_seconds), timing.shard) for timing in informative])
        logs = np.log(seconds)
        places = np.concatenate(
            [coordinates(timing.model, timing.cluster, timing.configurations, timing.shard) for timing in informative]
        )
        noisy = covariance(places, places, self._how) + self._how.noise_sd**2 * np.eye(len(logs))
        lower = np.linalg.cholesky(noisy)

        def misses(z: Floats) -> Floats:
            return np.concatenate(
                [
                    solve_triangular(
                        lower, logs - _log_seconds(done, means + sd * z, shard), lower=True, check_finite=False
                    ),
                    z,
                ]
            )

        best = least_squares(
            misses, np.zeros(len(NAMES)), loss="soft_l1", f_scale=ROBUST, max_nfev=60, xtol=1e-5, ftol=1e-6
        )
        fitted._z = best.x
        residual = logs - _log_seconds(done, means + sd * best.x, shard)
        # A row that is far off is taken for a bad measurement: it may keep its miss to itself.
        noisy += np.diag(np.maximum((residual / OUTLIER) ** 2 - np.diag(noisy), 0.0))
        moves = jacobian(done, means, sd, best.x, shard)
        whole = cho_factor(noisy + moves @ moves.T)
        solved = cho_solve(cho_factor(noisy), residual)
        # How well shards are met says nothing of how well steps are; how far constants had to be moved does.
        steps = np.flatnonzero(~shard)
        among = cho_solve(cho_factor(noisy[np.ix_(steps, steps)]), residual[steps]) if shard.any() else solved
        misfit = float(residual[steps] @ among + best.x @ best.x)
        spread = np.sqrt((self._how.freedom + misfit) / (self._how.freedom + len(steps)))
        if not len(steps):
            first = informative[0]
            # As wide as before them; of CPU cores, whose file is a guess, as wide as believed.
            spread = self._blind_spread(first.model, first.cluster) if self._device(first.cluster).rated else 1.0
        fitted._rows = _Rows(places, residual, moves, solved, whole, float(spread), int(shard.sum()))
        return fitted

    @property
    def rows(self) -> int:
        """Rows that it was fitted to."""
        return len(self._rows.residual) if self._rows else 0

    def constants(self, cluster: Cluster, precision: str = "bf16") -> dict[str, float]:
        """The constants, for the cluster's accelerator and a precision."""
        mean, sd = self._prior(cluster, precision)
        return dict(zip(NAMES, np.exp(mean + sd * self._z).tolist(), strict=True))

    def predict(
        self,
        model: ModelShape,
        cluster: Cluster,
        configurations: Configurations,
        precision: str,
        *,
        coverage: float | None = 0.8,
    ) -> Predicted:
        """Step times with an interval that holds that share of them; `coverage=None` leaves the interval out, and is
        fast.

        Raises ValueError for an accelerator without a file and for a precision that it does not have.
        """
        size = len(configurations)
        pieces = [
            self._piece(model, cluster, _cut(configurations, slice(at, at + CHUNK)), precision, coverage)
            for at in range(0, max(size, 1), CHUNK)
        ]
        names = pieces[0].breakdown
        return Predicted(
            seconds=np.concatenate([piece.seconds for piece in pieces]),
            low=np.concatenate([piece.low for piece in pieces]),
            high=np.concatenate([piece.high for piece in pieces]),
            breakdown={name: np.concatenate([piece.breakdown[name] for piece in pieces]) for name in names},
            assumptions=self.assumptions(model, cluster),
        )

    def _piece(
        self, model: ModelShape, cluster: Cluster, c: Configurations, precision: str, coverage: float | None
    ) -> Predicted:
        mean, sd = self._prior(cluster, precision)
        done = self._work(model, cluster, c, precision)
        breakdown = parts(done, mean + sd * self._z)
        seconds: Floats = sum(breakdown.values(), start=np.zeros(len(c)))
        if self._rows:
            near = covariance(coordinates(model, cluster, c), self._rows.places, self._how)
            factor = np.exp(near @ self._rows.solved)
            seconds, breakdown = seconds * factor, {name: part * factor for name, part in breakdown.items()}
        if coverage is None:
            nothing = np.full(len(c), np.nan)
            return Predicted(seconds, nothing, nothing, breakdown, ())
        half = self._errors(done, model, cluster, c, precision).half_widths(coverage)
        return Predicted(seconds, seconds * np.exp(-half), seconds * np.exp(half), breakdown, ())

    def errors(self, model: ModelShape, cluster: Cluster, configurations: Configurations, precision: str) -> Errors:
        """How wrong the predictions of N configurations may be, and how alike, as far as the rows of the fit do not
        tell."""
        done = self._work(model, cluster, configurations, precision)
        return self._errors(done, model, cluster, configurations, precision)

    def _errors(self, done: Work, model: ModelShape, cluster: Cluster, c: Configurations, precision: str) -> Errors:
        mean, sd = self._prior(cluster, precision)
        own, places, rows = jacobian(done, mean, sd, self._z), coordinates(model, cluster, c), self._rows
        if not rows:
            return Errors(self._how, own, places, self._blind_spread(model, cluster), self._how.freedom)
        across = own @ rows.jacobian.T + covariance(places, rows.places, self._how)
        freedom = self._how.freedom + len(rows.residual) - rows.shards
        return Errors(self._how, own, places, rows.spread, freedom, across, cho_solve(rows.whole, across.T))

    def _blind_spread(self, model: ModelShape, cluster: Cluster) -> float:
        if not self._device(cluster).rated:
            return self._how.blind_spread_of_cores
        if model.experts:
            return self._how.blind_spread_of_experts
        return self._how.blind_spread if cluster.nodes == 1 else self._how.blind_spread_of_nodes

    @property
    def smoothness(self) -> Smoothness:
        """What is believed of the misses."""
        return self._how

    def _device(self, cluster: Cluster) -> Accelerator:
        return on_network(cluster).model_copy(update=self._links)

    def _prior(self, cluster: Cluster, precision: str) -> tuple[Floats, Floats]:
        return prior(self._device(cluster), self._stack, precision, self._effects, self._features)

    def _work(self, model: ModelShape, cluster: Cluster, c: Configurations, precision: str) -> Work:
        device = self._device(cluster)
        return work(model, cluster, device, c, precision, self._optimizer, self._context, self._dispatch)

    def assumptions(self, model: ModelShape, cluster: Cluster) -> tuple[str, ...]:
        """What every prediction takes for granted, in words."""
        device = self._device(cluster)
        said = [
            f"{device.name}: {device.inside_node.kind} inside a node, {device.between_nodes.kind} between nodes",
            "causal attention; ranks in the order tensor, context, data, pipeline; all nodes alike",
            self._learned_from(),
        ]
        if device.rated:
            said.append(self._stack_in_words())
        if model.experts:
            said.append("tokens spread evenly over the experts")
            said.append(f"tokens to experts on other ranks: {_DISPATCH_IN_WORDS[self._dispatch]}")
        return tuple(said)

    def _stack_in_words(self) -> str:
        if self._stack in stacks():
            return f"software as in published runs with {self._stack}"
        name = f" ({self._stack})" if self._stack else ""
        return f"software that no published run is with{name}: the mean of all, and wider intervals"

    def _learned_from(self) -> str:
        if not self._rows:
            return "constants from data sheets and publications: no rows"
        alone = self._rows.shards
        if not alone:
            return f"constants fitted to {self.rows} rows"
        said = f"{alone} shards timed alone, the network as its file says"
        return f"constants fitted to {said}" if alone == self.rows else f"constants fitted to {self.rows} rows, {said}"


def _cut(c: Configurations, where: slice) -> Configurations:
    return Configurations(**{field.name: getattr(c, field.name)[where] for field in fields(c)})


def _log_seconds(done: Work, log_constants: Floats, shard: NDArray[np.bool_] | None = None) -> Floats:
    return np.log(step_seconds(done, log_constants.T, shard))


def jacobian(done: Work, mean: Floats, sd: Floats, z: Floats, shard: NDArray[np.bool_] | None = None) -> Floats:
    """∂ log seconds / ∂ z, by secants (`STEP`): N × constants."""
    columns = []
    for index in range(len(z)):
        shift = np.zeros(len(z))
        shift[index] = STEP
        up, down = (_log_seconds(done, mean + sd * (z + sign * shift), shard) for sign in (1, -1))
        columns.append((up - down) / (2 * STEP))
    return np.stack(columns, axis=1)
