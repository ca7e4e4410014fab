"""Numbers as text: every view formats shares, durations, sizes, counts and intervals here."""

import math

from profiles.noise_scale import NoiseScale


def percent(share: float) -> str:
    """`1.2 %`, `10 %`, `−34.5 %`: one decimal, cut off and not rounded: 9.99 % reads as less than 10 %."""
    tenths = math.trunc(round(share * 1000, 6))
    sign = "−" if tenths < 0 else ""
    return f"{sign}{abs(tenths) / 10:.1f}".removesuffix(".0") + " %"


def signed_percent(share: float) -> str:
    """A change: `+3.4 %`, `−12 %`, `0 %`; one decimal below 10 %, none above."""
    number = 100 * share
    text = f"{number:+.{1 if abs(number) < 9.95 else 0}f}".replace("-", "−").removesuffix(".0")
    return ("0" if text in ("+0", "−0") else text) + " %"


def signed_percent_interval(share: float, low: float, high: float) -> str:
    """A change and its interval: `+5.1 % (+1.2 to +9.8)`."""
    ends = " to ".join(signed_percent(end).removesuffix(" %") for end in (low, high))
    return f"{signed_percent(share)} ({ends})"


def duration(seconds: float) -> str:
    """Roughly how long something takes: `1.4 ms`, `0.4 s`, `38 s`, `12 min`, `3.5 h`."""
    if not math.isfinite(seconds):
        return "∞"
    if 0 < abs(seconds) < 0.0995:
        return f"{_plain(1000 * seconds, 2)} ms"
    for unit_seconds, name in ((1, "s"), (60, "min"), (3600, "h")):
        rounded = _plain(seconds / unit_seconds, 2)
        if abs(float(rounded)) < 100:
            return f"{rounded} {name}"
    return f"{seconds / 3600:.0f} h"


def signed_duration(seconds: float) -> str:
    """A time that may be negative: `−38 s`; a tenth of a second is nothing to a job: `0 s`."""
    return duration(seconds if abs(seconds) >= 0.1 else 0.0).replace("-", "−")


def duration_interval(value: float, low: float, high: float) -> str:
    """`14 min (6–21)`, `3 s (−1 to 7)`: a time and its interval, with one unit if all have it, else with three.
    `< 0.1 s` if none of the three is worth telling."""
    if max(abs(value), abs(low), abs(high)) < 0.1:
        return "< 0.1 s"
    (middle, unit), (first, first_unit), (last, last_unit) = (
        signed_duration(part).rsplit(" ", 1) for part in (value, low, high)
    )
    if unit == first_unit == last_unit:
        return f"{middle} {unit} ({first}{'–' if low >= 0 else ' to '}{last})"
    return f"{middle} {unit} ({first} {first_unit} to {last} {last_unit})"


def three_digits(amount: float) -> str:
    """Three significant digits, never as a power of ten: `0.0321`, `37`, `1240`."""
    return _plain(amount, 3)


def _plain(amount: float, digits: int) -> str:
    """So many significant digits, without zeros at the end of decimals."""
    if not math.isfinite(amount):
        return "∞"
    rounded = float(f"{amount:.{digits}g}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0) if rounded else 0
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def count(number: float) -> str:
    """Tokens, parameters and the like: `950`, `12.3 k`, `1.2 M`."""
    rounded = float(f"{number:.3g}")
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{three_digits(rounded / size)} {unit}"
    return f"{number:.0f}"


def gibibytes(size: float) -> str:
    """Bytes as `0.60 GiB`, `29.8 GiB`, `135 GiB`: three digits, and no more than two decimals."""
    return f"{_gib(size)} GiB"


def gibibytes_interval(size: float, low: float, high: float) -> str:
    """A size and its interval: `0.68 GiB (0.65–0.71)`."""
    return f"{gibibytes(size)} ({_gib(low)}–{_gib(high)})"


def _gib(size: float) -> str:
    amount = size / 2**30
    return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}"


def noise_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A noise scale in sequences, with its 90 % interval if there is one: `14.2 (10.1–19.8)`, `37 (31–∞)`."""
    if value is None:
        return "unknown yet"
    ends = f" ({three_digits(low)}–{'∞' if high is None else three_digits(high)})" if low is not None else ""
    return f"{three_digits(value)}{ends}"


def noise_in_words(noise: NoiseScale) -> str:
    """`noise scale 37 (31–46) sequences`."""
    return f"noise scale {noise_interval(noise.value, noise.low, noise.high)} sequences"
