"""`copus plan`: what to expect of a job before it is launched. Needs no accelerator."""

import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copus.backends.registry import find_backend
from copus.estimate import estimate_of
from copus.job import JobConfig, JobError, load_job
from copus.resize import resized
from launch.emit import check_tool, emit
from launch.json_output import as_json_line
from launch.recommendation import Recommendation, recommend, recommendation_facts
from launch.recommendation import as_values as recommendation_values
from launch.smallest_batch import as_values as smallest_batch_values
from launch.smallest_batch import smallest_batch, smallest_batch_facts
from launch.tables import page, print_columns, print_facts, print_table
from profiles.formatting import count, duration, gibibytes, gibibytes_interval, percent, three_digits

if TYPE_CHECKING:  # numpy and scipy are loaded when the command runs, and not by those that only look at it
    from planner.job_estimate import Fastest, JobEstimate, NoiseRange
    from planner.predictor import CandidateEstimate

DISPENSABLE = ("source", "80 %", "memory 80 %", "MFU", "next layout", "sure", "fit")
"""Columns that a narrow terminal goes without, the first one first; `--json` has them."""


def plan(
    job_file: Path,
    overrides: list[str],
    price_per_hour: float | None = None,
    backend: str | None = None,
    tool: str | None = None,
    stack: str | None = None,
    *,
    as_json: bool = False,
    all_candidates: bool = False,
) -> int:
    """Print what is expected of a job file. `price_per_hour` is that of one accelerator, `backend` replaces the job's,
    `stack` is the software whose published runs predictions are like, and with `tool` the best run is printed as that
    tool's arguments. Raises JobError if nothing can be expected."""
    if tool is not None:
        check_tool(tool, {"--json": as_json, "--all": all_candidates, "--price": price_per_hour is not None})
    job = load_job(job_file, overrides, notice=lambda line: print(line, file=sys.stderr), planned_only=True)
    if backend is not None:
        job = on_backend(job, backend)
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise JobError(f"--price({price_per_hour}): expected the price of an accelerator-hour, at least 0")
    estimate = estimate_of(job, stack)
    if tool is not None:
        emit(job, estimate, tool)
        return 0
    recommendation = recommend(job, estimate, price_per_hour)
    if as_json:
        print(as_json_line(as_values(job, estimate) | {"recommended": recommendation_values(recommendation)}))
    else:
        _print(job, estimate, recommendation, all_candidates)
    return 0


def on_backend(job: JobConfig, backend: str) -> JobConfig:
    """The job on another backend, which begins in the nearest layout that it runs there. Raises JobError for a backend
    that is not installed or cannot train the model."""
    try:
        find_backend(backend).check_installed()
    except ValueError as error:
        raise JobError(f"--backend {backend}: {error}") from None
    return resized(job, job.cluster, backend)


def as_values(job: JobConfig, estimate: "JobEstimate") -> dict[str, Any]:
    """The estimate as plain values, for `--json`. An open end of a range of noise scales is null."""
    fastest, by_noise = estimate.fastest(), estimate.by_noise(job.planner)
    smallest = smallest_batch(job, estimate)
    return {
        "name": job.name,
        "cluster": job.cluster.model_dump(mode="json"),
        "precision": job.training.precision,
        "parameters": job.model.parameters,
        "model_refusal": job.model_refusal,
        "memory_bytes": estimate.memory_bytes,
        "measured_rows": estimate.measured_rows,
        "measured_shards": estimate.measured_shards,
        "fingerprint": estimate.fingerprint and estimate.fingerprint.model_dump(mode="json"),
        "start": _values(estimate.start),
        "fastest": [
            {
                "global_batch": row.best.configuration.global_batch,
                "best": _values(row.best),
                "runner_up": row.runner_up and _values(row.runner_up),
                "sure": row.sure,
            }
            for row in fastest
        ],
        "by_noise": [
            {
                "noise_low": noise_range.low,
                "noise_high": noise_range.high if math.isfinite(noise_range.high) else None,
                "best": _values(noise_range.best),
            }
            for noise_range in by_noise
        ],
        "smallest_batch": smallest and smallest_batch_values(smallest),
        "variants": [_values(variant) for variant in estimate.variants],
        "candidates": [_values(candidate) for candidate in estimate.candidates],
        "assumptions": list(estimate.predictor.assumptions),
    }


def _values(candidate: "CandidateEstimate") -> dict[str, Any]:
    from planner.memory_check import in_words

    peak = candidate.peak
    return {
        "configuration": candidate.configuration.model_dump(mode="json"),
        "label": candidate.configuration.label,
        "step_seconds": candidate.step_seconds,
        "step_seconds_low": candidate.step_seconds_low,
        "step_seconds_high": candidate.step_seconds_high,
        "source": candidate.source,
        "peak_bytes": peak.expected_bytes,
        "peak_bytes_low": peak.low_bytes,
        "peak_bytes_high": peak.high_bytes,
        "memory": peak.parts,
        "stage": peak.stage,
        "chance_to_fit": peak.chance_to_fit,
        "fits": in_words(peak.chance_to_fit),
        "refusal": candidate.refusal,
        "peak_samples_per_second": candidate.peak_samples_per_second,
        "samples_per_second": candidate.samples_per_second,
        "mfu": candidate.mfu,
    }


def _print(
    job: JobConfig, estimate: "JobEstimate", recommendation: Recommendation | None, all_candidates: bool
) -> None:
    console = page()
    fastest, by_noise = estimate.fastest(), estimate.by_noise(job.planner)
    print_facts(_heading(job, estimate), _facts(job, estimate), console)
    if all_candidates:
        candidates = [_candidate(candidate) for candidate in estimate.candidates]
        print_table("every candidate", candidates, console, DISPENSABLE, wrapping="verdict")
    configurations = [variant.configuration for variant in estimate.variants]
    print_table(
        "the start with other settings of training.layout",
        [_variant(variant) for variant in estimate.variants],
        console,
        DISPENSABLE,
        bold=configurations.index(estimate.start.configuration),
    )
    if fastest:
        print_table("fastest layout of each global batch", [fastest_row(row) for row in fastest], console, DISPENSABLE)
        print_columns(
            "predicted peak memory per rank (GiB)",
            _memory([estimate.start, *(row.best for row in fastest)]),
            console,
        )
        title = "best configuration by noise scale (tr Σ/|G|², sequences)"
        print_table(title, [_by_noise(noise_range) for noise_range in by_noise], console, DISPENSABLE)
    else:
        print_facts(_nothing(job, estimate), [], console)
    smallest = smallest_batch(job, estimate)
    if smallest is not None:
        print_facts(*smallest_batch_facts(smallest), console)
    print_facts("assumed: " + "; ".join(estimate.predictor.assumptions), [], console)
    if recommendation is not None:
        chosen = recommendation.estimate
        memory = f"{_peak(chosen)}{_of(estimate.memory_bytes)}: {_fit(chosen)}"
        print_facts(*recommendation_facts(job, recommendation, memory), console)


def _heading(job: JobConfig, estimate: "JobEstimate") -> str:
    room = "memory is not checked" if estimate.memory_bytes is None else f"{gibibytes(estimate.memory_bytes)} each"
    return (
        f"{job.name}: {count(job.model.parameters)} weights in {job.training.precision} on "
        f"{job.cluster.accelerators} × {job.cluster.accelerator}, {room}"
    )


def _facts(job: JobConfig, estimate: "JobEstimate") -> list[tuple[str, str]]:
    """What is planned, and by which times: name and value."""
    from planner.memory_check import in_words

    start = estimate.start
    if estimate.fingerprint is None:
        times = "predicted by the cost model; the table has no row of this job"
    elif not estimate.measured_rows:
        times = (
            f"predicted by the cost model from {estimate.measured_shards} shards that one accelerator ran alone; the "
            "network is taken from its file"
        )
    else:
        times = (
            f"{estimate.measured_rows} measured rows of {estimate.fingerprint.hardware}; the rest predicted from them"
        )
    counts = Counter(in_words(candidate.peak.chance_to_fit) for candidate in estimate.candidates)
    fitting = ", ".join(f"{words} {number}" for words, number in counts.most_common())
    memory = "" if estimate.memory_bytes is None else f"; memory: {fitting}"  # else the heading says that it is unknown
    return [
        ("start", f"{start.configuration.label}: {_step(start)}; {_peak(start)}, {in_words(start.peak.chance_to_fit)}"),
        ("times", times),
        ("candidates", f"{len(estimate.candidates)}{memory}"),
        ("objective", f"{job.planner.objective}, φ = {job.planner.critical_batch_factor:g} · noise scale"),
        *([] if job.model_refusal is None else [("model", f"a plan only, {job.model_refusal}")]),
    ]


def _nothing(job: JobConfig, estimate: "JobEstimate") -> str:
    """Why there is no table of the fastest: nothing fits, or no step time is certain enough for the policy."""
    if any(candidate.can_run for candidate in estimate.candidates):
        return (
            f"No step time is certain enough for planner.policy({job.planner.policy}) to choose by; `copus profile "
            "run` measures them, and --all shows the predicted ones."
        )
    smallest = estimate.smallest
    return (
        f"No candidate may be chosen: the smallest is {smallest.configuration.label} with {_peak(smallest)}, "
        f"{_fit(smallest)}. The table above says what other settings of training.layout would need."
    )


def _candidate(candidate: "CandidateEstimate") -> dict[str, str]:
    return {
        "layout": candidate.configuration.layout.label,
        "micro-batch": str(candidate.configuration.micro_batch),
        "global batch": str(candidate.configuration.global_batch),
        **_speed(candidate),
        "80 %": _rates(candidate),
        "source": candidate.source,
        "memory": gibibytes(candidate.peak.expected_bytes),
        "verdict": candidate.refusal or _fit(candidate),
    }


def _variant(candidate: "CandidateEstimate") -> dict[str, str]:
    layout = candidate.configuration.layout
    return {
        "recompute": layout.recompute,
        "zero": str(layout.zero),
        "sequence parallel": "yes" if layout.sequence_parallel else "no",
        "memory": gibibytes(candidate.peak.expected_bytes),
        "memory 80 %": _gib_range(candidate),
        "fit": _fit(candidate),
        **_speed(candidate),
        "source": candidate.source,
    }


def fastest_row(row: "Fastest") -> dict[str, str]:
    """A row of the table of fastest layouts."""
    candidate, other = row.best, row.runner_up
    return {
        "batch": str(candidate.configuration.global_batch),
        "layout": f"{candidate.configuration.layout.label} m{candidate.configuration.micro_batch}",
        **_speed(candidate),
        "80 %": _rates(candidate),
        "source": candidate.source,
        "memory": gibibytes(candidate.peak.expected_bytes),
        "fit": _fit(candidate),
        "next layout": "–" if other is None else f"{other.configuration.layout.label} {_rate(other)}",
        "sure": "–" if row.sure is None else percent(min(row.sure, 0.99)),
    }


def _memory(estimates: "list[CandidateEstimate]") -> dict[str, dict[str, str]]:
    """Parts of the memory by configuration, without those that are nothing in all of them. Of configurations that
    differ in the global batch alone, and do not differ in memory, the first one stands for all."""
    rows: dict[str, dict[str, str]] = {}
    seen = set()
    for candidate in estimates:
        key = (
            candidate.configuration.layout,
            candidate.configuration.micro_batch,
            tuple(candidate.peak.parts.values()),
        )
        if key in seen:
            continue
        seen.add(key)
        rows[candidate.configuration.label] = {
            **{name: gibibytes(size).removesuffix(" GiB") for name, size in candidate.peak.parts.items()},
            "sum": gibibytes(sum(candidate.peak.parts.values())).removesuffix(" GiB"),
            "80 %": _gib_range(candidate),
            "stage": candidate.peak.stage,
        }
    nothing = [name for name in next(iter(rows.values())) if all(parts[name] == "0.00" for parts in rows.values())]
    return {label: {name: part for name, part in parts.items() if name not in nothing} for label, parts in rows.items()}


def _by_noise(noise_range: "NoiseRange") -> dict[str, str]:
    high = f"to {three_digits(noise_range.high)}" if math.isfinite(noise_range.high) else "and more"
    return {
        "noise scale": f"{three_digits(noise_range.low)} {high}",
        "configuration": noise_range.best.configuration.label,
        **_speed(noise_range.best),
        "source": noise_range.best.source,
        "memory": gibibytes(noise_range.best.peak.expected_bytes),
        "fit": _fit(noise_range.best),
    }


def _step(candidate: "CandidateEstimate") -> str:
    if candidate.step_seconds is None:
        return candidate.refusal
    rate = f"{_rate(candidate)} samples/s (80 %: {_rates(candidate)})"
    return f"{duration(candidate.step_seconds)} per step, {candidate.source}, {rate}"


def _peak(candidate: "CandidateEstimate") -> str:
    return gibibytes_interval(candidate.peak.expected_bytes, candidate.peak.low_bytes, candidate.peak.high_bytes)


def _gib_range(candidate: "CandidateEstimate") -> str:
    """The interval of the memory, GiB."""
    return _peak(candidate).partition("(")[2].removesuffix(")")


def _of(memory_bytes: float | None) -> str:
    return "" if memory_bytes is None else f" of {gibibytes(memory_bytes)}"


def _fit(candidate: "CandidateEstimate") -> str:
    from planner.memory_check import in_words

    words = in_words(candidate.peak.chance_to_fit)
    return (
        words
        if candidate.peak.chance_to_fit is None or words == "fits"
        else f"{words} ({percent(candidate.peak.chance_to_fit)})"
    )


def _speed(candidate: "CandidateEstimate") -> dict[str, str]:
    """Throughput, and the MFU where the peak of the accelerators is rated."""
    rate = {"samples/s": _rate(candidate)}
    if candidate.peak_samples_per_second is None:
        return rate
    return rate | {"MFU": "–" if candidate.mfu is None else percent(candidate.mfu)}


def _rate(candidate: "CandidateEstimate") -> str:
    return "–" if candidate.samples_per_second is None else three_digits(candidate.samples_per_second)


def _rates(candidate: "CandidateEstimate") -> str:
    """The interval of the throughput."""
    batch, low, high = candidate.configuration.global_batch, candidate.step_seconds_low, candidate.step_seconds_high
    return "–" if not low or not high else f"{three_digits(batch / high)}–{three_digits(batch / low)}"
