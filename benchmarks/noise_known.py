"""After how many measured steps is the noise scale known, and does its interval hold? Does a job on H100s then move?

    python -m benchmarks.noise_known [--quick] [--json] [--only cells,job]

Nothing is trained: gradients of known noise go through the meter that a job has, as often as the job would measure
them. Cells are steps of 64 to 64 M tokens, sources of parts. The job is
examples/llama-7b-h100.yaml, begun at batches of 64 to 1024 on a simulated clock: its planner, with the cost model for
a machine, and a noise scale that grows.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.noise_synthetic import SyntheticSteps
from copus.job import JobConfig, load_job
from copus.noise.run_noise import RunNoise
from planner.backend_traits import ANY_BACKEND
from planner.config import PlannerConfig
from planner.decision_times import decision_is_due
from planner.planner import Planner
from planner.predictor import Predictor
from planner.sampling import executed_configuration, first_known_step, half_life, source_of_step
from planner.trials import SETTLING_STEPS
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale

SECTIONS = ("cells", "job")
STEP_SIZES = ((16, 4), (128, 8), (128, 128), (2048, 32), (4096, 64), (4096, 1024), (8192, 8192))
"""(sequence length, global batch): 64 tokens to 64 M."""
SOURCES = ("microbatch", "replica", "lone micro-batch")
"""The last is the default source in a step of one micro-batch: halves for calibration, and the norm layers."""
JOB_STEPS = 1000
NOISE_OVER_BATCH = (0.25, 4.0)
"""Range of the noise scale over the batch; each repetition draws one, log-uniformly."""
WANTED = 25
"""Measured steps after which the noise scale should be known, and its interval is judged."""
JOB = Path(__file__).parent.parent / "examples" / "llama-7b-h100.yaml"
BATCHES = (64, 128, 256, 512, 1024)
NOISE_SCALE = (100.0, 5000.0)
"""Of the simulated job at its beginning and its end: it grows with the square root of the samples."""
JOB_DIMENSIONS = 1024
"""Of the simulated job's gradients. How many a model of 7 B has is not known; it is hardly fewer."""
STEP_ERROR = 0.03
"""Standard deviation of the logarithm of a simulated step's time."""
MOVE_SECONDS = 10.0


class Cell(NamedTuple):
    """Steps of one size, measured from one source."""

    seq_len: int
    source: str
    configuration: Configuration
    settings: PlannerConfig


def cell_of(seq_len: int, global_batch: int, source: str) -> Cell:
    """One cell. Micro-batches make at most 16 parts of a step, replicas at most 8."""
    dp, micro_batch, noise_source = {
        "microbatch": (1, max(global_batch // 16, 1), "microbatch"),
        "replica": (min(global_batch, 8), 1, "replica"),
        "lone micro-batch": (1, global_batch, "auto"),
    }[source]
    configuration = Configuration(layout=Layout(dp=dp), micro_batch=micro_batch, global_batch=global_batch)
    return Cell(seq_len, source, configuration, PlannerConfig.model_validate({"noise_source": noise_source}))


def cells() -> list[Cell]:
    """All of them."""
    return [cell_of(*size, source) for size in STEP_SIZES for source in SOURCES]


def measure(cell: Cell, repetitions: int, later_steps: int) -> dict[str, Any]:
    """Steps until the noise scale is known, and how often its interval holds the truth, over independent runs."""
    batch = cell.configuration.global_batch
    until_known, covered, covered_later = [], [], []
    for repetition in range(repetitions):
        rng = np.random.default_rng([cell.seq_len, batch, SOURCES.index(cell.source), repetition])
        steps = SyntheticSteps(rng)
        truth = batch * float(np.exp(rng.uniform(*np.log(NOISE_OVER_BATCH))))
        meter = RunNoise(half_life(cell.settings, JOB_STEPS * batch, cell.seq_len))
        known_after, measured = None, 0
        for step in range(later_steps):
            source = source_of_step(cell.settings, ANY_BACKEND, cell.configuration, step)
            informative = meter.update(steps.step(cell.configuration, source, truth), (step + 1) * batch, batch)
            if not informative:
                continue
            measured += 1
            if known_after is None and measured >= cell.settings.min_noise_samples:
                known_after = measured if meter.estimate().value is not None else None
            if measured == WANTED:
                covered.append(holds(meter.estimate(), truth))
        until_known.append(np.inf if known_after is None else known_after)
        covered_later.append(holds(meter.estimate(), truth))
    slowest = float(np.quantile(until_known, 0.99, method="higher"))
    return {
        "seq_len": cell.seq_len,
        "global_batch": batch,
        "source": cell.source,
        "repetitions": repetitions,
        "steps_until_known": slowest if np.isfinite(slowest) else None,
        "coverage_pct": 100 * float(np.mean(covered)),
        "later_steps": later_steps,
        "coverage_later_pct": 100 * float(np.mean(covered_later)),
    }


def holds(noise: NoiseScale, truth: float) -> bool:
    """Whether the 90 % interval has the truth in it; an unknown one has not."""
    return noise.low is not None and noise.low <= truth and (noise.high is None or truth <= noise.high)


def true_noise_scale(share: float) -> float:
    """Of the simulated job, when that share of its samples has been consumed: ∝ √(share + offset)."""
    first, last = (value**2 for value in NOISE_SCALE)
    return float((first + (last - first) * share) ** 0.5)


def simulate_job(job: JobConfig, batch: int) -> dict[str, Any]:
    """The example begun at a batch, from beginning to end, on a clock that the cost model drives.

    The machine is as fast as the cost model says, but for the scatter of steps. The planner knows the same model, and
    the steps that it sees. There are no trials, which are about step times and not about noise.
    """
    start = job.training.configuration.model_copy(update={"global_batch": batch})
    # A range of 1: c is what the simulation says.
    settings = job.planner.model_copy(update={"trial_budget": 0.0, "critical_batch_factor_range": 1.0})
    machine, predictor = (
        Predictor.from_rows(settings, job.model, job.cluster, job.training.precision, start) for _ in range(2)
    )
    planner = Planner(predictor, total_samples=job.total_samples)
    meter = RunNoise(half_life(settings, job.total_samples, job.model.seq_len))
    rng = np.random.default_rng(batch)
    gradients = SyntheticSteps(rng, JOB_DIMENSIONS)
    running, samples, step, seconds, moved_at_step = start, 0, 0, 0.0, 0
    measured, known_after, first_known = 0, None, None
    errors, moves = [], []
    while samples + running.global_batch <= job.total_samples:
        source = source_of_step(settings, ANY_BACKEND, running, step)
        result = gradients.step(running, source, true_noise_scale(samples / job.total_samples))
        before, samples, step = samples, samples + running.global_batch, step + 1
        measured += meter.update(result, samples, running.global_batch)
        executed = executed_configuration(ANY_BACKEND, running, source)
        expected = machine.throughput.predict(executed)
        assert expected is not None, "the cost model knows H100s"
        assert expected.step_seconds is not None
        step_seconds = expected.step_seconds * float(np.exp(STEP_ERROR * rng.standard_normal()))
        seconds += step_seconds
        settled = step > moved_at_step + SETTLING_STEPS
        planner.observe_step(executed, step_seconds, settled)
        due = decision_is_due(before, samples, running.global_batch, settings.every_samples)
        if not settled or not (due or step == first_known_step(settings)):
            continue
        decision = planner.decide(meter.estimate(), running, samples)
        if decision.critical_batch is not None:
            if known_after is None:
                known_after, first_known = measured, decision.number
            truth = settings.critical_batch_factor * true_noise_scale(samples / job.total_samples)
            errors.append(math.log(decision.critical_batch / truth))
        if decision.switch:
            moves.append({"samples": samples, "to": decision.chosen.label, "reason": decision.reason})
            planner.observe_move(running, decision.chosen, MOVE_SECONDS)
            seconds += MOVE_SECONDS
            running, moved_at_step = decision.chosen, step
    return {
        "global_batch": batch,
        "measured_steps_until_known": known_after,
        "first_known_decision": first_known,
        "decisions": planner.number,
        "unknown_decisions": planner.number - len(errors),
        "critical_batch_bias_pct": 100 * math.expm1(float(np.mean(errors))),
        "critical_batch_spread_pct": 100 * math.expm1(float(np.std(errors))),
        "moves": moves,
        "hours": seconds / 3600,
        "ends_in": running.label,
    }


def run(only: list[str], quick: bool) -> dict[str, Any]:
    """The parts that are asked for."""
    result: dict[str, Any] = {"benchmark": "noise_known", "quick": quick}
    if "cells" in only:
        repetitions, later = (60, 60) if quick else (200, 100)
        rows = [measure(cell, repetitions, later) for cell in cells()]
        result["cells"] = rows
        steps = [row["steps_until_known"] for row in rows]
        result["steps_until_known_max"] = None if None in steps else max(steps)
        result["coverage_pct"] = float(np.mean([row["coverage_pct"] for row in rows]))
        result["coverage_later_pct"] = float(np.mean([row["coverage_later_pct"] for row in rows]))
    if "job" in only:
        result["job"] = [simulate_job(load_job(JOB), batch) for batch in (BATCHES[::2] if quick else BATCHES)]
    return result


def show(result: dict[str, Any], console: Console) -> None:
    """Tables for people."""
    if "cells" in result:
        names = ("tokens a step", "seq_len", "batch", "source", "known after", "coverage %", "later %")
        table = Table(*names, title=f"measured steps until known (99 % of runs); coverage after {WANTED}, and later")
        for row in result["cells"]:
            steps = row["steps_until_known"]
            table.add_row(
                f"{row['seq_len'] * row['global_batch']:,}",
                str(row["seq_len"]),
                str(row["global_batch"]),
                row["source"],
                "never" if steps is None else f"{steps:.0f}",
                f"{row['coverage_pct']:.1f}",
                f"{row['coverage_later_pct']:.1f}",
            )
        console.print(table)
        console.print(
            f"known after at most {result['steps_until_known_max']} measured steps; the 90 % interval holds the "
            f"truth in {result['coverage_pct']:.1f} % after {WANTED} and in {result['coverage_later_pct']:.1f} % later"
        )
    if "job" in result:
        columns = (
            "begun at",
            "known after",
            "decisions",
            "unknown",
            "φ, bias %",
            "spread %",
            "moves",
            "hours",
            "ends in",
        )
        jobs = Table(*columns, title=f"{JOB.name} on a simulated clock")
        for row in result["job"]:
            jobs.add_row(
                str(row["global_batch"]),
                str(row["measured_steps_until_known"]),
                str(row["decisions"]),
                str(row["unknown_decisions"]),
                f"{row['critical_batch_bias_pct']:+.0f}",
                f"{row['critical_batch_spread_pct']:.0f}",
                str(len(row["moves"])),
                f"{row['hours']:.1f}",
                row["ends_in"],
            )
        console.print(jobs)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("noise_known", __doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and fewer jobs")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    options = parser.parse_args(arguments)
    only = options.only.split(",")
    if unknown := set(only) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    result = run(only, options.quick)
    tell(result, show, options, console_of(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
