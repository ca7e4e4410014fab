"""What the DeepSpeed backend can run. Imports no deepspeed."""

from typing import TYPE_CHECKING, Any

from copus.backends.huggingface_description import HuggingFaceDescription
from profiles.layout import Layout

if TYPE_CHECKING:
    from copus.job import TrainingConfig
    from profiles.memory.implementation import Implementation


class DeepSpeedDescription(HuggingFaceDescription):
    """DeepSpeed: data parallelism with ZeRO 0 to 3."""

    framework = "deepspeed"
    largest_zero = 3
    offloads_optimizer = True
    why_no_other_optimizer = "gradients are scaled, and steps left out, inside torch's fused AdamW"
    extra = "deepspeed"
    packages = ("deepspeed", "transformers")
    noise_metrics = ("plain",)

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for a setting that DeepSpeed does not have at the stage of the layout."""
        super().check_training(training)
        zero = training.layout.zero
        if training.overlap_grad_reduce and zero < (2 if training.precision == "bf16" else 1):
            raise ValueError(
                f"overlap_grad_reduce(true) is not supported by DeepSpeed with zero({zero}) in {training.precision}"
            )

    def check_precision(self, layout: Layout, precision: str) -> None:
        """Raise ValueError for bf16 without ZeRO."""
        if precision == "bf16" and layout.zero == 0:
            raise ValueError(
                "precision(bf16) needs layout.zero of 1 to 3: with zero(0) DeepSpeed accumulates gradients in bf16"
            )

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError for a layout that the DeepSpeed backend does not run."""
        super().check_layout(layout)
        for name in ("tp", "pp", "cp", "ep"):
            if (degree := getattr(layout, name)) > 1:
                raise ValueError(
                    f"{name}({degree}) is not supported by the deepspeed backend: it is data parallel only"
                )
        if layout.etp:
            raise ValueError(f"etp({layout.etp}) is not supported by the deepspeed backend")
        if layout.dp_replicate > 1:
            raise ValueError(
                f"dp_replicate({layout.dp_replicate}) is not supported by the deepspeed backend: at most 1"
            )
        if layout.offload_optimizer and layout.zero != 3:
            raise ValueError(
                f"offload_optimizer(true) needs zero(3), not zero({layout.zero}): with less of ZeRO DeepSpeed adds up "
                "bf16 gradients in bf16 when it offloads"
            )

    def implementation(self, dropout: bool) -> "Implementation":
        """How it uses memory: transformers' layers and plain PyTorch's loss."""
        from profiles.memory.implementation import Implementation  # its package loads numpy, which few commands need

        return Implementation(
            stack="deepspeed", dropout=dropout, fused_qkv="released", gated_mlp_tensors=4, loss="copying"
        )

    def load(self) -> type[Any]:
        """The class that trains. Takes seconds."""
        from copus.backends.deepspeed.backend import DeepSpeedBackend

        return DeepSpeedBackend
