"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, configured in a folder of their own.

Nothing of the machine's own Slurm is touched, everything listens on the loopback interface, and the daemons are
children that are ended by their ids.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=copus-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue_seconds}
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
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
ReturnToService=2
KillWait=5
SlurmdTimeout=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
"""
# A requeued job has to wait for cred_expire (120 s by default) before it starts again: here less.
REQUEUE_SECONDS = 10


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
def slurm_cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Both nodes idle while it is entered. Gives what has to be in the environment of Slurm's programs."""
    configuration = folder / "slurm.conf"
    settings = {"folder": folder, "host": socket.gethostname().partition(".")[0], "ports": _free_ports(3)}
    configuration.write_text(CONFIGURATION.format(**settings, requeue_seconds=REQUEUE_SECONDS))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
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
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        wait_for("idle nodes", lambda: _idle(environment) == len(NODES), 60)
        daemons.callback(_cancel_all, environment)
        yield environment


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Poll until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


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
