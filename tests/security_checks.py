"""What a run must not do: listen where others can reach it, and write down secrets. For tests that have a run."""

from pathlib import Path

import psutil

SECRETS = {
    name: f"canary-of-{name.lower()}"
    for name in ("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "HF_TOKEN", "MY_PASSWORD", "WANDB_API_KEY")
}
"""Put into a command's environment; nothing that it leaves may hold a value of these."""


def listening(pid: int) -> set[str]:
    """Addresses, without ports, that a process and all below it listen on."""
    parent = psutil.Process(pid)
    found = set()
    for process in (parent, *parent.children(recursive=True)):
        try:
            connections = process.net_connections("all")
        except psutil.Error:  # it has just ended
            continue
        found |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def with_secrets(folder: Path) -> list[Path]:
    """Files below a folder that a secret stands in, or is the name of."""
    values = [value.encode() for value in SECRETS.values()]
    return [
        path
        for path in folder.rglob("*")
        if any(value in str(path).encode() or (path.is_file() and value in path.read_bytes()) for value in values)
    ]
