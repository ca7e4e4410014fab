"""Gradients, update and evaluation of a built FSDP model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from copus.backends.fsdp.built import BuiltModel
from copus.backends.fsdp.part_norms import grad_sq_share
from copus.backends.huggingface import mean_loss
from copus.backends.microbatches import Microbatch, evaluation_of, loss_share, read_microbatches
from copus.backends.step_contract import Batches, StepRequest, StepShares
from profiles.configuration import Configuration


def compute_gradients(
    built: BuiltModel, configuration: Configuration, batches: Batches, request: StepRequest
) -> StepShares:
    """Forward, backward and reduction, and what this rank adds to the figures of the step."""
    for sharded in (*built.parameters, *built.empty):
        sharded.parameter.grad = None
    count = configuration.num_microbatches
    built.part_norms.start(request.noise_source, configuration)
    losses = []
    for index, sequences in enumerate(_microbatches(built, configuration, batches, request.first_sample)):
        _communicate(built, is_last=index == count - 1)
        with _split_loss(built):
            loss = _loss(built, sequences)
            built.part_norms.begin_backward(index)
            (loss / count).backward()
        losses.append(loss.detach())
    grad_sq = built.backward_updates.finish() if built.backward_updates is not None else None
    if grad_sq is None:
        grad_sq = grad_sq_share(built)
    return StepShares(_loss_share(built, configuration, losses), grad_sq, built.part_norms.contribution(built.device))


def _communicate(built: BuiltModel, is_last: bool) -> None:
    """What is exchanged in the backward pass of a micro-batch.

    ZeRO-0 and 1 reduce gradients once a step, 2 and 3 in every micro-batch; 1 and 2 keep gathered weights for the whole
    step. Copies of the state (HSDP) always add up their gradients once.
    """
    model, zero = built.model, built.layout.zero
    model.set_requires_gradient_sync(is_last or zero >= 2)
    model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or zero == 3)
    model.set_is_last_backward(is_last)


def update_weights(built: BuiltModel, options: dict[str, Any], scale: float) -> None:
    """Multiply the gradients by `scale`, and update the weights with them."""
    optimizer = built.optimizer
    assert optimizer is not None, "it is built"
    updated = (*built.parameters, *built.empty)
    gradients = [sharded.gradient for sharded in updated]
    if scale != 1:
        torch._foreach_mul_(gradients, scale)
    for sharded, gradient in zip(updated, gradients, strict=True):
        sharded.main.grad = gradient
    built.set_options(options)
    optimizer.step()
    for sharded in updated:
        sharded.parameter.grad = sharded.main.grad = None


def evaluate(built: BuiltModel, configuration: Configuration, batches: Batches, sequences: int) -> float:
    """Mean loss over the first `sequences` sequences of `batches`, equal on every rank."""
    whole = evaluation_of(configuration, sequences)
    built.model.eval()
    with torch.no_grad(), _split_loss(built):
        losses = [_loss(built, sequences) for sequences in _microbatches(built, whole, batches, 0)]
    built.model.train()
    for module in built.fsdp_modules:  # without a backward pass they would stay gathered, and become stale
        module.reshard()
    loss = _loss_share(built, whole, losses)
    dist.all_reduce(loss)
    return float(loss)


def _microbatches(
    built: BuiltModel, configuration: Configuration, batches: Batches, first_sample: int
) -> Iterator[Microbatch]:
    """This replica's micro-batches."""
    for sequences in read_microbatches(batches, configuration, first_sample, built.dp_rank):
        yield sequences.to(built.device)


def _split_loss(built: BuiltModel) -> contextlib.AbstractContextManager[None]:
    """Lets the loss read logits that are split over the vocabulary, and never gather them."""
    return loss_parallel() if built.layout.tp > 1 else contextlib.nullcontext()


def _loss(built: BuiltModel, sequences: Microbatch) -> torch.Tensor:
    loss = mean_loss(built.model, *sequences)
    return loss.to_local() if isinstance(loss, DTensor) else loss


def _loss_share(built: BuiltModel, configuration: Configuration, losses: list[torch.Tensor]) -> torch.Tensor:
    return loss_share(configuration, losses, built.device, counts=built.tp_rank == 0)
