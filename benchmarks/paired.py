"""Times of steps that were run in turns, with something and without it: the ratio, and its interval. Without torch, for
the commands that show them."""

import numpy as np


def paired(times: list[float], off: list[float], cycle: int) -> dict[str, float]:
    """What is added to the times, as `median_ratio` gives it, from rounds or from cycles of rounds, summed."""
    whole = max(len(off) // cycle, 1)
    with_, without = (np.array(seconds)[: whole * cycle].reshape(whole, -1).sum(axis=1) for seconds in (times, off))
    return median_ratio(with_, without)


def median_ratio(with_: np.ndarray, without: np.ndarray) -> dict[str, float]:
    """Median over rounds of time with ÷ time without, less 1, in percent; and the 90 % interval of that median, by
    bootstrap over rounds."""
    ratios = 100 * (with_ / without - 1)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (5, 95))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}
