"""Arrays of configurations say the same as the configurations."""

import numpy as np

from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.layout import Layout

SOME = [
    Configuration(layout=Layout(tp=2, pp=2, dp=3, sequence_parallel=True, zero=1), micro_batch=2, global_batch=24),
    Configuration(layout=Layout(pp=4, vp=2, recompute="full"), micro_batch=1, global_batch=8),
    Configuration(layout=Layout(cp=2, dp=8, ep=4, zero=3, recompute="selective"), micro_batch=4, global_batch=64),
]


def test_arrays_and_back() -> None:
    arrays = Configurations.of(SOME)
    assert [arrays[index] for index in range(len(arrays))] == SOME
    assert arrays.num_microbatches.tolist() == [c.num_microbatches for c in SOME]
    assert arrays.accelerators.tolist() == [c.layout.accelerators for c in SOME]
    kept = arrays.take(np.array([False, True, True]))
    assert [kept[0], kept[1]] == SOME[1:]
    assert len(Configurations.of([])) == 0
