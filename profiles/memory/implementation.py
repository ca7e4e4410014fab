"""What memory and time depend on beside model and configuration: how the training framework is written."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal

from pydantic import Field, PositiveInt

from profiles.layout import ContextExchange, ExpertDispatch
from profiles.optimizer_state import OptimizerState
from profiles.record import Record

Module = Literal["norms", "activations", "latent"]
"""A piece of a layer that is cheap to compute again: the outputs of its norms, the product of the activated gate and
the other half in a gated MLP, queries, keys and values that latent attention makes of narrow vectors."""


class Implementation(Record):
    """How a framework spends memory and time. The defaults are those of the megatron backend, without dropout."""

    stack: str | None = None
    """The software whose published runs the cost model takes for alike (`profiles.cost.effects.stacks`): megatron is
    Megatron-LM without Transformer Engine. None: no software in particular, with wider intervals."""
    attention: Literal["flash", "materialised"] = "flash"
    """flash: no scores are kept. materialised: the s × s scores of every head are (2205.05198, section 4.1)."""
    dropout: bool = False
    """Whether masks of dropout, one byte an element, are kept: two a layer, and one of materialised scores."""
    fused_qkv: Literal["kept", "released"] = "kept"
    """What becomes of the joint output of the query, key and value projection when rotary positions have made copies of
    the first two. kept: the values are a view into it, so that all of it stays (megatron-core). released: not so."""
    narrow_values: Literal["padded", "as they are"] = "padded"
    """What becomes of the values of latent attention if they are narrower than its keys. padded: torch's kernels
    that keep no scores take values as wide as keys, and their results, as wide, stay beside the part that counts."""
    gated_mlp_tensors: PositiveInt = 5
    """Tensors as wide as `ffn_hidden` that a gated MLP keeps. 4: gate, up, activated gate, product. 3: activation and
    product are one kernel. 5: megatron-core adds `glu_linear_offset` to up, and so copies it even where that is 0."""
    expert_outputs: Literal["kept", "released"] = "kept"
    """kept: what experts make of their tokens stays, to be weighed with the router's probabilities on the way back.
    released: the probabilities come in before the second matrix, and nothing has to stay."""
    recomputed_modules: tuple[Module, ...] = ()
    """What every layer computes again in the backward pass beside `Layout.recompute`."""
    loss: Literal["in-place", "copying"] = "in-place"
    """in-place: the loss keeps the logits once in fp32 beside the model's precision (megatron's vocabulary-parallel
    cross entropy). copying: shifted logits and exponentials are tensors of their own (plain PyTorch)."""
    fp32_gradients: bool = True
    """Whether gradients of a bf16 model are accumulated in fp32 (megatron's `grad_reduce_in_fp32`)."""
    gradient_buckets: bool = False
    """Whether gradients lie a second time, in the model's precision, in buckets for their reduction (PyTorch's DDP)."""
    weights: Literal["kept", "gathered"] = "kept"
    """kept: the weights that the model computes with are always there. gathered: they are copies, made for a step (with
    ZeRO-3 for a layer) from the fp32 weights that the optimizer updates, also in fp32 (FSDP)."""
    context: ContextExchange = "gathered"
    """How context parallel ranks get keys and values. gathered: a layer keeps those of all tokens. ring: its own."""
    expert_dispatch: ExpertDispatch = "alltoall"
    """How tokens come to experts on other ranks; time alone depends on it."""
    gathered_inputs: Literal["regathered", "kept"] = "regathered"
    """What becomes of the inputs that sequence parallelism gathers in front of matrices: gathered again in the backward
    pass (2205.05198, section 4.2.2), or kept whole on every rank."""
    stages: Literal["even", "balanced"] = "even"
    """even: every pipeline stage has as many layers. balanced: the output layer counts as the layers that take as long,
    so that the last stage has fewer and the others more."""
    optimizer: OptimizerState = OptimizerState()
    """What the job's optimizer keeps of the weights."""
    optimizer_in_backward: bool = False
    """Whether steps of one sequence update each weight in the backward pass and free its gradient at once. Only where
    weights are gathered."""
    fragmentation: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations and buffers that the allocator adds: blocks are rounded up, and freed ones do not fit."""

    def as_stack(self, stack: str) -> "Implementation":
        """The same with the kernels of a stack of the same framework, as far as they are known to need other memory."""
        kernels = _KERNELS.get(stack, {}) if self.stack == "megatron" else {}
        return self.model_copy(update={**kernels, "stack": stack})

    def alternatives(self) -> Iterator[tuple["Implementation", int]]:
        """Itself and what other frameworks do, each with the number of differences: what observed peaks choose from."""
        choices = {
            "attention": ("flash", "materialised"),
            "loss": ("in-place", "copying"),
            "gradient_buckets": (False, True),
            "gathered_inputs": ("regathered", "kept"),
            "stages": ("even", "balanced"),
        }
        for values in product(*choices.values()):
            changes = {name: value for name, value in zip(choices, values, strict=True) if value != getattr(self, name)}
            yield self.model_copy(update=changes), len(changes)


_KERNELS: Mapping[str, Mapping[str, Any]] = {
    "megatron-te": {
        **{"fused_qkv": "released", "narrow_values": "as they are", "gated_mlp_tensors": 3},
        **{"expert_outputs": "released", "context": "ring"},
    },
}
MEGATRON = Implementation(stack="megatron")
"""What this project's own backend does."""
MEGATRON_TE = MEGATRON.as_stack("megatron-te")
"""Megatron-core with Transformer Engine, its fused kernels and its grouped matrix products."""
PYTORCH = Implementation(
    fused_qkv="released", gated_mlp_tensors=4, loss="copying", gradient_buckets=True, stages="balanced"
)
"""Plain PyTorch: `DistributedDataParallel`, an unfused loss, stages balanced by their work."""
KORTHIKANTI = Implementation(attention="materialised", dropout=True, fused_qkv="released", context="ring")
"""Megatron-LM as the paper describes it (2205.05198); without rotary positions nothing is copied."""
