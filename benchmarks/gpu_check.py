"""A short check of one accelerator: step time and peak memory beside their predictions, cost of measuring noise, and of
a change of batch.

    python -m benchmarks.gpu_check [--quick] [--json] [--out DIR]

One rank trains two models on random tokens, with the real backend. Variants are interleaved, so that a slow moment of
the machine hits all of them. Without a CUDA device it says so and succeeds; `--quick` runs a tiny model on whatever
there is, also on a CPU.
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_predicted import accelerator_file, predictions
from copus.backends.base import Backend
from copus.backends.step_contract import StepRequest, StepResult, StepRules
from copus.devices import join_world, rank_device, wait_for
from copus.hardware import hardware_name, peak_memory_bytes, reset_peak_memory, software_name
from copus.job import JobConfig, parse_job
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import OUT_OF_MEMORY
from profiles.mfu import peak_samples_per_second

SMALL_MODEL = {
    "layers": 12, "hidden": 1024, "ffn_hidden": 2816, "heads": 16, "kv_heads": 8, "seq_len": 1024, "vocab": 32000,
}  # fmt: skip
LARGE_MODEL = {
    "layers": 24, "hidden": 2048, "ffn_hidden": 5632, "heads": 16, "kv_heads": 8, "seq_len": 2048, "vocab": 32000,
}  # fmt: skip
QUICK_MODEL = {"layers": 2, "hidden": 64, "ffn_hidden": 128, "heads": 4, "kv_heads": 2, "seq_len": 32, "vocab": 256}
RULES = StepRules(lr=1e-4, betas=(0.9, 0.95))
POOL = 64
"""Different random sequences; later samples repeat them."""


class Rank:
    """A backend in training, and the clock around its steps."""

    def __init__(self, job: JobConfig, backend: Backend) -> None:
        self.backend = backend
        self._device = backend.device
        self._sample = 0
        generator = torch.Generator().manual_seed(0)
        model = job.model
        self._pool = torch.randint(0, model.vocab, (POOL, model.seq_len + 1), generator=generator)

    def batches(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and labels of `count` sequences from `first` on, int64 of shape (count, seq_len)."""
        rows = self._pool[torch.arange(first, first + count) % POOL]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def change(self, after: Configuration) -> None:
        """Go on in another configuration."""
        self.backend.move(after)

    def seconds(self, action: Callable[[], Any]) -> float:
        """Duration of an action, the work that it left on the device included."""
        wait_for(self._device)
        begin = time.perf_counter()
        action()
        wait_for(self._device)
        return time.perf_counter() - begin

    def step(self, noise_source: str | None = None) -> StepResult:
        """One optimizer step."""
        first, self._sample = self._sample, self._sample + self.backend.configuration.global_batch
        result = self.backend.train_step(self.batches, StepRequest(first, RULES, noise_source))
        if result.skipped:
            raise RuntimeError(f"{self.backend.configuration.label}: the gradient is not finite")
        return result


def make_job(model: dict[str, int]) -> JobConfig:
    """A job that is measured: one rank."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    return parse_job(
        {
            "name": "gpu-check",
            "model": model,
            "cluster": {"accelerators_per_node": 1, "accelerator": accelerator_file() or "unknown"},
            "training": {"global_batch": 8, "micro_batch": 2, "tokens": 10**9, "precision": precision},
        },
        "gpu_check",
    )


@contextmanager
def rank_of(job: JobConfig, device: torch.device) -> Iterator[Rank]:
    """A rank that trains this job, and lets go of it."""
    from copus.backends.megatron.backend import MegatronBackend  # some seconds: not for --help

    backend = MegatronBackend(job, device)
    backend.build(job.training.configuration)
    try:
        yield Rank(job, backend)
    finally:
        backend.close()


def configuration(global_batch: int, micro_batch: int) -> Configuration:
    """A configuration of the one layout that one rank has."""
    return Configuration(layout=Layout(), micro_batch=micro_batch, global_batch=global_batch)


def middle(values: list[float]) -> dict[str, float]:
    """Median, and 10th and 90th percentile."""
    low, median, high = np.percentile(values, (10, 50, 90))
    return {"median": float(median), "low": float(low), "high": float(high)}


def measure_steps(
    rank: Rank, job: JobConfig, candidates: list[Configuration], rounds: int, deadline: float
) -> list[dict[str, Any]]:
    """Step time and peak memory of configurations, in rounds, so that none has a moment of its own."""
    times: dict[Configuration, list[float]] = {candidate: [] for candidate in candidates}
    peaks: dict[Configuration, int | None] = {}
    failures: dict[Configuration, str] = {}
    for candidate in candidates * rounds:
        if candidate in failures:
            continue
        if time.monotonic() > deadline:
            break
        rank.change(candidate)
        try:
            rank.step()
            reset_peak_memory()
            times[candidate] += [rank.seconds(rank.step) for _ in range(3)]
            peaks[candidate] = peak_memory_bytes()
        except torch.OutOfMemoryError:  # of this device, with one rank: the other micro-batches are not concerned
            failures[candidate] = OUT_OF_MEMORY
        if candidate in failures:  # the error, which holds on to activations, is gone
            torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    for candidate, predicted in zip(candidates, predictions(job, candidates), strict=True):
        row: dict[str, Any] = {"configuration": candidate.label, **predicted}
        if candidate in failures or not times[candidate]:
            rows.append({**row, "failure": failures.get(candidate, "not measured: no time left")})
            continue
        step = middle(times[candidate])
        samples_per_second = candidate.global_batch / step["median"]
        row |= {"step_seconds": step, "count": len(times[candidate]), "samples_per_second": samples_per_second}
        row |= {"tokens_per_second": samples_per_second * job.model.seq_len, "peak_bytes": peaks[candidate]}
        if peak := peak_samples_per_second(job.model, job.cluster, job.training.precision):
            row["mfu"] = samples_per_second / peak
        rows.append(row)
    return rows


def measure_noise(rank: Rank, pairs: int, deadline: float) -> dict[str, Any]:
    """What measuring every micro-batch adds to a step: pairs of a step with and without it, in alternating order."""
    rank.change(configuration(8, 2))
    sources = (None, "microbatch")
    for source in sources:
        rank.step(source)
    seconds: dict[str | None, list[float]] = {source: [] for source in sources}
    for pair in range(pairs):
        if pair >= 4 and time.monotonic() > deadline:
            break
        for source in sources if pair % 2 else sources[::-1]:
            seconds[source].append(rank.seconds(lambda source=source: rank.step(source)))  # type: ignore[misc]
    off, on = np.array(seconds[None]), np.array(seconds["microbatch"])
    return {
        "source": "microbatch",
        "configuration": rank.backend.configuration.label,
        "pairs": len(off),
        "off_seconds": middle(seconds[None]),
        "on_seconds": middle(seconds["microbatch"]),
        "overhead_pct": middle(list(100 * (on / off - 1))),
    }


def measure_moves(rank: Rank) -> list[dict[str, Any]]:
    """Change the global batch and the micro-batch, there and back: the move, the first step after it, a later one."""
    moves = []
    path = [configuration(8, 2), configuration(16, 2), configuration(16, 4), configuration(8, 2)]
    rank.change(path[0])
    for before, after in itertools.pairwise(path):
        rank.step()
        seconds = rank.seconds(functools.partial(rank.change, after))
        first = rank.seconds(rank.step)
        moves.append(
            {
                "before": before.label,
                "after": after.label,
                "move_seconds": seconds,
                "first_step_seconds": first,
                "later_step_seconds": middle([rank.seconds(rank.step) for _ in range(3)])["median"],
            }
        )
    return moves


def run(quick: bool, limit_seconds: float) -> dict[str, Any]:
    """Everything, on the device that is there."""
    begin = time.monotonic()
    device = rank_device(0, 1)
    models = {"small": QUICK_MODEL} if quick else {"small": SMALL_MODEL, "large": LARGE_MODEL}
    result: dict[str, Any] = {"benchmark": "gpu_check", "quick": quick, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        join_world(device, timedelta(minutes=5), store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        for name, model in models.items():
            job = make_job(model)
            batch = 8 if name == "small" else 32
            candidates = [
                configuration(batch, micro_batch) for micro_batch in (1, 2, 4, 8, 16, 32) if micro_batch <= batch
            ]
            share = 0.4 if name == "small" else 1.0  # of the time, in which this model has to be done
            with rank_of(job, device) as rank:
                result["models"][name] = {
                    "model": job.model.model_dump(),
                    "parameters": job.model.parameters,
                    "steps": measure_steps(
                        rank, job, candidates, 2 if quick else 5, begin + 0.6 * share * limit_seconds
                    ),
                }
                if name == "small":
                    result |= {
                        "device": hardware_name(job.cluster),
                        "accelerator": job.cluster.accelerator,
                        "software": software_name(),
                        "backend": rank.backend.fingerprint().backend,
                        "precision": job.training.precision,
                        "noise": measure_noise(rank, 6 if quick else 20, begin + share * limit_seconds),
                        "moves": measure_moves(rank),
                    }
        dist.destroy_process_group()
    return result | {"seconds": time.monotonic() - begin}


def show(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    source = "this device has no file, so nothing is predicted"
    if result["accelerator"] != "unknown":
        source = f"predictions from {result['accelerator']}.yaml alone"
    console.print(f"{result['device']} · {result['software']}; {source}")
    for measured in result["models"].values():
        table = Table("configuration", "step ms", "10–90 %", "predicted (80 %)", "tokens/s", "MFU", "peak GiB")
        table.add_column("predicted (80 %)")
        table.title = f"{measured['parameters'] / 1e6:.0f} M parameters, {result['precision']}"
        for row in measured["steps"]:
            table.add_row(*_cells(row))
        console.print(table)
    overhead = result["noise"]["overhead_pct"]
    console.print(
        f"noise of every micro-batch: {overhead['median']:+.1f} % a step "
        f"({overhead['low']:+.1f} to {overhead['high']:+.1f} %, {result['noise']['pairs']} pairs)"
    )
    for move in result["moves"]:
        console.print(
            f"{move['before']} → {move['after']}: {1e3 * move['move_seconds']:.2f} ms; first step "
            f"{1e3 * move['first_step_seconds']:.1f} ms, later {1e3 * move['later_step_seconds']:.1f} ms",
            soft_wrap=True,
        )


def _cells(row: dict[str, Any]) -> list[str]:
    predicted_step = predicted_peak = "?"
    if "chance_to_fit" in row:
        low, step, high = (1e3 * seconds for seconds in row["predicted_seconds"])
        predicted_step = f"{step:.1f} ({low:.1f}–{high:.1f})"
        low, peak, high = (size / 2**30 for size in row["predicted_bytes"])
        predicted_peak = f"{peak:.1f} ({low:.1f}–{high:.1f})"
    if "failure" in row:
        return [row["configuration"], row["failure"], "", predicted_step, "", "", "", predicted_peak]
    measured = row["step_seconds"]
    return [
        row["configuration"],
        f"{1e3 * measured['median']:.1f}",
        f"{1e3 * measured['low']:.1f}–{1e3 * measured['high']:.1f}",
        predicted_step,
        f"{row['tokens_per_second']:.0f}",
        f"{100 * row['mfu']:.1f} %" if "mfu" in row else "?",
        "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
        predicted_peak,
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, on a CPU too: whether it runs, not how fast"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write gpu_check.json into this folder")
    parser.add_argument(
        "--limit-seconds", type=float, default=180.0, help="measure fewer rounds rather than take longer"
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fit into
    if torch.cuda.is_available() or options.quick:
        result = run(options.quick, options.limit_seconds)
        show(result, console)
    else:
        result = {"benchmark": "gpu_check", "device": None, "message": "no CUDA device"}
        console.print("no CUDA device: nothing was measured (--quick runs a tiny model on the CPU)")
    text = json.dumps(result, indent=2)
    if options.json:
        print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        partial = options.out / ".gpu_check.json.partial"
        partial.write_text(text + "\n")
        partial.replace(options.out / "gpu_check.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
