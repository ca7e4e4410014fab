"""How fast, how exact and how close to the least possible traffic a running job moves between layouts.

`python -m benchmarks.reshard` moves a job of four ranks through all ordered pairs of six layouts (Megatron: with and
without the distributed optimizer), and times the other way in the same run: checkpoint, new processes, load.
`--plan-only` plans the move of a 70 B model between many ranks, in this process alone.
"""

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.backends.registry import find_backend
from copus.job import JobConfig, parse_job
from copus.reshard.plan import make_plan
from copus.reshard.table import Field, ShardTable
from profiles.layout import Layout

OF_MEGATRON = [{"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"tp": 2, "pp": 2}, {"tp": 4}, {"pp": 4}]
OF_FSDP = [
    *({"dp": 4, "zero": 3}, {"tp": 2, "dp": 2, "zero": 3}, {"dp": 4, "zero": 3, "dp_replicate": 2}),
    *({"tp": 2, "dp": 2}, {"tp": 4}, {"dp": 4}),
]
LAYOUTS: dict[str, list[list[Layout]]] = {
    "megatron": [[Layout(**{**degrees, "zero": zero}) for degrees in OF_MEGATRON] for zero in (0, 1)],
    "fsdp": [[Layout(**degrees) for degrees in OF_FSDP]],
}
"""By backend: lists of layouts. A job moves through all pairs of a list."""
MODEL = {"layers": 8, "hidden": 512, "ffn_hidden": 1376, "heads": 8, "kv_heads": 4, "seq_len": 64, "vocab": 8192}
QUICK_MODEL = {"layers": 4, "hidden": 128, "ffn_hidden": 352, "heads": 4, "kv_heads": 4, "seq_len": 32, "vocab": 1024}
LARGE_MODEL = {
    "layers": 80,
    "hidden": 8192,
    "ffn_hidden": 28672,
    "heads": 64,
    "kv_heads": 8,
    "seq_len": 8192,
    "vocab": 128256,
}
"""Llama 3 70B."""
RANKS = 4


def bytes_floor(held: ShardTable, needed: ShardTable) -> int:
    """The least that has to change rank: of every rank, the bytes that it needs and does not hold.

    Worked out without the planner, one rank and field after the other; a rank's own shards do not overlap.
    """
    have: dict[tuple[int, str], list[tuple[list[int], list[int]]]] = {}
    for rank, fields, start, stop in _rows(held):
        for field in fields:
            have.setdefault((rank, field.name), []).append((start, stop))
    lacking = 0
    for rank, fields, start, stop in _rows(needed):
        for field in fields:
            elements = math.prod(high - low for low, high in zip(start, stop, strict=True))
            for own_start, own_stop in have.get((rank, field.name), []):
                shared = (
                    min(high, own_high) - max(low, own_low)
                    for low, high, own_low, own_high in zip(start, stop, own_start, own_stop, strict=True)
                )
                elements -= math.prod(max(0, length) for length in shared)
            lacking += elements * field.element_bytes
    return lacking


def _rows(table: ShardTable) -> Iterator[tuple[int, tuple[Field, ...], list[int], list[int]]]:
    fields = [table.groups[group] for group in table.group.tolist()]
    return zip(table.rank.tolist(), fields, table.start.tolist(), table.stop.tolist(), strict=True)


def plan_only(ranks: int, ranks_per_node: int) -> dict[str, Any]:
    """Plan a 70 B model's move between two layouts; the distributed optimizer on, off, or changed on the way."""
    if ranks % 32:
        raise SystemExit(f"--ranks({ranks}) ÷ (tp(8) × pp(4)) = {ranks / 32:g}, not a whole number of replicas")
    from copus.backends.megatron.shard_table import shard_table  # some seconds: not for --help

    job = large_job(ranks, ranks_per_node)
    shard_table(job, Layout())  # warm: imports that the first one makes
    plans: list[dict[str, Any]] = []
    for zeros in itertools.product((0, 1), repeat=2):
        before = Layout(tp=8, pp=4, dp=ranks // 32, zero=zeros[0])
        after = Layout(tp=4, pp=8, dp=ranks // 32, zero=zeros[1])
        started, cpu_started = time.perf_counter(), time.process_time()
        held, needed = shard_table(job, before), shard_table(job, after)
        plan = make_plan(held, needed, ranks_per_node)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        sent = plan.bytes_sent(ranks)
        near = plan.moves & (plan.sender // ranks_per_node == plan.receiver // ranks_per_node)
        plans.append(
            {
                "before": before.label,
                "after": after.label,
                "plan_seconds": seconds,
                "plan_cpu_seconds": cpu_seconds,  # on a machine that others use the wall clock says little
                "transfers": int(plan.moves.sum()),
                "bytes_moved": plan.bytes_moved,
                "bytes_floor": bytes_floor(held, needed),
                "max_over_mean_sent": float(sent.max() / sent.mean()),
                "same_node_fraction": float(plan.bytes[near].sum() / max(1, plan.bytes_moved)),
                "most_peers": plan.most_peers(),
            }
        )
    return {
        "benchmark": "reshard",
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "parameters": job.model.parameters,
        "plan_seconds": max(plan["plan_seconds"] for plan in plans),
        "plan_cpu_seconds": max(plan["plan_cpu_seconds"] for plan in plans),
        "max_over_mean_sent": max(plan["max_over_mean_sent"] for plan in plans),
        "floor_exact": all(plan["bytes_moved"] == plan["bytes_floor"] for plan in plans),
        "plans": plans,
    }


def make_job(quick: bool, backend: str) -> JobConfig:
    """The job that is moved: four ranks, one thread each."""
    return parse_job(
        {
            "name": "reshard",
            "model": QUICK_MODEL if quick else MODEL,
            "cluster": {"accelerators_per_node": RANKS},
            "training": {
                "backend": backend,
                "layout": {"dp": RANKS},
                "micro_batch": 1,
                "global_batch": 8,
                "tokens": 10**6,
            },
        },
        "reshard",
    )


def large_job(ranks: int, ranks_per_node: int) -> JobConfig:
    """The job whose moves are planned only."""
    return parse_job(
        {
            "name": "reshard",
            "model": LARGE_MODEL,
            "cluster": {"nodes": -(-ranks // ranks_per_node), "accelerators_per_node": min(ranks, ranks_per_node)},
            "training": {
                "layout": {"dp": ranks},
                "global_batch": ranks,
                "evaluate_sequences": ranks,
                "tokens": 10**12,
                "precision": "bf16",
            },
        },
        "reshard",
    )


def walk(count: int) -> list[int]:
    """A closed walk over `count` places, from 0, that goes each ordered pair once (Hierholzer)."""
    left = {here: [there for there in range(count) if there != here] for here in range(count)}
    path, circuit = [0], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            circuit.append(path.pop())
    return circuit[::-1]


def start_ranks(task: dict[str, Any], folder: Path) -> tuple[dict[str, Any], float]:
    """Run a task on fresh ranks, as an engine would start them; what rank 0 wrote, and the time of the start."""
    (folder / "task.json").write_text(json.dumps(task))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "benchmarks.reshard_ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not result.exists():
        cause = done.stderr[max(0, done.stderr.find("Traceback")) :]
        raise SystemExit(f"the ranks failed ({done.returncode}):\n{cause[:4000]}")
    return json.loads(result.read_text()), started


def run(backend: str, quick: bool, repeats: int, restarts: int, console: Console) -> dict[str, Any]:
    """Moves, then restarts, through every list of layouts of a backend."""
    job = make_job(quick, backend)
    pairs: list[dict[str, Any]] = []
    for layouts in LAYOUTS[backend]:
        layouts = layouts[:3] if quick else layouts
        with tempfile.TemporaryDirectory(prefix="copus-reshard-") as name:
            folder = Path(name)
            path = walk(len(layouts))
            tour = path + path[1:] * (repeats - 1)
            task = {
                "do": "move",
                "backend": backend,
                "quick": quick,
                "tour": [layouts[place].model_dump() for place in tour],
            }
            console.print(f"{len(tour) - 1} moves among {', '.join(layout.label for layout in layouts)}")
            moved, _ = start_ranks(task, folder)
            count = min(restarts, len(layouts))
            restart = _restarts(layouts, moved["saves"], count, backend, quick, folder, console)
        pairs += _pairs(job, layouts, tour, moved["moves"], restart)
    measured = [pair for pair in pairs if pair["restart_seconds"] is not None]
    speedups = [pair["restart_seconds"] / pair["move_seconds"] for pair in measured]
    return {
        "benchmark": "reshard",
        "backend": backend,
        "quick": quick,
        "device": moved["device"],
        "software": moved["software"],
        "parameters": job.model.parameters,
        "repeats": repeats,
        "max_abs_diff": max(pair["max_abs_diff"] for pair in pairs),
        "max_moved_over_floor": max(
            pair["bytes_moved"] / max(1, pair["bytes_floor"]) for pair in pairs if pair["bytes_moved"]
        ),
        "speedup_median": statistics.median(speedups) if speedups else None,
        "speedup_min": min(speedups) if speedups else None,
        "restarts_measured": sum(pair["restart_measured"] for pair in pairs),
        "pairs": pairs,
    }


def _restarts(
    layouts: list[Layout],
    saves: dict[str, float],
    count: int,
    backend: str,
    quick: bool,
    folder: Path,
    console: Console,
) -> dict[str, Any]:
    """Time to leave each layout (its checkpoint), and to arrive at some (start, imports, groups, model, load).

    The ring layouts[i] → layouts[i + 1] is measured: every layout is left once and arrived at once.
    """
    arrive: dict[str, float] = {}
    ring: dict[tuple[str, str], float] = {}
    for index in range(count):
        before, after = layouts[index], layouts[(index + 1) % len(layouts)]
        console.print(f"restart {before.label} → {after.label}")
        task = {"do": "load", "backend": backend, "quick": quick, "layout": after.model_dump()}
        task["checkpoint"] = str(folder / before.label)
        result, started = start_ranks(task, folder)
        arrive[after.label] = result["ready"] - started
        ring[before.label, after.label] = saves[before.label] + arrive[after.label]
    return {"leave": saves, "arrive": arrive, "ring": ring}


def _pairs(
    job: JobConfig, layouts: list[Layout], tour: list[int], moves: list[dict[str, Any]], restart: dict[str, Any]
) -> list[dict[str, Any]]:
    import torch  # some seconds: not for --help

    shard_table = find_backend(job.training.backend).load()(job, torch.device("cpu")).shard_table
    by_pair: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for pair, move in zip(itertools.pairwise(tour), moves, strict=True):
        by_pair.setdefault(pair, []).append(move)
    rows = []
    for (first, second), made in sorted(by_pair.items()):
        before, after = layouts[first], layouts[second]
        tables = [shard_table(layout) for layout in (before, after)]
        seconds = [move["seconds"] for move in made]
        measured = (before.label, after.label) in restart["ring"]
        other = None
        if after.label in restart["arrive"]:
            other = restart["leave"][before.label] + restart["arrive"][after.label]
        rows.append(
            {
                "before": before.label,
                "after": after.label,
                "max_abs_diff": max(move["max_abs_diff"] for move in made),
                "bytes_moved": made[0]["bytes_moved"],
                "bytes_floor": bytes_floor(*tables),
                "move_seconds": statistics.median(seconds),
                "move_seconds_all": seconds,
                "phases": {
                    name: statistics.median(move["phases"][name] for move in made) for name in made[0]["phases"]
                },
                "peak_bytes": made[-1]["peak_bytes"],
                "restart_seconds": other,
                "restart_measured": measured,
            }
        )
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    if "plans" in result:
        console.print(f"{result['parameters'] / 1e9:.1f} B parameters, {result['ranks']} ranks")
        table = Table("move", "plan s (CPU)", "transfers", "moved GB", "moved/floor", "max/mean sent", "same node")
        for plan in result["plans"]:
            table.add_row(
                f"{plan['before']} → {plan['after']}",
                f"{plan['plan_seconds']:.2f} ({plan['plan_cpu_seconds']:.2f})",
                str(plan["transfers"]),
                f"{plan['bytes_moved'] / 1e9:.0f}",
                f"{plan['bytes_moved'] / max(1, plan['bytes_floor']):.4f}",
                f"{plan['max_over_mean_sent']:.3f}",
                f"{100 * plan['same_node_fraction']:.0f} %",
            )
        console.print(table)
        return
    console.print(
        f"{result['device']} · {result['software']} · {result['parameters'] / 1e6:.1f} M parameters, {RANKS} ranks"
    )
    table = Table("move", "max diff", "moved MB", "moved/floor", "s (min–max)", "restart s", "faster", "peak MiB")
    for pair in result["pairs"]:
        times, restart = pair["move_seconds_all"], pair["restart_seconds"]
        table.add_row(
            f"{pair['before']} → {pair['after']}",
            f"{pair['max_abs_diff']:g}",
            f"{pair['bytes_moved'] / 1e6:.0f}",
            f"{pair['bytes_moved'] / pair['bytes_floor']:.3f}" if pair["bytes_floor"] else "nothing to move",
            f"{pair['move_seconds']:.2f} ({min(times):.2f}–{max(times):.2f})",
            "?" if restart is None else f"{restart:.1f}{'' if pair['restart_measured'] else '*'}",
            "?" if restart is None else f"{restart / pair['move_seconds']:.1f}×",
            "?" if pair["peak_bytes"] is None else f"{pair['peak_bytes'] / 2**20:.0f}",
        )
    console.print(table)
    console.print("* not measured as a pair: checkpoint of the one layout + start and load of the other, each measured")
    if result["speedup_median"] is not None:
        console.print(
            f"faster than a restart: median {result['speedup_median']:.1f}×, least {result['speedup_min']:.1f}×"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("reshard", __doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, few pairs, one restart: whether it works")
    parser.add_argument("--backend", choices=sorted(LAYOUTS), default="megatron", help="framework that trains")
    parser.add_argument("--repeats", type=int, default=3, help="times that each pair is moved")
    parser.add_argument("--restarts", type=int, default=6, help="restarts that are measured, of a ring of six pairs")
    parser.add_argument("--plan-only", action="store_true", help="plan the move of a 70 B model in this process")
    parser.add_argument("--ranks", type=int, default=1024, help="with --plan-only: how many; a multiple of 32")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="with --plan-only")
    options = parser.parse_args(arguments)
    console = console_of(options)
    if options.plan_only:
        result = plan_only(options.ranks, options.ranks_per_node)
    else:
        repeats, restarts = (1, 1) if options.quick else (options.repeats, options.restarts)
        result = run(options.backend, options.quick, repeats, restarts, console)
    tell(result, show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
