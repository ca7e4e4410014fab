"""Gradients of the norm layers' weights for each sequence, from what a backward pass has at hand (Gray et al. 2024,
2411.00999)."""

from collections import defaultdict
from typing import Any

import torch


class NormLayers:
    """Sees every RMSNorm y = w·x̂ of the model; the gradient of w for sequence i is g_i = Σ_t x̂_it · dy_it.

    Tensor parallel ranks see the same, and one of them counts.
    """

    def __init__(self, model: Any, counts: bool) -> None:
        self.names: set[str] = set()
        """Of the weights of the norms."""
        self._on = False
        self._hooks = []
        for name, module in model.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                self.names.add(f"{name}.weight")
                if counts:
                    self._hooks.append(module.register_forward_hook(self._after_forward))

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def start(self, on: bool) -> None:
        """Begin a step. Raises RuntimeError if norm layers are to be measured and there are none."""
        if on and not self.names:
            raise RuntimeError(
                "planner.noise_source(normlayer) measures RMSNorm modules, and this model has none: its norms are of "
                "another kind, or fused into another layer"
            )
        self._on = on
        self._passes: dict[torch.nn.Module, int] = defaultdict(int)
        self._squares: dict[int, list[torch.Tensor]] = defaultdict(list)

    def _after_forward(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not (self._on and output.requires_grad):
            return
        # Under recomputation both passes come here; only the output of the first has a backward pass.
        states = inputs[0].detach()
        output.register_hook(lambda gradient: self._after_backward(module, states, gradient))

    @torch.no_grad()
    def _after_backward(self, module: Any, states: torch.Tensor, gradient: torch.Tensor) -> None:
        """`states` and `gradient` are x and dy, [batch, tokens, hidden]."""
        microbatch = self._passes[module]
        self._passes[module] = microbatch + 1
        rms = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = rms.square_().div_(states.shape[-1]).add_(module.variance_epsilon).rsqrt_()
        of_sequences = (states * scale * gradient).sum(dim=1)
        self._squares[microbatch].append(torch.linalg.vector_norm(of_sequences, dim=1).double().square_())

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """This rank's contribution to Σ|g_i|² of each of its replica's sequences: float64 of shape (num_microbatches ·
        micro_batch,).

        Gradients of each sequence's own mean loss: those seen are divided by the replica's sequences, which is undone.
        """
        sums = torch.zeros(num_microbatches, micro_batch, dtype=torch.float64, device=device)
        for microbatch, squares in self._squares.items():
            sums[microbatch] = torch.stack(squares).sum(dim=0)
        self.start(False)
        return sums.view(-1) * (num_microbatches * micro_batch) ** 2
