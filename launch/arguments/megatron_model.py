"""The model that Megatron-LM's arguments describe, and its vocabulary."""

import json
import re
from pathlib import Path, PurePath
from typing import Any

from copus.job import JobError
from launch.arguments.given_arguments import GivenArguments
from launch.arguments.megatron_experts import dense_layers, read_experts
from profiles.preset import presets

_VOCABULARIES = {"GPT2BPETokenizer": 50257, "Llama2Tokenizer": 32000, "Llama3Tokenizer": 128256}
"""Tokenizers that have one vocabulary, whatever file they are read from."""
_TRAINED = "the tokenizer is a `tokenizer.json`, data.tokenizer, or is trained"
_PADDED = "the vocabulary is padded to a multiple of 128 in every layout"


def read_model(given: GivenArguments) -> None:
    """Fill the model section. Without `--num-layers` there is none: the model comes from elsewhere.

    Raises JobError if a size is missing.
    """
    layers = given.whole("--num-layers")
    if layers is None:
        return
    given.job.put("model.layers", layers)
    for field, name in (("hidden", "--hidden-size"), ("heads", "--num-attention-heads"), ("seq_len", "--seq-length")):
        size = given.whole(name)
        if not size:
            raise JobError(f"{name} is not given, and the model needs it")
        given.job.put(f"model.{field}", size)
    _attention(given)
    _mlp(given)
    _vocabulary(given)
    _norms(given)
    _positions(given)
    _window(given)
    given.job.put("model.tied_embeddings", not given.flag("--untie-embeddings-and-output-weights"))
    if given.real("--init-method-std") not in (None, 0.02):
        given.leave("--init-method-std", "changes the training", "weights begin with a standard deviation of 0.02")


def _attention(given: GivenArguments) -> None:
    groups, grouped = given.whole("--num-query-groups"), given.flag("--group-query-attention")
    heads = given.job.values["model"]["heads"]
    given.job.put("model.kv_heads", (groups or 1) if grouped else heads, "" if grouped else "no grouped queries")
    if head_dim := given.whole("--kv-channels"):
        given.job.put("model.head_dim", head_dim)
    if scale := given.real("--softmax-scale"):
        given.job.put("model.attention_scale", scale)
    attention, hidden = given.real("--attention-dropout"), given.real("--hidden-dropout")
    given.put("training.dropout", "--hidden-dropout", hidden, 0.1)
    if (0.1 if attention is None else attention) != (0.1 if hidden is None else hidden):
        reason = "dropout is one number: that of --hidden-dropout"
        if attention is None:
            given.job.leave("--attention-dropout's default of 0.1", "changes the training", reason)
        given.leave("--attention-dropout", "changes the training", reason)


def _mlp(given: GivenArguments) -> None:
    put, hidden = given.job.put, given.job.values["model"]["hidden"]
    gated = given.flag("--swiglu")
    width, experts = given.whole("--ffn-hidden-size"), given.whole("--num-experts")
    of_experts = given.whole("--moe-ffn-hidden-size") if experts else None
    if dense := dense_layers(given) if experts else 0:
        put("model.dense_layers", dense)
        if of_experts:
            put("model.expert_hidden", of_experts)
    elif of_experts:
        width = None
        put("model.ffn_hidden", of_experts, "--moe-ffn-hidden-size")
    if width:
        put("model.ffn_hidden", width)
    elif dense or not of_experts:
        usual, factor = (int(4 * hidden * 2 / 3 / 64) * 64, "8/3") if gated else (4 * hidden, "4")
        put("model.ffn_hidden", usual, f"--ffn-hidden-size's default, {hidden} × {factor}")
    put("model.gated_mlp", gated)
    if given.flag("--squared-relu"):
        put("model.activation", "squared_relu")
    elif given.flag("--openai-gelu"):
        put("model.activation", "gelu_tanh")
    if experts:
        read_experts(given, experts)


def _vocabulary(given: GivenArguments) -> None:
    size, kind, file = given.whole("--vocab-size"), given.text("--tokenizer-type"), given.text("--vocab-file")
    model = given.text("--tokenizer-model")
    source = ""
    if size is None and file and (size := _entries(Path(file))):
        source = f"entries of {PurePath(file).name}"
    if size is None and model and (size := _tokens(Path(model))):
        source = f"tokens of {model}"
    if size is None and (kind in _VOCABULARIES or (kind is None and file)):
        kind = kind or "GPT2BPETokenizer"
        size, source = _VOCABULARIES[kind], f"that of {kind}"
    if size is None and model and (size := _published(model)):
        source = f"that of {model}"
    if size is not None:
        given.job.put("model.vocab", size, source)
    if kind != "HuggingFaceTokenizer":
        given.leave("--tokenizer-type", "is lost", _TRAINED)
    given.leave("--vocab-file", "is lost", _TRAINED)
    given.leave("--merge-file", "is lost", _TRAINED)
    if model and (Path(model) / "tokenizer.json").is_file():
        given.job.put("data.tokenizer", str(Path(model) / "tokenizer.json"))
    elif model and Path(model).name == "tokenizer.json":
        given.job.put("data.tokenizer", model)
    else:
        reason = "set data.tokenizer to its `tokenizer.json`; without it a tokenizer is trained"
        given.leave("--tokenizer-model", "is lost", reason)
    given.leave("--make-vocab-size-divisible-by", "is not needed", _PADDED)


def _norms(given: GivenArguments) -> None:
    put = given.job.put
    norm = given.text("--normalization")
    given.put("model.norm", "--normalization", norm and ("rmsnorm" if norm == "RMSNorm" else "layernorm"), "layernorm")
    given.put("model.norm_epsilon", "--norm-epsilon", given.real("--norm-epsilon"), 1e-5)
    plain, qkv = given.flag("--disable-bias-linear"), given.flag("--add-qkv-bias")
    put("model.bias", "qkv" if plain and qkv else "none" if plain else "all", "" if plain else "the default")
    if given.flag("--qk-layernorm"):
        put("model.qk_norm", "head")


def _positions(given: GivenArguments) -> None:
    put = given.job.put
    rotary, kind = given.flag("--use-rotary-position-embeddings"), given.text("--position-embedding-type")
    if kind == "learned_absolute" or (kind is None and not rotary):
        put("model.positions", "learned", "" if kind else "--position-embedding-type's default")
        if given.whole("--max-position-embeddings") not in (None, given.job.values["model"]["seq_len"]):
            reason = "there is an embedding for each position of --seq-length"
            given.leave("--max-position-embeddings", "changes the training", reason)
        return
    put("model.positions", "rope")
    given.put("model.rope_base", "--rotary-base", given.real("--rotary-base"), 10000.0)
    if (fraction := given.real("--rotary-percent")) is not None:
        put("model.rope_fraction", fraction)
    if (factor := given.real("--rotary-seq-len-interpolation-factor")) is not None:
        put("model.rope_scaling", {"kind": "linear", "factor": factor})
    if given.flag("--use-rope-scaling"):
        factor = given.real("--rope-scaling-factor")
        scaling = {"kind": "llama3", "factor": 8.0 if factor is None else factor, "original_seq_len": 8192}
        put("model.rope_scaling", scaling)
    if kind == "yarn":
        _yarn(given)
    elif kind not in ("rope", None):
        given.leave("--position-embedding-type", "changes the training", "positions are rotary, or learned")


def _yarn(given: GivenArguments) -> None:
    scaling: dict[str, Any] = {"kind": "yarn", "factor": given.real("--yarn-rotary-scaling-factor") or 1.0}
    if length := given.whole("--yarn-original-max-position-embeddings"):
        scaling["original_seq_len"] = length
    for field, name in (("beta_fast", "--yarn-beta-fast"), ("beta_slow", "--yarn-beta-slow")):
        if (value := given.real(name)) is not None:
            scaling[field] = value
    if given.flag("--no-yarn-correction-range-round-to-int"):
        scaling["truncate"] = False
    if length:
        given.job.put("model.rope_scaling", scaling)
    else:
        given.leave("--position-embedding-type", "changes the training", "yarn needs the sequence length before it")


def _window(given: GivenArguments) -> None:
    text, every = given.text("--window-size"), given.text("--window-attn-skip-freq")
    if text is None:
        return
    match = re.fullmatch(r"\(?\s*(-?\d+)[,\s]+(-?\d+)\s*\)?", text)
    if match is None:
        raise JobError(f"--window-size {text}: expected two whole numbers, tokens before and after")
    if int(match[1]) >= 0:
        given.job.put("model.sliding_window", int(match[1]) + 1, f"{match[1]} tokens before, and the token itself")
    if every is not None and every.isdecimal():
        given.job.put("model.full_attention_every", int(every))
    elif every is not None:
        given.leave(
            "--window-attn-skip-freq", "changes the training", "every n-th layer attends to all tokens, or none"
        )


def _entries(path: Path) -> int | None:
    """Number of entries of a vocabulary in JSON; None if the file is not there, or is something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return len(values) if isinstance(values, dict) else None


def _tokens(path: Path) -> int | None:
    """Number of tokens of a `tokenizer.json`, or of the one in a folder; None if there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        numbers = [*values["model"]["vocab"].values(), *(token["id"] for token in values.get("added_tokens", []))]
        return int(max(numbers)) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _published(name: str) -> int | None:
    """Size of the vocabulary of a model that is known by name, such as `meta-llama/Llama-3.1-8B`."""
    wanted = PurePath(name).name.lower().replace("_", "-").replace("meta-llama", "llama")
    short = re.sub(r"-(instruct|chat|base|hf)(-.*)?$", "", wanted)
    preset = next((name for name in (wanted, short) if name in presets()), None)
    return None if preset is None else int(presets()[preset]["vocab"])
