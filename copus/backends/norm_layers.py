"""Gradients of the norm layers' weights for each sequence, from what a backward pass has at hand (Gray et al. 2024,
2411.00999)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def norms_of(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The norms of a model over the last axis of their input, by name: RMSNorm of torch, transformers and others, and
    torch's LayerNorm."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = type(module).__name__.endswith("RMSNorm") or isinstance(module, torch.nn.LayerNorm)
        if is_norm and weight is not None and weight.dim() == 1:
            yield name, module


class NormLayers:
    """Observes norms y = w·x̂ + b (RMSNorm has no b). For sequence i the gradient of w is Σ_t x̂_it · dy_it and that of
    b is Σ_t dy_it. A norm of queries or keys normalises every head, so its sums run over the heads too."""

    def __init__(self, norms: Iterable[tuple[str, torch.nn.Module]], sequence_axis: int, counts: bool) -> None:
        """`sequence_axis` is the axis of a norm's input that counts the sequences of a micro-batch. Of the ranks that
        see the same norms one `counts`."""
        self.names: set[str] = set()
        """Of their weights and biases."""
        self.params: list[torch.nn.Parameter] = []
        """These themselves."""
        self._sequence_axis = sequence_axis
        self._on = False
        self._hooks = []
        for name, module in norms:
            for kind, param in module.named_parameters():
                self.names.add(f"{name}.{kind}")
                self.params.append(param)
            if counts or self._is_partial(name):
                self._hooks.append(module.register_forward_hook(self._after_forward))

    def _is_partial(self, name: str) -> bool:
        """Whether every rank has sums of its own over this norm's tokens or heads, so that all of them count."""
        return False

    def close(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def start(self, on: bool) -> None:
        """Begin a step. Raises RuntimeError if norm layers are to be measured and there are none."""
        if on and not self.params:
            raise RuntimeError(
                "planner.noise_source(normlayer) measures modules RMSNorm and LayerNorm, and this model has none: "
                "its norms are of another kind, or fused into another layer"
            )
        self._on = on
        self._passes: dict[torch.nn.Module, int] = defaultdict(int)
        self._squares: dict[int, torch.Tensor] = {}

    def _after_forward(self, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not (self._on and output.requires_grad):  # evaluation, or the first pass of a recomputed layer
            return
        # Where both passes of a recomputed layer come here, only the output of the second has a backward pass.
        states = inputs[0].detach()
        output.register_hook(lambda gradient: self._after_backward(module, states, gradient))

    @torch.no_grad()
    def _after_backward(self, module: Any, states: torch.Tensor, gradient: torch.Tensor) -> None:
        """`states` and `gradient` are x and dy: the width of the norm is the last axis."""
        microbatch = self._passes[module]
        self._passes[module] = microbatch + 1
        summed = [axis for axis in range(states.dim() - 1) if axis != self._sequence_axis]
        bias = getattr(module, "bias", None)
        if bias is not None or isinstance(module, torch.nn.LayerNorm):
            states = states - states.mean(dim=-1, keepdim=True, dtype=torch.float32)
        if bias is not None:
            self._see(module, bias, microbatch, gradient.sum(dim=summed, dtype=torch.float32))
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        if epsilon is None:  # torch's RMSNorm, unless it was told
            epsilon = torch.finfo(states.dtype).eps
        root = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = root.square_().div_(states.shape[-1]).add_(epsilon).rsqrt_()
        self._see(module, module.weight, microbatch, (states * scale).mul_(gradient).sum(dim=summed))

    def _see(self, module: Any, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        """Take the gradients of a parameter of a norm for the sequences of a micro-batch, of shape (sequences, …)."""
        self._add(param, microbatch, of_sequences)

    def _add(self, param: torch.nn.Parameter, microbatch: int, of_sequences: torch.Tensor) -> None:
        squares = torch.linalg.vector_norm(of_sequences, dim=1).double().square_()
        total = self._squares.get(microbatch)
        self._squares[microbatch] = squares if total is None else total + squares

    @torch.no_grad()
    def collect(self, num_microbatches: int, micro_batch: int, device: torch.device) -> torch.Tensor:
        """This rank's contribution to Σ|g_i|² of each of its replica's sequences: float64 of shape (num_microbatches ·
        micro_batch,).

        The gradients are those of each sequence's own mean loss; in a step that is divided by the replica's sequences,
        which is undone here. Zeros if the step was another one than it was said to be.
        """
        sums = torch.zeros(num_microbatches, micro_batch, dtype=torch.float64, device=device)
        if all(microbatch < num_microbatches for microbatch in self._squares) and (
            {len(squares) for squares in self._squares.values()} == {micro_batch}
        ):
            for microbatch, squares in self._squares.items():
                sums[microbatch] = squares
        self.start(False)
        return sums.view(-1) * (num_microbatches * micro_batch) ** 2
