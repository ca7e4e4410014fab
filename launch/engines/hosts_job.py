"""The supervisor of a job on hosts: `python -m launch.engines.hosts_job RUN SESSION WORKER… [--profile-only]`.

Keeps a process on every host (`hosts_node`), starts attempts on as many of those that can reach each other as the job
wants, and decides what follows when one ends:

- trained to the end, or stopped by the user (`RUN/stop`): the job ends;
- a host is lost: the next attempt, from the newest checkpoint, with a spare in its place or with one fewer;
- a host that was missing is there again: the workers are asked for a checkpoint, and the next attempt has it too;
- workers failed on hosts that are all there: the next attempt, `launch.max_restarts` times.

In the first two cases the workers on the other hosts stay, and join the next attempt in the same processes
(`copus.worlds`); if that fails before it trains, all are started anew. On spare hosts, and on those that are back,
workers stand by: they have done their imports. A host's agent never restarts its workers: every end leads here.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from copus.event_log import EventLog
from copus.events import End, Start, Warned
from copus.fencing import replace_others
from copus.job import JobError, load_job
from copus.rendezvous import WAIT, Rendezvous
from copus.stop_request import LARGER
from copus.user_errors import EXIT_CODE, report_failure
from launch.engines.agent import agent_arguments, agent_environment
from launch.engines.hosts_fleet import Fleet, say
from launch.engines.hosts_link import Link
from launch.engines.hosts_messages import Join, Kill, Stop
from launch.engines.hosts_options import HostsOptions
from launch.follow import Follower
from launch.run_directory import request_pause, stopped_for_good
from launch.status import RunStatus

POLL_SECONDS = 0.1
STEADY_SECONDS = 10.0
"""How long a host has to be back before the others stop for it."""
WAIT_SHARE = 2.0
"""Of `lost_seconds`: how long workers that have lost others wait to be told how to go on."""
READY_SECONDS = 90.0
"""How long the others wait at most for the workers there to do their imports."""
ENDING_SECONDS = 20.0
"""How long hosts may take to end their workers once they are told to."""
FIRST_PORT, PORTS = 18_000, 12_000
"""Below the ports that Linux gives away by itself."""


def random_port() -> int:
    """Where a world may meet. Nobody looks whether it is free there; the next attempt tries another."""
    return random.randrange(FIRST_PORT, FIRST_PORT + PORTS)


class StopRequested(Exception):  # noqa: N818 (not an error)
    """Somebody asked for the end of the job."""


class Supervisor:
    """The attempts of a job, one after the other."""

    def __init__(self, run: Path, session: str, worker: Sequence[str], profile_only: bool) -> None:
        """Takes SIGTERM and SIGINT over."""
        self._run, self._session, self._worker = run, session, worker
        self._profile_only = profile_only
        self._job = load_job(run / "job.yaml")
        self._options = HostsOptions.model_validate(self._job.launch.options)
        self._fleet = Fleet(run, self._options, sys.stderr.buffer)
        self._events, self._status = Follower(run), RunStatus()
        self._attempt = 0
        self._start_before: Start | None = None
        """The newest one before this attempt."""
        self._kill = self._stop = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self._kill = self._kill or number == signal.SIGINT or self._stop
        self._stop = True

    def supervise(self) -> int:
        """Until the job is over: 0, or 1 if it failed."""
        failures, keep = 0, False
        try:
            while True:
                members = self._gather()
                code = self._run_attempt(members, keep)
                if code == 0 and not self._goes_on():
                    return 0
                self._new_status()
                if self._stop or stopped_for_good(self._run):
                    return code
                if self._status.failure is not None and self._status.failure.user_error:
                    return 1
                if code:
                    self._wait(lambda: self._fleet.is_settled)
                    lost = [link.host for link in members if not self._fleet.is_whole([link])]
                    cut = not lost and not self._fleet.is_whole(members)
                    did_not_come_along = keep and not self._has_trained
                    failures += not lost and not cut and not did_not_come_along
                    if failures > self._job.launch.max_restarts:
                        say(f"the workers failed {failures} times (launch.max_restarts)")
                        return 1
                    what = f"{', '.join(lost)} lost" if lost else "hosts are cut off from each other" if cut else ""
                    keep = bool(what) and self._has_trained
                    if not keep:
                        self._end_workers(members)
                    self._tell(f"{what}: going on without" if what else "workers failed: starting them again")
                else:
                    keep = True
                self._attempt += 1
        except StopRequested:
            self._log_end()
            return 0
        finally:
            self._end_workers(self._fleet.ready)
            self._fleet.close()

    def _gather(self) -> list[Link]:
        """Hosts for the next attempt. Raises JobError if there are too few for too long."""
        end, said = time.monotonic() + self._options.wait_seconds, False
        while True:
            self._wait(lambda: self._fleet.is_settled)
            group = self._fleet.largest_group(self._job.cluster.nodes)
            if len(group) >= self._options.min_hosts:
                return group
            if not said:
                self._tell(
                    f"waiting for hosts, {len(group)} of {self._options.min_hosts} are there: {self._fleet.missing}"
                )
                said = True
            if time.monotonic() > end:
                raise JobError(
                    f"{len(group)} hosts are there, fewer than launch.options.min_hosts({self._options.min_hosts}), "
                    f"for {self._options.wait_seconds:g} s: {self._fleet.missing}"
                )
            self._pause()

    def _wait(self, condition: Callable[[], bool]) -> None:
        while True:
            self._pause()
            if condition():
                return

    def _pause(self) -> None:
        """A moment. Raises StopRequested if no workers are wanted any more."""
        if self._stop or stopped_for_good(self._run):
            raise StopRequested
        time.sleep(POLL_SECONDS)
        self._fleet.tend()

    def _run_attempt(self, members: list[Link], keep: bool) -> int:
        """Run the workers on these hosts until something follows (`keep`: those that are there join in). 0 if all of
        them ended with 0, or stopped for more hosts and wait for these."""
        if self._asked_for_more():
            (self._run / "stop").unlink()
        self._new_status()
        self._status.forget_ending()
        self._start_before = self._status.start
        say(f"attempt {self._attempt} on {', '.join(link.host for link in members)}{' in their processes' * keep}")
        self._end_workers([link for link in self._fleet.ready if link not in members and not link.is_spare])
        replace_others(self._run, f"{self._session}-{self._attempt}")
        port = self._options.port or random_port()
        for link in members:
            place = self._rendezvous(members.index(link), members, port)
            link.send(self._order(link, place, keep or link.is_spare))
        stop_sent = False
        more_since: float | None = None
        while True:
            time.sleep(POLL_SECONDS)
            self._fleet.tend()
            codes = [link.ended.get(self._attempt) for link in members]
            if all(code == 0 for code in codes) or self._is_paused():
                return 0
            if keep and 0 in codes and not self._trains():  # they were ending when they were told to join
                return 1
            if stop_sent and None not in codes:  # an agent that is stopped ends with a code
                return 1
            if (any(codes) and not stop_sent) or self._kill or not self._fleet.is_whole(members):
                if self._stop:
                    self._end_workers(members)
                return 1
            if self._stop and not stop_sent:
                stop_sent = True
                for link in members:
                    link.send(Stop())
            for link in self._fleet.ready:
                if link not in members and link.may_stand_by:
                    link.send(self._order(link, None, keep=False))
            group = self._fleet.largest_group(self._job.cluster.nodes)
            if len(group) <= len(members):
                more_since = None
                continue
            more_since = more_since or time.monotonic()
            steady_seconds = time.monotonic() - more_since
            are_ready = all(link in members or link.is_standing_by for link in group)
            if not are_ready and steady_seconds < READY_SECONDS:
                continue
            if steady_seconds > STEADY_SECONDS and not os.path.lexists(self._run / "stop"):
                more_since = None
                say("more hosts are there: asking the workers for a checkpoint")
                with suppress(OSError):  # a full disk: once more, later
                    request_pause(self._run, LARGER)

    def _rendezvous(self, index: int, members: list[Link], port: int) -> Rendezvous:
        """Where the workers of one of the members meet the others."""
        addresses = [one.address for one in members if one.address is not None]
        per_host = self._job.cluster.accelerators_per_node
        return Rendezvous(
            token=f"{self._session}-{self._attempt}",
            attempt=self._attempt,
            address=addresses[0],
            port=port,
            first_rank=index * per_host,
            ranks=len(members) * per_host,
            addresses=tuple(addresses),
        )

    def _order(self, link: Link, rendezvous: Rendezvous | None, keep: bool) -> Join:
        """What a host is told. Its agent knows of no other one."""
        cluster = self._job.cluster.model_copy(update={"nodes": 1})
        launch = self._job.launch.model_copy(update={"max_restarts": 0})
        job = self._job.model_copy(update={"cluster": cluster, "launch": launch})
        name = f"{self._session}-{self._attempt}"
        logs = self._run / "logs" / f"{name}.{link.host}"
        local = {"backend": "bound", "endpoint": "127.0.0.1:0", "session": name, "address": "127.0.0.1"}
        agent = agent_arguments(self._run, job, **local, logs=logs, worker=self._worker)
        passed = {name: os.environ[name] for name in self._options.pass_env if name in os.environ}
        users = self._options.env | passed
        nccl = self._options.nccl_interface or f"={link.interface}"
        environment = {
            **{"GLOO_SOCKET_IFNAME": link.interface or "", "NCCL_SOCKET_IFNAME": nccl},
            **users,
            **agent_environment(job, users),
            WAIT: f"{WAIT_SHARE * self._options.lost_seconds:g}",
        }
        arguments = [*agent, *(["--profile-only"] if self._profile_only else [])]
        return Join(
            rendezvous=rendezvous,
            keep=keep,
            workers=cluster.accelerators_per_node,
            arguments=arguments,
            environment=environment,
            log=f"{logs}.log",
        )

    @property
    def _has_trained(self) -> bool:
        """Whether this attempt has come to its first step."""
        return self._status.start is not self._start_before

    def _trains(self) -> bool:
        self._new_status()
        return self._has_trained

    def _end_workers(self, links: Sequence[Link]) -> None:
        """End all workers on these hosts, and wait until they are gone where that can be known."""
        busy = [link for link in links if link.has_workers]
        for link in busy:
            link.send(Kill())
        end = time.monotonic() + ENDING_SECONDS
        while any(link.has_workers and not link.is_gone for link in busy) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            self._fleet.tend()

    def _is_paused(self) -> bool:
        """Whether the workers have stopped for more hosts."""
        if not self._asked_for_more():
            return False
        self._new_status()
        return self._status.end is not None and self._status.end.reason == "interrupted"

    def _goes_on(self) -> bool:
        """Whether the workers that ended well had stopped for more hosts."""
        self._new_status()
        if not self._asked_for_more():
            return False
        (self._run / "stop").unlink()
        return self._status.end is not None and self._status.end.reason == "interrupted"

    def _asked_for_more(self) -> bool:
        """Whether the workers were asked to stop for more hosts, and for nothing else since."""
        try:
            return (self._run / "stop").read_text() == LARGER
        except FileNotFoundError:
            return False

    def _new_status(self) -> None:
        self._status.update(self._events.read())

    def _tell(self, message: str) -> None:
        """Into the log and into the run's events: the workers are gone, nobody else writes there."""
        say(message)
        self._new_status()
        log = EventLog(self._run)
        step = self._status.step.step if self._status.step else 0
        log.write(Warned(step=step, samples_consumed=self._status.samples_consumed, message=message))
        log.close()

    def _log_end(self) -> None:
        """That it was stopped while it had no workers to say so."""
        self._new_status()
        log = EventLog(self._run)
        step = self._status.step.step if self._status.step else 0
        log.write(End(step=step, samples_consumed=self._status.samples_consumed, reason="interrupted", seconds=0.0))
        log.close()


def main(arguments: list[str]) -> int:
    """The whole job; the exit code of the supervisor."""
    run, session, *worker = arguments
    profile_only = worker[-1] == "--profile-only"
    try:
        return Supervisor(Path(run), session, worker[:-1] if profile_only else worker, profile_only).supervise()
    except JobError as error:
        report_failure(error, EventLog(Path(run)), rank=0)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
