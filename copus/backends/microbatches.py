"""Reading the micro-batches of a step, and the configuration of an evaluation."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from copus.backends.step_contract import Batches
from profiles.configuration import Configuration


def read_microbatches(
    batches: Batches, starts: range, micro_batch: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of the micro-batches that begin at `starts`, int64 of shape (micro_batch, seq_len) each.

    A thread reads one micro-batch ahead of the step.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="copus-reader") as reader:
        upcoming = reader.submit(batches, starts[0], micro_batch)
        for following in [*starts[1:], None]:
            tokens, labels = upcoming.result()
            if following is not None:
                upcoming = reader.submit(batches, following, micro_batch)
            yield to_device(device, tokens), to_device(device, labels)


def to_device(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for: from pageable memory it would, for all that the GPU has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def evaluation_of(configuration: Configuration, sequences: int) -> Configuration:
    """One pass over so many sequences in the layout of `configuration`, in the largest micro-batch up to its own."""
    whole = configuration.model_copy(update={"global_batch": sequences, "micro_batch": 1})
    for micro_batch in range(configuration.micro_batch, 0, -1):
        count, rest = divmod(sequences, configuration.layout.dp * micro_batch)
        if rest == 0 and (configuration.layout.vp == 1 or count % configuration.layout.pp == 0):
            return whole.model_copy(update={"micro_batch": micro_batch})
    return whole
