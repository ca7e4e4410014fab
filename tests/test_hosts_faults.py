"""Fifteen faults on four hosts, one after the other, in two jobs: three hosts train and one is spare, and two hosts
without one. `make test-hosts`.

After each fault the job has to train on, on as many ranks as it can have, and when the host is back on all of them; in
the end each sample counts once, and the losses are those of a job that nobody disturbed.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hosts
import psutil
import pytest
from host_jobs import LOST_SECONDS, HostRun, job_on, running

from copus.event_lines import without_replays
from copus.events import Checkpoint, Restart, Start, Step, Warned, read_events
from copus.fencing import FILE as SESSION
from copus.rendezvous import FILE, Rendezvous
from launch.engines.hosts_node import HOST, RUN

pytestmark = [pytest.mark.hosts, pytest.mark.dist, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Hosts]:
    why_not = hosts.why_not()
    if why_not:
        pytest.skip(f"no hosts here: {why_not}")
    with hosts.made(4, tmp_path_factory.mktemp("cluster")) as made:
        yield made


def trains(environment: dict[str, str]) -> bool:
    """Whether a process is of the newest attempt; the engine's own on a host may be of any."""
    if FILE not in environment:
        return True
    try:
        rendezvous = Rendezvous.model_validate_json(Path(environment[FILE]).read_text())
    except FileNotFoundError:
        return False
    return rendezvous.token == (Path(environment[RUN]) / SESSION).read_text()


def process(cluster: hosts.Hosts, module: str) -> psutil.Process:
    """One that runs a module of copus for the job, on the first host that has any; of workers and agents one that
    trains. An agent has the module of its workers among its arguments too, after its own."""
    for host in cluster.hosts:
        for pid in host.processes():
            one = psutil.Process(pid)
            _, _, after = " ".join(one.cmdline()).partition(" -m ")
            environment = one.environ()
            if after.startswith(f"{module} ") and environment.get(HOST) == host.name and trains(environment):
                return one
    raise AssertionError(f"no {module} runs")


def suffer(run: HostRun, what: str, harm: Callable[[], object], ranks: int) -> None:
    """Do it after a checkpoint, and see the job train again on so many ranks."""
    run.wait(lambda: bool(run.seen_since_start(Checkpoint)), "a checkpoint", 0.05)
    at, begun = run.samples, time.time()
    harm()
    run.trains(ranks)
    newest = run.seen(Restart)[-1]
    told = [f" ({one.message}, after {one.time - begun:.1f} s)" for one in run.seen(Warned) if one.time > begun]
    print(
        f"{what} at {at} samples{''.join(told)}: {newest.ranks} ranks train again after {time.time() - begun:.1f} s, "
        f"{newest.samples_repeated} samples repeated",
        flush=True,
    )


def check_samples_and_losses(run: HostRun, steady: dict[int, float]) -> None:
    assert run.lineage() == (0, 0)
    mine = {e.samples_consumed: e.loss for e in without_replays(read_events(run.folder)) if isinstance(e, Step)}
    common = sorted(mine.keys() & steady.keys())
    assert len(common) > 20
    worst = max(abs((mine[at] or 0.0) - steady[at]) for at in common)
    print(f"largest difference in loss {worst:.1e} over {len(common)} steps", flush=True)
    assert worst < 1e-3


@pytest.fixture(scope="module")
def steady(cluster: hosts.Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by samples of a job on one host that nothing happens to."""
    with running(job_on(cluster, tmp_path_factory.mktemp("steady"), [0])) as run:
        run.trains(ranks=1)
        while run.samples < 1800:
            run.trains_for(300)
        run.stop()
        return {event.samples_consumed: event.loss or 0.0 for event in run.seen(Step)}


def test_two_hosts_without_a_spare(cluster: hosts.Hosts, tmp_path: Path, steady: dict[int, float]) -> None:
    first, second = cluster[0], cluster[1]
    with running(job_on(cluster, tmp_path, [0, 1])) as run:
        run.trains(ranks=2)
        for host, name in ((second, "the second host"), (first, "the host of the first agent")):
            suffer(run, f"{name} cut off", host.cut, ranks=1)
            suffer(run, f"{name} reached again", host.mend, ranks=2)
            suffer(run, f"{name} frozen", host.freeze, ranks=1)
            suffer(run, f"{name} thawed", host.thaw, ranks=2)
            suffer(run, f"{name} switched off", host.switch_off, ranks=1)
            suffer(run, f"{name} booted", host.boot, ranks=2)
        starts = len(run.seen(Start))
        second.limit(2)
        run.trains_for(240)
        second.limit(None)
        second.cut()
        time.sleep(LOST_SECONDS / 3)  # what is too short to count
        second.mend()
        run.trains_for(240)
        assert len(run.seen(Start)) == starts
        print("a slow link and a short cut: no restart", flush=True)
        run.stop()
        check_samples_and_losses(run, steady)


def test_three_hosts_and_a_spare(cluster: hosts.Hosts, tmp_path: Path, steady: dict[int, float]) -> None:
    with running(job_on(cluster, tmp_path, [0, 1, 2, 3], nodes=3)) as run:
        run.trains(ranks=3)
        suffer(run, "a host cut off: the spare stands in", cluster[1].cut, ranks=3)
        cluster[1].mend()
        suffer(run, "a worker killed", lambda: process(cluster, "copus.worker").kill(), ranks=3)
        suffer(run, "an agent killed", lambda: process(cluster, "copus.agent").kill(), ranks=3)
        node = "launch.engines.hosts_node"
        suffer(run, "the engine's process killed", lambda: process(cluster, node).kill(), ranks=3)
        suffer(run, "a worker that hangs", lambda: process(cluster, "copus.worker").suspend(), ranks=3)

        def two_at_once() -> None:
            cluster[0].freeze()
            cluster[2].switch_off()

        suffer(run, "two hosts at once", two_at_once, ranks=2)
        suffer(run, "one of them back", cluster[0].thaw, ranks=3)
        cluster[2].boot()

        def in_the_start() -> None:
            before = run.said().count("copus: attempt ")
            cluster[0].switch_off()
            hosts.wait_for("the next attempt", lambda: run.said().count("copus: attempt ") > before, 60)
            cluster[1].cut()

        suffer(run, "another lost while the job starts again", in_the_start, ranks=2)
        run.stop()
        check_samples_and_losses(run, steady)
