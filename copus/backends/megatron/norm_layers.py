"""The norm layers of Megatron's models, whose gradients may be partial sums on every tensor parallel rank."""

from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.modules import LayerNorm, RMSNorm, is_norm_of_heads
from copus.backends.norm_layers import NormLayers
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402


class MegatronNormLayers(NormLayers):
    """Observes every norm of this rank.

    With sequence parallelism a rank has some of the tokens, and with tensor parallelism the norms of queries and keys
    have some of the heads, so the sums are partial. They are kept (one vector per parameter and sequence) and summed
    over the ranks before they are squared. Otherwise all tensor-parallel ranks have the same sums, and those of rank 0
    count.
    """

    def __init__(self, chunks: list[Any], layout: Layout) -> None:
        self._layout = layout
        self._counts = parallel_state.get_tensor_model_parallel_rank() == 0
        norms = [
            (name, module)
            for chunk in chunks
            for name, module in chunk.named_modules()
            if isinstance(module, RMSNorm | LayerNorm)
        ]
        self._partial = {module for name, module in norms if self._is_partial(name)}
        super().__init__(norms, sequence_axis=1, counts=self._counts)

    def _is_partial(self, name: str) -> bool:
        return self._layout.sequence_parallel or (self._layout.tp > 1 and is_norm_of_heads(name))

    def start(self, on: bool, weights: dict[torch.nn.Parameter, torch.Tensor] | None = None) -> None:
        """Begin a step; with `weights`, gradients are multiplied by them. Raises as `NormLayers.start`."""
        super().start(on)
        self._weights = weights
        self._kept: dict[tuple[torch.nn.Parameter, int], torch.Tensor] = {}

    def _see(self, module: Any, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        if module in self._partial:
            self._kept[param, microbatch] = of_sequences
        else:
            self._add(param, microbatch, of_sequences)

    def _add(self, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        weighted = of_sequences if self._weights is None else of_sequences * self._weights[param]
        super()._add(param, microbatch, weighted)

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """As `NormLayers.collect`; collective over tensor-parallel ranks if they have partial sums."""
        if self._kept:
            keys = [
                (param, microbatch)
                for param in self.params
                for microbatch in range(num_microbatches)
                if (param, microbatch) in self._kept
            ]
            together = torch.cat([self._kept[key].flatten() for key in keys])
            dist.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
            if self._counts:
                sizes = [self._kept[key].numel() for key in keys]
                for (param, microbatch), of_sequences in zip(keys, together.split(sizes), strict=True):
                    self._add(param, microbatch, of_sequences.view(micro_batch, -1))
        return super().collect(num_microbatches, micro_batch, device)
