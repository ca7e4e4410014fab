"""Checkpoints of Megatron-LM in the format `torch_dist`: their weights under the names of the state.

Most tensors have all layers of the model along a first axis, and the norms before attention and MLP have the names that
Transformer Engine gives them, whatever was used.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from copus.job import JobError
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.sharded_checkpoint import Chunk, SavedState, read_index, zeros_below
from copus.weights.families import weights_of
from copus.weights.megatron_names import hugging_face_parts
from profiles.model_shape import ModelShape

_WEIGHTS = re.compile(r"(?:module\.|model\.)?((?:(?:embedding|decoder)\..+[._]|output_layer\.)(?:weight|bias))")
"""Names of weights; optimizer state, random states and what an index says of objects are left out."""
_STACKED = re.compile(r"decoder\.layers\.(?=\D)")
"""The layers of this tensor are its first axis."""
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_ROWS_OF_TOKENS = ("embedding.word_embeddings.weight", "output_layer.weight")
_MOST_PADDING = 8192
"""More rows than that are not for the sake of tensor parallelism: the vocabulary is another one."""


def stored_name(name: str) -> str:
    """The name that a weight has in Megatron-LM's checkpoints, from that in a layer of its own number."""
    name = re.sub(r"^(decoder\.layers\.)\d+\.", r"\1", name)
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(f"layers.{own}", f"layers.{fused}")
    return name


def read_megatron(folder: Path, model: ModelShape) -> SavedState:
    """Where each weight of a model is in a checkpoint of Megatron-LM; what else is in it is passed over.

    The rows that pad Megatron's vocabulary are replaced by zeros. Raises JobError for another vocabulary.
    """
    if model.experts:
        raise JobError(f"training.init_from({folder}): experts of Megatron-LM's checkpoints are not read")
    saved: SavedState = {}
    for field, chunks in read_index(folder).items():
        match = _WEIGHTS.fullmatch(field.name)
        if match is not None:
            for chunk in chunks:
                for part, cut in _parts(folder, field._replace(name=match[1]), chunk, model):
                    saved.setdefault(part, []).append(cut)
    for field, chunks in saved.items():
        weight = weights_of(model).get(field.name, field.shape)
        chunks += zeros_below(weight, field.shape)
    return saved


def _parts(folder: Path, field: Field, chunk: Chunk, model: ModelShape) -> Iterator[tuple[Field, Chunk]]:
    """The parts of a chunk that are in one weight of the state each."""
    name, shape, box = field.name, field.shape, chunk.box
    if _STACKED.match(name):
        if box.shape[0] != 1:
            raise JobError(f"{folder.name}: {name} has {box.shape[0]} layers in one part; one is read")
        name = _STACKED.sub(f"decoder.layers.{box.offset[0]}.", name)
        shape, box = shape[1:], Box(box.offset[1:], box.shape[1:])
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    if name in _ROWS_OF_TOKENS:
        if not 0 <= shape[0] - model.vocab < _MOST_PADDING:
            raise JobError(
                f"training.init_from({folder}): {name} has {shape[0]} rows, and model.vocab is {model.vocab}"
            )
        own_rows = box.intersect(Box.whole((model.vocab, *shape[1:])))
        shape = (model.padded_vocab, *shape[1:])
        pieces = [] if own_rows is None else list(hugging_face_parts(name, shape, own_rows, model))
    else:
        pieces = list(hugging_face_parts(name, shape, box, model))
    for part in pieces:
        moved = [new - old for new, old in zip(part.offset, part.box.offset, strict=True)]
        yield (
            Field(part.name, field.dtype, part.shape),
            chunk._replace(box=part.box.shifted(moved), stored=box.shifted(moved)),
        )
