"""A built model on one rank: what it consists of, and how to let go of it."""

from dataclasses import dataclass
from typing import Any

import torch

from copus.backends.megatron.part_norms import PartNorms
from copus.backends.megatron.upstream import inner_optimizers
from profiles.layout import Layout


@dataclass
class BuiltModel:
    """What a layout consists of on this rank. A build that fails half-way lacks the last of it."""

    device: torch.device
    layout: Layout
    chunks: list[Any]
    """The model chunks of this rank (one, or `vp`), in megatron's data parallel wrappers."""
    optimizer: Any = None
    """Megatron's chain of optimizers."""
    part_norms: PartNorms | None = None
    """What the noise is measured with."""

    def release(self) -> None:
        """Let go of the memory. Megatron's wrappers refer to each other in circles and hang their buffers on the
        parameters."""
        if self.part_norms is not None:
            self.part_norms.close()
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
        # The shards of an fp32 distributed optimizer are views of the weights, with a graph behind them that ends in
        # the hooks of the data parallel wrapper: a circle that no collector sees.
        vars(wrapper).clear()


def _release_chunk(chunk: Any) -> None:
    for param in chunk.parameters():
        for name in ("main_grad", "main_param", "grad"):
            if getattr(param, name, None) is not None:
                setattr(param, name, None)
        param.data = param.data.new_empty(0)
    chunk.grad_accs = []
    chunk.bucket_groups, chunk.buffers = [], []
