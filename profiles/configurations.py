"""Many configurations at once: what the cost and the memory model work on."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from profiles.configuration import Configuration
from profiles.layout import Layout

RECOMPUTE: tuple[str, ...] = get_args(Layout.model_fields["recompute"].annotation)
"""Meaning of `Configurations.recompute`: none, selective, full."""


@dataclass(frozen=True)
class Configurations:
    """One array per quantity, all of length N; units and meaning as in `Layout` and `Configuration`."""

    tp: NDArray[np.int64]
    """Tensor parallel degrees."""
    pp: NDArray[np.int64]
    """Pipeline parallel degrees."""
    vp: NDArray[np.int64]
    """Model chunks per pipeline stage."""
    cp: NDArray[np.int64]
    """Context parallel degrees."""
    ep: NDArray[np.int64]
    """Expert parallel degrees."""
    expert_tp: NDArray[np.int64]
    """Tensor parallel degrees of the experts."""
    dp: NDArray[np.int64]
    """Data parallel degrees."""
    sequence_parallel: NDArray[np.bool_]
    """Whether activations outside of matrix products are split over the tensor parallel ranks."""
    recompute: NDArray[np.int64]
    """Index into `RECOMPUTE`."""
    zero: NDArray[np.int64]
    """ZeRO stages."""
    dp_replicate: NDArray[np.int64]
    """Copies of what ZeRO shares out."""
    offload_optimizer: NDArray[np.bool_]
    """Whether the optimizer state and the reduced gradients lie in the host's memory."""
    micro_batch: NDArray[np.int64]
    """Sequences in one forward-backward pass of one replica."""
    global_batch: NDArray[np.int64]
    """Sequences in one optimizer step."""

    @classmethod
    def of(cls, configurations: Iterable[Configuration]) -> "Configurations":
        """The arrays of some configurations, in their order."""
        rows = [
            (
                *(c.layout.tp, c.layout.pp, c.layout.vp, c.layout.cp),
                *(c.layout.ep, c.layout.expert_tp, c.layout.dp),
                *(c.layout.sequence_parallel, RECOMPUTE.index(c.layout.recompute)),
                *(c.layout.zero, c.layout.dp_replicate, c.layout.offload_optimizer, c.micro_batch, c.global_batch),
            )
            for c in configurations
        ]
        columns = np.array(rows, dtype=np.int64).reshape(len(rows), len(fields(cls))).T
        values: dict[str, Any] = dict(zip((field.name for field in fields(cls)), columns, strict=True))
        for name in ("sequence_parallel", "offload_optimizer"):
            values[name] = values[name].astype(np.bool_)
        return cls(**values)

    def __len__(self) -> int:
        return len(self.tp)

    def __getitem__(self, index: int) -> Configuration:
        """One of them, as the model that validates."""
        degrees: dict[str, Any] = {
            name: int(getattr(self, name)[index])
            for name in ("tp", "pp", "vp", "cp", "ep", "dp", "zero", "dp_replicate")
        }
        layout = Layout(
            **degrees,
            etp=int(self.expert_tp[index]),
            sequence_parallel=bool(self.sequence_parallel[index]),
            recompute=RECOMPUTE[self.recompute[index]],
            offload_optimizer=bool(self.offload_optimizer[index]),
        )
        return Configuration(
            layout=layout, micro_batch=int(self.micro_batch[index]), global_batch=int(self.global_batch[index])
        )

    def take(self, where: NDArray[np.bool_] | NDArray[np.int64]) -> "Configurations":
        """The configurations at the given places (a mask or indices)."""
        return Configurations(**{field.name: getattr(self, field.name)[where] for field in fields(self)})

    @property
    def num_microbatches(self) -> NDArray[np.int64]:
        """Micro-batches that each replica runs in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def accelerators(self) -> NDArray[np.int64]:
        """Ranks that each takes."""
        return self.tp * self.pp * self.cp * self.dp
