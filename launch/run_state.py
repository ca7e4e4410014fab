"""Whether a run is alive, and how it ended, from its events, its lock and its engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.engines import EngineState, engine_state
from launch.engines.ticket import FILE as TICKET
from launch.run_directory import lock_holder
from launch.status import RunStatus
from launch.wording import describe_limit
from profiles.formatting import duration

StateName = Literal[
    "queued",
    "starting",
    "measuring",
    "running",
    "stopping",
    "stalled",
    "unknown",
    "finished",
    "stopped",
    "failed",
    "crashed",
]

HEARD_SECONDS = 30.0
"""A run whose lock is not seen to be held, as on another machine, is alive when it wrote something this lately."""
STALLED_SECONDS = 60.0
"""A run that has been silent for so long, and for ten times its last step or evaluation, is stalled."""
ENDING_SECONDS = 60.0
"""The lock may outlast the last event by this; when it is held for longer, workers are being started again."""


@dataclass(frozen=True)
class RunState:
    """What a run is doing."""

    name: StateName
    """One word."""
    why: str = ""
    """The rest of the sentence, where there is more to say."""
    alive: bool = False
    """Whether it may go on without anybody's doing."""


def state_of(
    run: Path, status: RunStatus, now: float | None = None, ask: Callable[[Path], EngineState] = engine_state
) -> RunState:
    """The state of a run whose events gave `status`. `ask` is how its engine is asked."""
    now = time.time() if now is None else now
    silent = now - status.time if status.time is not None else None
    held, ended = lock_holder(run) is not None, _ended(status)
    if not held and ended is not None and ended.name == "finished":
        return ended  # no engine starts that again
    state = ask(run)
    if state.phase == "queued":
        return RunState("queued", state.words, alive=True)
    # Events of the future tell that the clock was set back meanwhile, and not that somebody is alive.
    heard = silent is not None and abs(silent) < HEARD_SECONDS
    if held or state.phase == "running" or (ended is None and heard):
        return _alive(run, status, silent)
    if ended is not None:
        return ended
    if state.phase == "unknown" and (run / TICKET).exists():  # its scheduler has it, or had it: the lock says nothing
        return RunState("unknown", state.words, alive=True)
    if status.start is None and status.profile is None:
        return RunState("crashed", "its workers never began")
    return RunState("crashed", "its workers are gone without having said why")


def _ended(status: RunStatus) -> RunState | None:
    """How the newest attempt ended; None if it did not say."""
    if status.end is not None:
        if status.end.reason == "finished":
            return RunState("finished")
        if status.end.reason == "diverged":
            return RunState("failed", "diverged: its steps were not finite")
        return RunState("stopped", describe_limit(status.end.reason, status.start))
    if status.failure is not None:
        return RunState("failed", f"rank {status.failure.rank}: {status.failure.message}")
    return None


def _alive(run: Path, status: RunStatus, silent: float | None) -> RunState:
    if status.end is not None and silent is not None and silent < ENDING_SECONDS:
        return RunState("stopping", "the workers are ending", alive=True)
    if status.end is not None or status.failure is not None or status.time is None:
        return RunState("starting", "its workers", alive=True)
    seconds = max(
        status.step.seconds if status.step else 0.0,
        status.evaluation.seconds if status.evaluation else 0.0,
        (status.profile.step_seconds or 0.0) if status.profile else 0.0,
    )
    if silent is not None and silent > max(STALLED_SECONDS, 10 * seconds):
        return RunState("stalled", f"no event for {duration(silent)}", alive=True)
    if (run / "stop").exists():
        return RunState("stopping", "at the next step, with a checkpoint", alive=True)
    if status.profile is not None:
        return RunState("measuring", "the throughput of this machine", alive=True)
    return RunState("running", alive=True)
