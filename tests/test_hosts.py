"""Jobs on several hosts: network namespaces with cables that can be cut. `make test-hosts`; more faults:
tests/test_hosts_faults.py."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from host_jobs import job_on, running

from copus.events import Restart, Start
from copus.job import JobError
from launch.engines import engine_of

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Hosts]:
    why_not = hosts.why_not()
    if why_not:
        pytest.skip(f"no hosts here: {why_not}")
    folder = tmp_path_factory.mktemp("cluster")
    with hosts.made(3, folder, unshared={2: folder / "runs"}) as made:
        yield made


def at(cluster: hosts.Hosts, index: int, command: str) -> subprocess.CompletedProcess[str]:
    words = [word.format(host=cluster[index].name, command=command) for word in cluster.ssh]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def refusal(cluster: hosts.Hosts, folder: Path, indices: list[int], **options: object) -> str:
    """What is said of a job on these hosts before anything starts."""
    job = job_on(cluster, folder, indices, **options)
    before = sorted(folder.rglob("*"))
    with pytest.raises(JobError) as caught:
        engine_of(job).ready(job)
    assert sorted(folder.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hosts_have_names_and_addresses_of_their_own(cluster: hosts.Hosts) -> None:
    assert [at(cluster, index, "hostname").stdout.strip() for index in range(2)] == cluster.names[:2]
    assert at(cluster, 0, f"getent hosts {cluster[1].name}").returncode != 0
    assert cluster[0].address in at(cluster, 0, "ip -brief address show eth0").stdout


def test_hosts_that_cannot_be_used_are_refused_before_anything_starts(cluster: hosts.Hosts, tmp_path: Path) -> None:
    said = refusal(cluster, cluster.folder, [0, 2])
    assert f"is not the one of {cluster[2].name}: all machines have to share it" in said
    said = refusal(cluster, tmp_path, [0, 1], network="10.200.0.0/16")
    assert "launch.options.network(10.200.0.0/16)" in said
    assert f"{cluster[0].address} (eth0)" in said
    cluster[1].cut()
    try:
        said = refusal(cluster, tmp_path, [0, 1])
    finally:
        cluster[1].mend()
    assert said.startswith(f"launch.options.hosts: {cluster[1].name} does not answer (exit code 255): ssh: connect")


@pytest.mark.dist
def test_a_job_goes_on_without_a_host_and_takes_it_back(cluster: hosts.Hosts, tmp_path: Path) -> None:
    """The cable of the host with rank 0 is cut. Names resolve nowhere, Docker's bridge leads nowhere, and nothing
    listens on addresses that the other host does not need."""
    with running(job_on(cluster, tmp_path, [0, 1])) as run:
        run.trains(ranks=2)
        for index in (0, 1):
            sockets = hosts.run("ip", "netns", "exec", cluster[index].name, "ss", "--tcp", "--listening", "-n", "-H")
            listening = {line.split()[3].rpartition(":")[0] for line in sockets.splitlines()}
            assert listening <= {cluster[index].address, "127.0.0.1"}
        cluster[0].cut()
        run.trains(ranks=1)
        cluster[0].mend()
        run.trains(ranks=2)
        run.stop()
        assert [event.ranks for event in run.seen(Restart)] == [1, 2]
        assert [event.attempt for event in run.seen(Restart)] == [1, 2]
        _, back = run.seen(Restart)
        assert back.samples_repeated == 0  # the others made a checkpoint before they stopped
        assert [event.configuration.layout.accelerators for event in run.seen(Start)] == [2, 1, 2]
        assert run.lineage() == (0, 0)
