"""A built model on one rank: its parts, and how their memory is freed."""

from dataclasses import dataclass
from typing import Any

import torch

from copus.backends.megatron.experts import ExpertTokens
from copus.backends.megatron.part_norms import PartNorms
from copus.backends.megatron.upstream import inner_optimizers
from profiles.layout import Layout


@dataclass
class BuiltModel:
    """The parts of a layout on this rank. A build that failed half-way lacks the later ones."""

    device: torch.device
    layout: Layout
    chunks: list[Any]
    """The model chunks of this rank (one, or `vp`), in megatron's data parallel wrappers."""
    optimizer: Any = None
    """Megatron's chain of optimizers."""
    separates_documents: bool = False
    """Whether attention or positions begin anew with each document: then every pipeline stage reads the sequences."""
    part_norms: PartNorms | None = None
    """Measures the noise."""
    expert_tokens: ExpertTokens | None = None
    """Sees how tokens spread over experts."""

    def release(self) -> None:
        """Free the memory. Megatron's wrappers form reference cycles and attach their buffers to the parameters."""
        if self.part_norms is not None:
            self.part_norms.close()
        if self.expert_tokens is not None:
            self.expert_tokens.close()
        if self.optimizer is not None:
            _release_optimizer(self.optimizer)
        for chunk in self.chunks:
            _release_chunk(chunk)


def _release_optimizer(optimizer: Any) -> None:
    for inner in inner_optimizers(optimizer):
        inner.state.clear()
        for group in inner.param_groups:
            for param in group["params"]:
                param.data = param.data.new_empty(0)
            group["params"] = []
    for wrapper in optimizer.chained_optimizers:
        # The shards of an fp32 distributed optimizer are views of the weights, and their autograd graph ends in the
        # hooks of the data parallel wrapper: a cycle that the garbage collector cannot see.
        vars(wrapper).clear()


def _release_chunk(chunk: Any) -> None:
    for param in chunk.parameters():
        for name in ("main_grad", "main_param", "grad"):
            if getattr(param, name, None) is not None:
                setattr(param, name, None)
        param.data = param.data.new_empty(0)
    chunk.grad_accs = []
    chunk.bucket_groups, chunk.buffers = [], []
    chunk.expert_parallel_bucket_groups, chunk.expert_parallel_buffers = [], []
