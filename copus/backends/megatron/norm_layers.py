"""The norm layers of Megatron's models, whose gradients may be partial sums on every tensor parallel rank."""

from collections import defaultdict
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

    With sequence and context parallelism a rank has some of the tokens, and with tensor parallelism the norms of
    queries and keys have some of the heads, so the sums are partial. They are kept (one vector per parameter and
    sequence) and summed over the ranks before they are squared. Otherwise all tensor-parallel ranks have the same sums,
    and those of rank 0 count.
    """

    def __init__(self, chunks: list[Any], layout: Layout) -> None:
        self._layout = layout
        self._config = chunks[0].config
        self._of_tokens = parallel_state.get_context_parallel_group()
        first_tp = parallel_state.get_tensor_model_parallel_rank() == 0
        self._counts = first_tp and self._of_tokens.rank() == 0
        norms = [
            (name, module)
            for chunk in chunks
            for name, module in chunk.named_modules()
            if isinstance(module, RMSNorm | LayerNorm)
        ]
        self._groups: dict[torch.nn.Module, dist.ProcessGroup] = {}
        """Who has parts of the sums of a norm."""
        for name, module in norms:
            if self._is_partial(name):
                self._groups[module] = parallel_state.get_tensor_and_context_parallel_group()
            elif layout.cp > 1:
                self._groups[module] = self._of_tokens
        super().__init__(norms, sequence_axis=1, counts=first_tp)

    def _is_partial(self, name: str) -> bool:
        return self._layout.sequence_parallel or (self._layout.tp > 1 and is_norm_of_heads(name, self._config))

    def start(self, on: bool, weights: dict[torch.nn.Parameter, torch.Tensor] | None = None) -> None:
        """Begin a step; with `weights`, gradients are multiplied by them. Raises as `NormLayers.start`."""
        super().start(on)
        self._weights = weights
        self._kept: dict[dist.ProcessGroup, dict[tuple[torch.nn.Parameter, int], torch.Tensor]] = defaultdict(dict)

    def _see(self, module: Any, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        if module in self._groups:
            self._kept[self._groups[module]][param, microbatch] = of_sequences
        else:
            self._add(param, microbatch, of_sequences)

    def _add(self, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        weighted = of_sequences if self._weights is None else of_sequences * self._weights[param]
        super()._add(param, microbatch, weighted)

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """As `NormLayers.collect`; collective over the ranks that have partial sums."""
        for group in dict.fromkeys(self._groups.values()):
            kept = self._kept[group]
            keys = [
                (param, microbatch)
                for param in self.params
                for microbatch in range(num_microbatches)
                if (param, microbatch) in kept
            ]
            if not keys:
                continue
            together = torch.cat([kept[key].flatten() for key in keys])
            dist.all_reduce(together, group=group)
            if self._counts:
                sizes = [kept[key].numel() for key in keys]
                for (param, microbatch), of_sequences in zip(keys, together.split(sizes), strict=True):
                    self._add(param, microbatch, of_sequences.view(micro_batch, -1))
        # Every rank has the gradients of the mean over its own tokens.
        return super().collect(num_microbatches, micro_batch, device) / self._of_tokens.size() ** 2
