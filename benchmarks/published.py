"""Published rows (a folder with `throughput.csv`) as sweeps that the cost model can take."""

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost.accelerator import accelerator, accelerators
from profiles.cost.timings import Timings
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from profiles.published import recompute_kind, zero_stage

UNRELIABLE = (
    "noisy",
    "near-oom",
    "failed",
    "very-low-mfu",
    "inconsistent",
    "gbs!=",
    "tp*pp*cp*dp!=",
    "no-full-layout",
    "slower",
)
"""Words in the column `quality` of rows that are not scored."""
LEAST_MFU = 0.15
"""Rows that are published with a lower model FLOP utilization are not scored: most of them come from faulty runs."""
OTHER_NAMES = {"h800": "h100-sxm", "h100": "h100-sxm", "a100": "a100-80g", "dgx-a100-40g": "a100-40g"}
"""Accelerators by what a row's `system` says, where it is not the name of a file."""


@dataclass
class Sweep:
    """Rows of one sweep with the same model, cluster and precision."""

    sweep_id: str
    """As published."""
    source_id: str
    """As published."""
    timings: Timings
    """All of its usable rows."""
    scored: np.ndarray
    """Which of them are reliable enough to score (`UNRELIABLE`, `LEAST_MFU`)."""


@dataclass
class Published:
    """What a folder holds."""

    sweeps: list[Sweep]
    """In the order of the file."""
    rows: int = 0
    """Rows of the file."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why rows could not be used, and how many."""


class UnusableError(ValueError):
    """A row that says too little, or contradicts itself."""


def read(folder: Path) -> Published:
    """The sweeps of `throughput.csv`. Raises FileNotFoundError where it is not there."""
    found = Published([])
    groups: dict[tuple[str, ModelShape, Cluster, str], list[tuple[dict[str, str], Configuration, float]]] = {}
    with (folder / "throughput.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found.rows += 1
            try:
                model, cluster = _model(row), _cluster(row)
                precision = _precision(row["precision"], cluster)
                configuration = _configuration(row, cluster)
                seconds_of_step = _seconds(row, configuration)
                key = (row["sweep_id"] or row["source_id"], model, cluster, precision)
                groups.setdefault(key, []).append((row, configuration, seconds_of_step))
            except UnusableError as reason:
                found.skipped[str(reason)] += 1
            except ValueError:
                found.skipped["a number cannot be read"] += 1
    for (sweep_id, model, cluster, precision), rows in groups.items():
        seconds = np.array([row[2] for row in rows])
        timings = Timings(model, cluster, precision, Configurations.of(row[1] for row in rows), seconds)
        scored = np.array([_reliable(row[0]) for row in rows])
        found.sweeps.append(Sweep(sweep_id, rows[0][0]["source_id"], timings, scored))
    return found


def _reliable(row: dict[str, str]) -> bool:
    mfu = float(row.get("mfu") or 1)
    return not any(word in row["quality"] for word in UNRELIABLE) and mfu >= LEAST_MFU


def _model(row: dict[str, str]) -> ModelShape:
    names = ("layers", "hidden", "heads", "seq_len")
    if not all(row[name] for name in names):
        raise UnusableError("no model shape")
    shape = {name: int(row[name]) for name in names}
    gated = row["gated_mlp"] == "yes"
    try:
        return ModelShape(
            **shape,
            ffn_hidden=int(row["ffn_hidden"] or 4 * shape["hidden"]),
            kv_heads=int(row["kv_heads"] or shape["heads"]),
            vocab=int(row["vocab"] or 50257),
            gated_mlp=gated,
            tied_embeddings=row["tied_embeddings"] == "yes",
        )
    except ValidationError as error:
        raise UnusableError("model shape is not possible") from error


def _cluster(row: dict[str, str]) -> Cluster:
    gpus = int(row["gpus"])
    per_node = min(int(row["gpus_per_node"] or 8), gpus)
    if gpus % per_node:
        raise UnusableError("accelerators do not fill the nodes")
    return Cluster(nodes=gpus // per_node, accelerators_per_node=per_node, accelerator=_accelerator(row["system"]))


def _accelerator(system: str) -> str:
    names = {name: name for name in accelerators()} | OTHER_NAMES
    found = [name for name in names if name in system.lower()]
    if not found:
        raise UnusableError("accelerator is unknown")
    return names[max(found, key=len)]


def _precision(text: str, cluster: Cluster) -> str:
    try:
        accelerator(cluster.accelerator).peak(text or "bf16")
    except ValueError as error:
        raise UnusableError("precision is unknown") from error
    return text or "bf16"


def _configuration(row: dict[str, str], cluster: Cluster) -> Configuration:
    if not row["gbs"]:
        raise UnusableError("no global batch")
    tp, pp, vp, cp, ep = (int(row[name] or 1) for name in ("tp", "pp", "vp", "cp", "ep"))
    dp, rest = divmod(cluster.accelerators, tp * pp * cp)
    if rest or (row["dp"] and int(row["dp"]) != dp):
        raise UnusableError("layout does not fill the cluster")
    gbs = int(row["gbs"])
    # Not said: what follows from gradient accumulation, else one sequence, as everybody with a pipeline has it.
    micro_batch = int(row["mbs"] or 0) or (gbs // (dp * int(row["grad_accum"])) if row["grad_accum"] else 1) or 1
    try:
        layout = Layout(
            **{"tp": tp, "pp": pp, "vp": vp if pp > 1 else 1, "cp": cp, "ep": ep, "dp": dp},
            sequence_parallel=row["sequence_parallel"] == "yes" and tp > 1,
            recompute=recompute_kind(row["recompute"]),
            zero=zero_stage(row["sharding"]),
        )
        return Configuration(layout=layout, micro_batch=micro_batch, global_batch=gbs)
    except ValidationError as error:
        raise UnusableError("batches do not divide") from error


def _seconds(row: dict[str, str], configuration: Configuration) -> float:
    if row["step_time_s"]:
        return float(row["step_time_s"])
    if row["tokens_per_s_per_gpu"]:
        rate = float(row["tokens_per_s_per_gpu"]) * configuration.layout.accelerators
        return configuration.global_batch * int(row["seq_len"]) / rate
    raise UnusableError("no time")
