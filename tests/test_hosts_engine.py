"""The hosts engine without hosts: what it refuses, whom it picks, and the process that runs on each. With real ones:
tests/test_hosts.py."""

import hashlib
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from launch_events import start, step
from launch_jobs import copus_here, write_job

from copus.checkpoints.store import Writing
from copus.event_log import EventLog
from copus.events import End, Failure, Warned, read_events
from copus.fencing import FILE, TOKEN
from copus.job import JobError, load_job
from copus.rendezvous import Rendezvous
from launch.engines import engine_of, hosts_job, hosts_node
from launch.engines.hosts import HostsEngine, HostsWorkers
from launch.engines.hosts_fleet import Fleet
from launch.engines.hosts_job import Supervisor
from launch.engines.hosts_link import Link, common_network, host_command, misfit
from launch.engines.hosts_messages import Beat, Bind, Hello, Interface, Join, Kill, Watch, attempt_of
from launch.engines.hosts_options import HostsOptions
from launch.run_directory import request_stop

HERE = ["sh", "-c", "{command}", "{host}"]
"""A template that runs on this machine whatever is meant for a host."""


def options(**values: Any) -> HostsOptions:
    return HostsOptions(**{"hosts": ["a", "b", "c"], "command": HERE, **values})


def hello(*interfaces: tuple[str, str, str, int], **software: str) -> Hello:
    named = [Interface(name=n, address=a, network=w, mbit_per_second=s) for n, a, w, s in interfaces]
    return Hello(software=software, digests=[], interfaces=named)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hosts": []}, "hosts: list should have at least 1 item"),
        ({"hosts": ["a", "a"]}, "a stands there twice"),
        ({"hosts": ["-oProxyCommand=x"]}, "hosts"),
        ({"hosts": ["a", "b"], "command": ["ssh", "{host}"]}, "{command} has to be one of its words"),
        ({"hosts": ["a", "b"], "command": ["sh", "-c", "{command}"]}, "{host} has to stand in one of its words"),
        ({"hosts": ["a", "b"], "network": "10.1.0.1/16"}, "10.1.0.1/16 has host bits set"),
        ({"hosts": ["a", "b"], "min_hosts": 3}, "min_hosts(3) is more than the 2 of hosts"),
        ({"hosts": ["a", "b"], "env": {"MY_TOKEN": "x"}}, "MY_TOKEN looks like a secret"),
        (
            {"hosts": ["a", "b"], "env": {"OMP_NUM_THREADS": "8"}},
            "OMP_NUM_THREADS would be overridden: set launch.threads_per_rank",
        ),
        (
            {"hosts": ["a", "b"], "pass_env": ["OMP_NUM_THREADS"]},
            "pass_env: OMP_NUM_THREADS would be overridden: set launch.threads_per_rank",
        ),
        ({"hosts": ["a", "b"], "pass_env": ["MASTER_PORT"]}, "pass_env: MASTER_PORT would be overridden"),
        ({"hosts": ["a", "b"], "env": {"X": "1"}, "pass_env": ["X"]}, "pass_env: X is in env too"),
        (
            {"hosts": ["a", "b"], "env": {"NCCL_SOCKET_IFNAME": "ib0"}, "nccl_interface": "ib1"},
            "nccl_interface(ib1) and NCCL_SOCKET_IFNAME of env or pass_env ask for the same",
        ),
        ({"hosts": ["a", "b"], "python": "bin/python"}, "neither an absolute path nor a name"),
        ({"hosts": ["a"]}, "cluster.nodes(2) is more than the 1 machines of launch.options.hosts"),
    ],
)
def test_options_that_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_job(tmp_path, cluster={"nodes": 2, "accelerators_per_node": 1})
    launch = yaml.safe_dump(values, default_flow_style=True)
    with pytest.raises(JobError) as caught:
        engine_of(load_job(path, [f"launch.options={launch}"], engine="hosts"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dry_run_prints_the_commands_and_contacts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "secret")
    launch = {"engine": "hosts", "options": {"hosts": ["node1", "me@node2"], "pass_env": ["MY_TOKEN"]}}
    write_job(tmp_path, launch=launch)
    assert copus_here("submit", "job.yaml", "--dry-run") == 0
    printed = capfd.readouterr().out
    first, second = (shlex.split(line) for line in printed.splitlines())
    assert first[:-1] == ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "node1"]
    assert second[-2] == "me@node2"
    assert shlex.split(second[-1])[-1] == str(tmp_path / "runs" / "small" / "job.yaml")
    assert "secret" not in printed


def test_a_host_that_does_not_answer_is_named_with_ssh_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sh", "-c", "echo 'ssh: no route to {host}' >&2; exit 255", "{command}"]
    write_job(tmp_path, launch={"engine": "hosts", "options": {"hosts": ["node1"], "command": command}})
    before = sorted(tmp_path.rglob("*"))
    assert copus_here("submit", "job.yaml") == 2
    said = capfd.readouterr().err.splitlines()
    expected = "launch.options.hosts: node1 does not answer (exit code 255): ssh: no route to node1"
    assert said[-1] == f"copus: {expected}"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_goes_on_without_hosts_that_do_not_answer_if_enough_others_do(tmp_path: Path) -> None:
    script = "if [ $1 = b ]; then echo 'ssh: no route to b' >&2; exit 255; fi; eval \"$0\""
    values = {"hosts": ["a", "b"], "command": ["sh", "-c", script, "{command}", "{host}"]}
    job = load_job(write_job(tmp_path, launch={"engine": "hosts", "options": values}))
    said = "b does not answer (exit code 255): ssh: no route to b"
    with pytest.raises(JobError) as caught:
        engine_of(job).ready(job)
    assert str(caught.value) == f"launch.options.hosts: {said}"
    assert engine_of(job).ready_again(job) == [f"goes on without a machine of launch.options.hosts: {said}"]
    with pytest.raises(JobError) as caught:
        HostsEngine(options(**values, min_hosts=2)).ready_again(job)
    assert str(caught.value) == (
        f"launch.options.hosts: 1 of 2 machines answer, fewer than launch.options.min_hosts(2): {said}"
    )


@pytest.mark.parametrize("package", ["copus", "launch", "planner", "profiles"])
def test_another_source_of_any_package_is_another_version(package: str, tmp_path: Path) -> None:
    file = tmp_path / package / "module.py"
    file.parent.mkdir()
    file.write_text("1")
    before = hosts_node.source_digest(tmp_path)
    file.write_text("2")
    assert hosts_node.source_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"command": ["no-such-ssh", "{host}", "{command}"]}, "command: no-such-ssh: No such file or directory"),
        ({"pass_env": ["MY_TOKEN"]}, "pass_env(MY_TOKEN): this shell has no such variable that a job may take"),
        ({"pass_env": ["PYTHONUNBUFFERED"]}, "pass_env: PYTHONUNBUFFERED(0) would be overridden: it is '1'"),
    ],
)
def test_what_is_missing_on_this_machine_is_told_in_a_line(
    values: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_TOKEN", raising=False)
    monkeypatch.setenv("PYTHONUNBUFFERED", "0")
    write_job(tmp_path, launch={"engine": "hosts", "options": {"hosts": ["node1"], "command": HERE, **values}})
    before = sorted(tmp_path.rglob("*"))
    assert copus_here("submit", "job.yaml") == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"copus: launch.options.{message}"
    assert sorted(tmp_path.rglob("*")) == before


def test_logs_are_in_the_order_of_attempts_whatever_the_hosts_names(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    names = ["s-1.agent.log", "s-1-2.gpu-b.log", "s-1-10.gpu-a.log", "s-1-2.gpu-1.x.org.log"]
    for name in names:
        (tmp_path / "logs" / name).touch()
    expected = [names[0], names[3], names[1], names[2]]
    assert [log.name for log in HostsEngine(options()).log_files(tmp_path)] == expected


def test_the_log_of_a_failed_rank_is_its_own(tmp_path: Path) -> None:
    for host, ranks in (("a-1", (0, 1)), ("a-2.org", (2, 3))):
        (tmp_path / f"s-0.{host}.log").write_text("".join(f"[rank{rank}]: hello\n" for rank in ranks))
        for local_rank, rank in enumerate(ranks):
            folder = tmp_path / f"s-0.{host}" / "s-0_x" / "attempt_0" / str(local_rank)
            folder.mkdir(parents=True)
            (folder / "stderr.log").write_text(f"of rank {rank}")
    agent: Any = None
    workers = HostsWorkers(agent, tmp_path, "s")
    logs = [workers.error_log(rank) for rank in range(4)]
    assert [log and log.read_text() for log in logs] == [f"of rank {rank}" for rank in range(4)]
    assert workers.error_log(4) is None


def test_other_versions_are_named() -> None:
    here = {"torch": "2.13.0", "COPUS": "abc"}
    assert misfit(hello(torch="2.13.0", COPUS="abc"), here) is None
    assert misfit(hello(torch="2.12.0", COPUS="abc"), here) == "has torch 2.12.0, and this machine 2.13.0"
    assert misfit(hello(COPUS="abc"), here) == "has torch none, and this machine 2.13.0"


def test_the_fastest_network_in_which_each_has_an_address_of_its_own() -> None:
    docker = ("docker0", "172.17.0.1", "172.17.0.0/16", 100_000)  # the same everywhere
    hellos = {
        "a": hello(docker, ("eth0", "10.0.0.1", "10.0.0.0/24", 1000), ("ib0", "10.1.0.1", "10.1.0.0/24", 200_000)),
        "b": hello(docker, ("eno1", "10.0.0.2", "10.0.0.0/24", 1000), ("ib3", "10.1.0.2", "10.1.0.0/24", 200_000)),
    }
    assert common_network(options(), hellos) == "10.1.0.0/24"
    assert common_network(options(network="10.0.0.0/8"), hellos) == "10.0.0.0/8"
    apart = {
        "a": hello(docker, ("eth0", "10.0.0.1", "10.0.0.0/24", 0)),
        "b": hello(docker, ("e", "10.2.0.1", "10.2.0.0/24", 0)),
    }
    with pytest.raises(JobError, match="no network in which each has an address of its own; a has 172"):
        common_network(options(), apart)
    with pytest.raises(JobError, match=r"launch.options.network\(10.0.0.0/24\): b has 172"):
        common_network(options(network="10.0.0.0/24"), apart)
    with pytest.raises(JobError, match=r"launch.options.network\(172.17.0.0/16\): a and b both have 172.17.0.1 there"):
        common_network(options(network="172.17.0.0/16"), apart)


def test_an_address_with_a_label_belongs_to_its_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = {
        name: [SimpleNamespace(family=socket.AF_INET, address=address, netmask="255.255.255.0")]
        for name, address in (("eth0:1", "10.0.0.5"), ("eth1:1", "10.0.1.5"), ("gone", "10.0.2.5"))
    }
    states = {name: SimpleNamespace(isup=name == "eth0", speed=1000) for name in ("eth0", "eth1")}
    monkeypatch.setattr(hosts_node.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(hosts_node.psutil, "net_if_stats", lambda: states)
    labelled = Interface(name="eth0:1", address="10.0.0.5", network="10.0.0.0/24", mbit_per_second=1000)
    assert hosts_node.interfaces() == [labelled]


def fleet_of(tmp_path: Path, heard: dict[str, dict[str, float | None]]) -> Fleet:
    """Hosts that say how long they have not heard each other."""
    (tmp_path / "job.yaml").write_text("")
    fleet = Fleet(tmp_path, options(hosts=sorted(heard), lost_seconds=10), sys.stderr.buffer)
    for host, silent in heard.items():
        link: Any = SimpleNamespace(
            host=host, port=1, silent_seconds=silent, unheard_seconds=0.0, bound_seconds=60.0, hello=hello()
        )
        fleet._links[host] = link
    return fleet


def test_the_largest_group_that_hears_each_other_goes_on(tmp_path: Path) -> None:
    all_well = fleet_of(tmp_path, {"a": {"b": 1, "c": 1}, "b": {"a": 1, "c": 1}, "c": {"a": 1, "b": 1}})
    assert [link.host for link in all_well.largest_group(3)] == ["a", "b", "c"]
    assert [link.host for link in all_well.largest_group(2)] == ["a", "b"]
    assert all_well.is_settled
    assert all_well.is_whole(all_well.ready)
    first_cut = fleet_of(tmp_path, {"a": {"b": 11, "c": 11}, "b": {"a": 11, "c": 1}, "c": {"a": 11, "b": 1}})
    assert [link.host for link in first_cut.largest_group(3)] == ["b", "c"]
    assert first_cut.is_settled
    assert not first_cut.is_whole(first_cut.ready)
    in_doubt = fleet_of(tmp_path, {"a": {"b": 6, "c": 1}, "b": {"a": 6, "c": 1}, "c": {"a": 1, "b": 1}})
    assert not in_doubt.is_settled
    assert in_doubt.is_whole(in_doubt.ready)  # not yet lost
    one_way = fleet_of(tmp_path, {"a": {"b": 1}, "b": {"a": None}})
    assert [link.host for link in one_way.largest_group(2)] == ["a"]
    assert one_way.is_settled


def test_hosts_that_were_slow_to_start_get_time_to_hear_each_other(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, {"a": {"b": None}, "b": {"a": None}})
    for link in fleet.ready:
        vars(link)["bound_seconds"] = 0.5
    assert not fleet.is_settled


def test_a_network_that_one_host_alone_chose_is_left_for_one_that_others_share(tmp_path: Path) -> None:
    fleet = fleet_of(tmp_path, {"a": {}, "b": {}})
    orders: list[str] = []
    for host, link in fleet._links.items():
        eth0 = ("eth0", f"10.0.0.{1 + ord(host) - ord('a')}", "10.0.0.0/24", 1000)
        said = hello(("docker0", "172.17.0.1", "172.17.0.0/16", 10_000), eth0)
        said = said.model_copy(update={"software": fleet._software, "digests": [fleet._job_digest]})
        vars(link).update(hello=said, address=None, port=None, send=lambda order: orders.append(order.address))
    late = fleet._links.pop("b")
    fleet._closed["b"] = 0.0
    fleet._bind_new()
    assert orders == ["172.17.0.1"]
    fleet._links["b"] = late
    fleet._bind_new()
    assert orders == ["172.17.0.1", "10.0.0.1", "10.0.0.2"]
    fleet._bind_new()
    assert len(orders) == 3


@contextmanager
def linked(tmp_path: Path, host: str, **values: Any) -> Iterator[Link]:
    link = Link(host, host_command(options(**values), host, [tmp_path / "mark"], tmp_path), subprocess.DEVNULL)
    try:
        yield link
    finally:
        link.close()


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_hosts_hear_each_other_until_one_is_gone(tmp_path: Path) -> None:
    (tmp_path / "mark").write_text("here")
    with linked(tmp_path, "a") as a:
        with linked(tmp_path, "b") as b:
            wait_for(lambda: a.hello and b.hello)
            assert a.hello is not None
            assert a.hello.digests == [hashlib.sha256(b"here").hexdigest()]
            for link in (a, b):
                link.send(Bind(address="127.0.0.1"))
            wait_for(lambda: a.port and b.port)
            a.send(Watch(peers={"b": ("127.0.0.1", b.port or 0)}))
            b.send(Watch(peers={"a": ("127.0.0.1", a.port or 0)}))
            wait_for(lambda: a.silent_seconds.get("b") is not None and b.silent_seconds.get("a") is not None)
            for _ in range(3):
                a.send(Beat())
        wait_for(lambda: (a.silent_seconds["b"] or 0) > 2.5)


def test_a_host_that_hears_nothing_of_its_supervisor_ends_itself(tmp_path: Path) -> None:
    with linked(tmp_path, "a", lost_seconds=5) as link:
        wait_for(lambda: link.hello)
        assert link.hello is not None
        assert link.hello.digests == [None]
        wait_for(lambda: link.is_gone, 30)


def test_an_interpreter_may_be_wrapped(tmp_path: Path) -> None:
    """The wrapper has the run in its environment too, and is nothing that was left of it."""
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\n{shlex.quote(sys.executable)} "$@"\n')
    wrapper.chmod(0o755)
    with linked(tmp_path, "a", python=str(wrapper)) as link:
        wait_for(lambda: link.hello or link.is_gone)
        assert link.hello is not None


def rendezvous(attempt: int) -> Rendezvous:
    return Rendezvous(
        token=f"s-{attempt}", attempt=attempt, address="10.0.0.1", port=20_000, first_rank=0, ranks=1, addresses=()
    )


def test_an_agent_is_started_and_ended_with_all_below(tmp_path: Path) -> None:
    with linked(tmp_path, "a") as link:
        wait_for(lambda: link.hello)
        log = tmp_path / "agent.log"

        def has_ended(attempt: int) -> bool:
            link.send(Beat())  # the import of torch may take longer than the host's patience
            return attempt in link.ended

        for attempt in (0, 1):
            place = rendezvous(attempt)
            agent: dict[str, Any] = {"arguments": ["--nonsense"], "environment": {}, "log": str(log)}
            link.send(Join(rendezvous=place, keep=False, workers=1, **agent))
            if attempt:
                link.send(Kill())
            wait_for(lambda at=attempt: has_ended(at), 200)
        assert link.ended == {0: 2, 1: -9}
        assert "agent.py: error: " in log.read_text()


def test_ranks_of_an_attempt_that_was_given_up_write_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(step(4))
    (tmp_path / FILE).write_text("s-1")
    writer = (
        "from pathlib import Path; from copus.event_log import EventLog; from copus.events import Warned\n"
        f"EventLog(Path({str(tmp_path)!r})).write(Warned(step=1, samples_consumed=4, message='late'))"
    )
    before = (tmp_path / "events.jsonl").read_bytes()
    command = [sys.executable, "-c", writer]
    late = subprocess.run(command, env=os.environ | {TOKEN: "s-0"}, capture_output=True, text=True)
    assert late.returncode == 1
    assert f"s-0 was given up, s-1 trains in {tmp_path}" in late.stderr
    assert (tmp_path / "events.jsonl").read_bytes() == before
    subprocess.run(command, env=os.environ | {TOKEN: "s-1"}, check=True)
    assert b"late" in (tmp_path / "events.jsonl").read_bytes()


def test_a_rank_that_was_given_up_does_not_write_its_share_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_text("s-1")
    monkeypatch.setenv(TOKEN, "s-0")
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    writing = Writing.__new__(Writing)
    writing._run, writing._save = tmp_path, Mock()
    with pytest.raises(SystemExit):
        writing._write()
    writing._save.write.assert_not_called()


class StubLink:
    """A host on which each attempt ends as it is told to."""

    def __init__(self, host: str, number: int) -> None:
        self.host, self.address, self.interface = host, f"10.0.0.{number}", "eth0"
        self.ended: dict[int, int] = {}
        self.agents: list[Join] = []
        """What it was told to join."""
        self.stood_by = 0
        """How often it was told to stand by."""
        self.is_gone = False
        self.is_standing_by = self.is_spare = False
        self.ends_with: Any = lambda attempt: 0

    def send(self, order: Any) -> None:
        if isinstance(order, Join) and order.rendezvous is None:
            self.stood_by += 1
            self.is_standing_by = self.is_spare = True
        elif isinstance(order, Join):
            self.is_standing_by = self.is_spare = False
            self.agents.append(order)
            assert order.rendezvous is not None
            code = self.ends_with(order.rendezvous.attempt)
            if code is not None:
                self.ended[order.rendezvous.attempt] = code
        elif isinstance(order, Kill) and self.is_spare:
            self.is_standing_by = self.is_spare = False
        elif isinstance(order, Kill) and self.agents:
            self.ended.setdefault(attempt_of(self.agents[-1]), -9)

    @property
    def has_workers(self) -> bool:
        return self.is_spare or (bool(self.agents) and attempt_of(self.agents[-1]) not in self.ended)

    @property
    def may_stand_by(self) -> bool:
        return not self.has_workers and not self.stood_by


class StubFleet:
    """Hosts that are there until they are taken away."""

    is_settled, missing = True, "b cannot be reached"

    def __init__(self, *hosts: str) -> None:
        self.links = [StubLink(host, number) for number, host in enumerate(hosts, start=1)]
        self.away: set[str] = set()

    def __getitem__(self, host: str) -> StubLink:
        return next(link for link in self.links if link.host == host)

    def tend(self) -> None: ...
    def close(self) -> None: ...

    @property
    def ready(self) -> list[StubLink]:
        return self.largest_group(len(self.links))

    def largest_group(self, most: int) -> list[StubLink]:
        return [link for link in self.links if link.host not in self.away][:most]

    def is_whole(self, members: Any) -> bool:
        return not any(link.host in self.away for link in members)


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A supervisor of a job on the first two of three hosts, and its fleet."""
    for name in ("POLL_SECONDS", "STEADY_SECONDS"):
        monkeypatch.setattr(hosts_job, name, 0.01)
    monkeypatch.setattr(hosts_job.signal, "signal", lambda *handler: None)

    def make(*hosts: str, **options: Any) -> tuple[Supervisor, StubFleet]:
        fleet = StubFleet(*hosts)
        monkeypatch.setattr(hosts_job, "Fleet", lambda *arguments: fleet)
        cluster = {"nodes": 2, "accelerators_per_node": 1}
        launch = {"engine": "hosts", "max_restarts": 1, "options": {"hosts": list(hosts), **options}}
        write_job(tmp_path, cluster=cluster, launch=launch)
        return Supervisor(tmp_path, "s", ["-m", "copus.worker"], False), fleet

    return make


def warnings_of(run: Path) -> list[str]:
    return [event.message for event in read_events(run) if isinstance(event, Warned)]


def test_a_lost_host_is_replaced_by_a_spare_and_costs_no_restart(
    supervised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, fleet = supervised("a", "b", "c")

    def lose_a() -> None:
        if fleet["c"].stood_by:
            fleet.away.add("a")

    monkeypatch.setattr(fleet, "tend", lose_a)
    fleet["a"].ends_with = lambda attempt: None  # nobody hears how it ended
    fleet["b"].ends_with = lambda attempt: None if attempt == 0 else 0
    assert supervisor.supervise() == 0
    assert warnings_of(tmp_path) == ["a lost: going on without"]
    assert [len(fleet[host].agents) for host in "abc"] == [1, 2, 1]
    of_b, of_c = fleet["b"].agents[1], fleet["c"].agents[0]
    assert of_b.rendezvous is not None
    assert of_b.rendezvous.model_dump(exclude={"port"}) == {
        "token": "s-1", "attempt": 1, "address": "10.0.0.2", "first_rank": 0, "ranks": 2,
        "addresses": ("10.0.0.2", "10.0.0.3"),
    }  # fmt: skip
    assert of_c.rendezvous == of_b.rendezvous.model_copy(update={"first_rank": 1})
    words = " ".join(of_b.arguments)
    assert "--rdzv-endpoint 127.0.0.1:0" in words  # agents know nothing of each other
    assert "--nnodes 1 --nproc-per-node 1 --max-restarts 0" in words
    assert of_b.environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert not of_b.keep  # it was lost before it trained
    assert of_c.keep  # it stood by
    assert fleet["c"].stood_by == 1
    assert (tmp_path / FILE).read_text() == "s-1"


def test_without_a_spare_it_goes_on_with_fewer_and_stops_for_the_host_that_is_back(
    supervised: Any, tmp_path: Path
) -> None:
    supervisor, fleet = supervised("a", "b")
    fleet.away.add("b")
    log = EventLog(tmp_path)

    def until_b_is_back(attempt: int) -> int | None:
        if attempt == 0:
            fleet.away.clear()
            threading.Thread(target=stop_as_asked).start()
            return None
        return 0

    def stop_as_asked() -> None:
        wait_for((tmp_path / "stop").exists)
        log.write(End(step=1, samples_consumed=4, reason="interrupted", seconds=1.0))
        fleet["a"].ended[0] = 0

    fleet["a"].ends_with = until_b_is_back
    assert supervisor.supervise() == 0
    places = [(order.rendezvous and order.rendezvous.ranks, order.keep) for order in fleet["a"].agents]
    assert places == [(1, False), (2, True)]
    assert fleet["b"].stood_by == 1
    assert len(fleet["b"].agents) == 1
    assert not (tmp_path / "stop").exists()


def test_a_link_to_another_run_s_stop_is_left_where_it_is(
    supervised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrations have one: `copus cancel` takes the run that they are of."""
    said: list[str] = []
    monkeypatch.setattr(hosts_job, "say", said.append)
    supervisor, fleet = supervised("a", "b")
    fleet.away.add("b")
    rounds = iter(range(100))

    def tend() -> None:
        if fleet["a"].agents:
            fleet.away.clear()
            if next(rounds) == 50:
                fleet["a"].ended[0] = 0

    monkeypatch.setattr(fleet, "tend", tend)
    fleet["a"].ends_with = lambda attempt: None
    (tmp_path / "stop").symlink_to(tmp_path / "stop of the run")
    assert supervisor.supervise() == 0
    assert (tmp_path / "stop").is_symlink()
    assert said == ["attempt 0 on a"]


def test_workers_that_fail_on_hosts_that_are_there_are_started_again_so_often(supervised: Any, tmp_path: Path) -> None:
    supervisor, fleet = supervised("a", "b")
    fleet["b"].ends_with = lambda attempt: 1
    fleet["a"].ends_with = lambda attempt: None
    assert supervisor.supervise() == 1
    assert warnings_of(tmp_path) == ["workers failed: starting them again"]
    assert fleet["a"].ended == {0: -9, 1: -9}  # ended with the other


@pytest.mark.parametrize("trains", [True, False])
def test_workers_that_outlive_a_loss_stay_if_they_had_trained_and_start_anew_if_they_do_not_come_along(
    supervised: Any, tmp_path: Path, trains: bool
) -> None:
    """What they cannot help costs no restart."""
    supervisor, fleet = supervised("a", "b", "c")
    log = EventLog(tmp_path)

    def end(attempt: int) -> int | None:
        if attempt == 0:
            if trains:
                log.write(start())
            fleet.away.add("b")
            return None
        return 1 if attempt == 1 and trains else 0

    fleet["a"].ends_with = end
    fleet["b"].ends_with = lambda attempt: None
    assert supervisor.supervise() == 0
    assert [order.keep for order in fleet["a"].agents] == ([False, True, False] if trains else [False, False])
    assert supervisor._job.launch.max_restarts == 1
    assert warnings_of(tmp_path)[1:] == ["workers failed: starting them again"] * trains


def test_workers_that_were_ending_when_they_were_told_to_stay_are_started_anew(supervised: Any, tmp_path: Path) -> None:
    """A host that goes down asks its workers to stop, and with them all others."""
    supervisor, fleet = supervised("a", "b", "c")
    log = EventLog(tmp_path)

    def end(attempt: int) -> int | None:
        if attempt == 0:
            log.write(start())
            fleet.away.add("b")
            return None
        return 0

    fleet["a"].ends_with = end
    fleet["b"].ends_with = lambda attempt: None
    fleet["c"].ends_with = lambda attempt: None if attempt == 1 else 0
    assert supervisor.supervise() == 0
    assert [order.keep for order in fleet["a"].agents] == [False, True, False]


def test_an_error_of_the_user_s_is_not_tried_again(supervised: Any, tmp_path: Path) -> None:
    supervisor, fleet = supervised("a", "b")
    log = EventLog(tmp_path)

    def fail(attempt: int) -> int:
        log.write(Failure(step=0, samples_consumed=0, rank=0, message="no such file", user_error=True))
        return 1

    fleet["b"].ends_with = fail
    assert supervisor.supervise() == 1
    assert len(fleet["b"].agents) == 1


def test_too_few_hosts_are_waited_for_and_then_it_fails(supervised: Any, tmp_path: Path) -> None:
    supervisor, fleet = supervised("a", "b", min_hosts=2, wait_seconds=0.1)
    fleet.away.add("b")
    with pytest.raises(
        JobError, match=r"1 hosts are there, fewer than launch.options.min_hosts\(2\), for 0.1 s: b can"
    ):
        supervisor.supervise()
    assert warnings_of(tmp_path) == ["waiting for hosts, 1 of 2 are there: b cannot be reached"]


def test_a_stop_while_it_waits_is_an_end(supervised: Any, tmp_path: Path) -> None:
    supervisor, fleet = supervised("a", "b", min_hosts=2)
    fleet.away.add("b")
    request_stop(tmp_path)
    assert supervisor.supervise() == 0
    assert [event.reason for event in read_events(tmp_path) if isinstance(event, End)] == ["interrupted"]
