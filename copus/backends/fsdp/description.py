"""What the FSDP backend can run. Imports no torch."""

import os
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from copus.backends.description import refuse_cut_matrices
from copus.backends.huggingface_description import HuggingFaceDescription
from profiles.layout import Layout
from profiles.model_shape import ModelShape

if TYPE_CHECKING:
    from copus.job import TrainingConfig
    from profiles.memory.implementation import Implementation


_COMPILERS = (os.environ.get("CXX", "c++"), "g++", "clang++")
"""Any of these is enough for `torch.compile`."""
_SWITCHES = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""Variables with which `torch.compile` does nothing."""


class FsdpDescription(HuggingFaceDescription):
    """torch FSDP2 (`fully_shard`) on the models of transformers: data parallelism with every ZeRO stage and hybrid
    sharding, and tensor parallelism."""

    framework = "fsdp"
    largest_zero = 3
    zero_stages = (0, 1, 2, 3)
    shards_within_nodes = True
    packages = ("transformers",)
    extra = "fsdp"
    optimizers = ("adamw", "sgd", "adafactor", "muon", "signum")
    trains_without_masters = True
    has_fp32_gradients = False
    least_torch = (2, 13)  # for FSDP2's record of its gathered weights, which is not public
    noise_metrics = ("plain",)
    compiles = True
    updates_in_backward = True

    def check_training(self, training: "TrainingConfig") -> None:
        """Raise ValueError for a setting that it does not have."""
        super().check_training(training)
        if training.overlap_grad_reduce:
            raise ValueError("overlap_grad_reduce(true): the fsdp backend always overlaps; leave the field out")

    def check_node(self, training: "TrainingConfig") -> None:
        """Raise ValueError if it is to compile, and cannot here."""
        if not training.compile:
            return
        if not any(map(shutil.which, _COMPILERS)):
            raise ValueError("compile(true) needs a C++ compiler on every node: install g++ or clang, or set CXX")
        if switch := next((name for name in _SWITCHES if os.environ.get(name) == "1"), None):
            raise ValueError(f"compile(true): {switch}=1 in the environment turns it off; take one of them back")

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError for a layout that it does not run."""
        super().check_layout(layout)
        for name, value in (("pp", layout.pp), ("cp", layout.cp), ("ep", layout.ep)):
            if value > 1:
                raise ValueError(f"{name}({value}) is not supported by the fsdp backend: at most 1")
        if layout.etp:
            raise ValueError(f"etp({layout.etp}) is not supported by the fsdp backend")
        if layout.sequence_parallel:
            raise ValueError("sequence_parallel(true) is not supported by the fsdp backend")

    def check_model(self, model: ModelShape) -> None:
        """Raise ValueError for a model that it does not build: no shard is described of a bias that follows a sum."""
        super().check_model(model)
        if model.bias not in ("none", "qkv"):
            raise ValueError(f"bias({model.bias}) is not supported by the fsdp backend: it has none and qkv")

    def check_optimizer_in(self, layout: Layout) -> None:
        """Raise ValueError for Muon if a rank does not have its matrices whole."""
        refuse_cut_matrices(self.optimizer, layout)

    def check_model_in(self, layout: Layout, model: ModelShape) -> None:
        """Raise ValueError for tensor parallelism of a model with norms that every rank would see some heads of."""
        if layout.tp > 1 and model.qk_norm != "none":
            raise ValueError(
                f"tp({layout.tp}) with model.qk_norm({model.qk_norm}) is not supported by the fsdp backend"
            )

    def implementation(self, dropout: bool) -> "Implementation":
        """How it uses memory: transformers' layers, plain PyTorch's loss, weights gathered from fp32 ones."""
        from profiles.memory.implementation import Implementation  # its package loads numpy, which few commands need

        return Implementation(
            stack="fsdp",
            dropout=dropout,
            fused_qkv="released",
            gated_mlp_tensors=4,
            loss="copying",
            weights="gathered",
        )

    @property
    def software(self) -> str:
        """FSDP and its version, which is torch's: `fsdp 2.13.0`."""
        return f"{self.framework} {version('torch')}"

    def load(self) -> type[Any]:
        """The class that trains. Imports transformers, which takes seconds."""
        from copus.backends.fsdp.backend import FsdpBackend

        return FsdpBackend
