"""Maps a function over a stream in several processes: results in order, and only so much in flight that memory stays
bounded."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from copus.job import JobError
from copus.parent_death import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROCESSES = 16
"""Unless the job says more: by then one process that reads cannot keep up."""
_AHEAD = 2
"""Items in flight for each process."""


def default_processes() -> int:
    """One for each core that this process may use."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def ordered_map(
    function: Callable[[Any, Item], Result], context: Any, items: Iterable[Item], processes: int
) -> Iterator[tuple[Item, Result]]:
    """Every item with `function(context, item)`, in the order of the items.

    `function` belongs to a module, and `context` can be pickled: it is sent to each process once. With one process
    everything happens in this one. What `function` raises is raised here. Raises JobError if a process is killed.
    """
    if processes < 2:
        for item in items:
            yield item, function(context, item)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads as they happen to be
    pool = ProcessPoolExecutor(processes, spawn, _begin, (context, os.getpid()))
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_call, function, item)))
            if len(waiting) > _AHEAD * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise JobError(
            "data: a process that prepares the data was killed, perhaps for lack of memory: with fewer of them "
            f"(data.processes, {processes} now) less is needed"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_context: Any = None


def _begin(context: Any, parent: int) -> None:
    """Remember the context, and end with the parent however it dies: the pool would wait for ever."""
    global _context
    die_with_parent(signal.SIGKILL, parent)()
    _context = context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would compete with the other processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends the pool
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _call(function: Callable[[Any, Item], Result], item: Item) -> Result:
    return function(_context, item)
