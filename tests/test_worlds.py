"""Ranks that outlive the world that they are in: `copus.worlds`. On hosts: tests/test_hosts.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks.faults import Run, job_for, lineage
from copus.data.prepare import prepare
from copus.events import Checkpoint, End, Restart, Start, Step, read_events
from copus.fencing import replace_others
from copus.job import JobConfig, parse_job
from copus.rendezvous import FILE, WAIT, Rendezvous, clear_rendezvous, count_waiting, write_rendezvous
from copus.stop_request import LARGER
from launch.engines.agent import agent_environment
from launch.engines.environment import job_environment
from launch.engines.hosts_job import random_port
from launch.run_directory import create_run, lock_run, request_pause, request_stop


def job_on_hosts(folder: Path, backend: str, nodes: int) -> JobConfig:
    values = job_for(folder, backend, 1, 4000, lr=1e-3).model_dump(mode="json")
    values["cluster"]["nodes"] = nodes
    values["training"] |= {"layout": {"dp": nodes}, "global_batch": 12, "evaluate_sequences": 12}
    values["training"] |= {"tokens": 16 * 1_000_000, "evaluate_every_tokens": 16 * 1_000_000}
    values["planner"] |= {"policy": "static", "max_global_batch": 12}
    values["launch"] |= {"engine": "hosts", "options": {"hosts": list("abc")}, "timeout_seconds": 60.0}
    return parse_job(values)


class Ranks(Run):
    """A run whose ranks are told where to meet, and a hand on them."""

    def __init__(self, folder: Path, job: JobConfig) -> None:
        self.folder, self.job = folder, job
        super().__init__(folder, self)  # type: ignore[arg-type]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.attempt = -1

    def poll(self) -> None:
        """That the run has not ended, for `Run`: these ranks end as the test wants it."""

    def meet(self, *hosts: str) -> None:
        """Have one rank of each of these hosts form a world; those that are not there are started."""
        self.attempt += 1
        token = f"s-{self.attempt}"
        replace_others(self.folder, token)
        port = random_port()
        for rank, host in enumerate(hosts):
            rendezvous = Rendezvous(
                token=token, attempt=self.attempt, address="127.0.0.1", port=port, first_rank=rank,
                ranks=len(hosts), addresses=("127.0.0.1",),
            )  # fmt: skip
            write_rendezvous(self.folder / f"rendezvous-{host}", rendezvous)
            if host not in self.processes:
                self.processes[host] = self.start(host)

    def stand_by(self, host: str) -> None:
        """Start a rank that waits until it is told where to meet."""
        file = self.folder / f"rendezvous-{host}"
        clear_rendezvous(file)
        self.processes[host] = self.start(host)
        self.wait(lambda: count_waiting(file) == 1, f"{host} stands by", 0.05)

    def start(self, host: str) -> "subprocess.Popen[bytes]":
        place = {FILE: str(self.folder / f"rendezvous-{host}"), WAIT: "20"}
        ranks = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self.folder / f"{host}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "copus.worker", str(self.folder)],
                env=job_environment() | agent_environment(self.job, {}) | ranks | place,
                stdout=log, stderr=log,
            )  # fmt: skip

    def trains(self, ranks: int) -> None:
        """Wait until it does, in this attempt, and has a checkpoint of it."""

        def does() -> bool:
            newest = max((i for i, event in enumerate(self.events) if isinstance(event, Start)), default=0)
            now = self.events[newest:]
            return (
                self.count(Start) == self.attempt + 1
                and isinstance(now[0], Start)
                and now[0].configuration.layout.accelerators == ranks
                and any(isinstance(event, Checkpoint) for event in now)
                and isinstance(now[-1], Step)
            )

        self.wait(does, f"training on {ranks} ranks", 0.05)


@contextmanager
def ranks_of(job: JobConfig) -> Iterator[Ranks]:
    folder = create_run(job)
    prepare(job)
    with ExitStack() as held:
        held.enter_context(lock_run(folder))
        run = Ranks(folder, job)
        try:
            yield run
        except BaseException:
            for log in folder.glob("*.log"):
                print(f"==> {log.name} <==\n{log.read_text()}")
            raise
        finally:
            for process in run.processes.values():
                process.kill()
                process.wait()


@pytest.mark.dist
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("lost", "backend"), [("a", "megatron"), ("b", "megatron"), ("a", "fsdp"), ("b", "deepspeed")])
def test_a_rank_outlives_one_that_is_frozen_and_takes_another_in(tmp_path: Path, backend: str, lost: str) -> None:
    with ranks_of(job_on_hosts(tmp_path, backend, 2)) as run:
        run.meet("a", "b")
        run.trains(ranks=2)
        stays = "b" if lost == "a" else "a"
        os.kill(run.processes[lost].pid, signal.SIGSTOP)
        run.meet(stays)
        run.trains(ranks=1)
        run.processes[lost].kill()
        run.processes.pop(lost).wait()
        run.stand_by(lost)
        begun = {process.pid for process in run.processes.values()}
        request_pause(run.folder, LARGER)
        run.wait(lambda: isinstance(run.events[-1], End), "the pause")
        (run.folder / "stop").unlink()
        run.meet("a", "b")
        run.trains(ranks=2)
        assert {process.pid for process in run.processes.values()} == begun
        request_stop(run.folder)
        assert [process.wait(60) for process in run.processes.values()] == [0, 0]
        restarts = [event for event in read_events(run.folder) if isinstance(event, Restart)]
        assert [(event.ranks, event.attempt) for event in restarts] == [(1, 1), (2, 2)]
        assert restarts[1].samples_repeated == 0
        run.look()
        assert lineage(run.folder, run.samples) == (0, 0)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_ranks_outlive_one_that_is_killed_and_go_on_together(tmp_path: Path) -> None:
    """They know of it, by an error, before they are told where to meet."""
    with ranks_of(job_on_hosts(tmp_path, "megatron", 3)) as run:
        run.meet("a", "b", "c")
        run.trains(ranks=3)
        run.processes["a"].kill()
        run.processes.pop("a").wait()
        time.sleep(0.5)
        assert [process.poll() for process in run.processes.values()] == [None, None]
        run.meet(*run.processes)
        run.trains(ranks=2)
        request_stop(run.folder)
        assert [process.wait(60) for process in run.processes.values()] == [0, 0]
        run.look()
        assert lineage(run.folder, run.samples) == (0, 0)
