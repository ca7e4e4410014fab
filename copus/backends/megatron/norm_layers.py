"""Per-sequence gradients of the norm layers' weights, computed in the backward pass (Gray et al. 2024, 2411.00999)."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.modules import LayerNorm, RMSNorm, is_norm_of_heads
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402


class NormLayers:
    """Observes every norm y = w·x̂ + b of this rank (RMSNorm has no b). For sequence i the gradient of w is
    Σ_t x̂_it · dy_it and that of b is Σ_t dy_it. A norm of queries or keys normalises every head, so its sums run over
    the heads too.

    With sequence parallelism a rank has some of the tokens, and with tensor parallelism the norms of queries and keys
    have some of the heads, so the sums are partial. They are kept (one vector per parameter and sequence) and summed
    over the ranks before they are squared. Otherwise all tensor-parallel ranks have the same sums, and those of rank 0
    count.
    """

    def __init__(self, chunks: list[Any], layout: Layout) -> None:
        self._counts = parallel_state.get_tensor_model_parallel_rank() == 0
        self._partial: set[torch.nn.Module] = set()
        """Norms of which this rank sees a part."""
        self._weights: dict[torch.nn.Parameter, torch.Tensor] | None = None
        self._on = False
        self.params: list[torch.nn.Parameter] = []
        """The weights and biases of the norms."""
        for chunk in chunks:
            for name, module in chunk.named_modules():
                if not isinstance(module, RMSNorm | LayerNorm):
                    continue
                self.params += module.parameters()
                if layout.sequence_parallel or (layout.tp > 1 and is_norm_of_heads(name)):
                    self._partial.add(module)
                if self._counts or module in self._partial:
                    module.register_forward_hook(self._after_forward)

    def start(self, on: bool, weights: dict[torch.nn.Parameter, torch.Tensor] | None) -> None:
        """Begin a step; with `weights`, gradients are multiplied by them."""
        if on and not self.params:
            raise RuntimeError(
                "planner.noise_source(normlayer) measures the modules RMSNorm and LayerNorm of "
                "copus/backends/megatron/modules.py, and this model has none: its norms are of another kind, or fused "
                "into another layer"
            )
        self._on = on
        self._weights = weights
        self._passes: dict[torch.nn.Module, int] = defaultdict(int)
        self._squares: dict[int, torch.Tensor] = {}
        self._kept: dict[tuple[torch.nn.Parameter, int], torch.Tensor] = {}

    def _after_forward(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not (self._on and output.requires_grad):  # evaluation, or the first pass of a recomputed layer
            return
        states = inputs[0].detach()
        output.register_hook(lambda gradient: self._after_backward(module, states, gradient))

    @torch.no_grad()
    def _after_backward(self, module: Any, states: torch.Tensor, gradient: torch.Tensor) -> None:
        """`states` and `gradient` are x and dy: [s, b, h], or [s, b, heads, width]."""
        pass_number = self._passes[module]
        self._passes[module] = pass_number + 1
        tokens = [dimension for dimension in range(states.dim() - 1) if dimension != 1]
        if isinstance(module, LayerNorm):
            states = states - states.mean(dim=-1, keepdim=True, dtype=torch.float32)
            self._see(module, module.bias, pass_number, gradient.sum(dim=tokens, dtype=torch.float32))
        root = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (root.square_().div_(states.shape[-1]).add_(module.eps)).rsqrt_()
        self._see(module, module.weight, pass_number, (states * scale * gradient).sum(dim=tokens))

    def _see(self, module: Any, param: torch.nn.Parameter, pass_number: int, of_sequences: torch.Tensor) -> None:
        if module in self._partial:
            self._kept[param, pass_number] = of_sequences
        else:
            self._add(param, pass_number, of_sequences)

    def _add(self, param: torch.nn.Parameter, pass_number: int, of_sequences: torch.Tensor) -> None:
        if self._weights is not None:
            of_sequences = of_sequences * self._weights[param]
        squares = torch.linalg.vector_norm(of_sequences, dim=1).double().square_()
        total = self._squares.get(pass_number)
        self._squares[pass_number] = squares if total is None else total + squares

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """This rank's summands of |g_i|², for every sequence of its replica: float64 of shape (num_microbatches ·
        micro_batch,).

        The gradients are those of the sequence's own mean loss; Megatron divides it by the replica's sequences, which
        is undone here. Collective over tensor-parallel ranks if they have partial sums.
        """
        if self._kept:
            keys = [
                (param, pass_number)
                for param in self.params
                for pass_number in range(num_microbatches)
                if (param, pass_number) in self._kept
            ]
            together = torch.cat([self._kept[key].flatten() for key in keys])
            dist.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
            if self._counts:
                sizes = [self._kept[key].numel() for key in keys]
                for (param, pass_number), of_sequences in zip(keys, together.split(sizes), strict=True):
                    self._add(param, pass_number, of_sequences.view(micro_batch, -1))
        sums = torch.zeros(num_microbatches, micro_batch, dtype=torch.float64, device=device)
        for pass_number, squares in self._squares.items():
            sums[pass_number] += squares
        self.start(False, None)
        return sums.view(-1) * (num_microbatches * micro_batch) ** 2
