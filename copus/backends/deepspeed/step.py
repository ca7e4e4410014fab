"""Gradients, update and evaluation of a built DeepSpeed engine."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.adamw import AdamWOptions
from copus.backends.deepspeed.built import BuiltModel
from copus.backends.deepspeed.gradients import MATRICES
from copus.backends.huggingface import mean_loss
from copus.backends.microbatches import Microbatch, evaluation_of, loss_share, read_microbatches
from copus.backends.step_contract import Batches, StepRequest, StepShares
from profiles.configuration import Configuration


def compute_gradients(
    built: BuiltModel, configuration: Configuration, batches: Batches, request: StepRequest
) -> StepShares:
    """Forward, backward and reduction, and what this rank adds to the figures of the step."""
    if built.has_gradients:
        _make_step(built, scale=1.0, skip=True)
    built.has_gradients = True
    engine, part_norms, count = built.engine, built.part_norms, configuration.num_microbatches
    part_norms.start(request.noise_source, configuration)
    losses = []
    for index, sequences in enumerate(_microbatches(built, configuration, batches, request.first_sample)):
        engine.set_gradient_accumulation_boundary(index == count - 1)
        loss = mean_loss(engine, *sequences)
        losses.append(loss.detach())
        part_norms.begin_backward(index)
        engine.backward(loss / count, scale_wrt_gas=False)
    return StepShares(
        loss_share(configuration, losses, built.device, counts=True),
        part_norms.grad_sq_share(),
        part_norms.contribution(built.device),
    )


def update_weights(built: BuiltModel, options: AdamWOptions, scale: float) -> None:
    """Multiply the gradients by `scale`, and update the weights with them."""
    assert built.adam is not None, "it is built"
    for number, group in enumerate(built.adam.param_groups):
        group.update(asdict(options))
        group["weight_decay"] *= number == MATRICES
    _make_step(built, scale)


def _make_step(built: BuiltModel, scale: float, skip: bool = False) -> None:
    """Let DeepSpeed make its step, or all of it but Adam's: with what else it does it forgets the gradients.

    Fused Adam has two settings for mixed precision: it divides the gradients by `grad_scale`, in the pass that it makes
    over them anyway, and leaves everything as it is if `found_inf` is 1.
    """
    adam: Any = built.adam
    if scale == 1 and not skip:
        adam.grad_scale = adam.found_inf = None
    else:
        device = built.optimized[0].device  # the host, if the optimizer is offloaded
        adam.grad_scale = torch.full((), 1 / scale, device=device)
        adam.found_inf = torch.full((), float(skip), device=device)
    built.engine.step()
    built.has_gradients = False


def evaluate(built: BuiltModel, configuration: Configuration, batches: Batches, sequences: int) -> float:
    """Mean loss over the first `sequences` sequences of `batches`, equal on every rank."""
    whole = evaluation_of(configuration, sequences)
    built.engine.eval()
    with torch.no_grad():
        losses = [mean_loss(built.engine, *sequences) for sequences in _microbatches(built, whole, batches, 0)]
    built.engine.train()
    loss = loss_share(whole, losses, built.device, counts=True)
    dist.all_reduce(loss)
    return float(loss)


def _microbatches(
    built: BuiltModel, configuration: Configuration, batches: Batches, first_sample: int
) -> Iterator[Microbatch]:
    """This replica's micro-batches."""
    for sequences in read_microbatches(batches, configuration, first_sample, dist.get_rank()):
        yield sequences.to(built.device)
