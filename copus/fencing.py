"""Ranks that were given up write nothing any more.

An engine may take a host for dead that was only cut off, or stopped, and start the job on others. When its ranks wake
up, they must not write into a run that is no longer theirs, before they are ended.
"""

import os
import sys
import time
from pathlib import Path

from copus.durable import write_atomically
from copus.rendezvous import read_rendezvous

TOKEN = "COPUS_SESSION"
"""Environment variable in which an engine gives the ranks of an attempt their token; without it none is replaced."""
FILE = "session"
"""In the run directory: the token of the newest attempt."""


CALL_SECONDS = 5.0
"""Time from the beginning of an attempt until its rendezvous has come to all hosts, at most."""


class ReplacedError(RuntimeError):
    """The attempt of this process is over, and it is to join the next one."""


def replace_others(run: Path, token: str) -> None:
    """Begin an attempt, before its ranks start: those with another token write nothing into the run any more."""
    write_atomically(run / FILE, token)


def own_name(name: str) -> str:
    """A name for something that other attempts, earlier and later ones, must not take for theirs."""
    token = os.environ.get(TOKEN)
    return name if token is None else f"{name}-{token}"


def end_if_replaced(run: Path) -> None:
    """End this process if another attempt has begun in the run. Raises ReplacedError instead if it is to join that.

    Whoever removes or renames what later attempts may have made too lists it before this question: what is on
    the list is of this attempt, or of an earlier one, however long the process is frozen after the answer.
    """
    mine = os.environ.get(TOKEN)
    if mine is None:
        return
    try:
        newest = (run / FILE).read_text(encoding="utf-8")
    except OSError:  # nobody can say
        return
    end = time.monotonic() + CALL_SECONDS
    while newest != mine and (rendezvous := read_rendezvous()) is not None and time.monotonic() < end:
        if rendezvous.token == newest:
            raise ReplacedError(f"{mine} was given up for {newest}")
        time.sleep(0.05)
    if newest != mine:
        print(f"copus: {mine} was given up, {newest} trains in {run}: ended", file=sys.stderr, flush=True)
        os._exit(1)
