"""What a meter adds to a step is found in times of which it is known."""

import numpy as np
import pytest

from benchmarks.noise_meter import MODES, compared


def test_what_the_meter_adds_is_told_apart_from_what_disturbs_every_mode_of_a_round() -> None:
    rng = np.random.default_rng(0)
    disturbed = rng.uniform(1, 3, size=(40, 1)) * np.ones((40, 4))  # a round is slow or fast as a whole
    measured = disturbed * np.array([1.08, 1.0, 1.0, 1.0])
    times = (disturbed, measured, disturbed)
    added = compared({mode: list(seconds.flatten()) for mode, seconds in zip(MODES, times, strict=True)})
    for name, percent in {"step": 2.0, "measured": 8.0, "others": 0.0, "check": 0.0}.items():
        assert added[name] == pytest.approx({"median": percent, "low": percent, "high": percent}, abs=1e-9), name
