"""Where the weights of Megatron's GPT are in a checkpoint of the format `torch_dist`, and which these are.

Layers that are all alike are one tensor, with the layers along its first axis; of others each has tensors of its own,
with its number in the name. The experts of a layer are one tensor, with the experts along the next axis, whether they
are computed one by one or in groups. A norm has the name of the projection behind it if Transformer Engine fuses the
two, or if Megatron's own layers pretend to: which norms those are differs between the two for experts and latent
attention, so such a model has all of them under both names.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from copus.reshard.boxes import Box
from copus.weights.megatron_names import FUSED_LATENT_NORMS, FUSED_NORMS
from profiles.model_shape import ModelShape

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"(\.mlp\.experts\.)local_experts\.(\d+)\.")
_ALL_LAYERS = re.compile(r"decoder\.layers\.(?=\D)")
_ALL_EXPERTS = re.compile(r"\.mlp\.experts\.experts\.(?=\D)")


class Place(NamedTuple):
    """Where a weight is: at an index of the first axes of a tensor, which may have several names."""

    names: tuple[str, ...]
    at: tuple[int, ...]
    """Index along the axes of layers and experts, as far as the tensor has them."""
    first_axes: tuple[int, ...]
    """Lengths of these axes."""


def place_of(name: str, model: ModelShape) -> Place:
    """Where a weight or a module's state is that has this name in a layer of its own number."""
    at, first_axes = [], []
    layer = _LAYER.match(name)
    if layer is not None and not model.dense_layers:
        name = name.replace(layer[0], layer[1])
        at.append(int(layer[2]))
        first_axes.append(model.layers)
    expert = _EXPERT.search(name)
    if expert is not None:
        name = name.replace(expert[0], f"{expert[1]}experts.")
        at.append(int(expert[2]))
        first_axes.append(model.experts)
    fused, is_latent = name, model.latent_attention is not None
    for with_projection, alone in (FUSED_NORMS | (FUSED_LATENT_NORMS if is_latent else {})).items():
        fused = re.sub(rf"(layers\.(?:\d+\.)?){re.escape(alone)}", rf"\1{with_projection}", fused)
    are_fused = not model.experts and not is_latent
    return Place((fused,) if are_fused or fused == name else (fused, name), tuple(at), tuple(first_axes))


class Weight(NamedTuple):
    """A weight of which a tensor in a file has a part."""

    name: str
    """With the numbers of the layer and of the expert in it."""
    shape: tuple[int, ...]
    box: Box
    """The part."""
    stored: Box
    """The tensor in the file, in the coordinates of the weight: several layers or experts are one below the other."""


def weights_in(name: str, shape: tuple[int, ...], box: Box, model: ModelShape) -> Iterator[Weight]:
    """The weights of which a box of a tensor of this name and whole shape has parts.

    Raises ValueError if the tensor does not have the experts of the model.
    """
    axes = [(_ALL_LAYERS, "decoder.layers.{}.")] if _ALL_LAYERS.match(name) else []
    if _ALL_EXPERTS.search(name):
        if shape[len(axes)] != model.experts:
            raise ValueError(f"{name} has {shape[len(axes)]} experts, and model.experts is {model.experts}")
        axes.append((_ALL_EXPERTS, ".mlp.experts.local_experts.{}."))
    count = len(axes)
    first, offset, rows = box.shape[:count], box.offset[count:], box.shape[count]
    stored_shape = (math.prod(first) * rows, *box.shape[count + 1 :])
    for position, index in enumerate(np.ndindex(first)):
        own = name
        for (pattern, numbered), start, step in zip(axes, box.offset, index, strict=False):
            own = pattern.sub(numbered.format(start + step), own)
        stored = Box((offset[0] - position * rows, *offset[1:]), stored_shape)
        yield Weight(own, shape[count:], Box(offset, box.shape[count:]), stored)
