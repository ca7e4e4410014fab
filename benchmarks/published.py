"""Published rows (a folder with `throughput.csv`) as sweeps that the cost model can take."""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.published_sources import Settings, dispatch_of, features_of, implementation_of, stack_of
from profiles.accelerator import accelerator, accelerators
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.cost.effects import Effects
from profiles.cost.residual import Smoothness
from profiles.cost.timings import Timings
from profiles.layout import ExpertDispatch
from profiles.memory import Implementation
from profiles.model_shape import ModelShape
from profiles.published import (
    RejectedError,
    Row,
    configuration_of,
    csv_rows,
    nodes_of,
    number,
    seconds_of,
    whole,
)

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
GUESSED = (
    *("not-stated", "presumed", "partly-stated", "layout-inferred", "seq-inferred", "memory-accounting"),
    *("reduced-layers", "hf-loop", "offload"),
)
"""The same in `moe_rows.csv` and `zero_rows.csv`: what ran is partly a guess, or not what the formulas are about."""
LEAST_MFU = 0.15
"""Rows that are published with a lower model FLOP utilization are not scored: most of them come from faulty runs."""
UNSCORED_SOURCES = ("megatron-lm-golden",)
"""Sources whose rows are not scored: a handful of steps in tests of a repository."""
FILES = ("throughput.csv", "moe_rows.csv", "zero_rows.csv")
"""What a folder may have."""
OTHER_NAMES = {
    "a800": "a100-80g",
    "h800": "h100-sxm",
    "h100": "h100-sxm",
    "a100": "a100-80g",
    "dgx-a100-40g": "a100-40g",
}
"""Accelerators by what a row's `system` says, where it is not the name of a file."""

_Key = tuple[str, ModelShape, Cluster, str, str | None, tuple[str, ...], ExpertDispatch]


@dataclass
class Sweep:
    """Rows of one sweep with the same model, cluster, precision and software."""

    sweep_id: str
    """As published."""
    source_id: str
    """As published."""
    timings: Timings
    """All of its usable rows."""
    stack: str | None
    """What trained (`benchmarks.published_sources`)."""
    features: tuple[str, ...]
    """What of it was switched on (`benchmarks.published_sources.features_of`); of mixtures of experts alone."""
    dispatch: ExpertDispatch
    """How its tokens came to experts on other ranks (`benchmarks.published_sources.dispatch_of`)."""
    kind: str
    """dense, experts, or zero: dense rows of `zero_rows.csv`."""
    scored: np.ndarray
    """Which of them are reliable enough to score (`UNRELIABLE`, `GUESSED`, `LEAST_MFU`)."""
    implementations: tuple[Implementation, ...]
    """How each of its rows spends memory, if it was a Megatron run."""

    def cost_model(self, effects: Effects | None = None, how: Smoothness | None = None) -> CostModel:
        """That of its software, where published runs say `effects` (None: those in use)."""
        return CostModel(how, stack=self.stack, features=self.features, effects=effects, dispatch=self.dispatch)


@dataclass
class Published:
    """What a folder holds."""

    sweeps: list[Sweep]
    """In the order of the file."""
    rows: int = 0
    """Rows of the file."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Why rows could not be used, and how many."""


def read_all(folder: Path) -> Published:
    """The sweeps of all files that are there."""
    together = Published([])
    for name in FILES:
        if (folder / name).is_file():
            published = read(folder, name)
            together.sweeps += published.sweeps
            together.rows += published.rows
            together.skipped += published.skipped
    return together


def read(folder: Path, name: str = "throughput.csv") -> Published:
    """The sweeps of a file in the folder. Raises FileNotFoundError if it is not there."""
    published_rows, settings = Published([]), Settings(folder)
    unreliable = UNRELIABLE if name == FILES[0] else UNRELIABLE + GUESSED
    groups: dict[_Key, list[tuple[str, Configuration, float, bool, Implementation]]] = {}
    for published in csv_rows(folder / name):
        published_rows.rows += 1
        try:
            if name != FILES[0] and not any(published[degree] for degree in ("tp", "pp", "ep")):
                raise RejectedError("the layout is not stated")
            row = _filled(settings.filled({"model_name": "", "source_id": ""} | published))
            model, configuration, cluster = settings.model_of(row), configuration_of(row), _cluster(row)
            step_seconds = seconds_of(row, configuration, model)
            if step_seconds is None:
                raise RejectedError("no time")
            precision, sweep_id = _precision(row["precision"], cluster), row["sweep_id"] or row["source_id"]
            features = features_of(row) if model.experts else ()
            dispatch = dispatch_of(row) if model.experts else "alltoall"
            key = (sweep_id, model, cluster, precision, stack_of(row), features, dispatch)
            groups.setdefault(key, []).append(
                (
                    row["source_id"],
                    configuration,
                    step_seconds,
                    _reliable(row, unreliable),
                    implementation_of(row),
                )
            )
        except RejectedError as reason:
            published_rows.skipped[str(reason)] += 1
    for (sweep_id, model, cluster, precision, stack, features, dispatch), rows in groups.items():
        sources, configurations, seconds, reliable, implementations = zip(*rows, strict=True)
        timings = Timings(model, cluster, precision, Configurations.of(configurations), np.array(seconds))
        kind = "experts" if model.experts else "zero" if name.startswith("zero") else "dense"
        published_rows.sweeps.append(
            Sweep(sweep_id, sources[0], timings, stack, features, dispatch, kind, np.array(reliable), implementations)
        )
    return published_rows


def _filled(row: Row) -> Row:
    """With what many publications leave unsaid: GPT-2's vocabulary, an MLP that is four times as wide as the model,
    bf16, and the micro-batch that follows from gradient accumulation, or else the one sequence that everybody with a
    pipeline has, and without one as many as divide what a replica does, up to four."""
    split = whole(row, "tp", 1) * whole(row, "pp", 1) * whole(row, "cp", 1)
    replicas = max(whole(row, "gpus") // max(split, 1), 1)
    if row["grad_accum"]:
        micro_batch = whole(row, "gbs") // max(replicas * whole(row, "grad_accum"), 1) or 1
    else:
        micro_batch = 1 if whole(row, "pp", 1) > 1 else math.gcd(4, whole(row, "gbs") // replicas or 1)
    usual = {"vocab": 50257, "ffn_hidden": 4 * whole(row, "hidden"), "precision": "bf16", "mbs": micro_batch}
    return row | {name: row[name] or str(value) for name, value in usual.items()}


def _reliable(row: Row, words: tuple[str, ...]) -> bool:
    if row["source_id"] in UNSCORED_SOURCES or any(word in row["quality"] for word in words):
        return False
    return (number(row, "mfu") or 1) >= LEAST_MFU


def _cluster(row: Row) -> Cluster:
    nodes, per_node = nodes_of(row, 8)
    return Cluster(nodes=nodes, accelerators_per_node=per_node, accelerator=_accelerator(row["system"]))


def _accelerator(system: str) -> str:
    names = {name: name for name in accelerators()} | OTHER_NAMES
    matches = [name for name in names if name in system.lower()]
    if not matches:
        raise RejectedError("accelerator is unknown")
    return names[max(matches, key=len)]


def _precision(text: str, cluster: Cluster) -> str:
    try:
        accelerator(cluster.accelerator).peak(text)
    except ValueError as error:
        raise RejectedError("precision is unknown") from error
    return text
