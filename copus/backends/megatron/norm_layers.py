"""Per-sequence gradients of the norm layers' weights, computed in the backward pass (Gray et al. 2024, 2411.00999)."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.modules import RMSNorm
from profiles.layout import Layout

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402


class NormLayers:
    """Observes every RMSNorm y = w·x̂ of this rank; the gradient of w for sequence i is g_i = Σ_t x̂_it · dy_it.

    With sequence parallelism a rank has some of the tokens, so its g_i are partial sums. They are kept (one vector of
    `hidden` per norm and sequence) and summed over the ranks before they are squared. Otherwise all tensor-parallel
    ranks have the same g_i, and those of rank 0 count.
    """

    def __init__(self, chunks: list[Any], layout: Layout) -> None:
        self._sequence_parallel = layout.sequence_parallel
        self._counts = parallel_state.get_tensor_model_parallel_rank() == 0
        self._weights: dict[torch.nn.Parameter, torch.Tensor] | None = None
        self._on = False
        self.params: list[torch.nn.Parameter] = []
        """The weights of the norms."""
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, RMSNorm):
                    self.params.append(module.weight)
                    if self._counts or self._sequence_parallel:
                        module.register_forward_hook(self._after_forward)

    def start(self, on: bool, weights: dict[torch.nn.Parameter, torch.Tensor] | None) -> None:
        """Begin a step; with `weights`, gradients are multiplied by them."""
        if on and not self.params:
            raise RuntimeError(
                "planner.noise_source(normlayer) measures RMSNorm modules, and this model has none: its norms are of "
                "another kind, or fused into another layer"
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
        """`states` and `gradient` are x and dy, [s, b, h]."""
        pass_number = self._passes[module]
        self._passes[module] = pass_number + 1
        rms = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (rms.square_().div_(states.shape[-1]).add_(module.eps)).rsqrt_()
        of_sequences = (states * scale * gradient).sum(dim=0)
        if self._sequence_parallel:
            self._kept[module.weight, pass_number] = of_sequences
        else:
            self._add(module.weight, pass_number, of_sequences)

    def _add(self, weight: torch.nn.Parameter, pass_number: int, of_sequences: torch.Tensor) -> None:
        if self._weights is not None:
            of_sequences = of_sequences * self._weights[weight]
        squares = torch.linalg.vector_norm(of_sequences, dim=1).double().square_()
        total = self._squares.get(pass_number)
        self._squares[pass_number] = squares if total is None else total + squares

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """This rank's summands of |g_i|², for every sequence of its replica: float64 of shape (num_microbatches ·
        micro_batch,).

        g_i is the gradient of the sequence's own mean loss; Megatron divides it by the replica's sequences, which is
        undone here. Collective over tensor-parallel ranks with sequence parallelism.
        """
        if self._kept:
            keys = [(weight, pass_number) for weight in self.params for pass_number in range(num_microbatches)]
            together = torch.stack([self._kept[key] for key in keys])
            dist.all_reduce(together, group=parallel_state.get_tensor_model_parallel_group())
            if self._counts:
                for (weight, pass_number), of_sequences in zip(keys, together, strict=True):
                    self._add(weight, pass_number, of_sequences)
        sums = torch.zeros(num_microbatches, micro_batch, dtype=torch.float64, device=device)
        for pass_number, squares in self._squares.items():
            sums[pass_number] += squares
        self.start(False, None)
        return sums.view(-1) * (num_microbatches * micro_batch) ** 2
