"""Machines that are reached over ssh, for people without a scheduler.

The launcher starts a supervisor (`hosts_job`), which starts a process on each machine (`hosts_node`), which runs
torch's elastic agent. They live as long as the launcher stays.
"""

import hashlib
import os
import secrets
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path

from copus.job import JobConfig, JobError
from launch.engines.agent import check_environment
from launch.engines.environment import job_environment
from launch.engines.hosts_link import ask_hosts, common_network, host_command, misfit
from launch.engines.hosts_node import software
from launch.engines.hosts_options import HostsOptions
from launch.engines.local import LocalEngine, LocalWorkers
from launch.process import python_module
from launch.run_directory import shown

END_SECONDS = 30.0
"""How long the supervisor may take to end everything."""


class HostsWorkers(LocalWorkers):
    """The supervisor's process and the logs of all machines."""

    def kill(self) -> None:
        """The supervisor has the workers killed; where it does not come to an end, they end without it."""
        self._agent.send_signal(signal.SIGINT)
        try:
            self._agent.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            super().kill()

    def failed_rank(self) -> int | None:
        """The rank under "Root Cause" in the last words of the agents that failed last."""
        return next((rank for log in self._newest_logs() if (rank := self.root_cause(log)) is not None), None)

    def error_log(self, rank: int) -> Path | None:
        """`logs/SESSION-ATTEMPT.HOST/…/LOCAL_RANK/stderr.log` of the last attempt, on the host that had the rank. All
        hosts have as many ranks, in their order."""
        for log in self._newest_logs():
            if f"[rank{rank}]:" in log.read_text(errors="replace"):
                files = sorted(
                    log.with_suffix("").glob("*/attempt_0/*/stderr.log"), key=lambda file: int(file.parts[-2])
                )
                return files[rank % len(files)] if files else None
        return None

    def _newest_logs(self) -> list[Path]:
        logs = self.logs.glob(f"{self._session}-*.log")
        return sorted(logs, key=lambda log: log.stat().st_mtime, reverse=True)


class HostsEngine(LocalEngine):
    """`launch.options.hosts`, with the run directory, the data and the throughput table on a file system that they
    share with this machine."""

    Options = HostsOptions
    options: HostsOptions
    Workers = HostsWorkers
    is_here = False

    def check(self, job: JobConfig) -> None:
        """Raise JobError if there are fewer machines than the job wants."""
        nodes, hosts = job.cluster.nodes, self.options.hosts
        if nodes > len(hosts):
            raise JobError(f"cluster.nodes({nodes}) is more than the {len(hosts)} machines of launch.options.hosts")
        if self.options.min_hosts > nodes:
            raise JobError(f"launch.options.min_hosts({self.options.min_hosts}) is more than cluster.nodes({nodes})")

    def ready(self, job: JobConfig) -> None:
        """Raise JobError if a machine does not answer, has other versions or does not share the folders of the job,
        or where they have no network in common. Writes a file into each folder, and removes it."""
        for host, why in self._ask(job).items():
            raise JobError(f"launch.options.hosts: {host} {why}")

    def ready_again(self, job: JobConfig) -> list[str]:
        """As `ready`, but for machines that do not answer: a run goes on without them if `min_hosts` others do."""
        hosts, fewest = self.options.hosts, self.options.min_hosts
        silent = [f"{host} {why}" for host, why in self._ask(job).items()]
        if len(hosts) - len(silent) < fewest:
            raise JobError(
                f"launch.options.hosts: {len(hosts) - len(silent)} of {len(hosts)} machines answer, fewer than "
                f"launch.options.min_hosts({fewest}): {'; '.join(silent)}"
            )
        return [f"goes on without a machine of launch.options.hosts: {words}" for words in silent]

    def _ask(self, job: JobConfig) -> dict[str, str]:
        """The machines that do not answer, and what came instead. Raises JobError if the others do not fit."""
        shell = job_environment()
        for name in self.options.pass_env:
            if name not in shell:
                raise JobError(f"launch.options.pass_env({name}): this shell has no such variable that a job may take")
        check_environment(job, {name: shell[name] for name in self.options.pass_env}, "pass_env")
        folders = {
            "launch.runs": job.launch.runs,
            "data.cache": job.data.cache,
        } | ({} if job.profile.when == "never" else {"profile.table": job.profile.table.parent})
        marks: dict[str, Path] = {}
        try:
            for name, folder in folders.items():
                marks[name] = _mark(name, folder)
            hellos, silent = ask_hosts(self.options, list(marks.values()))
            wanted = [hashlib.sha256(mark.read_bytes()).hexdigest() for mark in marks.values()]
        finally:
            for mark in marks.values():
                mark.unlink(missing_ok=True)
        for host, hello in hellos.items():
            if flaw := misfit(hello, software()):
                raise JobError(f"launch.options.hosts: {host} {flaw}: the same is needed on all machines")
            for (name, mark), digest, there in zip(marks.items(), wanted, hello.digests, strict=True):
                if digest != there:
                    raise JobError(
                        f"{name}({folders[name]}): {shown(mark.parent)} of this machine is not the one of {host}: all "
                        "machines have to share it, at the same path"
                    )
        if hellos:
            common_network(self.options, hellos)
        return silent

    def describe(self, run: Path, job: JobConfig) -> str:
        """What is run for each machine; the rest goes through its stdin."""
        return "\n".join(
            shlex.join(host_command(self.options, host, [run / "job.yaml"], run)) for host in self.options.hosts
        )

    def begin_attempt(self, run: Path, session: str) -> dict[str, str]:
        """Nothing here: the supervisor begins its attempts itself."""
        return {}

    def command(self, run: Path, job: JobConfig, session: str, profile_only: bool) -> list[str]:
        """The supervisor's."""
        return python_module(
            "launch.engines.hosts_job", run, session, *self._worker, *(["--profile-only"] if profile_only else [])
        )

    def settings(self, job: JobConfig) -> dict[str, str]:
        """Nothing for the supervisor, which makes the workers' itself."""
        return {}

    def log_files(self, run: Path) -> list[Path]:
        """The supervisor's output, and that of each machine in each attempt (`SESSION-ATTEMPT.HOST.log`)."""
        supervisor = super().log_files(run)
        if not supervisor:
            return []
        session = supervisor[0].name.removesuffix(".agent.log")

        def attempt_and_host(log: Path) -> tuple[int, str]:
            attempt, _, host = log.name.removeprefix(f"{session}-").partition(".")
            return int(attempt), host

        return [*supervisor, *sorted((run / "logs").glob(f"{session}-*.log"), key=attempt_and_host)]


def _mark(name: str, folder: Path) -> Path:
    """A file with something in it that nobody else has, in a folder of the job or, where that is not there yet, the
    nearest above."""
    place = folder.expanduser().absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        descriptor, path = tempfile.mkstemp(dir=place, prefix=".copus-shared-")
    except OSError as error:
        raise JobError(f"{name}({folder}): {error.strerror}: {place}") from None
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(secrets.token_hex())
        file.flush()
        os.fsync(file.fileno())
    return Path(path)
