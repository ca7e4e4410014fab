"""The hosts of a job as its supervisor (`hosts_job`) sees them: who is there, and who hears whom."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from copus.job import JobError
from launch.engines.hosts_link import (
    ANSWER_SECONDS,
    FRESH_SECONDS,
    Link,
    common_network,
    host_command,
    interface_in,
    misfit,
)
from launch.engines.hosts_messages import BEAT_SECONDS, Beat, Bind, Watch
from launch.engines.hosts_node import digest, software
from launch.engines.hosts_options import HostsOptions

RETRY_SECONDS = 5.0
"""Time between two tries to reach a host that is lost."""


class Fleet:
    """The ways to all hosts, kept open."""

    def __init__(self, run: Path, options: HostsOptions, log: IO[bytes]) -> None:
        self._run, self._options, self._log = run, options, log
        self._software, self._job_digest = software(), digest(run / "job.yaml")
        self._links: dict[str, Link] = {}
        self._closed: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._watched: set[tuple[str, int]] = set()
        self._network: str | None = None
        self._next_beat = 0.0

    def tend(self) -> None:
        """What has to be done all the time: signs of life, lost hosts given up, and tried again."""
        now = time.monotonic()
        for host in self._options.hosts:
            link = self._links.get(host)
            if link is None and now - self._closed.get(host, -RETRY_SECONDS) >= RETRY_SECONDS:
                command = host_command(self._options, host, [self._run / "job.yaml"], self._run)
                self._links[host] = Link(host, command, self._log)
            elif link is not None and self._is_lost(link):
                if link.hello is not None:
                    say(f"{host} is lost: {'its process ended' if link.is_gone else 'it is silent'}")
                link.close()
                del self._links[host]
                self._refused.pop(host, None)
                self._closed[host] = now
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            for link in self._links.values():
                link.send(Beat())
        self._bind_new()
        self._introduce()

    def _is_lost(self, link: Link) -> bool:
        limit = ANSWER_SECONDS if link.hello is None else self._options.lost_seconds
        return link.is_gone or link.unheard_seconds > limit

    def _is_first_try(self, link: Link) -> bool:
        """Whether nobody knows yet if the host can be reached."""
        return link.port is None and link.host not in self._refused and link.host not in self._closed

    def _choose_network(self) -> None:
        """As soon as all first tries are through; again when others come while one host alone is in it."""
        hellos = {host: link.hello for host, link in self._links.items() if link.hello is not None}
        bound = [link for link in self._links.values() if link.address is not None]
        first_tries = any(link.hello is None and self._is_first_try(link) for link in self._links.values())
        if first_tries or not hellos or (self._network is not None and (len(bound) != 1 or len(hellos) == 1)):
            return
        try:
            network = common_network(self._options, hellos)
        except JobError:
            if self._network is None:
                raise
            return
        if network != self._network:
            self._network = network
            for link in bound:
                link.address = link.port = None

    def _bind_new(self) -> None:
        """Have each host listen in the network, once that is chosen."""
        self._choose_network()
        if self._network is None:
            return
        for host, link in self._links.items():
            if link.hello is None or link.address is not None or host in self._refused:
                continue
            flaw = misfit(link.hello, self._software)
            if link.hello.digests != [self._job_digest]:
                flaw = f"has another {self._run / 'job.yaml'}"
            interface = interface_in(self._network, link.hello)
            if flaw or interface is None:
                self._refused[host] = flaw or f"has no address in {self._network}"
                say(f"{host} is left out: it {self._refused[host]}")
                continue
            link.address, link.interface = interface.address, interface.name
            link.send(Bind(address=interface.address))

    def _introduce(self) -> None:
        """Tell all of all, when somebody has come or gone."""
        places = {host: (link.address or "", link.port) for host, link in self._links.items() if link.port is not None}
        now = {(host, port) for host, (_, port) in places.items() if port is not None}
        if now == self._watched:
            return
        self._watched = now
        for host in places:
            peers = {other: (address, port or 0) for other, (address, port) in places.items() if other != host}
            self._links[host].send(Watch(peers=peers))

    @property
    def is_settled(self) -> bool:
        """Whether each host has been reached or not, and each pair hears each other or does not."""
        ready = self.ready
        return (
            bool(self._links or self._closed)
            and not any(self._is_first_try(link) for link in self._links.values())
            and all(
                link.unheard_seconds < FRESH_SECONDS
                and all(self._hears(link, other) or self._is_deaf(link, other) for other in ready if other is not link)
                for link in ready
            )
        )

    @property
    def ready(self) -> list[Link]:
        """Those that agents can be started on, in the user's order."""
        return [self._links[host] for host in self._options.hosts if host in self._links and self._links[host].port]

    def _hears(self, link: Link, other: Link) -> bool:
        silent = link.silent_seconds.get(other.host)
        return silent is not None and silent < FRESH_SECONDS

    def _is_deaf(self, link: Link, other: Link) -> bool:
        silent = link.silent_seconds.get(other.host)
        limit = self._options.lost_seconds
        return silent > limit if silent is not None else min(link.bound_seconds, other.bound_seconds) > limit

    def is_whole(self, members: Sequence[Link]) -> bool:
        """Whether none of these is lost, or cut off from another."""
        return all(self._links.get(link.host) is link for link in members) and not any(
            self._is_deaf(link, other) for link in members for other in members if other is not link
        )

    def largest_group(self, most: int) -> list[Link]:
        """The largest group of hosts that all hear each other, of those that come first in the user's order."""
        groups = []
        for first in self.ready:
            group = [first]
            for link in self.ready:
                if link not in group and all(self._hears(link, one) and self._hears(one, link) for one in group):
                    group.append(link)
            order = self._options.hosts
            groups.append(sorted(group, key=lambda link: order.index(link.host))[:most])
        return max(groups, key=len, default=[])

    @property
    def missing(self) -> str:
        """Why hosts are missing, in words."""
        ready = {link.host for link in self.ready}
        reasons = [f"{host} {self._refused.get(host, 'cannot be reached')}" for host in self._options.hosts]
        return "; ".join(words for host, words in zip(self._options.hosts, reasons, strict=True) if host not in ready)

    def close(self) -> None:
        """Give all up."""
        for link in self._links.values():
            link.close()


def say(line: str) -> None:
    """Into the supervisor's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} copus: {line}", file=sys.stderr, flush=True)
