"""How much memory and time a checkpoint takes, to write and to read, with and without the distributed optimizer.

`python -m benchmarks.checkpoint` does it on four ranks. With `--former REVISION` the code of an earlier git revision
does the same, the two in turn. Bytes beyond the state are the most memory of any rank's process while it writes or
reads, less the memory that it had just before.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell

RANKS = 4
MODEL = {"layers": 8, "hidden": 768, "ffn_hidden": 2048, "heads": 12, "kv_heads": 12, "seq_len": 64, "vocab": 8192}
QUICK_MODEL = {"layers": 4, "hidden": 128, "ffn_hidden": 352, "heads": 4, "kv_heads": 4, "seq_len": 32, "vocab": 1024}
STAGING_BYTES = 16 * 2**20
ROOT = Path(__file__).resolve().parent.parent


def run(quick: bool, repeats: int, former: str | None, console: Console) -> dict[str, Any]:
    """Every cell, the two versions in turn."""
    cells: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="copus-checkpoint-") as name:
        folder = Path(name)
        sources = {"": ROOT}
        if former is not None:
            sources["former_"] = _checkout(former, folder / "former")
        for zero in (0, 1):
            seen: dict[str, list[dict[str, Any]]] = {version: [] for version in sources}
            for number in range(repeats):
                for version, source in sources.items():
                    console.print(f"zero {zero}, {version.rstrip('_') or 'this code'}, {number + 1} of {repeats}")
                    seen[version].append(_measure(source, zero, quick, folder))
            cells.append(_cell(zero, seen))
    return {
        "benchmark": "checkpoint",
        "quick": quick,
        "model": QUICK_MODEL if quick else MODEL,
        "former": former,
        "repeats": repeats,
        "cells": cells,
    }


def _checkout(revision: str, folder: Path) -> Path:
    """The files of a git revision."""
    archive = folder.with_suffix(".tar")
    subprocess.run(["git", "archive", "-o", str(archive), revision], cwd=ROOT, check=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


def _measure(source: Path, zero: int, quick: bool, folder: Path) -> dict[str, Any]:
    """One save and one load by the code in a folder."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    task = {"zero": zero, "model": QUICK_MODEL if quick else MODEL, "staging_bytes": STAGING_BYTES}
    (work / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += [str(ROOT / "benchmarks" / "checkpoint_ranks.py"), str(work)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(source)}
    done = subprocess.run(command, env=os.environ | settings, cwd=source, capture_output=True, text=True)
    if done.returncode or not (work / "result.json").exists():
        raise SystemExit(f"the ranks failed ({done.returncode}):\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads((work / "result.json").read_text())
    return result


def _cell(zero: int, seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is said of one setting: medians of seconds, and the most bytes of any repeat."""
    own = seen[""][0]
    cell = {
        "backend": "megatron",
        "zero": zero,
        "ranks": RANKS,
        "state_bytes": own["state_bytes"],
        "bound_bytes": STAGING_BYTES,
    }
    for version in ("", "former_"):
        runs = seen.get(version, [])
        for way in ("save", "load"):
            cell[f"{version}{way}_seconds"] = statistics.median(r[f"{way}_seconds"] for r in runs) if runs else None
            cell[f"{version}{way}_extra_bytes"] = max(r[f"{way}_extra_bytes"] for r in runs) if runs else None
        extra = [cell[f"{version}save_extra_bytes"], cell[f"{version}load_extra_bytes"]]
        cell[f"{version}extra_bytes_peak"] = max(extra) if runs else None
    return cell


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    table = Table(
        "zero",
        "state MB a rank",
        "bound MB",
        "extra MB, save · load",
        "save s",
        "load s",
        "former: extra MB",
        "save s",
        "load s",
    )
    for cell in result["cells"]:
        former = ["–"] * 3
        if cell["former_save_seconds"] is not None:
            former = [
                f"{cell['former_save_extra_bytes'] / 1e6:.0f} · {cell['former_load_extra_bytes'] / 1e6:.0f}",
                f"{cell['former_save_seconds']:.2f}",
                f"{cell['former_load_seconds']:.2f}",
            ]
        table.add_row(
            str(cell["zero"]),
            f"{cell['state_bytes'] / 1e6:.0f}",
            f"{cell['bound_bytes'] / 1e6:.1f}",
            f"{cell['save_extra_bytes'] / 1e6:.1f} · {cell['load_extra_bytes'] / 1e6:.1f}",
            f"{cell['save_seconds']:.2f}",
            f"{cell['load_seconds']:.2f}",
            *former,
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("checkpoint", __doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, once: whether it works")
    parser.add_argument("--repeats", type=int, default=3, help="times that each setting is saved and loaded")
    parser.add_argument("--former", metavar="REVISION", help="a git revision to compare with, as of 0.1.0")
    options = parser.parse_args(arguments)
    console = console_of(options)
    tell(run(options.quick, 1 if options.quick else options.repeats, options.former, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
