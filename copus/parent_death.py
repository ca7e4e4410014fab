"""A process that ends when its parent dies, however it dies: by SIGKILL, or for lack of memory, too."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def die_with_parent(number: int = signal.SIGTERM, parent: int | None = None) -> Callable[[], None]:
    """What a process calls to get this signal when its parent dies: `preexec_fn` of `Popen`. One that was started in
    another way gets the id of its parent from there, and calls it first of all.

    To Linux the parent is the thread that started the process: it has to be one that stays. Elsewhere nothing is asked
    for.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl = ctypes.CDLL(None).prctl  # loaded before a fork: nothing but the call itself happens between fork and exec
    parent = parent or os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask
