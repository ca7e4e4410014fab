"""What publications do not say in each row: the software that ran, the architecture, and what everybody with that
software has switched on."""

import csv
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from profiles.layout import ExpertDispatch
from profiles.memory import MEGATRON_TE, Implementation
from profiles.memory.implementation import Module
from profiles.model_shape import ModelShape
from profiles.optimizer_state import OptimizerState
from profiles.published import RejectedError, Row, model_of, whole

STACKS = {
    "ultrascale": "nanotron",
    **dict.fromkeys(("vtrain", "bloom", "bigscience", "mt-nlg"), "megatron-deepspeed"),
    **dict.fromkeys(("megatron-sc21", "megatron-readme-a100", "megatron-llama", "korthikanti"), "megatron"),
    **dict.fromkeys(("megatron-readme-h100", "nemo-2", "nemo-launcher", "nemo-longseq", "nemotron4"), "megatron-te"),
    **dict.fromkeys(("megatron-bridge", "megatron-moe", "megatron-lm", "mcore-moe", "dgxc"), "megatron-te"),
    **dict.fromkeys(("moe-parallel-folding", "verl-megatron", "gcp-user", "amd-primus"), "megatron-te"),
    **dict.fromkeys(("torchtitan", "fms-fsdp", "llm-foundry", "llama3-405b", "olmo", "opt-175b"), "fsdp"),
}
"""How the names of sources begin → what trained. Where it is not told, `sharding` may say; of Megatron-LM in its
first year, HAI-LLM, InternEvo and the like there is too little to learn from."""
FAMILIES = {
    **{"ultrascale": "ultrascale", "vtrain": "vtrain", "bloom": "bloom", "torchtitan": "torchtitan"},
    **dict.fromkeys(("megatron-sc21", "megatron-readme-a100"), "megatron-sc21"),
    **dict.fromkeys(("nemo-2", "nemo-launcher", "nemo-longseq"), "nemo"),
    **{"megatron-bridge": "megatron-bridge", "nemotron4": "nemotron4"},
    **dict.fromkeys(("megatron-moe-modelzoo", "mcore-moe-report", "megatron-lm-moe-recipes"), "megatron-core-moe"),
}
"""How the names of sources begin that repeat each other's runs, or are of one team and cluster → what they are left
out as, all together."""
EVENLY_ROUTED = ("megatron-bridge", "megatron-moe-modelzoo", "mcore-moe-report")
"""Names of sources whose recipes send equally many tokens to all experts, where a row does not say otherwise."""
FLEXIBLE = re.compile(r"deepep|hybridep|forced balance; recipe")
"""Words in notes of runs whose tokens went once to a node: by name, or by presets of Megatron-Bridge for benchmarks, of
which the newest have it for every model here."""
FLEXIBLE_SOURCES = ("mcore-moe-report", "megatron-moe-modelzoo", "megatron-bridge-26.08", "megatron-bridge-prs")
"""How the names of sources begin whose runs had it where a row does not say otherwise."""
HYBRIDS = re.compile(r"qwen3\.[56]|qwen3-next|nemotron-3[-.]|deepseek-v4", re.IGNORECASE)
"""Models that are not made of attention and MLPs alone, of which the cost model knows nothing."""
REGRESSION = ("gpt oss", "26.06.01")
"""A model and the release that its publisher says is slow by mistake."""
SETTINGS_KEY = (
    *("model_name", "system", "gpus", "precision", "seq_len", "gbs", "mbs", "tp", "pp", "vp", "cp", "ep"),
    "tokens_per_s_per_gpu",
)
"""Columns by which a row of `mbridge_row_settings.csv` belongs to one of `throughput.csv`."""


def stack_of(row: Row) -> str | None:
    """What trained: one of `profiles.cost.effects.stacks`, or None."""
    source, sharding = row["source_id"], row.get("sharding", "").lower()
    if source == "megatron-sc21-t2" and "zero3" in sharding:
        return "deepspeed"  # the paper's comparison
    named = _longest(STACKS, source)
    if named is not None:
        return named
    if sharding.startswith("fsdp"):
        return "fsdp"
    if sharding.startswith("zero"):
        return "deepspeed"
    return "megatron-te" if sharding.startswith(("ddp+dist", "megatron-fsdp")) else None


def family_of(source: str) -> str:
    """The sources that it is left out with."""
    return _longest(FAMILIES, source) or source


def _longest(names: dict[str, str], source: str) -> str | None:
    beginnings = [name for name in names if source.startswith(name)]
    return names[max(beginnings, key=len)] if beginnings else None


def features_of(row: Row) -> tuple[str, ...]:
    """What of the software was switched on in a run of a mixture of experts: levels of the group `feature` of
    `profiles.cost.effects`."""
    notes, graphs = row.get("notes", "").lower(), row.get("graphs", "").lower()
    is_even = "forced" in notes or "balanced gate" in notes
    is_even |= row["source_id"] in EVENLY_ROUTED and "natural" not in notes
    has_graphs = graphs in ("transformer_engine", "local") or bool(re.search(r"(?<!no )graphs(?! off)", notes))
    has_graphs |= "cuda graph transformer_engine" in notes
    is_overlapped = row.get("overlap", "").lower() == "true"
    is_overlapped |= bool(re.search(r"(ep|a2a|all-to-all|1f1b) overlap(?! (off|false))", notes))
    said = {
        "even-routing": is_even,
        "iteration-graph": graphs == "full_iteration" or "full_iteration" in notes,
        "graphs": has_graphs,
        "expert-overlap": is_overlapped,
    }
    return tuple(name for name, is_on in said.items() if is_on)


def dispatch_of(row: Row) -> ExpertDispatch:
    """How tokens came to experts on other ranks; a preset that does not say so has megatron's plain all-to-all."""
    notes, said = row.get("notes", "").lower(), row.get("dispatcher")
    if said is not None:
        return "flex" if said else "alltoall"
    if FLEXIBLE.search(notes):
        return "flex"
    return "flex" if row["source_id"].startswith(FLEXIBLE_SOURCES) and "all-to-all disp" not in notes else "alltoall"


_MODULES: dict[str, Module] = {
    **{"layernorm": "norms", "norm": "norms", "moe_act": "activations", "act": "activations"},
    "mla_up_proj": "latent",
}
"""Modules that recipes compute again → those that the memory model knows. A dense MLP of DeepSeek's is one layer in 20,
and gains nothing here."""


def implementation_of(row: Row) -> Implementation:
    """How the memory of a Megatron run is spent, as far as its recipe is published."""
    notes = row.get("notes", "").lower()
    words = re.split(r"[ ,()]+", row.get("modules", ""))
    modules = tuple(sorted({_MODULES[word] for word in words if word in _MODULES}))
    # All releases of Megatron-Bridge (v0.2 to v0.5) have these in their recipes for benchmarks.
    is_bridge = row["source_id"].startswith("megatron-bridge") and "natural routing" not in notes
    has_short_moments = row.get("moments") == "bfloat16" or "optimizer moments bf16" in notes
    has_short_moments |= is_bridge and row["model_name"].lower().startswith("deepseek")
    optimizer = OptimizerState(bytes_of_number=2 if has_short_moments else 4)
    changes = {"recomputed_modules": modules, "optimizer": optimizer, "fp32_gradients": not is_bridge}
    return MEGATRON_TE.model_copy(update=changes)


class Settings:
    """The files beside the rows: `model_shapes.json` and `mbridge_row_settings.csv`, where they are there."""

    def __init__(self, folder: Path) -> None:
        self._shapes = _shapes(folder / "model_shapes.json")
        self._rows = _settings(folder / "mbridge_row_settings.csv")

    def filled(self, row: Row) -> Row:
        """The row with what its software switches on by itself, and with the settings of its recipe. Raises
        RejectedError for a run that is slow by mistake."""
        if all(word in (row["model_name"] + row.get("notes", "")).lower() for word in REGRESSION):
            raise RejectedError("a release that is slow by mistake")
        row = row | self._recipe(row)
        row |= {"modules": row["recompute"].lower(), "recompute": _recomputed(row["recompute"])}
        if stack_of(row) == "megatron-te":
            tp = whole(row, "tp", 1)
            row["sequence_parallel"] = row["sequence_parallel"] or ("yes" if tp > 1 else "no")
            row["sharding"] = row["sharding"] or "dist-optimizer"
            # Its tables do not say so: all presets that split by tp (scripts/performance/configs/{qwen,deepseek}) have
            # expert_tensor_parallel_size=1. Where others do not say it, it is Megatron-core's default, tp.
            if row["source_id"].startswith("megatron-bridge"):
                row["etp"] = row.get("etp") or "1"
        if row["source_id"] == "megatron-readme-a100":
            row["recompute"] = row["recompute"] or "full"  # published are the operations of the hardware
        shape = self._shapes.get(row["model_name"].lower())
        if shape and not row["layers"]:
            names = ("layers", "hidden", "heads", "vocab", "ffn_hidden", "experts")
            row |= {name: str(shape[name]) for name in names}
        return row

    def model_of(self, row: Row) -> ModelShape:
        """The architecture. Raises RejectedError for one that is not known, or that is no transformer."""
        shape = self._shapes.get(row["model_name"].lower())
        hybrid = shape is not None and (shape["mamba"] or shape.get("hyper_connections"))
        if hybrid or HYBRIDS.match(row["model_name"]):
            raise RejectedError("a model that is more than attention and MLPs")
        try:
            if shape is not None:
                return _of_shape(shape, whole(row, "seq_len"))
            return _of_columns(row) if whole(row, "experts", 0) else model_of(row)
        except ValidationError as error:
            raise RejectedError(f"model: {error.errors(include_url=False)[0]['msg']}") from None

    def _recipe(self, row: Row) -> Row:
        recipe = self._rows.get(tuple(row.get(name, "") for name in SETTINGS_KEY))
        if recipe is None:
            return {}
        granularity, modules = recipe["recompute_granularity"], recipe["recompute_modules"]
        said = {"recompute": f"selective ({modules})" if granularity == "selective" else granularity}
        said |= {
            "graphs": recipe["cuda_graph_impl"],
            "overlap": recipe["moe_a2a_overlap"],
            "moments": recipe["exp_avg_dtype"],
            "dispatcher": recipe["dispatcher"],
        }
        return said | ({"sharding": "megatron-fsdp"} if recipe["use_megatron_fsdp"].lower() == "true" else {})


@cache
def _shapes(path: Path) -> dict[str, dict[str, Any]]:
    """By label and by name, in small letters."""
    if not path.is_file():
        return {}
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    return {shape["name"].lower(): shape for shape in models.values()} | {k.lower(): v for k, v in models.items()}


@cache
def _settings(path: Path) -> dict[tuple[str, ...], Row]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[name] for name in SETTINGS_KEY): row for row in csv.DictReader(file)}


def _recomputed(said: str) -> str:
    """`selective (modules)` as the nearest of what a layout can say: all of a layer with experts is nearly all, and
    norms and activations are next to nothing."""
    modules = re.search(r"selective *\((.*)\)", said.lower())
    if modules is None:
        return said
    names = re.split(r"[ ,]+", modules[1])
    if any("core" in name or "attn" in name or name in ("op", "every") for name in names):
        return "selective"
    return "full" if "moe" in names else "none"


def _of_shape(shape: dict[str, Any], seq_len: int) -> ModelShape:
    values: dict[str, Any] = {name: shape[name] for name in ("hidden", "heads", "kv_heads", "head_dim", "vocab")}
    values |= {name: shape[name] for name in ("gated_mlp", "tied_embeddings", "experts", "experts_per_token")}
    dense, attention = shape["first_k_dense"], shape["attention"]
    values["ffn_hidden"] = shape["ffn_hidden"] if dense else shape["moe_ffn_hidden"]
    if dense:
        values |= {"dense_layers": dense, "expert_hidden": shape["moe_ffn_hidden"]}
    if attention["kind"] == "MLA":
        ranks = {"kv_rank": attention["kv_lora_rank"], "query_rank": attention["q_lora_rank"]}
        widths = {"rope_dim": attention["qk_rope_head_dim"], "value_dim": attention["v_head_dim"]}
        values["latent_attention"] = ranks | widths
    # A module that predicts a second token is about a layer.
    layers = shape["layers"] + shape["mtp_layers"]
    return ModelShape(layers=layers, seq_len=seq_len, shared_expert_hidden=shape["shared_expert_ffn_hidden"], **values)


def _of_columns(row: Row) -> ModelShape:
    """Of a mixture of experts in `moe_rows.csv`, where a second number in `shared_experts` is their joint width."""
    values: dict[str, Any] = {name: whole(row, name) for name in ("layers", "hidden", "heads", "seq_len", "vocab")}
    width, dense = whole(row, "moe_ffn_hidden", whole(row, "ffn_hidden")), whole(row, "first_k_dense", 0)
    values["ffn_hidden"] = whole(row, "ffn_hidden", width) if dense else width
    if dense:
        values |= {"dense_layers": dense, "expert_hidden": width}
    shared = re.fullmatch(r"(\d+)(?: *\((\d+)\))?", row.get("shared_experts") or "0")
    if shared is None:
        raise RejectedError("shared_experts is not a number")
    return ModelShape(
        **values,
        kv_heads=whole(row, "kv_heads", values["heads"]),
        gated_mlp=row["gated_mlp"] == "yes",
        tied_embeddings=row["tied_embeddings"] == "yes",
        experts=whole(row, "experts"),
        experts_per_token=whole(row, "experts_per_token", 1),
        shared_expert_hidden=int(shared[2] or int(shared[1]) * width),
    )
