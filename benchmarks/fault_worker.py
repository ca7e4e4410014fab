"""`copus.worker` with moves at fixed places, and with what it is doing written down, so that faults can be aimed.

The planner of a real run decides by measured seconds, which no two runs share. Here layouts follow the samples alone,
so that a run with faults has to end with the very weights of the run without.
"""

import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import copus.moves
import copus.worker
import planner.decision_times
from copus.backends.registry import find_backend
from copus.checkpoints.store import Writing
from copus.job import load_job
from copus.moves import Moves
from copus.planning import Planner
from profiles.configuration import Configuration
from profiles.decision import Decision
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale, StepNorms

LAYOUTS = {
    "megatron": (Layout(dp=2), Layout(tp=2), Layout(pp=2), Layout(dp=2, zero=1)),
    "deepspeed": (Layout(dp=2), Layout(dp=2, zero=1), Layout(dp=2, zero=2), Layout(dp=2, zero=3)),
    "fsdp": (Layout(dp=2), Layout(tp=2), Layout(dp=2, zero=3), Layout(dp=2, zero=1)),
}
"""By backend: the layouts that follow one another, changed at every decision."""


class ScriptedPlanner(Planner):
    """The real planner, but for what it chooses."""

    layouts: tuple[Layout, ...]
    """The job's backend's."""

    def decide(
        self,
        noise: NoiseScale,
        current: Configuration,
        samples_consumed: int,
        step_norms: StepNorms | None = None,
        seconds_left: float = math.inf,
    ) -> Decision:
        """The next layout; the batch stays."""
        decision = super().decide(noise, current, samples_consumed, step_norms, seconds_left)
        layout = self.layouts[samples_consumed // self.config.every_samples % len(self.layouts)]
        chosen = current.model_copy(update={"layout": layout})
        return decision.model_copy(update={"chosen": chosen, "reason": "scripted", "predicted_gain": None})


def announced(run: Path, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with `run/phase` naming it while it works on rank 0."""

    @wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if os.environ.get("RANK") != "0":
            return function(*arguments, **options)
        (run / "phase").write_text(phase)
        try:
            return function(*arguments, **options)
        finally:
            (run / "phase").write_text("training")

    return wrapped


def main(arguments: list[str]) -> int:
    """One rank."""
    run = Path(arguments[0])
    (run / f"worker-{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    backend = load_job(run / "job.yaml").training.backend
    find_backend(backend).load()  # imported here and not between two collectives: it takes seconds
    ScriptedPlanner.layouts = LAYOUTS[backend]
    copus.worker.Planner = ScriptedPlanner  # type: ignore[misc]
    # Decisions fall due with the samples alone: on a busy machine some would else be left out, and with them a move.
    planner.decision_times.FEWEST_STEPS_BETWEEN, copus.moves.DECIDING_SHARE = 1, math.inf
    Writing._write = announced(run, "checkpoint", Writing._write)  # type: ignore[method-assign]
    Moves._move = announced(run, "move", Moves._move)  # type: ignore[method-assign]
    return copus.worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
