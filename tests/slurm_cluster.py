"""A Slurm cluster on this machine: munged, slurmctld and a slurmd for each node, configured in a folder of their own.

There are two nodes on the loopback interface, or one on each of some hosts of network namespaces (`hosts`). Nothing of
the machine's own Slurm is touched, and the daemons are children that are ended by their ids.
"""

import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hosts import Hosts, wait_for

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
ON_LOOPBACK = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
"""Daemons listen on the addresses that they are given, and nowhere else."""
GPUS = "AutoDetect=off\nName=gpu File=/dev/null\n"
"""One on each node, as far as Slurm knows."""
SLURMD_PORT = 6818
"""Slurm's own."""
LOST_SECONDS = 15
"""A host whose slurmd does not answer for so long is lost, to Slurm."""
CONFIGURATION = """
ClusterName=copus-test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue_seconds}
CredType=cred/munge
{listening}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
GresTypes=gpu
ReturnToService=2
KillWait=5
SlurmdTimeout={lost_seconds}
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
# A requeued job has to wait for cred_expire (120 s by default) before it starts again: here less.
REQUEUE_SECONDS = 10
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=1 Gres=gpu:1 State=UNKNOWN"


def install() -> str | None:
    """Install Debian's packages where they are missing. Why that is not possible, or None."""
    if all(shutil.which(program) for program in PROGRAMS):
        return None if os.geteuid() == 0 else "the daemons of Slurm have to be started by root"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{' and '.join(PACKAGES)} are not installed, and only root can do that, with apt"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        return f"apt cannot install {' and '.join(PACKAGES)}: {' '.join(done.stderr.split())[-300:]}"
    return None


@contextmanager
def slurm_cluster(folder: Path, hosts: Hosts | None = None) -> Iterator[dict[str, str]]:
    """All nodes idle while it is entered. Gives what has to be in the environment of Slurm's programs."""
    configuration = folder / "slurm.conf"
    here = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(1 + len(NODES))
    settings = {"folder": folder, "host": here, "port": port, "requeue_seconds": REQUEUE_SECONDS}
    if hosts is None:
        places = [(name, here, "127.0.0.1", port) for name, port in zip(NODES, ports, strict=True)]
        settings |= {"address": "127.0.0.1", "listening": ON_LOOPBACK, "lost_seconds": 60}
    else:
        places = [(host.name, host.name, host.address, SLURMD_PORT) for host in hosts.hosts]
        settings |= {"address": hosts.address, "listening": "", "lost_seconds": LOST_SECONDS}
    nodes = [NODE.format(name=name, host=host, address=at, port=port) for name, host, at, port in places]
    configuration.write_text(CONFIGURATION.format(**settings, nodes="\n".join(nodes)))
    (folder / "gres.conf").write_text(GPUS)
    for name in ("state", *(f"spool-{node}" for node, *_ in places)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(configuration)}
    munged = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("pid-file", "log-file", "seed-file")]
    with ExitStack() as daemons:

        def start(*command: str) -> None:
            daemons.enter_context(_daemon(folder, environment, *command))

        start("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={key}", *munged)
        wait_for("munge's socket", (folder / "munge.sock").exists, 20)
        start("slurmctld", "-D")
        for node, *_ in places:
            daemon = ["slurmd", "-D", "-N", node]
            if hosts is not None:
                # Not by ssh: `ip netns exec`, which that is below, hides the control groups that slurmd asks for.
                named = ["unshare", "--uts", "sh", "-c", f"hostname {node} && exec {shlex.join(daemon)}"]
                daemon = ["nsenter", f"--net=/run/netns/{node}", *named]
            start(*daemon)
        wait_for("idle nodes", lambda: _idle(environment) == len(places), 60)
        daemons.callback(_cancel_all, environment)
        yield environment


@contextmanager
def _daemon(folder: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    with open(folder / "daemons.log", "ab") as output:
        child = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _cancel_all(environment: dict[str, str]) -> None:
    """End what a failed test left: the daemons do not take their jobs with them."""

    def jobs() -> list[str]:
        return _ask(environment, "squeue", "--noheader", "--format=%i").split()

    if jobs():
        _ask(environment, "scancel", *jobs())
        wait_for("an empty queue", lambda: not jobs(), 30)


def _ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=30).stdout


def _idle(environment: dict[str, str]) -> int:
    said = _ask(environment, "sinfo", "--noheader", "--Node", "--format=%N %t")
    return len({line.split()[0] for line in said.splitlines() if line.split()[1:] == ["idle"]})  # a line a partition


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody has right now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
