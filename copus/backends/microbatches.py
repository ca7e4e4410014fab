"""The micro-batches of a replica: reading them, their share of the loss, and those of an evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from copus.backends.step_contract import Batches
from profiles.configuration import Configuration


def read_microbatches(
    batches: Batches, configuration: Configuration, first_sample: int, replica: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of a replica's micro-batches in the step that begins at `first_sample`, int64 of shape
    (micro_batch, seq_len) each, on the host.

    A thread reads one micro-batch ahead of the step.
    """
    micro_batch, per_replica = configuration.micro_batch, configuration.global_batch // configuration.layout.dp
    first = first_sample + replica * per_replica
    starts = range(first, first + per_replica, micro_batch)
    with ThreadPoolExecutor(1, thread_name_prefix="copus-reader") as reader:
        upcoming = reader.submit(batches, starts[0], micro_batch)
        for following in [*starts[1:], None]:
            tokens, labels = upcoming.result()
            if following is not None:
                upcoming = reader.submit(batches, following, micro_batch)
            yield tokens, labels


def to_device(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for. A copy from pageable memory would wait for all queued work of the GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def loss_share(
    configuration: Configuration, losses: list[torch.Tensor], device: torch.device, *, counts: bool
) -> torch.Tensor:
    """This rank's share of the mean loss over the global batch; of the ranks that have the same losses one `counts`."""
    if not (losses and counts):
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(losses).double().sum() / (len(losses) * configuration.layout.dp)


def evaluation_of(configuration: Configuration, sequences: int) -> Configuration:
    """One pass over so many sequences in the layout of `configuration`, in the largest micro-batch up to its own."""
    whole = configuration.model_copy(update={"global_batch": sequences, "micro_batch": 1})
    for micro_batch in range(configuration.micro_batch, 0, -1):
        count, rest = divmod(sequences, configuration.layout.dp * micro_batch)
        if rest == 0 and (configuration.layout.vp == 1 or count % configuration.layout.pp == 0):
            return whole.model_copy(update={"micro_batch": micro_batch})
    return whole
