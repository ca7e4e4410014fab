"""Gradients, update and evaluation of a built Megatron model."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.attention import own_pieces
from copus.backends.megatron.built import BuiltModel
from copus.backends.megatron.groups import replica_number
from copus.backends.megatron.local_tensors import unwrap
from copus.backends.megatron.upstream import inner_optimizers
from copus.backends.megatron.versions import main_grads
from copus.backends.microbatches import Microbatch, evaluation_of, hidden_scores, loss_share, read_microbatches
from copus.backends.squared_norms import norms, sum_of_squares
from copus.backends.step_contract import NOT_COUNTED, Batches, StepRequest, StepShares
from profiles.configuration import Configuration

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402


def compute_gradients(
    built: BuiltModel, configuration: Configuration, batches: Batches, request: StepRequest, optimizer_steps: int
) -> StepShares:
    """Run the forward and backward passes, reduce the gradients, and return this rank's shares of the step's figures.
    `optimizer_steps` is the number of steps before this one."""
    optimizer, part_norms, expert_tokens = built.optimizer, built.part_norms, built.expert_tokens
    assert part_norms is not None, "it is built"
    assert expert_tokens is not None, "it is built"
    for chunk in built.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    part_norms.start(request.noise_source, configuration, 1 - request.rules.beta2_product_before(optimizer_steps))
    expert_tokens.start()
    losses = _run_microbatches(built, configuration, batches, request.first_sample, forward_only=False)
    optimizer.prepare_grads()
    return StepShares(
        _loss_share(built, configuration, losses),
        local_grad_sq(built, configuration),
        part_norms.contribution(built.device),
        expert_tokens.contribution(built.device),
    )


def update_weights(built: BuiltModel, options: dict[str, Any], scale: float) -> None:
    """Multiply the gradients by `scale` and update the weights."""
    _scale_gradients(built.optimizer, scale)
    _set_options(built.optimizer, options)
    built.optimizer.step_with_ready_grads()
    assert built.expert_tokens is not None, "it is built"
    built.expert_tokens.update_biases()


def evaluate(built: BuiltModel, configuration: Configuration, batches: Batches, sequences: int) -> float:
    """Mean loss over the first `sequences` sequences of `batches`, equal on every rank."""
    whole = evaluation_of(configuration, sequences)
    for chunk in built.chunks:
        chunk.eval()
    with torch.no_grad():
        losses = _run_microbatches(built, whole, batches, 0, forward_only=True)
    for chunk in built.chunks:
        chunk.train()
    loss = _loss_share(built, whole, losses)
    dist.all_reduce(loss)
    return float(loss)


def _run_microbatches(
    built: BuiltModel, configuration: Configuration, batches: Batches, first_sample: int, forward_only: bool
) -> list[torch.Tensor]:
    """Run this replica's micro-batches and return their losses, on the last pipeline stage only."""
    chunks = built.chunks
    reads_all = built.separates_documents
    data = [
        _microbatches(unwrap(chunk), built.device, batches, configuration, first_sample, reads_all) for chunk in chunks
    ]

    run = get_forward_backward_func()
    outputs = run(
        forward_step_func=_forward_step,
        data_iterator=data if len(chunks) > 1 else data[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=configuration.num_microbatches,
        seq_length=unwrap(chunks[0]).max_sequence_length,
        micro_batch_size=configuration.micro_batch,
        forward_only=forward_only,
    )
    return [output["loss"] for output in outputs]


def _microbatches(
    model: Any, device: torch.device, batches: Batches, configuration: Configuration, first_sample: int, reads_all: bool
) -> Iterator[Microbatch | None]:
    """Micro-batches for the chunks with the embedding and with the output layer. The others read nothing, unless
    attention and positions go by the documents."""
    if not (model.pre_process or model.post_process or reads_all):
        yield from [None] * configuration.num_microbatches
        return
    replica = parallel_state.get_data_parallel_rank()
    for sequences in read_microbatches(batches, configuration, first_sample, replica):
        yield sequences.to(device)


def _forward_step(microbatches: Iterator[Microbatch | None], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's schedules call this for every micro-batch: the output, and a function that computes the loss."""
    sequences = next(microbatches)
    if sequences is None:
        return model(None, None, None), _mean_loss
    positions = sequences.positions
    order = torch.arange(sequences.tokens.shape[1], device=sequences.tokens.device).expand_as(sequences.tokens)
    if positions is None:  # learned positions are looked up by number; rotary ones need no tensor
        positions = order
    documents, hidden = sequences.documents, None
    if documents is not None:
        hidden = hidden_scores(documents, rows=own_pieces(order)[0])
    tokens, positions, labels = (own_pieces(whole) for whole in (sequences.tokens, positions, sequences.labels))
    if not unwrap(model).post_process:
        return model(tokens, positions, hidden), _mean_loss
    losses = model(tokens, positions, hidden, labels=labels.clamp(min=0))
    return losses, functools.partial(_mean_loss, counted=labels != NOT_COUNTED)


def _mean_loss(
    token_losses: torch.Tensor, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's share of the mean over all tokens of the sequences; the loss of those that do not count is 0.

    With context parallelism shares add up. megatron multiplies the loss by cp (schedules.py:268), and divides sums of
    gradients by the ranks that they are added up over, dp · cp.
    """
    losses = token_losses.float()
    loss = (losses if counted is None else losses * counted).mean() / parallel_state.get_context_parallel_world_size()
    return loss, {"loss": loss.detach().clone()}  # megatron divides `loss` in place by the number of micro-batches


def local_grad_sq(built: BuiltModel, configuration: Configuration) -> torch.Tensor:
    """This rank's share of |g|², in which every gradient counts once over all ranks.

    With the distributed optimizer every rank has its own shard. Without it all data and context parallel ranks
    have the same gradients, and those of the first count; of an expert's gradients those of the first rank that has it.
    """
    gradients: list[torch.Tensor] = []
    for wrapper in built.optimizer.chained_optimizers:
        of_experts = any(group["is_expert_parallel"] for group in wrapper.param_groups)
        if configuration.layout.zero or replica_number(of_experts) == 0:
            gradients += main_grads(wrapper)
    return sum_of_squares(norms(gradients), built.device)


def _loss_share(built: BuiltModel, configuration: Configuration, losses: list[torch.Tensor]) -> torch.Tensor:
    """This rank's share of the mean loss. Only the last stage has losses, the same on all its tensor-parallel ranks."""
    counts = parallel_state.get_tensor_model_parallel_rank() == 0
    return loss_share(configuration, losses, built.device, counts=counts)


def _scale_gradients(optimizer: Any, scale: float) -> None:
    if scale == 1:
        return
    for inner in inner_optimizers(optimizer):
        gradients = [param.grad for group in inner.param_groups for param in group["params"] if param.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale)


def _set_options(optimizer: Any, options: dict[str, Any]) -> None:
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            group.update(options)
            group["weight_decay"] *= group.get("wd_mult", 1.0)  # megatron's: 0 for norms
