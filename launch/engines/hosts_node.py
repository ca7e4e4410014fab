"""One host of a job: `python -m launch.engines.hosts_node FILE…`, which the supervisor (`hosts_job`) starts over ssh.

Says what the host has, sees FILEs or not, and then does what it is told (`hosts_messages`): exchanges signs of life
with the other hosts, and runs the elastic agent. If its supervisor is silent it ends the agent and itself: others may
be training in the run directory by then.
"""

import hashlib
import importlib.metadata
import ipaddress
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from copus.parent_death import die_with_parent
from copus.rendezvous import FILE as RENDEZVOUS
from copus.rendezvous import clear_rendezvous, count_waiting, write_rendezvous
from launch.engines.hosts_messages import (
    BEAT_SECONDS,
    ORDERS,
    Alive,
    Bind,
    Bound,
    Ended,
    Hello,
    Interface,
    Join,
    Kill,
    Order,
    Stop,
    Watch,
    attempt_of,
)
from launch.process import kill_family, module_root, python_module

HOST, RUN = "COPUS_HOST", "COPUS_RUN"
"""Variables in the environment of all processes of a run on a host: its name, and the run directory."""
PATIENCE = "COPUS_PATIENCE_SECONDS"
"""How long the supervisor may be silent."""


def main(files: list[str]) -> int:
    """Serve until stdin is closed, or the supervisor is silent."""
    end_leftovers()
    report(Hello(software=software(), digests=[digest(Path(file)) for file in files], interfaces=interfaces()))
    with tempfile.TemporaryDirectory(prefix="copus-", ignore_cleanup_errors=True) as folder:
        node = Node(os.environ[HOST], float(os.environ[PATIENCE]), Path(folder))
        try:
            return node.serve()
        finally:
            node.end_agent()


def report(message: BaseModel) -> None:
    """To the supervisor."""
    sys.stdout.write(message.model_dump_json() + "\n")
    sys.stdout.flush()


def software() -> dict[str, str]:
    """Versions that have to be the same on all hosts. Of copus itself its source too, which a checkout changes without
    another version."""
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]), "COPUS": source_digest(module_root())}
    for name in ("torch", "megatron-core", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def source_digest(root: Path) -> str:
    """Of all Python files of this distribution's packages, as a short hexadecimal number."""
    digests = hashlib.sha256()
    for package in ("copus", "launch", "planner", "profiles"):
        for path in sorted((root / package).rglob("*.py")):
            digests.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digests.hexdigest()[:12]


def digest(path: Path) -> str | None:
    """Of a file; None where there is none that can be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def interfaces() -> list[Interface]:
    """IPv4 addresses by which others might reach this host."""
    states = psutil.net_if_stats()
    return [
        Interface(
            name=name,
            address=one.address,
            network=str(ipaddress.IPv4Network(f"{one.address}/{one.netmask}", strict=False)),
            mbit_per_second=state.speed,
        )
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and not ipaddress.IPv4Address(one.address).is_loopback
        if (state := states.get(name.partition(":")[0])) is not None and state.isup  # eth0:1 is an address of eth0
    ]


def end_leftovers() -> None:
    """Kill what an agent, or an earlier process like this one, has left of the run on this host."""
    host, run = os.environ[HOST], os.environ.get(RUN)
    own = {os.getpid(), *(above.pid for above in psutil.Process().parents())}  # what wraps this interpreter is no rest
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ() if run and process.pid not in own else {}
            if environment.get(HOST) == host and environment.get(RUN) == run:
                kill_family(process.pid)


class Node:
    """Orders, signs of life, and the agent."""

    def __init__(self, name: str, patience_seconds: float, folder: Path) -> None:
        """`folder` is this host's own, whatever the hosts share."""
        self._name = name.encode()
        self._patience_seconds = patience_seconds
        self._rendezvous = folder / "rendezvous.json"
        self._agent: subprocess.Popen[bytes] | None = None
        self._attempt = self._workers = 0
        self._socket: socket.socket | None = None
        self._peers: dict[str, tuple[str, int]] = {}
        self._heard: dict[str, float] = {}

    def serve(self) -> int:
        """0 when stdin was closed, 1 when nothing came from there for too long."""
        unread, last_order, next_beat = b"", time.monotonic(), 0.0
        while True:
            udp = -1 if self._socket is None else self._socket.fileno()
            ready, _, _ = select.select([0, *([udp] if self._socket else [])], [], [], BEAT_SECONDS / 4)
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    return 0
                *lines, unread = (unread + data).split(b"\n")
                last_order = time.monotonic()
                for line in lines:
                    self._obey(ORDERS.validate_json(line))
            if self._socket is not None and udp in ready:
                self._listen(self._socket)
            now = time.monotonic()
            if now - last_order > self._patience_seconds:
                print(f"copus: nothing heard of the supervisor for {self._patience_seconds:g} s", file=sys.stderr)
                return 1
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                self._beat(now)
            self._look_after_agent()

    def _obey(self, order: Order) -> None:
        match order:
            case Bind():
                self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                self._socket.bind((order.address, 0))
                self._socket.setblocking(False)
                report(Bound(port=self._socket.getsockname()[1]))
            case Watch():
                same = {name for name, place in order.peers.items() if self._peers.get(name) == place}
                self._heard = {name: at for name, at in self._heard.items() if name in same}
                self._peers = order.peers
            case Join():
                self._join(order)
            case Stop():
                if self._agent is not None:
                    self._agent.terminate()
            case Kill():
                self.end_agent()

    def _listen(self, udp: socket.socket) -> None:
        with suppress(OSError):
            while True:
                name = udp.recv(1024).decode(errors="replace")
                if name in self._peers:
                    self._heard[name] = time.monotonic()

    def _beat(self, now: float) -> None:
        silent = {name: now - self._heard[name] if name in self._heard else None for name in self._peers}
        is_standing_by = self._agent is not None and count_waiting(self._rendezvous) == self._workers
        report(Alive(silent_seconds=silent, is_standing_by=is_standing_by))
        for place in self._peers.values():
            with suppress(OSError):
                if self._socket is not None:
                    self._socket.sendto(self._name, place)

    def _join(self, order: Join) -> None:
        stays = order.keep and self._agent is not None and self._agent.poll() is None
        if not stays:
            self.end_agent()
            clear_rendezvous(self._rendezvous)
        self._workers = order.workers
        self._attempt = attempt_of(order)
        if order.rendezvous is not None:
            write_rendezvous(self._rendezvous, order.rendezvous)
        if not stays:
            self._start_agent(order)

    def _start_agent(self, order: Join) -> None:
        with open(order.log, "ab") as output:
            self._agent = subprocess.Popen(
                python_module("copus.agent", *order.arguments),
                env=os.environ | order.environment | {RENDEZVOUS: str(self._rendezvous)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(),
            )

    def _look_after_agent(self) -> None:
        if self._agent is not None and (code := self._agent.poll()) is not None:
            self._agent = None
            end_leftovers()  # workers that outlive their agent
            report(Ended(attempt=self._attempt, code=code))

    def end_agent(self) -> None:
        """Kill it, and all that it has started, and wait until they are gone."""
        if self._agent is not None:
            kill_family(self._agent.pid)
            self._agent.wait()
            end_leftovers()


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except BrokenPipeError:  # the supervisor does not listen any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    sys.exit(status)
