"""Starting Python modules of this distribution as processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from copus.parent_death import die_with_parent
from launch.interrupts import Interrupts


def python_module(module: str, *arguments: str | Path) -> list[str]:
    """Command line that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def module_root() -> Path:
    """The folder that this distribution's packages lie in."""
    return Path(__file__).resolve().parent.parent


def module_environment(users: str | None = None) -> dict[str, str]:
    """What makes Python find modules where this command's own are, whatever folder it was typed in. `users` is a
    PYTHONPATH to look in after that, else that of this process.

    `python -m` looks in the current folder first; a folder `profiles` or `launch` of the user's would hide ours.
    """
    root = str(module_root())
    inherited = users or os.environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}


def kill_family(pid: int) -> None:
    """Kill a process first, so that it restarts nothing, then what is below it, one by one, and wait for these."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = parent.children(recursive=True)
        parent.kill()
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()  # psutil looks at the start time too: never a stranger with a recycled id
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)


def run_module(command: list[str], interrupts: Interrupts, stop: Path | None = None) -> int:
    """Run a command in the foreground. An interrupt of this one, or the file `stop` once it is there, ends it by
    SIGTERM, and a second interrupt kills it: what a terminal sends to both it ignores, also before it is ready for it.

    Returns its exit code (128 + signal).

    All that it prints goes to stderr: it is progress, and stdout is for this command's own result.
    """
    die_too = die_with_parent()

    def begin() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        die_too()

    child = subprocess.Popen(command, env=os.environ | module_environment(), stdout=2, preexec_fn=begin)
    passed_on, stopped = 0, False
    while child.poll() is None:
        if interrupts.count > passed_on:
            passed_on = interrupts.count
            if passed_on == 1:
                print("copus: stopping (once more: end at once)", file=sys.stderr)
                child.terminate()
            else:
                child.kill()
        if stop is not None and not stopped and stop.exists():
            stopped = True
            print("copus: stopping: `copus cancel` asked for it", file=sys.stderr)
            child.terminate()
        time.sleep(0.05)
    if interrupts.signal:
        return 128 + interrupts.signal
    if stopped:
        return 128 + signal.SIGTERM
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
