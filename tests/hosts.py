"""A cluster of hosts on this machine: network namespaces, each with a cable to one switch, an address, a name and an
ssh daemon of its own.

The file system is common to all, and so are the cores. Cables can be cut and slowed down (`tc tbf`), hosts can be
frozen and switched off. Needs root, `ip`, `tc` and OpenSSH (`why_not`).
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "ssh": "openssh-client", "sshd": "openssh-server"}
"""Program → Debian's package."""
SSHD = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PermitUserRC no
UseDNS no
MaxStartups 100
"""
SSH = """
Host {name}
  HostName {address}
  IdentityFile {folder}/key
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


def why_not() -> str | None:
    """Why there can be no such hosts here; None if there can. Installs Debian's packages if they are missing."""
    if os.geteuid() != 0:
        return "network namespaces can only be made by root"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} are not installed, and there is no apt-get"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]) if missing else ():
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode and command != ["update"]:
            return f"apt-get cannot install {', '.join(missing)}: {' '.join(done.stderr.split())[-300:]}"
    probe = f"copus-{os.getpid()}"
    if (made := subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)).returncode:
        return f"no network namespace can be made: {' '.join(made.stderr.split())}"
    run("ip", "netns", "del", probe)
    return None


def run(*command: str | Path) -> str:
    """Run a program to its end; what it printed. Raises RuntimeError, with its words, if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Poll until something is so. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)


@dataclass
class Host:
    """One of them."""

    name: str
    """Name of the namespace, and what `hostname` says there. It resolves nowhere."""
    address: str
    cable: str
    """The switch's end of its cable; the host's is `eth0`."""
    folder: Path
    """For the daemon's files."""
    unshared: Path | None = None
    """A folder that is empty here, whatever the others have in it."""
    _daemon: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    def boot(self) -> None:
        """Plug the cable in, and start the ssh daemon."""
        run("ip", "link", "set", self.cable, "up")
        if self.unshared:
            self.unshared.mkdir(exist_ok=True)
        hidden = f"mount -t tmpfs none {self.unshared} &&" if self.unshared else ""
        script = f"hostname {self.name} && {hidden} exec {shutil.which('sshd')} -D -e -f {self.folder}/{self.name}.sshd"
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self._daemon = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        sockets = ("ip", "netns", "exec", self.name, "ss", "--tcp", "--listening", "--numeric")
        wait_for("the ssh daemon", lambda: f"{self.address}:22 " in run(*sockets), 20)

    def processes(self) -> list[int]:
        """Ids of all that run there."""
        return [int(pid) for pid in run("ip", "netns", "pids", self.name).split()]

    def cut(self) -> None:
        """Pull the cable out: packets are lost, and nobody is told."""
        run("ip", "link", "set", self.cable, "down")

    def mend(self) -> None:
        """Plug it in again."""
        run("ip", "link", "set", self.cable, "up")

    def limit(self, mbit_per_second: float | None) -> None:
        """Slow the cable down in both directions; None takes the limit away."""
        for place in (["-n", self.name], []):
            end = "eth0" if place else self.cable
            with suppress(RuntimeError):
                run("tc", *place, "qdisc", "del", "dev", end, "root")
            if mbit_per_second is not None:
                bucket_bytes = max(128 * 1024, int(mbit_per_second * 1e6 / 8 * 0.004))  # 4 ms of the rate
                rate = ["rate", f"{mbit_per_second}mbit", "burst", str(bucket_bytes), "latency", "50ms"]
                run("tc", *place, "qdisc", "add", "dev", end, "root", "tbf", *rate)

    def signal(self, number: int) -> None:
        """Send a signal to all that runs there."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self) -> None:
        """Stop all that runs there, in the middle of whatever it does."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    def switch_off(self) -> None:
        """No power: the cable is dead first, so that nobody hears of the end."""
        self.cut()
        while self.processes():
            self.signal(signal.SIGKILL)
            time.sleep(0.02)
        if self._daemon is not None:
            self._daemon.wait()


@dataclass
class Hosts:
    """All of them, and the way to them."""

    hosts: list[Host]
    folder: Path
    address: str
    """This machine's own, on the same switch."""

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    @property
    def names(self) -> list[str]:
        """Names of all."""
        return [host.name for host in self.hosts]

    @property
    def ssh(self) -> list[str]:
        """A template for `launch.options.command`: ssh, with where these hosts are."""
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=3"]
        return ["ssh", "-F", str(self.folder / "ssh_config"), *options, "{host}", "{command}"]


@contextmanager
def made(count: int, folder: Path, unshared: dict[int, Path] | None = None) -> Iterator[Hosts]:
    """So many hosts, booted; all of it is removed at the end, whatever happened. `unshared`: see `Host`, by index."""
    tag = f"cp{os.getpid() % 46656:x}"
    network = f"10.77.{os.getpid() % 256}"
    switch = f"{tag}sw"
    hosts = [
        Host(f"{tag}h{index}", f"{network}.{index + 1}", f"{tag}c{index}", folder, (unshared or {}).get(index))
        for index in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # OpenSSH wants it
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
    (folder / "ssh_config").write_text(
        "".join(SSH.format(name=h.name, address=h.address, folder=folder) for h in hosts)
    )
    try:
        run("ip", "link", "add", switch, "type", "bridge")
        run("ip", "address", "add", f"{network}.254/24", "dev", switch)
        run("ip", "link", "set", switch, "up")
        for host in hosts:
            _make(host, switch)
        for host in hosts:
            host.boot()
        yield Hosts(hosts, folder, f"{network}.254")
    finally:
        for host in hosts:
            with suppress(RuntimeError):
                host.switch_off()
            with suppress(RuntimeError):
                run("ip", "netns", "del", host.name)
            with suppress(RuntimeError):
                run("ip", "link", "del", host.cable)
            shutil.rmtree(f"/etc/netns/{host.name}", ignore_errors=True)
        with suppress(RuntimeError):
            run("ip", "link", "del", switch)


def _make(host: Host, switch: str) -> None:
    own = Path("/etc/netns") / host.name  # `ip netns exec` puts these over the files of /etc
    own.mkdir(parents=True)
    (own / "hosts").write_text("127.0.0.1 localhost\n")
    (own / "resolv.conf").write_text("")
    (host.folder / f"{host.name}.sshd").write_text(SSHD.format(address=host.address, folder=host.folder))
    run("ip", "netns", "add", host.name)
    run("ip", "link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
    run("ip", "link", "set", host.cable, "master", switch)
    run("ip", "-n", host.name, "link", "set", "lo", "up")
    run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
    run("ip", "-n", host.name, "link", "set", "eth0", "up")
    # Docker's bridge, whose address is the same on all machines that have one, comes first in the list of interfaces
    # of many: nobody can be reached by it.
    run("ip", "-n", host.name, "link", "add", "docker0", "type", "bridge")
    run("ip", "-n", host.name, "address", "add", "172.17.0.1/16", "dev", "docker0")
    run("ip", "-n", host.name, "link", "set", "docker0", "up")
