"""`copus simulate`: what each policy would make of a job, and whether adapting is worth it, before it runs."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from copus.estimate import estimate_of
from copus.job import JobConfig, JobError, load_job
from copus.learning_rate import lr_decay
from launch.json_output import as_json_line
from launch.plot import check_output, need_matplotlib
from launch.run_directory import find_run, shown
from launch.simulate_like import ObservedRun, observe, trajectory_of
from launch.simulate_show import as_values, print_comparison, print_observed
from planner.forecast import CriticalBatchForecast
from planner.job_estimate import JobEstimate
from planner.menu import Floats, Menu
from planner.policies.policy import Policy, make_policy
from planner.simulator.compare import Setting, compare
from planner.simulator.trajectory import geometric, linear, power, published_schedules
from profiles.formatting import three_digits

LAWS = {"geometric": geometric, "linear": linear, "power": power}
VARIANTS: dict[str, dict[str, Any]] = {
    "static": {"policy": "static"},
    "ramp": {"policy": "ramp"},
    "norm-test": {"policy": "norm-test"},
    "norm-test-paper": {"policy": "norm-test", "norm_test_form": "paper"},
    "cbs": {"policy": "cbs"},
    "cbs-pessimistic": {"policy": "cbs", "cbs_layout": "pessimistic"},
    "cbs-optimistic": {"policy": "cbs", "cbs_layout": "optimistic"},
    "cbs-doubling": {"policy": "cbs-doubling"},
    "smallest-saturating": {"policy": "smallest-saturating"},
    "seesaw": {"policy": "seesaw"},
    "late-switch": {"policy": "late-switch"},
    "copus": {"policy": "copus"},
    "goodput": {"policy": "goodput"},
}
MOST_DECISIONS = 400
"""A simulation decides no more often than this in a job of the planned length."""


def simulate(
    job_file: Path,
    overrides: list[str],
    names: list[str],
    noise: str | None,
    law: str,
    like: str | None,
    *,
    error: float | None,
    factor_error: float,
    move_seconds: float | None,
    seeds: int,
    output: Path | None,
    as_json: bool = False,
) -> int:
    """Print a table of policies. Raises JobError for what is missing: a noise scale, measured times, a policy."""
    job = load_job(job_file, overrides, notice=lambda line: print(line, file=sys.stderr), planned_only=True)
    if output is not None:  # before minutes of simulation
        check_output("--plot", output)
        need_matplotlib("copus simulate --plot")
    _check(names, noise, like, error, factor_error, move_seconds, seeds)
    run = None if like is None else find_run(like)
    phi, said = _trajectory(job, noise, law, run)
    estimate = estimate_of(job)
    setting, source = _setting(job, estimate, phi)
    setting = replace(setting, noise=error, factor_error=factor_error)
    observed = None
    if run is not None:
        observed = observe(run)
        setting = _as_in_run(setting, job, estimate, observed)
        names = names or [job.planner.policy]
    if move_seconds is not None:
        setting = replace(setting, move_seconds=_move_seconds(move_seconds))
    plan, rows = compare(setting, {name: _policy(job, name) for name in names or VARIANTS}, seeds)
    if output is not None:
        from launch.simulate_plot import draw

        draw(output, setting, plan, rows)
    if as_json:
        print(as_json_line(as_values(setting, plan, rows, said, source) | {"made": observed and observed._asdict()}))
    else:
        print_comparison(setting, plan, rows, said, source)
        if observed is not None and run is not None:
            print_observed(observed, shown(run), rows)
    return 0


def _check(
    names: list[str],
    noise: str | None,
    like: str | None,
    error: float | None,
    factor_error: float,
    move_seconds: float | None,
    seeds: int,
) -> None:
    """Raise JobError for an option whose value is not possible."""
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise JobError(f"--policy {unknown[0]}: expected one of {', '.join(VARIANTS)}")
    checks = {
        f"--error {error}: finite, at least 0": 0 <= (error or 0) < math.inf,
        f"--factor-error {factor_error:g}: finite, above 0": 0 < factor_error < math.inf,
        f"--move-seconds {move_seconds}: finite, at least 0": 0 <= (move_seconds or 0) < math.inf,
        f"--seeds {seeds}: at least 1": seeds > 0,
        "give either --noise FIRST:LAST (B_simple in sequences) or --like RUN": (noise is None) != (like is None),
    }
    for words, holds in checks.items():
        if not holds:
            raise JobError(words)


def _policy(job: JobConfig, name: str) -> Policy:
    return make_policy(job.planner.model_copy(update=VARIANTS[name]))


def _trajectory(job: JobConfig, noise: str | None, law: str, run: Path | None) -> tuple[Floats, str]:
    """φ over the progress, and where it comes from in words."""
    factor = job.planner.critical_batch_factor
    if run is not None:
        return trajectory_of(run, factor), f"as run {shown(run)} measured it"
    assert noise is not None
    if Path(noise.partition(":")[0]).suffix == ".csv":
        return _published(noise)
    try:
        first, last = (float(part) for part in noise.split(":"))
        if law not in LAWS or not all(0 < factor * end < math.inf for end in (first, last)):
            raise ValueError
    except ValueError:
        raise JobError(
            f"--noise {noise} --law {law}: expected FIRST:LAST, both finite and above 0, and a law of {', '.join(LAWS)}"
        ) from None
    phi = LAWS[law](factor * first, factor * last)
    return phi, f"B_simple {three_digits(first)} → {three_digits(last)} sequences, {law}"


def _published(noise: str) -> tuple[Floats, str]:
    file, _, model = noise.partition(":")
    try:
        schedules = published_schedules(Path(file))
    except (OSError, KeyError) as error:
        raise JobError(f"--noise {noise}: {file} cannot be read as a table of schedules: {error}") from None
    if model not in schedules:
        raise JobError(f"--noise {noise}: {file} has the schedules {', '.join(schedules)}")
    return schedules[model], f"φ as the published batch schedule of {model}"


def _setting(job: JobConfig, estimate: JobEstimate, phi: Floats) -> tuple[Setting, str]:
    """The job as it is written, on a machine that is as predicted; and where the step times come from in words."""
    menu, speed, source = _throughputs(job, estimate)
    setting = Setting(
        menu=menu,
        samples_per_second=speed,
        critical_batch=phi,
        start=menu.configurations.index(job.training.configuration),
        total_samples=job.total_samples,
        every_samples=_every_samples(job, job.total_samples),
        move_seconds=_move_seconds(estimate.predictor.layout_move_seconds),
        objective=job.planner.objective,
        first_guess=_first_guess(job, float(phi[0])),
        plans_start=job.planner.start == "plan",
        factor_range=job.planner.critical_batch_factor_range,
        lr_decay=lambda samples: lr_decay(job, round(samples)),
    )
    return setting, source


def _as_in_run(setting: Setting, job: JobConfig, estimate: JobEstimate, observed: ObservedRun) -> Setting:
    """The setting with what is known of the run and its machine: length, moves, table errors, drift, bursts, trials."""
    start, layout = job.training.configuration, observed.layout_seconds
    errors = tuple(estimate.predictor.estimate(c, beside=start).error for c in setting.menu.configurations)
    return replace(
        setting,
        total_samples=observed.samples,
        every_samples=_every_samples(job, observed.samples),
        move_seconds=setting.move_seconds if layout is None else _move_seconds(layout),
        throughput_error=errors,
        drift=observed.drift,
        bursts=observed.bursts,
        trial_budget=job.planner.trial_budget,
    )


def _every_samples(job: JobConfig, total_samples: int) -> float:
    return max(job.planner.every_samples, total_samples / MOST_DECISIONS)


def _move_seconds(layout_seconds: float) -> Floats:
    """Cost of moves if only a new layout takes time."""
    return np.array([0.0, 0.0, layout_seconds])


def _throughputs(job: JobConfig, estimate: JobEstimate) -> tuple[Menu, Floats, str]:
    """What may be chosen, with samples a second, and where these come from: the table, and the cost model beyond it."""
    start = job.training.configuration
    usable = [
        candidate
        for candidate in estimate.candidates
        if candidate.step_seconds and (not candidate.refusal or candidate.configuration == start)
    ]
    if all(candidate.configuration != start for candidate in usable):
        raise JobError(f"{start.label}, with which the job starts, has no time: {estimate.start.refusal or 'unknown'}")
    predicted = sum(candidate.source == "predicted" for candidate in usable)
    source = f"{estimate.measured_rows} measured rows; {predicted} of {len(usable)} by the cost model"
    speeds = [candidate.configuration.global_batch / (candidate.step_seconds or math.inf) for candidate in usable]
    return Menu.of([candidate.configuration for candidate in usable]), np.array(speeds), source


def _first_guess(job: JobConfig, critical_batch: float) -> float:
    """What laws say of φ before the first step, over what it is."""
    laws = CriticalBatchForecast.of_laws(job.total_samples, job.model)
    return float(laws.at(np.array([1.0]))[0]) / critical_batch
