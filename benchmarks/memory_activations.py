"""Korthikanti et al.'s activation figures (2205.05198, figures 1 and 7) against the formulas."""

import csv
from pathlib import Path
from typing import Any

from benchmarks.memory_rows import GIB
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.layout import Layout
from profiles.memory import KORTHIKANTI, MemoryModel
from profiles.model_shape import ModelShape

MODELS = {  # layers, hidden, heads, pp, vp, micro-batch, global batch: table 3; tp is 8
    "22B": (48, 6144, 64, 1, 1, 4, 4),
    "175B": (96, 12288, 96, 8, 3, 1, 64),
    "530B": (105, 20480, 128, 35, 3, 1, 280),
    "1T": (128, 25600, 160, 64, 1, 1, 512),
}
SEQ_LEN, VOCAB = 2048, 51200


def check(folder: Path) -> list[dict[str, Any]]:
    """Every row of `activation_memory.csv` with the prediction, GiB or percent; none if there is no file."""
    path = folder / "activation_memory.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_row(row) for row in csv.DictReader(file) if row["model"] in MODELS]


def _row(row: dict[str, str]) -> dict[str, Any]:
    predicted = _predict(row["model"], row["mode"])
    if row["units"] == "%":
        value = 100 * predicted["activations"] / _predict(row["model"], "none")["activations"]
    elif "activations" in row["quantity"]:
        value = predicted["activations"] / GIB
    else:
        value = (predicted["weights"] + predicted["gradients"] + predicted["optimizer"]) / GIB
    published = float(row["value"])
    return {
        "model": row["model"],
        "mode": row["mode"],
        "quantity": row["quantity"],
        "units": row["units"],
        "published": published,
        "predicted": value,
        "error_pct": 100 * (value / published - 1),
    }


def _predict(name: str, mode: str) -> dict[str, float]:
    layers, hidden, heads, pp, vp, micro_batch, global_batch = MODELS[name]
    model = ModelShape(
        **{"layers": layers, "hidden": hidden, "ffn_hidden": 4 * hidden, "heads": heads, "kv_heads": heads},
        **{"seq_len": SEQ_LEN, "vocab": VOCAB, "gated_mlp": False, "tied_embeddings": True},
    )
    layout = Layout(
        **{"tp": 8, "pp": pp, "vp": vp},
        sequence_parallel=mode.startswith("SP"),
        recompute="full" if "full" in mode else "selective" if "selective" in mode else "none",
    )
    configuration = Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)
    predicted = MemoryModel(KORTHIKANTI).predict(model, Configurations.of([configuration]), "fp16", coverage=None)
    return {part: float(amount[0]) for part, amount in predicted.breakdown.items()}
