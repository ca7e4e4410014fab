"""The way to one host: the process there (`hosts_node`), started over ssh, its reports, and what they mean."""

import contextlib
import ipaddress
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from copus.job import JobError
from launch.engines.environment import job_environment
from launch.engines.hosts_messages import (
    BEAT_SECONDS,
    REPORTS,
    STANDBY,
    Alive,
    Bound,
    Ended,
    Hello,
    Interface,
    Join,
    Order,
    attempt_of,
)
from launch.engines.hosts_node import HOST, PATIENCE, RUN
from launch.engines.hosts_options import HostsOptions
from launch.process import module_root

ANSWER_SECONDS = 60.0
"""How long a host may take to start the process there: Python from a slow file system."""
FRESH_SECONDS = 3.5 * BEAT_SECONDS
"""A host that was heard within this time is certainly there."""
PATIENCE_SHARE = 2 / 3
"""Of `lost_seconds`: a host that hears nothing has ended its workers before it is given up."""


def host_command(options: HostsOptions, host: str, files: Sequence[Path], run: Path | None = None) -> list[str]:
    """What starts the process on a host; `files` are what it is asked for."""
    own = {HOST: host, PATIENCE: f"{options.lost_seconds * PATIENCE_SHARE:g}"} | ({RUN: str(run)} if run else {})
    # Another interpreter has copus of its own if this one's lies among packages that are not for it.
    if options.python is None or "site-packages" not in module_root().parts:
        own["PYTHONPATH"] = str(module_root())
    words = ["env", "PYTHONSAFEPATH=1", *(f"{name}={value}" for name, value in own.items())]
    words += [options.python or sys.executable, "-m", "launch.engines.hosts_node", *map(str, files)]
    command = "exec " + shlex.join(words)
    return [word.replace("{host}", host).replace("{command}", command) for word in options.command]


class Link:
    """A process on a host."""

    def __init__(self, host: str, command: list[str], log: IO[bytes] | int) -> None:
        """Starts it; `log` gets what is said on the way, ssh's words for instance."""
        self.host = host
        self.hello: Hello | None = None
        self.port: int | None = None
        """UDP, as soon as it is bound."""
        self.address: str | None = None
        self.interface: str | None = None
        """Where it was told to listen."""
        self.silent_seconds: dict[str, float | None] = {}
        """As in the newest sign of life."""
        self.is_standing_by = False
        """Likewise: whether its workers have only to be told where to meet."""
        self.ended: dict[int, int] = {}
        """Exit code of the agent in each attempt that ended."""
        self._joined: int | None = None
        """The newest attempt that its workers were told to join."""
        self._heard = time.monotonic()
        self._bound = math.inf
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=job_environment()
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a host that reads no more must not hold the others up
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard = time.monotonic()
            try:
                report = REPORTS.validate_json(line)
            except ValidationError:  # what a shell says when it starts
                continue
            match report:
                case Hello():
                    self.hello = report
                case Bound():
                    self._bound = time.monotonic()
                    self.port = report.port
                case Alive():
                    self.silent_seconds = report.silent_seconds
                    self.is_standing_by = report.is_standing_by
                case Ended():
                    self.ended[report.attempt] = report.code

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    @property
    def has_workers(self) -> bool:
        """Whether workers were started there, and their end was not heard of."""
        return self._joined is not None and self._joined not in self.ended

    @property
    def may_stand_by(self) -> bool:
        """Whether it has no workers, and none that stood by have ended there."""
        return not self.has_workers and STANDBY not in self.ended

    @property
    def is_spare(self) -> bool:
        """Whether its workers have joined no world yet."""
        return self.has_workers and self._joined == STANDBY

    @property
    def unheard_seconds(self) -> float:
        """Since its last report, or since it was started."""
        return time.monotonic() - self._heard

    @property
    def bound_seconds(self) -> float:
        """Since it listens to the others; below 0 before that."""
        return time.monotonic() - self._bound

    def send(self, order: Order) -> None:
        """Give an order. One that does not get through is seen by the silence that follows."""
        assert self._process.stdin is not None
        if isinstance(order, Join):
            self._joined = attempt_of(order)
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(order.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Give it up: the process there ends, as soon as it hears of it, and with it what it has started."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()


def ask_hosts(options: HostsOptions, files: Sequence[Path]) -> tuple[dict[str, Hello], dict[str, str]]:
    """What each host says of itself; and of those that do not answer, what came instead, in words. Raises JobError
    where the command that reaches them is not on this machine."""
    children: dict[str, subprocess.Popen[bytes]] = {}
    hellos: dict[str, Hello] = {}
    silent: dict[str, str] = {}
    end = time.monotonic() + ANSWER_SECONDS
    try:
        for host in options.hosts:
            command = host_command(options, host, files)
            try:
                children[host] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=job_environment(),
                )
            except OSError as error:
                raise JobError(f"launch.options.command: {command[0]}: {error.strerror}") from None
        for host, child in children.items():
            try:
                out, errors = child.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                silent[host] = f"did not answer in {ANSWER_SECONDS:g} s"
                continue
            for line in out.splitlines():
                with contextlib.suppress(ValidationError):
                    report = REPORTS.validate_json(line)
                    if isinstance(report, Hello):
                        hellos[host] = report
            if host not in hellos:
                said = errors.decode(errors="replace").strip().splitlines()
                why = f": {said[-1].strip()}" if said else ""
                silent[host] = f"does not answer (exit code {child.returncode}){why}"
        return hellos, silent
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def misfit(hello: Hello, software: dict[str, str]) -> str | None:
    """What a host has another version of than is wanted."""
    for name in sorted(software.keys() | hello.software.keys()):
        there, here = hello.software.get(name, "none"), software.get(name, "none")
        if there != here:
            return f"has {name} {there}, and this machine {here}"
    return None


def common_network(options: HostsOptions, hellos: dict[str, Hello]) -> str:
    """The network that the hosts talk over: the user's, or the fastest in which each has an address of its own.

    Raises JobError if there is none.
    """
    if options.network is not None:
        owners: dict[str, str] = {}
        for host, hello in hellos.items():
            interface = interface_in(options.network, hello)
            if interface is None:
                raise JobError(f"launch.options.network({options.network}): {host} has {_addresses(hello)}")
            owner = owners.setdefault(interface.address, host)
            if owner != host:
                raise JobError(
                    f"launch.options.network({options.network}): {owner} and {host} both have {interface.address} there"
                )
        return options.network
    first, *_ = hellos.values()
    for one in sorted(first.interfaces, key=lambda one: -one.mbit_per_second):
        there = [interface_in(one.network, hello) for hello in hellos.values()]
        addresses = {found.address for found in there if found}
        if len(addresses) == len(hellos):
            return one.network
    (a, of_a), (b, of_b), *_ = [*hellos.items(), *hellos.items()]
    raise JobError(
        f"launch.options.hosts: no network in which each has an address of its own; {a} has {_addresses(of_a)}, {b} "
        f"has {_addresses(of_b)}; launch.options.network names one that all can reach"
    )


def interface_in(network: str, hello: Hello) -> Interface | None:
    """The interface of a host that belongs to the network."""
    wanted = ipaddress.IPv4Network(network)
    return next((one for one in hello.interfaces if ipaddress.IPv4Address(one.address) in wanted), None)


def _addresses(hello: Hello) -> str:
    return ", ".join(f"{one.address} ({one.name})" for one in hello.interfaces) or "none"
