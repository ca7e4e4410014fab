"""Configuration files of Megatron-Bridge and NeMo, and files of arguments, as a command line of Megatron-LM.

Bridge and NeMo pass most fields on to the same classes of megatron-core, so that a field has the name of the argument.
"""

from collections.abc import Iterator
from typing import Any

from launch.arguments.command_line import CommandLine

_SECTIONS = (
    *("model", "train", "validation", "optimizer", "scheduler", "ddp", "dist", "dataset", "data", "tokenizer"),
    *("checkpoint", "logger", "rng", "trainer", "profiling", "mixed_precision", "comm_overlap", "peft", "optim"),
)
_RENAMED = {
    "layernorm_epsilon": "norm-epsilon",
    "num_moe_experts": "num-experts",
    "virtual_pipeline_model_parallel_size": "num-virtual-stages-per-pipeline-rank",
    "encoder_seq_length": "seq-length",
    "sequence_length": "seq-length",
    "seq_len_interpolation_factor": "rotary-seq-len-interpolation-factor",
    "rotary_percentage": "rotary-percent",
    "bias": "add-bias-linear",
    "max_steps": "train-iters",
    "max_time_per_run": "exit-duration-in-mins",
    "val_check_interval": "eval-interval",
    "limit_val_batches": "eval-iters",
    "gradient_clip_val": "clip-grad",
    "warmup_steps": "lr-warmup-iters",
    "adam_epsilon": "adam-eps",
    "num_nodes": "",
    "devices": "",
}
"""Fields that are called otherwise than the argument; an empty name is read elsewhere."""
_ON_BY_DEFAULT = {
    "add_bias_linear": "disable-bias-linear",
    "share_embeddings_and_output_weights": "untie-embeddings-and-output-weights",
    "masked_softmax_fusion": "no-masked-softmax-fusion",
    "gradient_accumulation_fusion": "no-gradient-accumulation-fusion",
    "bias_dropout_fusion": "no-bias-dropout-fusion",
    "apply_rope_fusion": "no-rope-fusion",
}
"""Fields that are true unless they are set, and the flag of their being false."""


def command_of_values(values: dict[str, Any]) -> CommandLine:
    """The command line for what a YAML file holds. Raises ValueError, one line, if it is no configuration of these."""
    command = CommandLine()
    given = next((inner for inner in _mappings(values) if any(str(key).startswith("--") for key in inner)), None)
    if given is not None:
        for name, value in given.items():
            if value not in (False, None):
                command.arguments[str(name).replace("_", "-")] = [] if value is True else str(value).split(" ")
        return command
    if not set(values) & set(_SECTIONS):
        raise ValueError(f"none of its sections ({', '.join(map(str, values))}) is one of Megatron-Bridge or NeMo")
    for name, value in _fields(values):
        _add(command, name, value)
    groups = command.arguments.get("--num-query-groups")
    if groups:
        command.arguments["--group-query-attention"] = []
    if trainer := values.get("trainer"):
        command.nodes, command.per_node = _count(trainer, "num_nodes"), _count(trainer, "devices")
    return command


def add_overrides(command: CommandLine) -> None:
    """Turn overrides of a command line, `train.global_batch_size=512`, into arguments."""
    for place, text in command.overrides.items():
        if place.partition(".")[0] in _SECTIONS:
            _add(command, place.rpartition(".")[2], _plain(text))
        else:
            command.notes.append(f"{place}={text} is left out")


def _mappings(values: Any) -> Iterator[dict[Any, Any]]:
    """A mapping, and those inside of it."""
    if isinstance(values, dict):
        yield values
        for inner in values.values():
            yield from _mappings(inner)


def _fields(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every field of every section; a section inside of a section (NeMo's `model.optim.sched`) counts as one."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value)
        elif not str(name).startswith("_"):
            yield str(name), value


def _add(command: CommandLine, name: str, value: Any) -> None:
    arguments = command.arguments
    if name in _ON_BY_DEFAULT or _RENAMED.get(name) == "add-bias-linear":
        if value is False:
            arguments["--" + _ON_BY_DEFAULT.get(name, "disable-bias-linear")] = []
    elif name in ("gated_linear_unit", "activation", "activation_func", "activation_func_name"):
        _add_activation(arguments, name, value)
    elif name == "precision" or name == "mixed_precision":
        kind = next((kind for kind in ("bf16", "fp16") if kind in str(value)), None)
        if kind:
            arguments[f"--{kind}"] = []
    elif name == "betas" and isinstance(value, list) and len(value) == 2:
        arguments["--adam-beta1"], arguments["--adam-beta2"] = [str(value[0])], [str(value[1])]
    elif name == "blend" and _is_blend(value):
        arguments["--data-path"] = _words_of_blend(value)
    elif name == "blend_per_split" and isinstance(value, list) and any(map(_is_blend, value)):
        for argument, part in zip(("train", "valid", "test"), value, strict=False):
            if _is_blend(part):
                arguments[f"--{argument}-data-path"] = _words_of_blend(part)
    elif name == "data_path" and isinstance(value, str):
        arguments["--data-path"] = value.strip("[]").replace(",", " ").split()
    elif name == "position_embedding_type":
        arguments["--position-embedding-type"] = [str(value)]
    elif name == "normalization":
        kinds = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm", "layernorm1p": "LayerNorm"}
        arguments["--normalization"] = [kinds.get(str(value).lower(), str(value))]
    elif value not in (None, False) and (argument := _RENAMED.get(name, name.replace("_", "-"))):
        values = value if isinstance(value, list) else [value]
        arguments[f"--{argument}"] = [] if value is True else [str(item) for item in values]


def _is_blend(value: Any) -> bool:
    """Whether it is Bridge's pair of prefixes and their weights, which may be null."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], list)


def _words_of_blend(value: list[Any]) -> list[str]:
    """As Megatron-LM's `--data-path` has it."""
    prefixes, weights = value
    if not weights:
        return [str(prefix) for prefix in prefixes]
    return [str(word) for pair in zip(weights, prefixes, strict=False) for word in pair]


def _add_activation(arguments: dict[str, list[str]], name: str, value: Any) -> None:
    """The gate and the function of the MLP, which are one argument: `--swiglu`."""
    text = str(value).lower()
    if "squared" in text and "relu" in text:
        arguments["--squared-relu"] = []
    elif "swiglu" in text or "silu" in text or (name == "gated_linear_unit" and value is True):
        arguments["--swiglu"] = []


def _count(section: Any, name: str) -> int | None:
    value = section.get(name) if isinstance(section, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _plain(text: str) -> Any:
    """The value of an override."""
    words = {"true": True, "false": False, "null": None, "none": None}
    return words.get(text.lower(), text)
