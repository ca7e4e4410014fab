"""How much memory of the process a move takes, as the system sees it."""

import ctypes
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from copus.hardware import peak_memory_bytes, reset_peak_memory
from tests.megatron_jobs import backend_of, configuration, tiny_job
from tests.ranks import run_ranks
from tests.test_moves import _living_bytes

MODEL = {"layers": 4, "hidden": 512, "ffn_hidden": 1376, "heads": 8, "kv_heads": 8, "vocab": 2048}
STAGING_BYTES = 16 * 2**20
M_MMAP_THRESHOLD = -3


class Use(NamedTuple):
    """Memory of a rank around a move, in bytes."""

    old: int
    """Tensors before: weights, moments, and the gradients' buffer, which goes first."""
    new: int
    """Tensors afterwards: the same."""
    most: int
    """Most in use meanwhile, without what is there beside the old tensors: code, libraries, sockets."""


def _move(layouts: list[dict[str, Any]]) -> Use:
    # Blocks from 1 MiB on have pages of their own, which go back to the system when they are freed: by default glibc
    # raises that limit with every such block, and what is freed would stay in its heap, and in the figures.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    backend = backend_of(tiny_job(2, layouts[0], MODEL, micro_batch=2, staging_bytes=STAGING_BYTES))
    there, back = (configuration(8, 2, **layout) for layout in (layouts[1], layouts[0]))
    for warm_up in (there, back):  # moments, groups, threads, caches
        backend.move(warm_up)
    old = _living_bytes()
    reset_peak_memory()
    beside = (peak_memory_bytes() or 0) - old
    most = backend.move(there).peak_bytes or 0
    return Use(old, _living_bytes(), most - beside)


@pytest.mark.dist
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
@pytest.mark.parametrize(
    "layouts",
    [[{"tp": 2}, {"pp": 2}], pytest.param([{"dp": 2, "zero": 1}, {"tp": 2}], marks=pytest.mark.slow)],
    ids=str,
)
def test_old_tensors_are_freed_while_new_ones_come(layouts: list[dict[str, Any]]) -> None:
    """The peak is below old + new + staging; here it is below old + new, which it cannot be where the old stay."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel does not reset the high-water mark")
    for use in run_ranks(2, _move, layouts):
        assert use.old > 5 * STAGING_BYTES, "or it would prove nothing"
        assert use.most < use.old + use.new
