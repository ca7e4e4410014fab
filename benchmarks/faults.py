"""Faults at random moments of a small job, and what is left of it.

    python -m benchmarks.faults [--backend NAME] [--data DIR] [--quick] [--only KIND] [--json] [--seed N]

The real command's engine (torch's elastic agent), the real worker with scripted moves, real signals. A run without
faults comes first; every other run has to end by itself at the same number of samples, to have each sample once in its
final lineage, and to hold the same weights and optimizer state to the bit. The job that shrinks from 4 to 2 ranks and
grows back, and so adds in another order, has to have the same losses within 1e-4.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fault_files import final_state, largest_difference, spoil
from benchmarks.fault_worker import LAYOUTS
from copus.data.prepare import prepare
from copus.event_lines import without_replays
from copus.events import Checkpoint, End, Event, Failure, Reconfigure, Restart, Start, Step, read_events
from copus.job import JobConfig, dump_job, parse_job
from launch.engines import LocalEngine, Workers
from launch.follow import Follower
from launch.run_directory import create_run, lock_run

FULL = (
    ("kill in training",) * 9
    + ("kill in a move",) * 5
    + ("kill in a checkpoint",) * 5
    + ("hang",) * 3
    + ("truncated file",) * 3
    + ("flipped bit",) * 3
    + ("half-written checkpoint",) * 1
    + ("full disk",) * 2
)
RESIZE = "change of ranks"
QUICK = ("kill in training", "kill in a move", "kill in a checkpoint", "flipped bit")
SAMPLES_BETWEEN = 128
"""Samples from a fault's recovery to the next fault, at most; at least a quarter of it."""
FAULTS_IN_A_RUN = 10
LASTS_SECONDS = {"move": 0.05, "checkpoint": 0.2}
"""About as long as one takes with this model: the moment is random within it."""
TIMEOUT_SECONDS = 20.0
"""A collective that takes longer is a hang: long enough for the ranks of a busy machine to start."""
PATIENCE_SECONDS = 240.0
"""A fault from which nothing comes in this time has broken the run."""


@dataclass
class Fault:
    """What was done, and what came of it."""

    kind: str
    ok: bool
    detail: str


def job_for(folder: Path, backend: str, ranks: int, samples: int, **training: Any) -> JobConfig:
    """A tiny model on made-up words, with a checkpoint and a move every few steps."""
    generator = random.Random(0)
    for name in ("train", "valid"):
        lines = ("".join(generator.choices("abcdefghij ", k=80)) for _ in range(samples))
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text("\n".join(lines))
    return parse_job(
        {
            "name": "faults",
            "model": {
                "layers": 4, "hidden": 32, "ffn_hidden": 48, "heads": 4, "kv_heads": 4, "seq_len": 16, "vocab": 300,
            },
            "data": {
                "source": [str(folder / "train.txt"), str(folder / "valid.txt")],
                "held_out": ["valid"],
                "cache": str(folder / "cache"),
            },
            "cluster": {"accelerators_per_node": ranks},
            "training": {
                "backend": backend,
                "layout": {"dp": ranks},
                "micro_batch": 1,
                "global_batch": 4,
                "tokens": 16 * samples,
                "lr": 3e-3,
                "evaluate_every_tokens": 16 * samples,
                "evaluate_sequences": 8,
                "checkpoint_every_tokens": 16 * 48,
                "keep_checkpoints": 3,
                **training,
            },
            "planner": {
                "start": "job",
                "every_samples": 64,
                "min_noise_samples": 4,
                "max_global_batch": 4,
                "max_micro_batch": 1,
            },
            "profile": {"when": "never", "table": str(folder / "table.jsonl")},
            "launch": {"runs": str(folder / "runs"), "max_restarts": 99, "timeout_seconds": TIMEOUT_SECONDS},
        }
    )  # fmt: skip


class Run:
    """A job on the local engine, with a hand on its workers."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self.folder = folder
        self.workers = workers
        self.follower = Follower(folder)
        self.events: list[Event] = []

    def look(self) -> None:
        """Read what is new. Raises RuntimeError if the workers are gone."""
        self.events += self.follower.read()
        if self.workers.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {self.workers.poll()}")

    def wait(self, condition: Callable[[], bool], what: str, interval: float = 0.005) -> None:
        """Until something is so. Raises TimeoutError."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not in {PATIENCE_SECONDS:.0f} s")
            time.sleep(interval)
            self.look()

    @property
    def samples(self) -> int:
        """Trained on, as the newest step says."""
        return next((event.samples_consumed for event in reversed(self.events) if isinstance(event, Step)), 0)

    def count(self, kind: type[Event]) -> int:
        """Events of a type so far."""
        return sum(isinstance(event, kind) for event in self.events)

    def phase(self) -> str:
        """What rank 0 is doing."""
        try:
            return (self.folder / "phase").read_text()
        except FileNotFoundError:
            return ""

    def hit(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        os.kill(int((self.folder / f"worker-{rank}.pid").read_text()), number)

    def checkpoints(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted((self.folder / "checkpoints").glob("samples-*"))


@contextmanager
def running(job: JobConfig, small_disk_bytes: int | None = None) -> Iterator[Run]:
    """Start a run; whatever is left of it at the end is killed. Optionally its checkpoints lie on a small disk."""
    folder = create_run(job)
    checkpoints = folder / "checkpoints"
    if small_disk_bytes is not None:
        checkpoints.mkdir()
        options = f"size={small_disk_bytes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "copus-faults", str(checkpoints)], check=True)
    try:
        with lock_run(folder) as lock:
            workers = LocalEngine(worker=["-m", "benchmarks.fault_worker"]).start(folder, job, lock)
            try:
                yield Run(folder, workers)
            finally:
                workers.kill()
    finally:
        if small_disk_bytes is not None:
            subprocess.run(["umount", "--lazy", str(checkpoints)], check=False, capture_output=True)


def strike(run: Run, kind: str, chance: random.Random) -> str:
    """Do it at a random moment, and see the run recover. What happened, in words; raises where nothing came of it."""
    run.wait(lambda: run.count(Start) > 0, "the first start", 0.05)
    aim = run.samples + chance.randrange(SAMPLES_BETWEEN // 4, SAMPLES_BETWEEN)
    run.wait(lambda: run.samples >= aim, "training")
    restarts, survived = run.count(Restart), run.count(Failure)
    if kind == "full disk":
        return _fill_disk(run)
    rank = chance.randrange(2)
    did = _do(run, kind, rank, chance)
    begun = time.monotonic()
    at = run.samples
    run.wait(lambda: run.count(Restart) > restarts, "the restart", 0.02)
    restart = next(event for event in reversed(run.events) if isinstance(event, Restart))
    seconds = time.monotonic() - begun
    run.wait(lambda: run.samples > restart.samples_consumed, "training after the restart")
    told = [e.message for e in run.events if isinstance(e, Failure) and not e.fatal][-1:]
    if kind in ("truncated file", "flipped bit", "half-written checkpoint"):
        recent = [e for e in run.events if isinstance(e, Failure)][survived:]
        if not any("skipped" in event.message for event in recent):
            raise RuntimeError(f"{did}, and no line says that it was skipped")
        did += f" ({told[0]})"
    return f"{did} at {at} samples; up after {seconds:.1f} s from {restart.resumed_from}; rank {rank}"


def _do(run: Run, kind: str, rank: int, chance: random.Random) -> str:
    if kind.startswith("kill in a "):
        phase = kind.removeprefix("kill in a ")
        run.wait(lambda: run.phase() == phase, phase, 0.001)
        time.sleep(chance.uniform(0, LASTS_SECONDS[phase]))
        seen = run.phase()
        run.hit(rank, signal.SIGKILL)
        return f"SIGKILL while rank 0 was in: {seen}"
    time.sleep(chance.uniform(0, 0.1))
    if kind == "kill in training":
        run.hit(rank, signal.SIGKILL)
        return "SIGKILL"
    if kind == "hang":
        run.hit(rank, signal.SIGSTOP)
        return "SIGSTOP"
    # There has to be another one to go back to: without any a run ends, and says how to train from the first step.
    run.wait(lambda: len(run.checkpoints()) > 1 and run.phase() == "training", "a second checkpoint")
    what = spoil(run.checkpoints()[-1], kind, chance)
    run.hit(rank, signal.SIGKILL)
    return f"{what}, SIGKILL"


def _fill_disk(run: Run) -> str:
    """Leave no room, see the warning, make room again, see a checkpoint."""
    run.wait(lambda: run.phase() == "training", "a moment between checkpoints")
    filler = run.folder / "checkpoints" / "filler"
    warned, at = run.count(Failure), run.samples
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    run.wait(lambda: run.count(Failure) > warned, "a warning")
    warning = next(event for event in reversed(run.events) if isinstance(event, Failure))
    if warning.fatal:
        raise RuntimeError(f"the full disk ended the run: {warning.message}")
    if not run.checkpoints():
        raise RuntimeError("the full disk cost the last good checkpoint")
    run.wait(lambda: run.samples > warning.samples_consumed, "training on a full disk")
    written = run.count(Checkpoint)
    filler.unlink()
    run.wait(lambda: run.count(Checkpoint) > written, "a checkpoint after there was room again")
    return f"disk filled at {at} samples: {warning.message}"


def finish(run: Run, job: JobConfig, reference: Path) -> tuple[str, int, int]:
    """Wait for the end: what is wrong with it (empty for nothing), samples lost, samples repeated."""
    end = time.monotonic() + 3 * PATIENCE_SECONDS
    while run.workers.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    code = run.workers.poll()
    lost, repeated = lineage(run.folder, job.total_samples)
    if code != 0:
        return f"the run ended with {code}", lost, repeated
    if lost or repeated:
        return f"{lost} samples lost, {repeated} repeated", lost, repeated
    difference = largest_difference(final_state(run.folder), final_state(reference))
    return ("" if difference == 0 else f"weights or optimizer state differ by {difference:g}"), lost, repeated


def lineage(run: Path, total: int) -> tuple[int, int]:
    """Samples that the final lineage of a run lacks, and has more than once."""
    consumed = lost = repeated = 0
    for event in without_replays(read_events(run)):
        if isinstance(event, Step):
            first = event.samples_consumed - event.global_batch
            lost += max(0, first - consumed)
            repeated += max(0, consumed - first)
            consumed = event.samples_consumed
    return lost + max(0, total - consumed), repeated


def disturbed(
    job: JobConfig, kinds: tuple[str, ...], chance: random.Random, reference: Path, say: Callable[[str], None]
) -> tuple[list[Fault], int, int]:
    """One run with these faults, one after the other."""
    faults: list[Fault] = []
    final = max((reference / "checkpoints").glob("samples-*"))
    room = 8 * sum(file.stat().st_size for file in final.rglob("*")) + 2**20
    with running(job, room if "full disk" in kinds else None) as run:
        for kind in kinds:
            try:
                faults.append(Fault(kind, True, strike(run, kind, chance)))
            except (RuntimeError, TimeoutError, OSError) as error:
                faults.append(Fault(kind, False, str(error)))
            say(f"{'ok ' if faults[-1].ok else 'BAD'} {kind}: {faults[-1].detail}")
        wrong, lost, repeated = finish(run, job, reference)
    if wrong:
        say(f"BAD the end of the run: {wrong}")
    ended = [Fault(f.kind, f.ok and not wrong, f"{f.detail}{'; in the end: ' * bool(wrong)}{wrong}") for f in faults]
    return ended, lost, repeated


def resized(folder: Path, backend: str, say: Callable[[str], None]) -> tuple[list[Fault], int, int]:
    """4 → 2 → 4 ranks through `copus submit --resume`, against 4 ranks all along."""
    # A third of the others' learning rate: at theirs one step in a hundred can have 40 times the gradient of its
    # neighbours, and what rounding does there is a thousand times what it does to the others.
    job = job_for(folder, backend, 4, 600, lr=1e-3)
    static = job.model_copy(update={"planner": job.planner.model_copy(update={"policy": "static"})})
    path = folder / "resize.yaml"
    path.write_text(dump_job(static.model_copy(update={"name": "resize"})))
    runs = folder / "runs"

    def copus(*arguments: str, stop_at: int | None = None, run: Path) -> None:
        with open(folder / "resize.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.cli", "submit", *arguments], stdout=log, stderr=log, cwd=folder,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            )  # fmt: skip
            end = time.monotonic() + 2 * PATIENCE_SECONDS
            follower, samples = Follower(run), 0
            while process.poll() is None:
                new = [event.samples_consumed for event in follower.read() if isinstance(event, Step)]
                samples = new[-1] if new else samples
                if stop_at is not None and samples >= stop_at:
                    process.send_signal(signal.SIGINT)
                    stop_at = None
                if time.monotonic() > end:
                    process.kill()
                    raise TimeoutError("the command does not end")
                time.sleep(0.01)

    steady, run = runs / "resize", runs / "resize-2"
    copus(str(path), run=steady)
    copus(str(path), stop_at=200, run=run)
    faults, begun = [], time.monotonic()
    for kind, ranks, stop_at in (("shrink 4 to 2 ranks", 2, 400), ("grow 2 to 4 ranks", 4, None)):
        copus("--resume", str(run), "--set", f"cluster.accelerators_per_node={ranks}", stop_at=stop_at, run=run)
        starts = [event for event in read_events(run) if isinstance(event, Start)]
        configuration = starts[-1].configuration
        ok = configuration.layout.accelerators == ranks
        detail = f"went on at {starts[-1].samples_consumed} samples with {configuration.label}"
        faults.append(Fault(kind, ok, f"{detail}; {time.monotonic() - begun:.0f} s"))
    lost, repeated = lineage(run, static.total_samples)
    losses = {event.samples_consumed: event.loss for event in read_events(steady) if isinstance(event, Step)}
    mine = {e.samples_consumed: e.loss for e in without_replays(read_events(run)) if isinstance(e, Step)}
    same = losses.keys() == mine.keys()
    worst = max((abs((mine[at] or 0.0) - (losses[at] or 0.0)) for at in mine if at in losses), default=float("inf"))
    ended = any(isinstance(event, End) and event.reason == "finished" for event in read_events(run))
    good = same and worst < 1e-4 and ended and not lost and not repeated
    what = f"; largest difference in loss {worst:.1e} over {len(mine)} steps"
    faults = [Fault(f.kind, f.ok and good, f.detail + what) for f in faults]
    for fault in faults:
        say(f"{'ok ' if fault.ok else 'BAD'} {fault.kind}: {fault.detail}")
    return faults, lost, repeated


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if every fault was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=sorted(LAYOUTS), default="megatron", help="framework that trains")
    parser.add_argument("--data", type=Path, help="folder to work in; a temporary one without it")
    parser.add_argument("--quick", action="store_true", help="a handful of faults, without the change of ranks")
    parser.add_argument("--only", choices=sorted({*FULL, RESIZE}), help="the faults of one kind")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args(arguments)
    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    kinds = [kind for kind in (*FULL, RESIZE) if kind == options.only] or [
        *(QUICK if options.quick else (*FULL, RESIZE))
    ]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="copus-faults-") as temporary:
        folder = (options.data or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        faults, lost, repeated = _all(folder, options.backend, kinds, random.Random(options.seed), say)
    result = {
        "backend": options.backend,
        "faults": [asdict(fault) for fault in faults],
        "samples_lost": lost,
        "samples_repeated": repeated,
        "seconds": round(time.monotonic() - begun, 1),
        "seed": options.seed,
    }
    if options.json:
        print(json.dumps(result))
    else:
        table = Table("kind", "tried", "survived")
        for kind in dict.fromkeys(fault.kind for fault in faults):
            oks = [fault.ok for fault in faults if fault.kind == kind]
            table.add_row(kind, str(len(oks)), str(sum(oks)))
        Console().print(table, f"samples lost {lost}, repeated {repeated}; {result['seconds']} s", sep="\n")
    return 0 if all(fault.ok for fault in faults) and not lost and not repeated else 1


def _can_mount(folder: Path) -> bool:
    point = folder / "mount"
    point.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096", "copus-faults", str(point)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        return False
    return subprocess.run(["umount", str(point)], check=False).returncode == 0


def _one_after_another(
    folder: Path, backend: str, kinds: list[str], chance: random.Random, say: Callable[[str], None]
) -> tuple[list[Fault], int, int]:
    """A run without faults, and as many runs with them as it takes."""
    chance.shuffle(kinds)
    groups = [tuple(kinds[first : first + FAULTS_IN_A_RUN]) for first in range(0, len(kinds), FAULTS_IN_A_RUN)]
    job = job_for(folder, backend, 2, SAMPLES_BETWEEN * (max(map(len, groups)) + 4))
    prepare(job)
    with running(job) as run:
        say(f"undisturbed: {job.total_samples} samples")
        while run.workers.poll() is None:
            time.sleep(0.05)
        reference = run.folder
    if run.workers.poll() != 0:
        raise SystemExit(f"the run without faults failed: {reference}")
    moves = sum(isinstance(event, Reconfigure) for event in read_events(reference))
    say(f"undisturbed: done, {moves} moves")
    faults: list[Fault] = []
    lost = repeated = 0
    for group in groups:
        of_group, group_lost, group_repeated = disturbed(job, group, chance, reference, say)
        faults, lost, repeated = faults + of_group, lost + group_lost, repeated + group_repeated
    return faults, lost, repeated


def _all(
    folder: Path, backend: str, kinds: list[str], chance: random.Random, say: Callable[[str], None]
) -> tuple[list[Fault], int, int]:
    resizes, kinds = RESIZE in kinds, [kind for kind in kinds if kind != RESIZE]
    faults: list[Fault] = []
    if "full disk" in kinds and not _can_mount(folder):
        why = "not tried: a small disk takes the right to mount one"
        faults = [Fault(kind, False, why) for kind in kinds if kind == "full disk"]
        kinds = [kind for kind in kinds if kind != "full disk"]
    lost = repeated = 0
    if kinds:
        outcomes, lost, repeated = _one_after_another(folder, backend, kinds, chance, say)
        faults += outcomes
    if resizes:
        outcomes, group_lost, group_repeated = resized(folder, backend, say)
        faults, lost, repeated = faults + outcomes, lost + group_lost, repeated + group_repeated
    return faults, lost, repeated


if __name__ == "__main__":
    sys.exit(main())
