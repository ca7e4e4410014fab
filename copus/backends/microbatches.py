"""The micro-batches of a replica: reading them, their share of the loss, and those of an evaluation."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from copus.backends.step_contract import Batches
from profiles.configuration import Configuration


class Microbatch(NamedTuple):
    """Sequences that go through the model together."""

    tokens: torch.Tensor
    """int64 of shape (micro_batch, seq_len)."""
    labels: torch.Tensor
    """The tokens one ahead, NOT_COUNTED for those whose loss does not count."""
    positions: torch.Tensor | None = None
    """Positions of the tokens; None for 0, 1, 2 and so on."""
    documents: torch.Tensor | None = None
    """Numbers of the documents that tokens attend within, rising along a sequence; None for one. Given if `positions`
    are."""

    def to(self, device: torch.device) -> "Microbatch":
        """A copy on a device, which the host does not wait for."""
        return Microbatch(*(None if tensor is None else to_device(device, tensor) for tensor in self))  # type: ignore[arg-type]


def hidden_scores(documents: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """True for the scores that attention within documents leaves out, those of later tokens and of other documents:
    bool of shape (micro_batch, 1, seq_len, seq_len), or some `rows` of it, given by number. `documents` are those of a
    `Microbatch`."""
    others = documents[:, None, rows, None] != documents[:, None, None, :]
    return others | _later(documents.shape[1], documents.device)[rows]


@functools.lru_cache(maxsize=2)
def _later(tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


def read_microbatches(
    batches: Batches, configuration: Configuration, first_sample: int, replica: int
) -> Iterator[Microbatch]:
    """A replica's micro-batches in the step that begins at `first_sample`, on the host.

    A thread reads one micro-batch ahead of the step.
    """
    micro_batch, per_replica = configuration.micro_batch, configuration.global_batch // configuration.layout.dp
    first = first_sample + replica * per_replica
    starts = range(first, first + per_replica, micro_batch)
    with ThreadPoolExecutor(1, thread_name_prefix="copus-reader") as reader:
        upcoming = reader.submit(batches, starts[0], micro_batch)
        for following in [*starts[1:], None]:
            sequences = Microbatch(*upcoming.result())
            if following is not None:
                upcoming = reader.submit(batches, following, micro_batch)
            yield sequences


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
