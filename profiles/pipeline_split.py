"""How many layers every pipeline stage has, also if they do not divide evenly."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


class PipelineSplit(NamedTuple):
    """Layers of pipeline stages, one entry a pipeline; all that are neither first nor last have as many as `middle`
    says. All three are the model's layers if there is one stage, and 0 if the layers cannot be split in this way."""

    first: Counts
    """Layers of the stage with the embedding."""
    middle: Counts
    """Layers of the fullest of all other stages; with one or two stages those of the first."""
    last: Counts
    """Layers of the stage with the output layer."""

    @property
    def possible(self) -> NDArray[np.bool_]:
        """Whether every stage has a layer."""
        return self.last > 0


def split_layers(layers: int, pp: Any, vp: Any = 1) -> PipelineSplit:
    """The split of a model's layers into pp stages of vp chunks (integers, or arrays of them).

    Even if pp · vp divides the layers. Else the first and the last stage, which also have the embedding and the output
    layer, are left with less than the others: as Llama 3 405B was trained, 126 layers on 16 stages as 7, 14 × 8 and 7
    (2407.21783, section 3.3.2). Interleaved stages can have that only if the embedding and the output layer fill the
    place of one layer each, so that pp · vp divides layers + 2.
    """
    pp, vp = np.asarray(pp, np.int64), np.asarray(vp, np.int64)
    chunks = pp * vp
    fullest = -(-layers // chunks) * vp
    rest = layers - fullest * (pp - 2)  # for the first and the last stage
    even = layers % chunks == 0
    uneven = (pp > 1) & (rest >= 2) & np.where(vp > 1, ((layers + 2) % chunks == 0) & (layers > chunks), True)
    first = np.where(even, layers // pp, np.where(uneven, rest - rest // 2, 0))
    last = np.where(even, layers // pp, np.where(uneven, rest // 2, 0))
    return PipelineSplit(first, np.where((even | uneven) & (pp > 2), fullest, first), last)
