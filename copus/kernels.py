"""What a job's layers are computed with: torch's own kernels, or those of Transformer Engine. Imports neither."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from copus.backends.registry import find_backend
from profiles.accelerator import accelerator
from profiles.layout import Layout
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from copus.job import TrainingConfig

TRANSFORMER_ENGINE = "transformer-engine"
OLDEST = (2, 3)
"""The oldest Transformer Engine whose modules and scalings are used as they are here."""
SCALED_BLOCK = {"fp8": 16, "mxfp8": 32}
"""Precisions whose products are of 8-bit operands, and what the sides of these must be multiples of: TE's
`assert_dim_for_fp8_exec` (utils.py:614), and the blocks that share a scale (2310.10537)."""
_NEEDS_ARITHMETIC_OF = {"fp8": "fp8", "mxfp8": "fp4"}
"""Among the peaks of an accelerator: whichever scales blocks in its matrix units has fp4 as well."""


def usual_kernels(training: dict[str, Any], on_cpu: bool) -> str:
    """The kernels of a training that names none, or `auto`, from the values of its section, unchecked so far."""
    if training["precision"] in [*SCALED_BLOCK]:  # which compares what has no hash, too
        return TRANSFORMER_ENGINE
    if "kernels" not in training or on_cpu or not is_installed():
        return "torch"
    try:
        backend = find_backend(training.get("backend", "megatron"))
    except (ValueError, TypeError):  # told where the field is checked
        return "torch"
    return TRANSFORMER_ENGINE if backend.has_transformer_engine else "torch"


def is_installed() -> bool:
    """Whether there is a Transformer Engine here, of whatever version."""
    return find_spec("transformer_engine") is not None


def check_installed_here() -> None:
    """Raise ValueError if this machine's Transformer Engine is missing or too old."""
    needed = ".".join(map(str, OLDEST))
    try:
        installed = version("transformer-engine") if is_installed() else None
    except PackageNotFoundError:  # built without metadata: megatron reads its version off the module
        return
    if installed is None:
        raise ValueError(
            f"kernels({TRANSFORMER_ENGINE}) needs Transformer Engine {needed} or newer on every node: "
            "pip install 'transformer-engine[pytorch]', or kernels(torch)"
        )
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:2]) < OLDEST:
        raise ValueError(
            f"kernels({TRANSFORMER_ENGINE}) needs Transformer Engine {needed} or newer, and {installed} is installed"
        )


def check_accelerator(training: "TrainingConfig", name: str) -> None:
    """Raise ValueError for kernels or a precision that an accelerator does not have."""
    if training.kernels == TRANSFORMER_ENGINE and name == "cpu":
        raise ValueError(f"kernels({TRANSFORMER_ENGINE}) needs GPUs, and cluster.accelerator is cpu")
    needed = _NEEDS_ARITHMETIC_OF.get(training.precision)
    if needed is not None and needed not in accelerator(name).flops:
        has = ", ".join(accelerator(name).flops)
        blocks = " in scaled blocks" if needed != training.precision else ""
        raise ValueError(f"precision({training.precision}): {name} does not compute so{blocks}; it has {has}")


def check_sides(precision: str, layout: Layout, model: ModelShape) -> None:
    """Raise ValueError for a layout in which a matrix or a rank's tokens are not whole blocks of 8-bit operands."""
    block = SCALED_BLOCK.get(precision)
    if block is None:
        return
    is_of_experts = model.expert_layers == model.layers  # then it is the width of the experts, and of no dense MLP
    widths = {
        "hidden": (model.hidden, 1),
        "ffn_hidden": (model.ffn_hidden, layout.expert_tp if is_of_experts else layout.tp),
    }
    if model.experts:
        widths["expert_hidden"] = (model.expert_width, layout.expert_tp)
        widths["shared_expert_hidden"] = (model.shared_expert_hidden, layout.tp)
    widths["heads · head_dim"] = (model.query_width, layout.tp)
    latent = model.latent_attention
    if latent is None:
        widths["(heads + 2 · kv_heads) · head_dim"] = (model.query_width + 2 * model.kv_width, layout.tp)
    else:
        of_keys_and_values = model.query_width + model.heads * (latent.value_dim - latent.rope_dim)
        widths["latent_attention.query_rank"] = (latent.query_rank or 0, 1)
        widths["latent_attention.kv_rank"] = (latent.kv_rank, 1)
        widths["heads · (head_dim − rope_dim + value_dim)"] = (of_keys_and_values, layout.tp)
        widths["heads · value_dim"] = (model.heads * latent.value_dim, layout.tp)
    widths["seq_len"] = (model.seq_len, layout.cp * (layout.tp if layout.sequence_parallel else 1))
    for name, (width, over) in widths.items():
        if width % (over * block):
            share = f" ÷ {over} = {width / over:g}" if over > 1 else ""
            raise ValueError(f"precision({precision}): model.{name}({width}){share} is no multiple of {block}")
