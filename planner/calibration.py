"""The critical batch, from the losses of branches that were trained at several batches for equal tokens."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import stdtrit

from profiles.noise_scale import NoiseScale

CONFIDENCE = 0.90
RESAMPLES = 1000
LARGEST_RATIO = 1e4
"""Critical batches below the largest tested batch over this are not told from each other."""


@dataclass(frozen=True)
class CriticalBatchFit:
    """What the branches say about φ, in sequences."""

    value: float | None
    """φ; None if larger batches lost nothing: then only `low` is known."""
    low: float | None
    """Lower end of its 90 % interval; None with one data order."""
    high: float | None
    """Upper end; None if it is unbounded, and with one data order."""
    residual: float
    """Root mean square of what the model leaves, nats per token."""


def fit_critical_batch(batches: np.ndarray, losses: np.ndarray, first_loss: float, seed: int = 0) -> CriticalBatchFit:
    """Fit φ to losses of shape (orders, batches) after equal tokens; `first_loss` is that of the common checkpoint.

    At batch B a token teaches 1 / (1 + B/φ) of what it teaches at a tiny batch: reaching a loss takes
    E(B) = E_min·(1 + B/φ) examples (McCandlish et al. 2018, 1812.06162, from eq. 2.11). Over a stretch that is short
    enough for the loss to fall in proportion, order o of the data then ends at

        loss_o(B) = first_loss − D_o / (1 + B/φ)

    with a D_o of its own for every order, so that what an order of the data does to all batches alike drops out: the
    comparison is paired. The interval is the bootstrap over orders, its standard error times Student's t for the few
    orders there are, in θ = log(1 + B_max/φ), in which estimates are nearly normal both when the largest batch loses
    nothing (θ = 0) and when it is far above φ. θ may come out below 0: then φ has no upper end.

    Raises ValueError for fewer than two batches, or losses of another shape, or that are not finite.
    """
    batches, losses = np.asarray(batches, float), np.asarray(losses, float)
    if losses.ndim != 2 or losses.shape[1] != len(batches) or len(set(batches)) < 2 or np.any(batches <= 0):
        raise ValueError(f"losses of shape {losses.shape} do not go with batches {batches.tolist()}")
    if not (np.isfinite(losses).all() and math.isfinite(first_loss)):
        raise ValueError("losses have to be finite")
    gains = first_loss - losses
    largest = float(batches.max())
    theta = _fit_theta(batches / largest, gains)
    shape = _efficiency(theta, batches / largest)
    drops = gains @ shape / (shape @ shape)
    residual = float(np.sqrt(np.mean((gains - drops[:, None] * shape) ** 2)))
    half_width = _half_width(batches / largest, gains, np.random.default_rng(seed)) if len(losses) > 1 else None
    return CriticalBatchFit(
        value=_critical_batch(theta, largest),
        low=None if half_width is None else _critical_batch(theta + half_width, largest),
        high=None if half_width is None else _critical_batch(theta - half_width, largest),
        residual=residual,
    )


def largest_within(batches: np.ndarray, losses: np.ndarray, tolerance: float) -> float:
    """The other definition of a critical batch, without a model: the largest tested batch whose mean loss is at most
    `tolerance` nats above the smallest batch's, no smaller batch being worse than that (branched training, Merrill
    et al., 2505.23971)."""
    order = np.argsort(batches)
    means = np.asarray(losses, float).mean(axis=0)[order]
    within = means <= means[0] + tolerance
    return float(np.asarray(batches, float)[order][np.argmin(within) - 1 if not within.all() else -1])


def combine_factor(critical: CriticalBatchFit, noise: NoiseScale) -> tuple[float | None, float | None, float | None]:
    """c = φ / B_simple with the ends of its 90 % interval: the relative errors of the two, added in squares, on each
    side. None if one of the two is not known; an unbounded φ leaves the lower end."""
    if noise.value is None:
        return None, None, None
    if critical.value is None:
        return None, None if critical.low is None or noise.high is None else critical.low / noise.high, None
    value = critical.value / noise.value
    low = high = None
    if critical.low is not None and noise.high is not None:
        spread = math.hypot(math.log(critical.value / critical.low), math.log(noise.high / noise.value))
        low = value * math.exp(-spread)
    if critical.high is not None and noise.low is not None and noise.low > 0:
        spread = math.hypot(math.log(critical.high / critical.value), math.log(noise.value / noise.low))
        high = value * math.exp(spread)
    return value, low, high


def _efficiency(theta: float | np.ndarray, relative: np.ndarray) -> np.ndarray:
    """1 / (1 + B/φ) for batches relative to the largest; φ may be negative: larger batches taught more."""
    return 1 / (1 + np.multiply.outer(np.expm1(theta), relative))


def _misfit(theta: float | np.ndarray, relative: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Sum of squares that is left at each θ when every order has its best drop: what does not lie along the shape."""
    shape = _efficiency(theta, relative)
    along = (shape @ gains.T) ** 2
    return (gains**2).sum() - along.sum(axis=-1) / (shape**2).sum(axis=-1)


def _fit_theta(relative: np.ndarray, gains: np.ndarray) -> float:
    """Least squares over θ: a grid, for there may be more than one minimum, then Brent's method in the best cell."""
    grid = np.linspace(math.log(0.1), math.log1p(LARGEST_RATIO), 200)
    best = int(np.argmin(_misfit(grid, relative, gains)))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    minimum = minimize_scalar(
        lambda theta: float(_misfit(theta, relative, gains)), bounds=around, method="bounded", options={"xatol": 1e-7}
    )
    return float(minimum.x)


def _half_width(relative: np.ndarray, gains: np.ndarray, rng: np.random.Generator) -> float:
    """Half of the 90 % interval of θ: bootstrap over orders. K orders resampled spread by √((K − 1)/K) too little."""
    orders = len(gains)
    if orders <= 5:  # few enough for all of them, each as often as it comes up
        draws = np.array(np.meshgrid(*[range(orders)] * orders)).reshape(orders, -1).T
    else:
        draws = rng.integers(0, orders, size=(RESAMPLES, orders))
    unique, times = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    fitted = np.array([_fit_theta(relative, gains[draw]) for draw in unique])
    mean = np.average(fitted, weights=times)
    variance = float(np.average((fitted - mean) ** 2, weights=times)) * orders / (orders - 1)
    return float(stdtrit(orders - 1, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance)


def _critical_batch(theta: float, largest: float) -> float | None:
    """φ of θ; None if it is infinite or beyond."""
    ratio = math.expm1(theta)
    return largest / ratio if ratio > 1e-9 else None
