"""What a step at batch 1 takes of memory: with each optimizer, and with LoRA, on one model and one machine.

    python -m benchmarks.small_batch_memory [--backend fsdp] [--steps 3] [--quick] [--json]

Every case is a process of its own: full training by the backend on one rank with each optimizer, with fp32 masters of
bf16 weights and without, beside what the memory model says; and LoRA of rank 16 by peft, if peft is installed, whose
adapters AdamW updates. `allocated` is the most that torch's CPU allocator had handed out during the steps, from the
events of its profiler, temporaries inside operations included; `resident` is the largest resident set of the process
less that before the model was built. The memory model's figure is without what it adds for a CUDA allocator (workspace
and fragmentation), which a CPU does not have. bf16 operations of a CPU may use fp32 temporaries.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import console_of, parser_of, tell
from copus.job import JobConfig, parse_job
from profiles.configurations import Configurations
from profiles.formatting import three_digits
from profiles.memory import MemoryModel

MIB = 2.0**20
MODEL = {
    **{"layers": 6, "hidden": 512, "ffn_hidden": 1408, "heads": 8, "kv_heads": 4},
    **{"seq_len": 128, "vocab": 4096},
}
SMALL_MODEL = MODEL | {"layers": 2, "hidden": 128, "ffn_hidden": 352, "seq_len": 32, "vocab": 512}
LEAN = {"precision": "bf16", "master_weights": "none"}
FULL: dict[str, dict[str, Any]] = {
    "AdamW, fp32": {"optimizer": {"kind": "adamw"}},
    "AdamW": {"precision": "bf16", "optimizer": {"kind": "adamw"}},
    "Muon": {"precision": "bf16", "optimizer": {"kind": "muon"}},
    "Signum": {"precision": "bf16", "optimizer": {"kind": "signum"}},
    "SGD": {"precision": "bf16", "optimizer": {"kind": "sgd"}},
    "Adafactor": {"precision": "bf16", "optimizer": {"kind": "adafactor"}},
    "AdamW, bf16 weights alone": LEAN | {"optimizer": {"kind": "adamw"}},
    "Adafactor, bf16 weights alone": LEAN | {"optimizer": {"kind": "adafactor"}},
    "SGD, bf16 weights alone": LEAN | {"optimizer": {"kind": "sgd"}},
}
"""Settings of full training by its name; bf16 with fp32 masters unless it says otherwise."""
IN_BACKWARD = {
    f"{case}, in the backward pass": FULL[case] | {"optimizer_in_backward": True, "clip_grad": 0}
    for case in ("Adafactor, bf16 weights alone", "SGD, bf16 weights alone")
}
"""What the fsdp backend alone has: `training.optimizer_in_backward`."""
LORA: dict[str, Any] = {
    "LoRA, queries and values": ["q_proj", "v_proj"],
    "LoRA, all matrices in layers": "all-linear",
}
"""peft's `target_modules` by the name of the case."""
RANK = 16


def job_of(settings: dict[str, Any], model: dict[str, Any], backend: str = "fsdp", ranks: int = 1) -> JobConfig:
    """Batch 1 on one rank, unless the settings say otherwise."""
    training = {"backend": backend, "global_batch": 1, "layout": {"dp": 1}, "tokens": 1_000_000}
    return parse_job(
        {
            "name": "memory",
            "model": model,
            "cluster": {"accelerators_per_node": ranks},
            "planner": {"policy": "static"},
            "training": training | settings,
        }
    )


def predicted_bytes(job: JobConfig) -> dict[str, float]:
    """Of the memory model, by component, without what a CUDA allocator adds."""
    training = job.training
    found = MemoryModel(training.implementation).predict(
        job.model, Configurations.of([training.configuration]), training.precision, coverage=None
    )
    return {name: float(part[0]) for name, part in found.breakdown.items() if name != "allocator"}


def measure(case: str, model: dict[str, Any], backend: str, steps: int) -> dict[str, Any]:
    """Run a case in this process."""
    import torch.distributed as dist  # seconds

    from benchmarks.small_batch_memory_cases import full, lora, peak_of

    if case in LORA:
        return peak_of(lora(LORA[case], RANK, job_of({}, model)), steps)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return peak_of(full(job_of((FULL | IN_BACKWARD)[case], model, backend)), steps)


def run(model: dict[str, Any], backend: str, steps: int, console: Console) -> dict[str, Any]:
    """All cases, one process after the other."""
    has_peft = importlib.util.find_spec("peft") is not None
    if not has_peft:
        console.print("LoRA is left out: `pip install peft` brings it")
    rows, settings = [], FULL | (IN_BACKWARD if backend == "fsdp" else {})
    for case in (*settings, *(LORA if has_peft else ())):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.small_batch_memory", "--case", case]
        command += ["--model", json.dumps(model), "--backend", backend, "--steps", str(steps)]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{case} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        row = {"case": case, **json.loads(done.stdout.splitlines()[-1])}
        if case in settings:
            row["predicted_bytes"] = predicted_bytes(job_of(settings[case], model, backend))
            predicted = sum(row["predicted_bytes"].values())
            row["error_pct"] = 100 * (predicted / row["allocated_bytes"] - 1)
        rows.append(row)
        console.print(f"{case}: {three_digits(row['allocated_bytes'] / MIB)} MiB")
    return {
        "model": model,
        "backend": backend,
        "steps": steps,
        "largest_error_pct": max(abs(row["error_pct"]) for row in rows if "error_pct" in row),
        "rows": rows,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """A table for people."""
    columns = ("trained, millions", "allocated, MiB", "predicted", "error %", "resident, MiB")
    table = Table("case", *columns, title="Memory of training at batch 1")
    for row in result["rows"]:
        predicted = ("–", "–")
        if "error_pct" in row:
            predicted = (three_digits(sum(row["predicted_bytes"].values()) / MIB), f"{row['error_pct']:+.1f}")
        amounts = (f"{row['trained'] / 1e6:.2f}", three_digits(row["allocated_bytes"] / MIB))
        table.add_row(row["case"], *amounts, *predicted, three_digits(row["resident_bytes"] / MIB))
    console.print(table)
    console.print(f"largest error of the memory model: {result['largest_error_pct']:.1f} %")


def peak(changes: Iterable[int]) -> int:
    """The largest sum of the first changes."""
    return int(np.max(np.cumsum(np.fromiter(changes, np.int64)), initial=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("small_batch_memory", __doc__)
    parser.add_argument("--backend", choices=["fsdp", "megatron"], default="fsdp", help="of full training")
    parser.add_argument("--steps", type=int, default=3, help="of each case")
    parser.add_argument("--quick", action="store_true", help="a model of 0.4 M parameters")
    parser.add_argument("--case", choices=[*FULL, *IN_BACKWARD, *LORA], help="run this case alone, in this process")
    parser.add_argument("--model", type=json.loads, default=MODEL, help="JSON object, as in a job file")
    options = parser.parse_args(arguments)
    model = SMALL_MODEL if options.quick else options.model
    if options.case:
        print(json.dumps(measure(options.case, model, options.backend, options.steps)))
        return 0
    console = console_of(options)
    tell(run(model, options.backend, options.steps, console), show, options, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
