"""A small job on hosts of network namespaces, and a hand on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import hosts

from benchmarks.faults import Run, job_for, lineage
from copus.data.prepare import prepare
from copus.events import Event, Start, Step, read_events
from copus.job import JobConfig, parse_job
from launch.engines import engine_of
from launch.engines.base import AttendedEngine
from launch.run_directory import create_run, lock_run, request_stop

LOST_SECONDS = 12
SAMPLES = 1_000_000
"""More than a test lasts."""
Kind = TypeVar("Kind", bound=Event)


def job_on(
    cluster: hosts.Hosts, folder: Path, indices: list[int], nodes: int | None = None, **options: object
) -> JobConfig:
    """A tiny model with one rank on each of `nodes` hosts (all of them); the others of `indices` are spares."""
    nodes = nodes or len(indices)
    values = job_for(folder, "megatron", 1, 4000, lr=1e-3).model_dump(mode="json")
    values["cluster"]["nodes"] = nodes
    batch = 12  # all numbers of ranks up to 4 divide it
    values["training"] |= {"layout": {"dp": nodes}, "global_batch": batch, "tokens": 16 * SAMPLES}
    values["training"] |= {"evaluate_sequences": 12, "evaluate_every_tokens": 16 * SAMPLES}
    values["training"] |= {"checkpoint_every_tokens": 16 * 120}
    values["planner"] |= {"policy": "static", "max_global_batch": batch}
    values["tracking"] = {}
    names = [cluster[index].name for index in indices]
    values["launch"] |= {
        "engine": "hosts",
        "timeout_seconds": 60.0,
        "options": {"hosts": names, "command": cluster.ssh, "lost_seconds": LOST_SECONDS, **options},
    }
    return parse_job(values)


class HostRun(Run):
    """A job that trains on hosts."""

    _starts = 0
    """At the last call of `trains`."""

    def trains(self, ranks: int) -> None:
        """Wait until it trains on so many ranks, in another start than at the last call."""

        def does() -> bool:
            starts = self.seen(Start)
            return (
                len(starts) > self._starts
                and starts[-1].configuration.layout.accelerators == ranks
                and len(self.seen_since_start(Step)) >= 5
            )

        self.wait(does, f"training on {ranks} ranks", 0.05)
        self._starts = len(self.seen(Start))

    def trains_for(self, samples: int) -> None:
        """Wait until it has trained on so many more."""
        end = self.samples + samples
        self.wait(lambda: self.samples >= end, f"training to {end} samples", 0.1)

    def seen(self, kind: type[Kind]) -> list[Kind]:
        """All events of a type so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def seen_since_start(self, kind: type[Kind]) -> list[Kind]:
        """Those since the newest start."""
        newest = max((index for index, event in enumerate(self.events) if isinstance(event, Start)), default=0)
        return [event for event in self.events[newest:] if isinstance(event, kind)]

    def stop(self) -> None:
        """Stop it with a checkpoint, and wait until it has."""
        request_stop(self.folder)
        hosts.wait_for("the end", lambda: self.workers.poll() is not None, 120)
        assert self.workers.poll() == 0, self.said()
        self.events = list(read_events(self.folder))

    def lineage(self) -> tuple[int, int]:
        """Samples that the run lacks and has twice, up to its end."""
        return lineage(self.folder, self.events[-1].samples_consumed)

    def said(self) -> str:
        """What the supervisor and the agents printed."""
        logs = sorted((self.folder / "logs").glob("*.log"), key=lambda log: log.stat().st_mtime)
        return "\n".join(f"==> {log.name} <==\n{log.read_text()}" for log in logs)


@contextmanager
def running(job: JobConfig) -> Iterator[HostRun]:
    """Prepare, check and start it; whatever is left at the end is killed. What it said is printed if that failed."""
    engine = engine_of(job)
    assert isinstance(engine, AttendedEngine)
    engine.ready(job)
    folder = create_run(job)
    prepare(job)
    with lock_run(folder) as lock:
        workers = engine.start(folder, job, lock)
        run = HostRun(folder, workers)
        try:
            yield run
        except BaseException:
            print(run.said())
            raise
        finally:
            if workers.poll() is None:
                workers.kill()
