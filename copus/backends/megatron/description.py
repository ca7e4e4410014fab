"""The description of the Megatron backend. Imports no megatron."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from copus.backends.description import BackendDescription, refuse_cut_matrices, refuse_fields
from copus.kernels import (
    SCALED_BLOCK,
    TRANSFORMER_ENGINE,
    check_accelerator,
    check_installed_here,
    check_sides,
)
from planner.backend_traits import PartCount
from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from profiles.rope import attention_factor

if TYPE_CHECKING:
    from copus.job import TrainingConfig
    from profiles.memory.implementation import Implementation

_REFUSED = ("rope_local_base", "attention_softcap", "logit_softcap")
"""Optional fields of a model that it does not build."""
_TORCH_WITHOUT_MASTERS = (2, 10)
"""The oldest torch whose bf16 weights may have fp32 gradients (`Tensor.grad_dtype`)."""


class MegatronDescription(BackendDescription):
    """Megatron-core: tensor, pipeline, context, data and expert parallelism; the distributed optimizer."""

    framework = "megatron-core"
    largest_zero = 1
    optimizers = ("adamw", "sgd", "adafactor", "muon", "signum")
    trains_without_masters = True
    reads_documents = True
    has_transformer_engine = True
    precisions = ("fp32", "bf16", *SCALED_BLOCK)

    def implementation(self, dropout: bool) -> "Implementation":
        """How it uses memory and time: with Transformer Engine or without."""
        from profiles.memory.implementation import MEGATRON  # its package loads numpy, which few commands need

        changes: dict[str, Any] = {"dropout": dropout}
        if self.kernels == TRANSFORMER_ENGINE:
            changes |= {"stack": "megatron-te", "context": "ring"}
        return MEGATRON.model_copy(update=changes)

    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a model that the Megatron backend does not build."""
        refuse_fields(model, _REFUSED, "the megatron backend")
        if model.bias == "attention":
            raise ValueError("bias(attention) is not supported by the megatron backend: it has none, qkv and all")
        if model.qk_norm == "projection":
            raise ValueError("qk_norm(projection) is not supported by the megatron backend: it has none and head")
        if model.experts and model.norm_position != "pre":
            raise ValueError(
                f"experts({model.experts}) is not supported by the megatron backend with norm_position"
                f"({model.norm_position}): only with pre"
            )
        if model.latent_attention is not None:
            beside = {"bias": "none", "qk_norm": "none", "positions": "rope", "rope_fraction": 1.0}
            for name, usual in beside.items():
                if getattr(model, name) != usual:
                    raise ValueError(
                        f"{name}({getattr(model, name)}) is not supported by the megatron backend with latent_attention"
                    )
        if attention_factor(model.rope_scaling) != 1 and (model.rope_fraction != 1 or model.latent_attention):
            what = "latent_attention" if model.latent_attention else f"rope_fraction({model.rope_fraction:g})"
            raise ValueError(
                f"{what} is not supported by the megatron backend with yarn's attention_factor"
                f"({attention_factor(model.rope_scaling):g})"
            )

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the Megatron backend does not run."""
        limits = (("zero", layout.zero, self.largest_zero), ("dp_replicate", layout.dp_replicate, 1))
        for name, value, limit in limits:
            if value > limit:
                raise ValueError(f"{name}({value}) is not supported by the megatron backend: at most {limit}")
        if not layout.etp and layout.ep > 1 and layout.ep % layout.cp:
            raise ValueError(
                f"ep({layout.ep}) ÷ cp({layout.cp}) is not whole: {layout.ep / layout.cp:g}; the megatron backend "
                "shares experts out over whole replicas"
            )
        together, replica = layout.expert_tp * layout.ep, layout.tp * layout.cp
        if layout.etp and together % replica:  # with one rank of them, megatron-core before 0.19 trains wrongly
            raise ValueError(
                f"etp·ep({together}) ÷ tp·cp({replica}) is not whole: {together / replica:g}; the megatron backend "
                "shares experts out over whole replicas"
            )
        super().check_layout(layout)

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for a setting that it does not have."""
        super().check_training(training)
        if training.without_masters and tuple(map(int, version("torch").split(".")[:2])) < _TORCH_WITHOUT_MASTERS:
            needed = ".".join(map(str, _TORCH_WITHOUT_MASTERS))
            raise ValueError(f"master_weights(none) of the megatron backend needs torch {needed} or newer")
        if training.precision in SCALED_BLOCK and training.kernels != TRANSFORMER_ENGINE:
            raise ValueError(f"precision({training.precision}) needs kernels({TRANSFORMER_ENGINE})")
        if training.precision == "fp32" and training.kernels == TRANSFORMER_ENGINE:
            raise ValueError(
                f"kernels({TRANSFORMER_ENGINE}) needs a precision of bf16, fp8 or mxfp8: its attention keeps every "
                "score in fp32"
            )

    def check_accelerator(self, training: "TrainingConfig", name: str) -> None:
        """Raise ValueError for kernels or a precision that an accelerator does not have."""
        check_accelerator(training, name)

    def check_node(self, training: "TrainingConfig") -> None:
        """Raise ValueError if it is to compute with Transformer Engine, and cannot here."""
        if training.kernels == TRANSFORMER_ENGINE:
            check_installed_here()

    def check_optimizer_in(self, layout: Layout) -> None:
        """Raise ValueError for a layout without whole rows, columns or matrices for the optimizer, or whose masters
        the job does not want."""
        refuse_cut_matrices(self.optimizer, layout)
        if layout.zero and self.without_masters:
            raise ValueError(
                f"layout.zero({layout.zero}) is not supported with master_weights(none): megatron's distributed "
                "optimizer always keeps fp32 copies of its ranges"
            )
        if layout.zero and not self.optimizer.elementwise:
            raise ValueError(
                f"layout.zero({layout.zero}) is not supported with optimizer.kind({self.optimizer.kind}): megatron's "
                "distributed optimizer shares out ranges of flattened weights, which have no whole rows"
            )

    def check_model_in(self, layout: Layout, model: ModelShape) -> None:
        """Raise ValueError for tensor parallelism of experts without sequence parallelism, which Megatron refuses,
        since every rank would send all tokens to the experts, of latent attention that it does not divide, and of
        matrices that the job's precision does not take."""
        check_sides(self.precision, layout, model)
        if model.experts and layout.tp > 1 and not layout.sequence_parallel:
            raise ValueError(f"tp({layout.tp}) of a model with experts needs sequence_parallel: true")
        if model.latent_attention is not None:  # Megatron checks these, though every rank has the projections whole
            latent = model.latent_attention
            widths = (("kv_rank + rope_dim", latent.kv_rank + latent.rope_dim), ("query_rank", latent.query_rank or 0))
            for name, width in widths:
                if width % layout.tp:
                    raise ValueError(
                        f"model.latent_attention.{name}({width}) ÷ tp({layout.tp}) is not whole: {width / layout.tp:g}"
                    )

    def parts(self, configuration: Configuration) -> dict[str, PartCount]:
        """The parts that a step has, by noise source. Replicas that share experts out have no gradient of their own:
        their micro-batches are a part together. Transformer Engine's norms are fused with what follows them, and show
        nothing of a sequence."""
        parts, together = super().parts(configuration), replicas_of_part(configuration.layout)
        if self.kernels == TRANSFORMER_ENGINE:
            del parts[NORMLAYER]
        if configuration.layout.ep > 1:
            del parts[REPLICA]
            number, size = parts[MICROBATCH]
            parts[MICROBATCH] = PartCount(number // together, size * together)
        return parts

    def load(self) -> type[Any]:
        """The class that trains. Takes seconds, and changes torch on a CPU."""
        from copus.backends.megatron.backend import MegatronBackend

        return MegatronBackend


def replicas_of_part(layout: Layout) -> int:
    """Replicas whose micro-batches are one part of a step: those that share experts out. The ranks that do are
    neighbours."""
    return max(layout.expert_tp * layout.ep // (layout.tp * layout.cp), 1)
