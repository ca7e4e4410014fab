"""Checkpoints of copus 0.1.0, which megatron-core wrote: the same format on disk with other names.

There the layers of one kind of weight are one tensor with a leading axis (`decoder.layers.mlp.linear_fc2.weight` of
shape [layers, hidden, ffn]), and the fields of the optimizer begin with `optimizer.state`.
"""

import re

from copus.backends.megatron.local_tensors import MASTER
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.sharded_checkpoint import Chunk, SavedState

_OPTIMIZER = "optimizer.state."
_MASTERS = ("param", "fp32_param")
"""With and without the distributed optimizer."""
_STACKED = re.compile(r"(?<=^decoder\.layers\.)(?=\D)")
"""Where the number of the layer is missing."""


def translate(saved: SavedState) -> SavedState:
    """The fields of a checkpoint under the names of today; one that has these already is left as it is."""
    if not any(field.name.startswith(_OPTIMIZER) for field in saved):
        return saved
    translated: SavedState = {}
    for field, chunks in saved.items():
        name, suffix = field.name, ""
        if name.startswith(_OPTIMIZER):
            statistic, _, name = name.removeprefix(_OPTIMIZER).partition(".")
            suffix = f"/{MASTER if statistic in _MASTERS else statistic}"
        if not _STACKED.search(name):
            translated[Field(name + suffix, field.dtype, field.shape)] = chunks
            continue
        for chunk in chunks:
            (layer, *offset), (_, *shape) = chunk.box.offset, chunk.box.shape  # one layer in each
            one = Field(_STACKED.sub(f"{layer}.", name) + suffix, field.dtype, field.shape[1:])
            part = Chunk(Box(tuple(offset), tuple(shape)), chunk.file, chunk.offset, chunk.length)
            translated.setdefault(one, []).append(part)
    return translated
