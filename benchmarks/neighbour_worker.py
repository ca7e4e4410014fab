"""The busy neighbour of `benchmarks.time_to_target`: takes one core half of the time, in bursts, until its parent ends.

    python -m benchmarks.neighbour_worker SEED

Bursts and pauses last 1 to 9 seconds, 5 in the mean, the same ones for the same seed: every run of a seed has the same
neighbour.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SHORTEST, LONGEST = 1.0, 9.0
"""Seconds of a burst, and of the pause after it."""


@contextmanager
def busy_neighbour(seed: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Have the neighbour around."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.neighbour_worker", str(seed)])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main(seed: int) -> None:
    """Compute and pause in turn while the process that asked for it is there."""
    parent, rng = os.getppid(), random.Random(seed)
    core = sorted(os.sched_getaffinity(0))[0]
    os.sched_setaffinity(0, {core})
    while os.getppid() == parent:
        end = time.monotonic() + rng.uniform(SHORTEST, LONGEST)
        while time.monotonic() < end:
            sum(range(100_000))
        time.sleep(rng.uniform(SHORTEST, LONGEST))


if __name__ == "__main__":
    main(int(sys.argv[1]))
