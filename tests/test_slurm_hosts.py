"""Slurm on hosts of network namespaces, one slurmd in each: `make test-slurm`.

Nothing that the nodes share but the file system: names resolve nowhere, Docker's bridge, whose address is the same on
all of them, comes first in the list of interfaces, and `launch.options` says nothing of that.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from slurm_cluster import install, slurm_cluster, wait_for
from test_slurm import Cluster, job_id, seen, tell, wait_for_event

from copus.event_lines import without_replays
from copus.events import Checkpoint, End, Restart, Start, Step, read_events

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def machines() -> Iterator[hosts.Hosts]:
    why_not = install() or hosts.why_not()
    if why_not:
        pytest.skip(f"no Slurm on hosts here: {why_not}")
    with tempfile.TemporaryDirectory(prefix="copus-slurm-hosts-") as folder, hosts.made(3, Path(folder)) as made:
        os.chmod(folder, 0o755)  # munge refuses folders that others might write to
        yield made


@pytest.fixture(scope="module")
def cluster(machines: hosts.Hosts) -> Iterator[Cluster]:
    with slurm_cluster(machines.folder, machines) as environment:
        yield Cluster(machines.folder, environment)


def listening(host: hosts.Host) -> set[str]:
    """Addresses on which Python processes of a host listen."""
    sockets = hosts.run("ip", "netns", "exec", host.name, "ss", "--tcp", "--listening", "-n", "-H", "--processes")
    return {line.split()[3].rpartition(":")[0] for line in sockets.splitlines() if '(("python' in line}


def test_a_job_loses_a_host_and_goes_on_with_another(cluster: Cluster, machines: hosts.Hosts) -> None:
    run = cluster.folder / "runs" / "hosts"
    cluster.copus(*cluster.job("hosts", 10**7), "--detach")
    wait_for_event(run, Checkpoint, 1)
    first, second, spare = machines.hosts
    assert (listening(first), listening(second), listening(spare)) == ({first.address}, {second.address}, set())
    second.switch_off()
    wait_for_event(run, Start, 2)
    wait_for("steps on the spare host", lambda: len(_steps_since(run, 2)) >= 20, 120)
    tell(run)
    assert listening(spare) == {spare.address}
    print(cluster.copus("cancel", "hosts"))
    wait_for_event(run, End, 1)
    wait_for("the end of the job", lambda: cluster.run(["squeue", "--noheader"]) == "", 60)
    assert _nodes(cluster, run) == [first.name, spare.name]
    assert [event.ranks for event in seen(run, Restart)] == [2]
    steps = [event.samples_consumed for event in without_replays(read_events(run)) if isinstance(event, Step)]
    assert steps == list(range(4, steps[-1] + 1, 4)), "nothing is lost, nothing trained twice"
    assert seen(run, End)[-1].samples_consumed == steps[-1]


def _steps_since(run: Path, start: int) -> list[Step]:
    """Steps after that many starts."""
    events = list(read_events(run))
    places = [index for index, event in enumerate(events) if isinstance(event, Start)]
    return [event for event in events[places[start - 1] :] if isinstance(event, Step)]


def _nodes(cluster: Cluster, run: Path) -> list[str]:
    """Nodes of the newest attempt of the run's job."""
    shown = cluster.run(["scontrol", "show", "--oneliner", "job", job_id(run)])
    short = next(word.removeprefix("NodeList=") for word in shown.split() if word.startswith("NodeList="))
    return cluster.run(["scontrol", "show", "hostnames", short]).split()
