"""The elastic agent of one node of a scheduler's job: a signal that takes the node away asks for a checkpoint first.

torch's agent gives its workers 30 seconds when it gets SIGTERM, and kills them then; a checkpoint may take longer.
Schedulers send the signal to the first process of a node (Kubernetes), or to all processes on it (Slurm). The agent
therefore ignores it, and the process that runs it asks all workers of the job, on every node, by `RUN/stop`: they stop
at the same step, and the agents end when their workers have.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from copus.parent_death import die_with_parent
from launch.process import python_module
from launch.run_directory import request_pause

HANDLED = "SIGINT,SIGHUP,SIGQUIT"
"""Signals at which the agent still ends its workers."""


def agent_command(*arguments: str) -> list[str]:
    """The command line of the agent, without SIGTERM among the signals that it acts on."""
    return python_module("copus.agent", "--signals-to-handle", HANDLED, *arguments)


def pause_on_sigterm(run: Path, mark: str, first: Callable[[], None] = lambda: None) -> None:
    """From now on a SIGTERM to this process asks the workers for a checkpoint, with `mark` in RUN/stop. A request of
    the user's to stop for good stays. `first` is called before, and may raise SystemExit instead."""

    def ask(number: int, frame: Any) -> None:
        first()
        try:
            request_pause(run, mark)
        except OSError as error:  # a full disk, which would take no checkpoint either
            print(f"copus: the workers cannot be asked for a checkpoint: {error.strerror}", file=sys.stderr)

    signal.signal(signal.SIGTERM, ask)


def start_agent(command: Sequence[str], environment: Mapping[str, str], **output: Any) -> subprocess.Popen[bytes]:
    """Start the agent, which ends when this process dies. `output` is for `Popen`."""
    return subprocess.Popen(command, env=environment, preexec_fn=_ignoring_sigterm(), **output)


def _ignoring_sigterm() -> Callable[[], None]:
    with_parent = die_with_parent(signal.SIGINT)

    def prepare() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # workers inherit that until they listen for themselves
        with_parent()

    return prepare
