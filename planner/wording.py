"""The words and figures of a decision."""

import math

from profiles.noise_scale import NoiseScale


def percent(share: float) -> str:
    """`1.2 %`, `10 %`, `−34.5 %`: one decimal, cut off and not rounded: 9.99 % reads as less than 10 %."""
    tenths = math.trunc(round(share * 1000, 6))
    sign = "−" if tenths < 0 else ""
    return f"{sign}{abs(tenths) / 10:.1f}".removesuffix(".0") + " %"


def duration(seconds: float) -> str:
    """`0.4 s`, `38 s`, `12 min`, `3.5 h`."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (math.inf, 3600, "h")):
        if abs(seconds) < limit:
            return f"{seconds / unit:.2g} {name}" if abs(seconds / unit) < 100 else f"{seconds / unit:.0f} {name}"
    return "∞"


def sequences(amount: float) -> str:
    """Three significant digits, never as a power of ten: `0.0321`, `37`, `1240`."""
    if not math.isfinite(amount):
        return "∞"
    return f"{amount:.3g}" if abs(amount) < 1000 else f"{float(f'{amount:.3g}'):.0f}"


def noise_in_words(noise: NoiseScale) -> str:
    """`noise scale 37 sequences (31–46)`, with the 90 % interval where there is one."""
    assert noise.value is not None
    if noise.low is None:
        return f"noise scale {sequences(noise.value)} sequences"
    high = "∞" if noise.high is None else sequences(noise.high)
    return f"noise scale {sequences(noise.value)} sequences ({sequences(noise.low)}–{high})"
