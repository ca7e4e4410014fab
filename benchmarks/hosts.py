"""What the link between two hosts does to step times, to the best layout and batch, and to moves.

    python -m benchmarks.hosts [--gbit 10,1,0.1] [--ranks 2] [--data DIR] [--json]

Two hosts of network namespaces on this machine (root only), with a link of each bandwidth between them in turn
(`tc tbf`, both directions, latency of the machine itself). On each, the job's own profiler measures four layouts, and
the planner's predictor fills the batches between; then a job moves through the layouts.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from benchmarks.faults import job_for
from copus.data.prepare import prepare
from copus.events import Reconfigure, read_events
from copus.job import JobConfig, parse_job
from launch.engines.base import Workers
from launch.engines.hosts import HostsEngine
from launch.engines.hosts_options import HostsOptions
from launch.run_directory import create_run, lock_run
from planner.goodput import goodput
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.table import ThroughputTable
from profiles.throughput import Throughput
from tests import hosts

MODEL = {"layers": 4, "hidden": 256, "ffn_hidden": 704, "heads": 8, "kv_heads": 4, "seq_len": 64, "vocab": 1024}
"""3.4 M parameters: 14 MB of gradients."""
BATCHES = (4, 8, 16, 32, 64)
MICRO_BATCHES = (1, 2, 4, 8)
CRITICAL_BATCHES = (8.0, 32.0, 128.0)
"""Sequences: what the best batch is told for, beside the bandwidth."""
MOVES = 8
PATIENCE_SECONDS = 900.0


def layouts_of(ranks: int) -> list[Layout]:
    """Data, tensor and pipeline parallel ones, and the sharded optimizer; on 4 ranks with tensor parallelism within a
    host too."""
    plain = [Layout(dp=ranks), Layout(tp=ranks), Layout(pp=ranks), Layout(dp=ranks, zero=1)]
    return plain if ranks == 2 else [*plain, Layout(tp=2, dp=2), Layout(tp=2, pp=2)]


def job_of(folder: Path, cluster: "hosts.Hosts", ranks: int, name: str, **training: Any) -> JobConfig:
    """A job with the ranks on both hosts."""
    values = job_for(folder, "megatron", ranks, 4000).model_dump(mode="json")
    values |= {"name": name, "model": MODEL, "cluster": {"nodes": 2, "accelerators_per_node": ranks // 2}}
    values["data"]["cache"] = str(folder / "cache")
    values["training"] |= {"layout": {"dp": ranks}, "global_batch": 4, "evaluate_sequences": 8, **training}
    values["training"]["evaluate_every_tokens"] = values["training"]["checkpoint_every_tokens"] = 10**9
    values["planner"] |= {
        "layouts": [layout.model_dump(mode="json") for layout in layouts_of(ranks)],
        "max_global_batch": max(BATCHES),
        "max_micro_batch": max(MICRO_BATCHES),
        "every_samples": 16,
    }
    values["profile"] = {
        "when": "missing",
        "table": str(folder / f"{name}.jsonl"),
        "budget_seconds": 400.0,
        "rounds": 1,
    }
    values["tracking"] = {}
    options = {"hosts": cluster.names, "command": cluster.ssh, "lost_seconds": 60}
    values["launch"] |= {"engine": "hosts", "timeout_seconds": 300.0, "options": options}
    return parse_job(values)


@contextmanager
def started(
    job: JobConfig, worker: list[str] | None = None, *, profile_only: bool = False
) -> Iterator[tuple[Path, Workers]]:
    """Prepare and start it; whatever is left of it at the end is killed."""
    engine = HostsEngine(HostsOptions.model_validate(job.launch.options), **({"worker": worker} if worker else {}))
    folder = create_run(job)
    prepare(job)
    with lock_run(folder) as lock:
        workers = engine.start(folder, job, lock, profile_only=profile_only)
        try:
            yield folder, workers
        finally:
            if workers.poll() is None:
                workers.kill()


def wait_for_end(folder: Path, workers: Workers) -> None:
    """Raises RuntimeError where it fails, or lasts too long."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (code := workers.poll()) is None and time.monotonic() < end:
        time.sleep(0.2)
    if code != 0:
        raise RuntimeError(f"{folder} ended with {code}: its logs are in {workers.logs}")


def step_times(job: JobConfig) -> Throughput:
    """What the job's profiler measures on the hosts."""
    with started(job, profile_only=True) as (folder, workers):
        wait_for_end(folder, workers)
    return Throughput(ThroughputTable(job.profile.table).rows())


def moves_of(job: JobConfig) -> list[Reconfigure]:
    """Moves of a job through all layouts, in a circle."""
    with started(job, ["-m", "benchmarks.fault_worker"]) as (folder, workers):
        wait_for_end(folder, workers)
        return [event for event in read_events(folder) if isinstance(event, Reconfigure)]


def fastest(throughput: Throughput, ranks: int) -> list[dict[str, Any]]:
    """By batch and layout: the fastest micro-batch, and its step."""
    rows = []
    for batch in BATCHES:
        for layout in layouts_of(ranks):
            choices = []
            for micro_batch in MICRO_BATCHES:
                if batch % (layout.dp * micro_batch) == 0:
                    configuration = Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)
                    seen = throughput.predict(configuration)
                    if seen is not None and seen.step_seconds:
                        choices.append((seen.step_seconds, micro_batch))
            if choices:
                seconds, micro_batch = min(choices)
                rows.append(
                    {"global_batch": batch, "layout": layout.label, "micro_batch": micro_batch, "step_seconds": seconds}
                )
    return rows


def best(rows: list[dict[str, Any]], critical_batch: float) -> dict[str, Any]:
    """The row with the most goodput at this critical batch, sequences."""
    return max(
        rows, key=lambda row: goodput(row["global_batch"] / row["step_seconds"], row["global_batch"], critical_batch)
    )


def measure(folder: Path, gbits: list[float], ranks: int, console: Console) -> dict[str, Any]:
    """Everything, one bandwidth after the other."""
    links = []
    with hosts.made(2, folder / "cluster") as cluster:
        for gbit in gbits:
            begun = time.monotonic()
            for host in cluster.hosts:
                host.limit(gbit * 1000)
            rows = fastest(step_times(job_of(folder, cluster, ranks, f"steps-{gbit:g}-{ranks}")), ranks)
            moving = job_of(
                folder, cluster, ranks, f"moves-{gbit:g}-{ranks}", tokens=MODEL["seq_len"] * 16 * (MOVES + 1)
            )
            moves = moves_of(moving.model_copy(update={"profile": moving.profile.model_copy(update={"when": "never"})}))
            seconds = [move.seconds for move in moves]
            links.append(
                {
                    "gbit_per_second": gbit,
                    "steps": rows,
                    "best": {f"{critical:g}": best(rows, critical) for critical in CRITICAL_BATCHES},
                    "moves": [
                        {
                            "before": move.before.layout.label,
                            "after": move.after.layout.label,
                            "seconds": move.seconds,
                            "bytes": move.bytes_moved,
                        }
                        for move in moves
                    ],
                    "move_seconds": median(seconds) if seconds else None,
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
            console.print(f"{gbit:g} Gbit/s: measured in {links[-1]['seconds']} s", markup=False)
    return {"ranks": ranks, "load": os.getloadavg()[0], "cores": os.cpu_count(), "model": MODEL, "links": links}


def show(result: dict[str, Any], console: Console) -> None:
    """The fastest layout of each batch, the best batch, and the moves, by bandwidth."""
    links = result["links"]
    table = Table("batch", *(f"{link['gbit_per_second']:g} Gbit/s" for link in links))
    for batch in BATCHES:
        cells = []
        for link in links:
            rows = [row for row in link["steps"] if row["global_batch"] == batch]
            first = min(rows, key=lambda row: row["step_seconds"], default=None)
            cells.append(f"{first['layout']} m{first['micro_batch']}, {first['step_seconds']:.3f} s" if first else "")
        table.add_row(str(batch), *cells)
    for critical in CRITICAL_BATCHES:
        chosen = [link["best"][f"{critical:g}"] for link in links]
        table.add_row(f"best at φ {critical:g}", *(f"{row['layout']} B{row['global_batch']}" for row in chosen))
    table.add_row("a move", *(f"{link['move_seconds']:.2f} s" if link["move_seconds"] else "" for link in links))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run it."""
    parser: argparse.ArgumentParser = parser_of("hosts", __doc__)
    parser.add_argument("--gbit", default="10,1,0.1", help="bandwidths of the link, Gbit/s, with commas between")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2, help="ranks on both hosts together")
    parser.add_argument("--data", type=Path, help="folder to work in; a temporary one without it")
    options = parser.parse_args(arguments)
    if reason := hosts.why_not():
        raise SystemExit(f"benchmarks.hosts: {reason}")
    console = console_of(options)
    with tempfile.TemporaryDirectory(prefix="copus-hosts-") as temporary:
        folder = (options.data or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        result = measure(folder, [float(text) for text in options.gbit.split(",")], options.ranks, console)
    tell(result, show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
