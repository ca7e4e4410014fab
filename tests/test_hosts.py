"""Several hosts for real: network namespaces with cables that can be cut. `make test-hosts`."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[hosts.Hosts]:
    why_not = hosts.why_not()
    if why_not:
        pytest.skip(f"no hosts here: {why_not}")
    with tempfile.TemporaryDirectory(prefix="copus-hosts-") as folder, hosts.made(2, Path(folder)) as made:
        yield made


def at(cluster: hosts.Hosts, index: int, command: str) -> subprocess.CompletedProcess[str]:
    words = [word.format(host=cluster[index].name, command=command) for word in cluster.ssh]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_hosts_have_names_and_addresses_of_their_own(cluster: hosts.Hosts) -> None:
    assert [at(cluster, index, "hostname").stdout.strip() for index in range(2)] == cluster.names
    assert at(cluster, 0, f"getent hosts {cluster[1].name}").returncode != 0
    assert cluster[0].address in at(cluster, 0, "ip -brief address show eth0").stdout


def test_what_is_done_to_a_host_is_felt_and_passes(cluster: hosts.Hosts) -> None:
    there = cluster[1]
    for harm, repair in ((there.cut, there.mend), (there.freeze, there.thaw), (there.switch_off, there.boot)):
        harm()
        assert at(cluster, 1, "true").returncode == 255, harm
        repair()
        hosts.wait_for("the host", lambda: at(cluster, 1, "true").returncode == 0, 30)
        assert at(cluster, 0, "true").returncode == 0
