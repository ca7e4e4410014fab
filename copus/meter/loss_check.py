"""Is the loss a mean over equally many tokens? The gradients of what the model returns say so, in the first steps."""

from typing import Any

import torch

STEPS = 3
"""Steps that are looked at."""
LARGEST_MEAN = 1.5
"""A mean of cross entropies moves the logits by at most 1 in all, and a loss that is divided by the number of
micro-batches by less; a bit more where replicas have more or fewer tokens than others."""
UNEVEN = 1.1
"""Ratio of the most to the fewest tokens of a micro-batch that is worth a word."""


class LossCheck:
    """Sees the gradients of the logits, or of the losses if the model returns these.

    The gradient of a token's cross entropy sums up to zero over the vocabulary, and its absolute values to 2·(1 − p)
    times the weight of the token, with p the probability of the right one. So half of the sum over all tokens is at
    most the sum of all weights, which a mean has at 1, and tokens that do not count have no gradient.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._steps = 0
        self._weights: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []
        self._hook: Any = module.register_forward_hook(self._after_forward)

    def _after_forward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        returned = _logits(output)
        if returned is not None and returned.requires_grad:
            returned.register_hook(self._see)

    @torch.no_grad()
    def _see(self, gradient: torch.Tensor) -> None:
        if gradient.dim() > 1 and gradient.shape[-1] > 1:
            of_tokens = gradient.abs().sum(dim=-1, dtype=torch.float32)
            total, balance = of_tokens.sum(), gradient.sum(dim=-1, dtype=torch.float32).abs().sum()
            if balance <= 0.01 * total:
                self._weights.append(total / 2)
                self._tokens.append((of_tokens > 0).sum())
                return
        counted = gradient[gradient != 0]
        if len(counted) > 1 or not gradient.dim():
            low, high = counted.aminmax()
            if low == high > 0:  # losses: the gradient of each is its weight
                self._weights.append(gradient.sum(dtype=torch.float32))
                self._tokens.append(torch.tensor(len(counted)))

    def complaints(self, loss_scale: float) -> list[tuple[str, str]]:
        """What is wrong with the loss of the step that is over, as (kind, sentence). `loss_scale` is what a gradient
        scaler multiplied it by."""
        weights = [float(weight) / loss_scale for weight in self._weights]
        tokens = [int(count) for count in self._tokens]
        self._weights, self._tokens = [], []
        self._steps += 1
        if self._steps >= STEPS:
            self.close()
        faults = []
        if weights and max(weights) > LARGEST_MEAN:
            faults.append(
                (
                    "summed loss",
                    "the loss of a micro-batch is not the mean over its tokens: the logits are weighted with "
                    f"{max(weights):.3g} in all, and a mean weights them with 1. It is summed, or scaled (then pass "
                    "grad_scaler): averages over steps of different sizes are wrong then",
                )
            )
        if tokens and min(tokens) * UNEVEN < max(tokens):
            faults.append(
                (
                    "uneven tokens",
                    f"micro-batches count {min(tokens)} to {max(tokens)} tokens: the estimate takes them for equally "
                    "large, and is off by about the variance of their sizes. Pack or bucket sequences",
                )
            )
        return faults

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()


def _logits(output: Any) -> torch.Tensor | None:
    """The tensor that a loss is computed from, in what a model returns."""
    if isinstance(output, torch.Tensor):
        return output
    logits = getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(output, dict):
        logits = output.get("logits")
        return logits if isinstance(logits, torch.Tensor) else None
    if isinstance(output, tuple):
        return next((value for value in output if isinstance(value, torch.Tensor) and value.dim() > 1), None)
    return None
