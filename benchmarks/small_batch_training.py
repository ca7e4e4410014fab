"""Trains cells of `benchmarks.small_batch` in this process, with the updates that jobs make: runs that differ in seed
and learning rate alone train together."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from benchmarks.small_batch_model import Weights, stacked_losses, stacked_weights
from copus.backends.optimizers.by_region import ParameterStep
from copus.backends.optimizers.updates import UPDATES
from copus.backends.regions import HeldWeight, Region
from copus.data.prepared import prepared_path
from copus.data.samples import SampleReader
from copus.job import JobConfig
from copus.learning_rate import base_lr
from copus.optimizers import Optimizer
from copus.reshard.boxes import Box
from copus.reshard.table import Field

DIVERGED = 20.0
"""Nats a token after which a run is given up."""


def train(job: JobConfig, optimizer: Optimizer, batch: int, runs: Sequence[tuple[float, int]]) -> list[float]:
    """Held-out losses in nats per token after all tokens of the job, one for each pair of peak learning rate and seed;
    infinite where training diverged."""
    torch.set_num_threads(1)
    seq_len, count = job.model.seq_len, job.total_samples
    prepared = prepared_path(job)
    rates, seeds = zip(*runs, strict=True)
    streams = [_sequences(prepared, "train", seq_len, count, seed) for seed in seeds]
    tokens, labels = (torch.stack(side) for side in zip(*streams, strict=True))
    weights = {name: weight.requires_grad_() for name, weight in stacked_weights(job.model, seeds).items()}
    update = StackedUpdate(optimizer, weights, torch.tensor(rates))
    kappa = batch / job.reference_batch
    diverged = torch.zeros(len(runs), dtype=torch.bool)
    for first in range(0, count // batch * batch, batch):
        part = slice(first, first + batch)
        losses = stacked_losses(job.model, weights, tokens[:, part], labels[:, part])
        losses.sum().backward()  # no run's gradient depends on another one's
        diverged |= ~(losses.detach() < DIVERGED)
        if diverged.all():
            break
        update.step(base_lr(job, first * seq_len), kappa)
    valid = _sequences(prepared, "valid", seq_len, job.training.evaluate_sequences, 0)
    with torch.no_grad():
        held_out = (side.expand(len(runs), -1, -1) for side in valid)
        losses = stacked_losses(job.model, weights, *held_out)
    return torch.where(diverged | ~(losses < DIVERGED), math.inf, losses).tolist()


class StackedUpdate:
    """The update of an optimizer (`copus.backends.optimizers`) for stacked weights, without weight decay."""

    def __init__(self, optimizer: Optimizer, weights: Weights, rates: torch.Tensor) -> None:
        assert optimizer.weight_decay == 0
        self._optimizer, self._rates = optimizer, rates
        self._steps, self._beta2_product = 0, 1.0
        self._weights = list(weights.values())
        self._held = [whole_weight(name, weight[0]) for name, weight in weights.items()]
        self._state = [
            {name: torch.zeros(len(rates), *shape) for name, shape in held.statistic_shapes(optimizer).items()}
            for held in self._held
        ]

    @torch.no_grad()
    def step(self, factor: float, kappa: float) -> None:
        """Make a step from the gradients that are there, which are used up, with `factor` times every run's peak
        learning rate. An update is proportional to its learning rate: it is made with 1 on zeros, then scaled."""
        betas = self._optimizer.betas_at(kappa)
        options = {"lr": 1.0, "betas": betas, "weight_decay": 0.0, "steps": self._steps}
        options["correction"] = 1 - self._beta2_product * betas[1]
        for weight, held, state in zip(self._weights, self._held, self._state, strict=True):
            change, gradient = torch.zeros_like(weight), weight.grad
            assert gradient is not None, "the backward pass comes first"
            weight.grad = None

            def update(change: torch.Tensor, gradient: torch.Tensor, state: Weights, held: HeldWeight = held) -> None:
                UPDATES[self._optimizer.kind](ParameterStep(change, gradient, state, held, self._optimizer, options))

            if self._optimizer.elementwise:
                update(change, gradient, state)
            else:
                torch.func.vmap(update, out_dims=None)(change, gradient, state)
            rates = (factor * self._rates).view(-1, *[1] * (weight.dim() - 1))
            weight.addcmul_(change, rates)
        self._steps += 1
        self._beta2_product *= betas[1]


@functools.lru_cache(maxsize=8)
def _sequences(
    prepared: Path, side: Literal["train", "valid"], seq_len: int, sequences: int, seed: int
) -> tuple[torch.Tensor, ...]:
    """Tokens and labels: shape (sequences, seq_len)."""
    return SampleReader(prepared, side, seq_len, sequences, seed).batch(0, sequences)


def whole_weight(name: str, weight: torch.Tensor) -> HeldWeight:
    """A weight that one rank has all of."""
    shape = tuple(weight.shape)
    return HeldWeight(shape, (Region(Box.whole(shape), Field(name, "float32", shape), (0,) * len(shape)),))
