"""Names of what the ranks run on, for fingerprints of measurements, and the memory that they use."""

import contextlib
import math
import os
import platform
import time
from pathlib import Path

import torch

from copus.cgroups import memory_left
from profiles.cluster import Cluster
from profiles.hardware import name_hardware


def hardware_name(cluster: Cluster) -> str:
    """`2 × Intel(R) Xeon(R) … core` or `8 × NVIDIA H100 80GB HBM3`: accelerators as this rank sees them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_processor()} core"
    return name_hardware(device, cluster.nodes, cluster.accelerators_per_node)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def software_name() -> str:
    """Versions that matter for speed. Rows of a throughput table are found by this text: other words for the same would
    have everything measured anew."""
    if torch.cuda.is_available():
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    return f"torch {torch.__version__}, gloo, {torch.get_num_threads()} threads a rank"


class PhaseClock:
    """Seconds of the phases of something, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """The phase that began at the end of the last one is over."""
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now


def reset_peak_memory() -> None:
    """Start `peak_memory_bytes` anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux: 5 resets the high-water mark of this process (man 5 proc)
        Path("/proc/self/clear_refs").write_text("5")


def room_for_a_copy() -> float:
    """Bytes of the host's memory that this rank may take for a while, next to the others on its node: its part of half
    of what is available on the machine and in the control groups of this process. Infinite where the system does not
    tell."""
    return min(_memory_available(), memory_left()) / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _memory_available() -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf


def peak_memory_bytes() -> int | None:
    """Largest memory since the last reset: of the GPU, or resident on a CPU; None if the system does not tell.

    On a GPU it is the most that torch's allocator reserved, and what is used beside it now: CUDA's context, NCCL's
    communicators, libraries. All of it is lacking elsewhere. Ranks that share a GPU count each other's.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()
        return torch.cuda.max_memory_reserved() + max(beside, 0)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
