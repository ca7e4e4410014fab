"""What the link between two hosts does to step times, to the best configuration, to moves, and to the time to a loss.

    python -m benchmarks.hosts [--gbit 10,1,0.1] [--quick] [--out DIR] [--json]
    python -m benchmarks.hosts --train --gbit 0.1 [--seeds N] [--quick] [--out DIR] [--json]

Two hosts of network namespaces on this machine (Linux, root), a rank on each, and between them links of one bandwidth
after the other (`tc tbf`, both directions; the latency is that of this machine). On each link the job's profiler
measures all layouts, also tensor parallelism over the link, which the planner leaves out unless the job file lists it.
Then a job moves through the layouts, and each move is timed. Links that are finished are kept in DIR.

With `--train`, `benchmarks.time_to_target` runs on one of the links: `goodput` against every fixed batch in its fastest
layout, with a decay. The profiler goes on with what it has measured there.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import time_to_target
from benchmarks.command import console_of, overrides_of, parser_of, set_arguments, tell
from benchmarks.time_to_target import JOB, Settings, measured_of
from copus.data.prepare import prepare
from copus.durable import write_atomically
from copus.events import Reconfigure, read_events
from copus.job import load_job
from launch.engines.hosts import HostsEngine
from launch.engines.hosts_options import HostsOptions
from launch.run_directory import create_run, lock_run, portable
from planner.job_estimate import JobEstimate
from tests import hosts

OUT = Path("build/hosts")
GBIT = "10,1,0.1"
WORKLOAD = "short-sequences"
"""Of `benchmarks.time_to_target`: the job file as it is."""
QUICK_BATCHES = "4,8"
"""Fixed ones that `--train` compares with."""
PROFILE_SECONDS, QUICK_PROFILE_SECONDS = 240, 60
"""For measuring the steps on one link."""
LARGEST_BATCH, QUICK_LARGEST_BATCH = 64, 8
CIRCLES, QUICK_CIRCLES = 5, 1
"""How often a job moves through all layouts."""
SAMPLES_BETWEEN_MOVES = 16
SENT_SECONDS = 2.0
"""How long the throughput of the link itself is measured."""
RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
count, begun = 0, time.monotonic()
while data := peer.recv(1 << 20):
    count += len(data)
print(count / (time.monotonic() - begun))
"""
SEND = """
import socket, sys, time
block, end = bytes(1 << 18), time.monotonic() + float(sys.argv[3])
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as peer:
    while time.monotonic() < end:
        peer.sendall(block)
"""
Row = dict[str, Any]


@contextmanager
def linked() -> Iterator[hosts.Hosts]:
    """Two hosts, and the files of their ssh daemons, for as long; SIGTERM removes them too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="copus-hosts-") as folder, hosts.made(2, Path(folder)) as cluster:
        yield cluster


def limit(cluster: hosts.Hosts, gbit_per_second: float) -> None:
    """Give both cables this bandwidth."""
    for host in cluster.hosts:
        host.limit(1000 * gbit_per_second)


def settings_of(cluster: hosts.Hosts, quick: bool) -> Settings:
    """Over the job file of `benchmarks.time_to_target`: a rank on each host, and every layout."""
    from benchmarks.fault_worker import LAYOUTS  # imports torch: not for --help

    layouts = [layout.model_dump(mode="json", exclude_defaults=True) for layout in LAYOUTS["megatron"]]
    return {
        "cluster.nodes": 2,
        "cluster.accelerators_per_node": 1,
        "launch.engine": "hosts",
        "launch.options": json.dumps({"hosts": cluster.names, "command": cluster.ssh, "lost_seconds": 120}),
        "training.max_minutes": 60,
        "planner.layouts": json.dumps(layouts),
        "planner.max_global_batch": QUICK_LARGEST_BATCH if quick else LARGEST_BATCH,
        "planner.max_micro_batch": 2 if quick else 8,
    }


def measure(gbit_per_second: float, cluster: hosts.Hosts, quick: bool, out: Path, console: Console) -> Row:
    """Steps and moves over a link of this bandwidth. Raises SystemExit if a job fails."""
    limit(cluster, gbit_per_second)
    settings = settings_of(cluster, quick)
    table = out / WORKLOAD
    table.mkdir(parents=True, exist_ok=True)
    tcp, budget_seconds = link_gbit(cluster), QUICK_PROFILE_SECONDS if quick else PROFILE_SECONDS
    console.print(f"{gbit_per_second:g} Gbit/s: steps, at most {budget_seconds} s of them")
    estimate = measured_of(JOB, settings, table, budget_seconds)
    assert estimate.fingerprint is not None
    config = load_job(JOB, overrides_of(settings)).planner
    best = [
        {"noise_scale_from": span.low, "configuration": span.best.configuration.label}
        for span in estimate.by_noise(config)
    ]
    console.print(f"{gbit_per_second:g} Gbit/s: moves")
    return {
        "gbit_per_second": gbit_per_second,
        "tcp_gbit_per_second": tcp,
        "hardware": estimate.fingerprint.hardware,
        "software": estimate.fingerprint.software,
        "steps": steps_of(estimate),
        "best": best,
        "moves": moves_of({**settings, "launch.runs": out / "runs"}, QUICK_CIRCLES if quick else CIRCLES),
    }


def link_gbit(cluster: hosts.Hosts) -> float:
    """What one TCP connection gets through from the first host to the second, Gbit/s."""
    sender, receiver = (["ip", "netns", "exec", host.name, sys.executable, "-c"] for host in cluster.hosts)
    address = cluster[1].address
    with subprocess.Popen([*receiver, RECEIVE, address], stdout=subprocess.PIPE, text=True) as receiving:
        assert receiving.stdout is not None
        port = receiving.stdout.readline().strip()
        subprocess.run([*sender, SEND, address, port, str(SENT_SECONDS)], check=True)
        return float(receiving.stdout.readline()) * 8 / 1e9


def steps_of(estimate: JobEstimate) -> list[Row]:
    """By global batch and layout: the fastest micro-batch, and its step in seconds."""
    fastest: dict[tuple[int, str], Row] = {}
    for candidate in estimate.eligible:
        configuration, seconds = candidate.configuration, candidate.step_seconds
        key = configuration.global_batch, configuration.layout.label
        if seconds is not None and (key not in fastest or seconds < fastest[key]["step_seconds"]):
            step = {"micro_batch": configuration.micro_batch, "step_seconds": seconds, "source": candidate.source}
            fastest[key] = {"global_batch": key[0], "layout": key[1], **step}
    return [fastest[key] for key in sorted(fastest)]


def moves_of(settings: Settings, circles: int) -> list[Row]:
    """Moves of a job through all layouts: medians by pair. Raises SystemExit if it fails."""
    moves, batch = circles * len(json.loads(settings["planner.layouts"])), 4
    own = {
        "name": "moves",
        "training.layout": json.dumps({"dp": 2}),
        "training.global_batch": batch,
        "training.micro_batch": 1,
        "training.tokens": load_job(JOB).model.seq_len * SAMPLES_BETWEEN_MOVES * (moves + 1),
        "training.warmup_tokens": 0,
        "training.target_loss": "null",
        "training.evaluate_every_tokens": 10**9,
        "training.evaluate_sequences": batch,
        "planner.every_samples": SAMPLES_BETWEEN_MOVES,
        "planner.start": "job",
        "profile.when": "never",
    }
    job = portable(load_job(JOB, overrides_of({**settings, **own})))
    engine = HostsEngine(HostsOptions.model_validate(job.launch.options), ["-m", "benchmarks.fault_worker"])
    run = create_run(job)
    prepare(job)
    with lock_run(run) as lock:
        workers = engine.start(run, job, lock)
        try:
            while (code := workers.poll()) is None:
                time.sleep(0.2)
        finally:
            if workers.poll() is None:
                workers.kill()
    if code:
        raise SystemExit(f"the job that moves ended with {code}: its logs are in {workers.logs}")
    return medians([event for event in read_events(run) if isinstance(event, Reconfigure)])


def medians(moves: Sequence[Reconfigure]) -> list[Row]:
    """A row for each pair of layouts."""
    pairs: defaultdict[tuple[str, str], list[Reconfigure]] = defaultdict(list)
    for move in moves:
        pairs[move.before.layout.label, move.after.layout.label].append(move)
    return [
        {
            "before": before,
            "after": after,
            "bytes_moved": made[0].bytes_moved,
            "seconds": median(move.seconds for move in made),
            "seconds_all": [move.seconds for move in made],
        }
        for (before, after), made in pairs.items()
    ]


def measure_all(options: argparse.Namespace, out: Path, console: Console) -> Row:
    """One link after the other, those left out that OUT has."""
    with linked() as cluster:
        links = []
        for gbit in options.gbit:
            kept = out / f"{gbit:g}" / "link.json"
            if not kept.exists():
                link = measure(gbit, cluster, options.quick, kept.parent, console)
                write_atomically(kept, json.dumps(link))
            links.append(json.loads(kept.read_text()))
    return {"benchmark": "hosts", "parameters": load_job(JOB).model.parameters, "links": links}


def train(options: argparse.Namespace, out: Path) -> int:
    """`benchmarks.time_to_target` over the first of the links."""
    gbit, *_ = options.gbit
    batches = QUICK_BATCHES if options.quick else time_to_target.BATCHES
    names = [*(f"static-{batch}" for batch in batches.split(",")), "goodput", "goodput-table"]
    words = ["--workloads", WORKLOAD, "--decay", "cosine", "--neighbour", "quiet", "--batches", batches]
    words += ["--only", ",".join(names), "--seeds", str(options.seeds), "--out", str(out / f"{gbit:g}")]
    words += ["--profile-seconds", str(QUICK_PROFILE_SECONDS if options.quick else PROFILE_SECONDS)]
    words += ["--quick"] * options.quick + ["--json"] * options.json
    with linked() as cluster:
        limit(cluster, gbit)
        return time_to_target.main([*words, *set_arguments(overrides_of(settings_of(cluster, options.quick)))])


def show(result: Row, console: Console) -> None:
    """By bandwidth: the step of every layout at every batch, the best configurations, the moves."""
    links = result["links"]
    first = links[0]
    console.print(f"{first['hardware']} · {first['software']} · {result['parameters'] / 1e6:.1f} M parameters")
    header = [f"{link['gbit_per_second']:g} Gbit/s (TCP {link['tcp_gbit_per_second']:.2g})" for link in links]
    steps = Table(
        "batch", "layout", *header, title="seconds of a step in the fastest micro-batch; * the fastest layout"
    )
    by_link = [{(row["global_batch"], row["layout"]): row for row in link["steps"]} for link in links]
    cells = sorted(set().union(*by_link))
    for batch, layout in cells:
        rivals = [other for of_batch, other in cells if of_batch == batch]
        steps.add_row(str(batch), layout, *(_step(rows, batch, layout, rivals) for rows in by_link))
    console.print(steps)
    best = Table(*header, title="configuration with the most Goodput, from a noise scale on (sequences)")
    best.add_row(
        *("\n".join(f"{one['noise_scale_from']:.3g}: {one['configuration']}" for one in link["best"]) for link in links)
    )
    console.print(best)
    moves = Table("move", "MB", *header, title="seconds of a move, medians")
    of_link = [{(move["before"], move["after"]): move for move in link["moves"]} for link in links]
    for pair, move in of_link[0].items():
        seconds = (f"{made[pair]['seconds']:.2f}" if pair in made else "–" for made in of_link)
        moves.add_row(" → ".join(pair), f"{move['bytes_moved'] / 1e6:.1f}", *seconds)
    console.print(moves)


def _step(rows: dict[tuple[int, str], Row], batch: int, layout: str, rivals: Sequence[str]) -> str:
    """With a * if all rivals were measured, and it is the fastest."""
    row = rows.get((batch, layout))
    if row is None:
        return "–"
    of_rivals = [rows[batch, rival]["step_seconds"] for rival in rivals if (batch, rival) in rows]
    is_fastest = len(of_rivals) == len(rivals) and row["step_seconds"] == min(of_rivals)
    return f"{row['step_seconds']:.3f} m{row['micro_batch']}{'*' * is_fastest}"


def _bandwidths(text: str) -> list[float]:
    """Gbit/s, with commas between."""
    values = [float(word) for word in text.split(",")]
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text}: bandwidths are above 0")
    return values


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = parser_of("hosts", __doc__)
    parser.add_argument("--gbit", type=_bandwidths, default=GBIT, help=f"Gbit/s of the links, {GBIT}")
    parser.add_argument("--train", action="store_true", help="train to a loss over the first of the links instead")
    parser.add_argument("--seeds", type=int, default=2, help="of --train: 2")
    parser.add_argument("--quick", action="store_true", help="batches up to 8, less of everything")
    parser.add_argument("--out", type=Path, default=None, help=f"folder with the runs, {OUT}; finished ones are kept")
    options = parser.parse_args(arguments)
    if reason := hosts.why_not():
        raise SystemExit(f"benchmarks.hosts: {reason}")
    out = (options.out or OUT.with_name(f"{OUT.name}{'-quick' * options.quick}")).absolute()
    if options.train:
        return train(options, out)
    console = console_of(options)
    tell(measure_all(options, out, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
