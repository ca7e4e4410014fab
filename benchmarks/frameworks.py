"""Whether one job trains alike on every backend and in every layout, and goes from one to the other to the bit.

`python -m benchmarks.frameworks` trains a few steps on Megatron TP2·PP2, and lets every backend and layout go on from
that checkpoint: what each has loaded it writes again, which must be equal to the bit, moments included. Then come 20
steps on the same samples, compared with Megatron on one rank: losses, |g|² and the norms of the parts of the first
step, where all have the same weights.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.backends.registry import BUILT_IN
from copus.job import JobConfig, parse_job
from profiles.layout import Layout

MODEL = {"layers": 4, "hidden": 128, "ffn_hidden": 352, "heads": 8, "kv_heads": 4, "seq_len": 32, "vocab": 1000}
STEPS, STEPS_BEFORE = 20, 3
BATCH, MICRO_BATCH = 8, 2
ORIGIN = ("megatron", Layout(tp=2, pp=2))
REFERENCE = ("megatron", Layout())
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "megatron": [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}],
    "fsdp": [
        *({"dp": 2, "zero": zero} for zero in range(4)),
        {"tp": 2},
        {"dp": 2, "tp": 2, "zero": 3},
        {"dp": 4, "zero": 3, "dp_replicate": 2},
    ],
    "deepspeed": [{"dp": 2, "zero": zero} for zero in range(4)],
}


def make_job(backend: str, layout: Layout) -> JobConfig:
    """The job on a backend: the same model, seed and batch."""
    return parse_job(
        {
            "name": "frameworks",
            "model": MODEL,
            "cluster": {"accelerators_per_node": layout.accelerators},
            "training": {
                "backend": backend,
                "layout": layout.model_dump(),
                "micro_batch": MICRO_BATCH,
                "global_batch": BATCH,
                "tokens": 10**6,
            },
        },
        "frameworks",
    )


def run(backends: list[str], steps: int, console: Console) -> dict[str, Any]:
    """The reference, then every backend in every layout of it."""
    with tempfile.TemporaryDirectory(prefix="copus-frameworks-") as name:
        origin = Path(name) / "origin"
        _on_ranks(*ORIGIN, {"steps": STEPS_BEFORE, "save": str(origin)}, Path(name))
        cells: list[dict[str, Any]] = []
        reference: dict[str, Any] = {}
        for backend in ["megatron", *(name for name in backends if name != "megatron")]:
            for layout in (Layout(**degrees) for degrees in LAYOUTS[backend]):
                task = {"steps": steps, "load": str(origin), "again": str(Path(name) / "again")}
                shown = _on_ranks(backend, layout, task, Path(name))
                reference = reference or shown  # the first is `REFERENCE`
                cells.append(_cell(backend, layout, shown, reference))
                console.print(f"{backend} {layout.label}: losses within {cells[-1]['max_loss_diff']:.1e}")
    return {"benchmark": "frameworks", "steps": steps, "cells": cells}


def _cell(backend: str, layout: Layout, shown: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    return {
        "backend": backend,
        "layout": layout.label,
        "max_loss_diff": max(map(_relative, shown["losses"], reference["losses"])),
        "grad_sq_diff": _relative(shown["grad_sq"], reference["grad_sq"]),
        "part_norm_diff": max(map(_relative, shown["parts"], reference["parts"]), default=None),
        "parts": len(shown["parts"]),
        "resumed_from": f"{ORIGIN[0]} {ORIGIN[1].label}",
        "bit_equal": shown["bit_equal"],
    }


def _relative(value: float, right: float) -> float:
    return abs(value - right) / abs(right)


def _on_ranks(backend: str, layout: Layout, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a task on fresh ranks; what rank 0 wrote."""
    (folder / "task.json").write_text(json.dumps({"backend": backend, "layout": layout.model_dump(), **task}))
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.accelerators}"]
    command += ["-m", "benchmarks.frameworks_ranks", str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode or not result.exists():
        cause = done.stderr[max(0, done.stderr.find("Traceback")) :]
        raise SystemExit(f"{backend} {layout.label}: the ranks failed ({done.returncode}):\n{cause[:4000]}")
    written: dict[str, Any] = json.loads(result.read_text())
    return written


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    table = Table("backend", "layout", f"loss, {result['steps']} steps", "|g|²", "|g_j|²", "checkpoint")
    for cell in result["cells"]:
        parts = cell["part_norm_diff"]
        table.add_row(
            cell["backend"],
            cell["layout"],
            f"{cell['max_loss_diff']:.1e}",
            f"{cell['grad_sq_diff']:.1e}",
            "not measured" if parts is None else f"{parts:.1e} ({cell['parts']} parts)",
            "equal to the bit" if cell["bit_equal"] else "DIFFERS",
        )
    console.print(table)
    console.print(
        f"largest relative difference from {REFERENCE[0]} {REFERENCE[1].label}; all went on from a checkpoint of "
        f"{ORIGIN[0]} {ORIGIN[1].label}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = parser_of("frameworks", __doc__)
    parser.add_argument("--quick", action="store_true", help="4 steps instead of 20")
    installed = [name for name in LAYOUTS if name in BUILT_IN]
    parser.add_argument("--backend", action="append", choices=installed, help="only these, and the reference")
    options = parser.parse_args(arguments)
    console = console_of(options)
    tell(run(options.backend or installed, 4 if options.quick else STEPS, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
