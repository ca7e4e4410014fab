"""Checkpoints that earlier versions wrote: the same format on disk, under Megatron's names.

In those of 0.1.0, which megatron-core wrote, the layers of one kind of weight are one tensor with a leading axis
(`decoder.layers.mlp.linear_fc2.weight` of shape [layers, hidden, ffn]), and the fields of the optimizer begin with
`optimizer.state`. Later ones have a tensor for each layer, and Megatron's fused projections in it.
"""

import re

from copus.checkpoints.sharded import SavedState
from copus.reshard.boxes import Box
from copus.reshard.table import MASTER, Field
from copus.weights.megatron_names import hugging_face_parts
from profiles.model_shape import ModelShape

_OPTIMIZER = "optimizer.state."
_MASTERS = ("param", "fp32_param")
"""With and without the distributed optimizer."""
_STACKED = re.compile(r"(?<=^decoder\.layers\.)(?=\D)")
"""Where the number of the layer is missing."""


def translate(saved: SavedState, model: ModelShape) -> SavedState:
    """The fields of a checkpoint under the names of today; one that has these already is left as it is."""
    translated: SavedState = {}
    for field, chunks in _unstacked(saved).items():
        weight, slash, suffix = field.name.partition("/")
        for chunk in chunks:
            for part in hugging_face_parts(weight, field.shape, chunk.box, model):
                moved = [new - old for new, old in zip(part.offset, part.box.offset, strict=True)]
                cut = chunk._replace(box=part.box.shifted(moved), stored=chunk.stored.shifted(moved))
                translated.setdefault(Field(part.name + slash + suffix, field.dtype, part.shape), []).append(cut)
    return translated


def _unstacked(saved: SavedState) -> SavedState:
    """The fields of a checkpoint of 0.1.0 layer by layer, under Megatron's names; of a later one as they are."""
    if not any(field.name.startswith(_OPTIMIZER) for field in saved):
        return saved
    unstacked: SavedState = {}
    for field, chunks in saved.items():
        name, suffix = field.name, ""
        if name.startswith(_OPTIMIZER):
            statistic, _, name = name.removeprefix(_OPTIMIZER).partition(".")
            suffix = f"/{MASTER if statistic in _MASTERS else statistic}"
        if not _STACKED.search(name):
            unstacked[Field(name + suffix, field.dtype, field.shape)] = chunks
            continue
        for chunk in chunks:
            (layer, *offset), (_, *shape) = chunk.box.offset, chunk.box.shape  # a chunk has one layer
            of_layer = Field(_STACKED.sub(f"{layer}.", name) + suffix, field.dtype, field.shape[1:])
            box = Box(tuple(offset), tuple(shape))
            unstacked.setdefault(of_layer, []).append(chunk._replace(box=box, stored=box))
    return unstacked
