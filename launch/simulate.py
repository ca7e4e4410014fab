"""`copus simulate`: what each policy would make of a job, and whether adapting is worth it, before it runs."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from copus.audit import past_run_of
from copus.estimate import estimate_of
from copus.event_lines import without_replays
from copus.events import Noise, Reconfigure, Trial, read_events
from copus.job import JobConfig, JobError, load_job
from copus.learning_rate import lr_decay
from launch.json_output import as_json_line
from launch.plot import check_output, need_matplotlib
from launch.run_directory import find_run, shown
from launch.tables import add_solid_column, new_table, page, print_facts
from planner.forecast import CriticalBatchForecast
from planner.job_estimate import JobEstimate
from planner.menu import Floats, Menu, rung_of
from planner.plan import Plan
from planner.policies.policy import Policy, make_policy
from planner.simulator.compare import Row, Setting, compare
from planner.simulator.trajectory import geometric, linear, power, published_schedules, through
from profiles.formatting import duration, percent, signed_percent, three_digits

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
SMALL_GAIN = 0.01
"""A gain below this share is hardly one."""
MOST_DECISIONS = 400
"""A simulation decides no more often than this in a job of the planned length."""


def simulate(
    job_file: Path,
    overrides: list[str],
    names: list[str],
    noise: str | None,
    law: str,
    run: str | None,
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
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise JobError(f"--policy {unknown[0]}: expected one of {', '.join(VARIANTS)}")
    checks = {
        f"--error {error}: finite, at least 0": 0 <= (error or 0) < math.inf,
        f"--factor-error {factor_error:g}: finite, above 0": 0 < factor_error < math.inf,
        f"--move-seconds {move_seconds}: finite, at least 0": 0 <= (move_seconds or 0) < math.inf,
        f"--seeds {seeds}: at least 1": seeds > 0,
    }
    for words, holds in checks.items():
        if not holds:
            raise JobError(words)
    phi, said = _trajectory(job, noise, law, run)
    estimate = estimate_of(job)
    menu, speed, source = _throughputs(job, estimate)
    made = None if run is None else _made(find_run(run))
    cost = move_seconds
    if cost is None:
        cost = made.layout_seconds if made and made.layout_seconds is not None else None
    if cost is None:
        cost = estimate.predictor.layout_move_seconds
    total = job.total_samples if made is None else made.samples
    setting = Setting(
        menu=menu,
        samples_per_second=speed,
        critical_batch=phi,
        start=menu.configurations.index(job.training.configuration),
        total_samples=total,
        every_samples=max(job.planner.every_samples, total / MOST_DECISIONS),
        move_seconds=np.array([0.0, 0.0, cost]),
        objective=job.planner.objective,
        noise=error,
        first_guess=_first_guess(job, float(phi[0])),
        plans_start=job.planner.start == "plan",
        factor_error=factor_error,
        factor_range=job.planner.critical_batch_factor_range,
        lr_decay=lambda samples: lr_decay(job, round(samples)),
    )
    if made is not None:  # what is known of the machine is put in: table errors, drift, bursts, trials
        start = job.training.configuration
        errors = tuple(
            estimate.predictor.estimate(configuration, beside=start).error for configuration in menu.configurations
        )
        setting = replace(
            setting,
            throughput_error=errors,
            drift=made.drift,
            bursts=made.bursts,
            trial_budget=job.planner.trial_budget,
        )
        names = names or [job.planner.policy]
    policies = {name: _policy(job, name) for name in names or VARIANTS}
    plan, rows = compare(setting, policies, seeds)
    if output is not None:
        from launch.simulate_plot import draw

        draw(output, setting, plan, rows)
    if as_json:
        print(as_json_line(_values(setting, plan, rows, said, source) | {"made": made and made._asdict()}))
    else:
        _print(setting, plan, rows, said, source)
        if made is not None:
            _print_made(made, shown(find_run(run or "")), rows)
    return 0


def _policy(job: JobConfig, name: str) -> Policy:
    return make_policy(job.planner.model_copy(update=VARIANTS[name]))


def _trajectory(job: JobConfig, noise: str | None, law: str, run: str | None) -> tuple[Floats, str]:
    """φ over the progress, and where it comes from in words."""
    factor = job.planner.critical_batch_factor
    if (noise is None) == (run is None):
        raise JobError("give either --noise FIRST:LAST (B_simple in sequences) or --like RUN")
    if run is not None:
        events = without_replays(read_events(find_run(run)))
        seen = [(e.samples_consumed, e.value) for e in events if isinstance(e, Noise) and e.value and e.value > 0]
        total = max((e.samples_consumed for e in events), default=0)  # a run may stop early, and a resume lengthen it
        if not seen or not total:
            raise JobError(f"--like {run}: the run has measured no noise scale")
        phi = through([samples / total for samples, _ in seen], [factor * (value or 0.0) for _, value in seen])
        return phi, f"as run {shown(find_run(run))} measured it"
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


class Made(NamedTuple):
    """What a run did, to be compared with what is expected of it."""

    samples: int
    """Sequences that it trained on."""
    layout_moves: int
    """Lasting moves to another layout after the first step."""
    batch_moves: int
    """Other lasting moves after the first step."""
    trials: int
    """Trials."""
    layout_seconds: float | None
    """Median of what its moves to another layout took; None without any."""
    drift: float
    """How much its machine wandered, slowly: standard deviation of the logarithm of its speed."""
    bursts: float
    """Share of the time in which half of its machine would have had to be taken for the quick part of that."""


def _made(run: Path) -> Made:
    events = without_replays(read_events(run))
    moves = [e for e in events if isinstance(e, Reconfigure) and not e.trial and e.samples_consumed]
    trials = [e for e in events if isinstance(e, Trial)]
    kept = [rung_of(e.running, e.candidate) for e in trials if e.outcome == "stayed"]
    rungs = [e.rung for e in moves] + kept
    seconds = [e.seconds for e in events if isinstance(e, Reconfigure) and e.rung == "layout"]
    past = past_run_of(run)
    machine = None if past is None else past.step_times()
    return Made(
        samples=max(e.samples_consumed for e in events),
        layout_moves=rungs.count("layout"),
        batch_moves=len(rungs) - rungs.count("layout"),
        trials=len(trials),
        layout_seconds=float(np.median(seconds)) if seconds else None,
        drift=machine.drift if machine else 0.0,
        bursts=min((machine.bursts / math.log(2)) ** 2, 0.5) if machine else 0.0,
    )


def _print_made(made: Made, run: str, rows: list[Row]) -> None:
    """What the run did beside what was to be expected: `moves  runs/x made 4 (1 to another layout), 0 trials`."""
    console = page()
    count = made.layout_moves + made.batch_moves
    moves, trials = f"{count} move{'s' * (count != 1)}", f"{made.trials} trial{'s' * (made.trials != 1)}"
    console.print(
        f"{run} made {moves} after its start, {made.layout_moves} of them to another layout, and {trials} in "
        f"{made.samples} sequences; its machine drifted by {percent(made.drift)}",
        soft_wrap=True,
    )
    for row in rows:
        mean = row.layout_moves + row.batch_moves
        console.print(
            f"  {row.policy} is expected to make {mean:.1f} ({row.moves_low:.0f} to {row.moves_high:.0f}), "
            f"{row.layout_moves:.1f} of them to another layout, and {row.trials:.1f} trials",
            soft_wrap=True,
        )


def _values(setting: Setting, plan: Plan, rows: list[Row], said: str, source: str) -> dict[str, Any]:
    label = [configuration.label for configuration in setting.menu.configurations]
    start = _start_seconds(setting)
    return {
        "noise": said,
        "throughput": source,
        "objective": setting.objective,
        "move_seconds": float(setting.move_seconds[2]),
        "best_fixed": {"configuration": label[plan.fixed_index], "seconds": plan.fixed_seconds},
        "as_written": {"configuration": label[setting.start], "seconds": start},
        "plan": {
            "seconds": plan.seconds,
            "gain_over_best_fixed_pct": 100 * plan.gain,
            "schedule": [
                {"from": s.first, "to": s.last, "configuration": label[s.index], "critical_batch": s.critical_batch}
                for s in plan.schedule
            ],
        },
        "policies": [
            {
                "policy": row.policy,
                "seconds": row.seconds,
                "low": row.low,
                "high": row.high,
                "gain_over_best_fixed_pct": 100 * row.gain,
                "layout_moves": row.layout_moves,
                "batch_moves": row.batch_moves,
                "trials": row.trials,
                "moves_low": row.moves_low,
                "moves_high": row.moves_high,
            }
            for row in rows
        ],
    }


def _start_seconds(setting: Setting) -> float:
    """Duration of the job as it is written, without any move."""
    return float(setting.total_samples / setting.samples_per_second[setting.start])


def _print(setting: Setting, plan: Plan, rows: list[Row], said: str, source: str) -> None:
    console = page()
    label = [configuration.label for configuration in setting.menu.configurations]
    how = "as a job's steps measure it" if setting.noise is None else f"estimates ± {percent(setting.noise)}"
    print_facts(
        f"time to target, {len(rows)} polic{'y' if len(rows) == 1 else 'ies'}",
        [
            ("noise", f"{said}; {how}, c × {setting.factor_error:g}"),
            ("throughput", f"{source}; a layout move takes {duration(setting.move_seconds[2])}"),
            ("objective", setting.objective),
        ],
        console,
    )
    table = new_table()
    add_solid_column(table, "policy", [*(row.policy for row in rows), "as written", "best fixed"])
    for name in ("time to target", "±", "vs best fixed", "layout moves", "other moves"):
        table.add_column(name, justify="right")
    fixed, start = plan.fixed_seconds, _start_seconds(setting)
    for row in rows:
        gain, half = row.gain, duration((row.high - row.low) / 2)
        table.add_row(
            row.policy,
            duration(row.seconds),
            half,
            signed_percent(gain),
            f"{row.layout_moves:.1f}",
            f"{row.batch_moves:.1f}",
        )
    table.add_row("as written", duration(start), "", signed_percent(fixed / start - 1), "0", "0")
    table.add_row("best fixed", duration(fixed), "", "", "0", "0")
    table.add_row("oracle", duration(plan.seconds), "", signed_percent(plan.gain), "", "", style="dim")
    console.print(table)
    console.print(f"best fixed: {label[plan.fixed_index]}")
    console.print("schedule of the oracle, who knows φ:")
    for stretch in plan.schedule:
        console.print(
            f"  from {percent(stretch.first):>5} of the progress (φ = {three_digits(stretch.critical_batch)}): "
            f"{label[stretch.index]}, {duration(stretch.seconds)}"
        )
    print_facts(_conclusion(plan, label[plan.fixed_index]), [], console)


def _conclusion(plan: Plan, fixed: str) -> str:
    """Whether adapting is worth it, in words. The best schedule is behind the best fixed configuration if the job does
    not start in that, and the way there costs more than it brings."""
    longer = percent(-plan.gain / (1 + plan.gain))
    if plan.gain < 0 and longer != percent(0.0):
        return (
            f"adapting does not pay here: even the best schedule takes {longer} longer than {fixed} from start to end, "
            "because the job starts elsewhere and the move costs more than it brings"
        )
    worth = f"adapting is worth {percent(max(plan.gain, 0.0))} over {fixed} at best"
    return worth if plan.gain >= SMALL_GAIN else f"{worth}: hardly anything"
