"""How `copus simulate` shows what it found: for people, and as values."""

from typing import Any

from launch.simulate_like import ObservedRun
from launch.tables import add_solid_column, new_table, page, print_facts
from planner.plan import Plan
from planner.simulator.compare import Row, Setting
from profiles.formatting import duration, percent, signed_percent, three_digits

SMALL_GAIN = 0.01
"""A gain below this share is hardly one."""


def as_values(setting: Setting, plan: Plan, rows: list[Row], said: str, source: str) -> dict[str, Any]:
    """The comparison for `--json`; `said` and `source` tell where φ and the step times come from."""
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


def print_comparison(setting: Setting, plan: Plan, rows: list[Row], said: str, source: str) -> None:
    """The policies in a table, the schedule of the oracle, and whether adapting is worth it."""
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
    print_facts(conclusion(plan, label[plan.fixed_index]), [], console)


def print_observed(observed: ObservedRun, run: str, rows: list[Row]) -> None:
    """What the run did beside what was to be expected: `runs/x made 4 moves after its start`."""
    console = page()
    count = observed.layout_moves + observed.batch_moves
    moves, trials = f"{count} move{'s' * (count != 1)}", f"{observed.trials} trial{'s' * (observed.trials != 1)}"
    console.print(
        f"{run} made {moves} after its start, {observed.layout_moves} of them to another layout, and {trials} in "
        f"{observed.samples} sequences; its machine drifted by {percent(observed.drift)}",
        soft_wrap=True,
    )
    for row in rows:
        mean = row.layout_moves + row.batch_moves
        console.print(
            f"  {row.policy} is expected to make {mean:.1f} ({row.moves_low:.0f} to {row.moves_high:.0f}), "
            f"{row.layout_moves:.1f} of them to another layout, and {row.trials:.1f} trials",
            soft_wrap=True,
        )


def _start_seconds(setting: Setting) -> float:
    """Duration of the job as it is written, without any move."""
    return float(setting.total_samples / setting.samples_per_second[setting.start])


def conclusion(plan: Plan, fixed: str) -> str:
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
