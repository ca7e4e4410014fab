"""A checkpoint as one of Megatron-LM, in its format `torch_dist`, with the weights alone.

Megatron-LM takes it with `--pretrained-checkpoint DIR` or `--load DIR --finetune`. All layers are one tensor with the
layers along its first axis, and the norms before attention and MLP have Transformer Engine's names, as Megatron's own
checkpoints have them whatever their layers are made of.
"""

import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from copus.checkpoints.sharded import Chunk, PlaceInFile, SavedState, write_index
from copus.durable import write_text
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.weights.families import Shapes
from copus.weights.megatron_lm import stored_name
from copus.weights.megatron_names import hugging_face_parts
from copus.weights.source import LATEST, RELEASE
from copus.weights.trained import TORCH_NAMES, Precision, TrainedWeights, pieces
from profiles.model_shape import ModelShape

_DATA = "__0_0.distcp"
_MODULES_WITH_EXTRA_STATE = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
"""Megatron asks for an extra state of these, which is nothing unless they compute in 8 bits."""


def weights_in_megatron(model: ModelShape) -> Shapes:
    """Every weight of Megatron-LM's GPT, under the names that a layer of copus's own specification has.

    Raises ValueError for a model that Megatron-LM's GPT does not have.
    """
    for name, usual in (("norm_position", "pre"), ("experts", 0)):
        if getattr(model, name) != usual:
            raise ValueError(f"model.{name}({getattr(model, name)}) is not exported to Megatron-LM: {usual} is")
    if model.latent_attention is not None:
        raise ValueError("model.latent_attention is not exported to Megatron-LM")
    if model.qk_norm == "projection":
        raise ValueError("model.qk_norm(projection) is not exported to Megatron-LM: none and head are")
    return dict(_weights(model))


def _weights(model: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vectors = model.hidden, ("weight", "bias")[: model.norm_vectors]
    queries, projected = model.query_width + 2 * model.kv_width, model.ffn_hidden * (2 if model.gated_mlp else 1)
    has_bias = model.bias == "all"
    linear: tuple[tuple[str, int, int, bool], ...] = (
        ("self_attention.linear_qkv", queries, hidden, model.bias != "none"),
        ("self_attention.linear_proj", hidden, model.query_width, model.bias in ("attention", "all")),
        ("mlp.linear_fc1", projected, hidden, has_bias),
        ("mlp.linear_fc2", hidden, model.ffn_hidden, has_bias),
    )
    norms = {"input_layernorm": hidden, "pre_mlp_layernorm": hidden}
    if model.qk_norm == "head":
        norms |= dict.fromkeys(("self_attention.q_layernorm", "self_attention.k_layernorm"), model.head_width)
    yield "embedding.word_embeddings.weight", (model.padded_vocab, hidden)
    if model.positions == "learned":
        yield "embedding.position_embeddings.weight", (model.seq_len, hidden)
    for layer in (f"decoder.layers.{number}" for number in range(model.layers)):
        for module, outputs, inputs, with_bias in linear:
            yield f"{layer}.{module}.weight", (outputs, inputs)
            if with_bias:
                yield f"{layer}.{module}.bias", (outputs,)
        for module, width in norms.items():
            for kind in vectors:
                yield f"{layer}.{module}.{kind}", (width,)
    for kind in vectors:
        yield f"decoder.final_layernorm.{kind}", (hidden,)
    if not model.tied_embeddings:
        yield "output_layer.weight", (model.padded_vocab, hidden)


class MegatronExport:
    """What is to be written, planned: `write` writes it."""

    def __init__(self, run: Path, job: JobConfig, checkpoint: Path, precision: Precision) -> None:
        """Raises JobError for a model that Megatron-LM does not have."""
        self._model, self._checkpoint, self._dtype = job.model, checkpoint, TORCH_NAMES[precision]
        try:
            self._weights = weights_in_megatron(job.model)
        except ValueError as error:
            raise JobError(f"{run.name}: {error}") from None
        item_bytes = getattr(torch, self._dtype).itemsize
        self.bytes = sum(Box.whole(shape).elements for shape in self._weights.values()) * item_bytes
        """Size of the weights on disk."""

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write everything into an empty folder; `advance` is told of bytes of weights as they are written."""
        release = folder / RELEASE
        release.mkdir()
        saved: SavedState = defaultdict(list)
        with TrainedWeights(self._checkpoint, self._model) as weights, open(release / _DATA, "wb") as file:
            for name, shape in self._weights.items():
                for field, box, numbers in self._parts(weights, name, shape):
                    place = _append(file, numbers)
                    saved[field].append(Chunk(box, box, *place))
                    advance(numbers.nbytes)
            # None is in a list, since several may have one name
            objects = {name: _append(file, [None]) for name in self._extra_states()}
        write_index(release, [saved], objects)
        (release / "common.pt").write_bytes(_saved({"checkpoint_version": 3.0, "iteration": 0}))
        formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        formats |= {"common_backend": "torch", "common_backend_version": 1}
        write_text(release / "metadata.json", json.dumps(formats))
        write_text(folder / LATEST, RELEASE)

    def _parts(
        self, weights: TrainedWeights, name: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[Field, Box, torch.Tensor]]:
        """A weight in parts of some megabytes: the tensor that it is in, where in that, and its numbers."""
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        before = (int(layer[1]),) if layer else ()
        whole = (self._model.layers, *shape) if layer else shape
        field = Field(stored_name(name), self._dtype, whole)
        for start, rows in pieces(shape):
            box = Box((start, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
            numbers = torch.empty(box.shape, dtype=getattr(torch, self._dtype))
            for part in hugging_face_parts(name, shape, box, self._model):
                numbers[part.box.slices_in(box)] = weights.read(part.name, Box(part.offset, part.box.shape))
            yield (
                field,
                Box((*before, *box.offset), (*[1] * len(before), *box.shape)),
                numbers.view(*[1] * len(before), *box.shape),
            )

    def _extra_states(self) -> Iterator[str]:
        for module in _MODULES_WITH_EXTRA_STATE:
            for layer in range(self._model.layers):
                yield f"decoder.layers.{module}._extra_state/shard_{layer}_{self._model.layers}"


def _append(file: IO[bytes], value: Any) -> PlaceInFile:
    """Append a tensor or an object as torch saves it, and return where it is."""
    offset = file.tell()
    file.write(_saved(value))
    return _DATA, offset, file.tell() - offset


def _saved(value: Any) -> memoryview:
    """The bytes of what torch saves. It does not write them itself: of a full disk it would make a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getbuffer()
