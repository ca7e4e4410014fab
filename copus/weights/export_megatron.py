"""A checkpoint as one of Megatron-LM, in its format `torch_dist`, with the weights alone.

Megatron-LM takes it with `--pretrained-checkpoint DIR` or `--load DIR --finetune`.
"""

import io
import json
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
from copus.weights.megatron_names import hugging_face_parts
from copus.weights.megatron_stored import place_of
from copus.weights.megatron_weights import weights_in_megatron
from copus.weights.source import LATEST, RELEASE
from copus.weights.trained import TORCH_NAMES, Precision, TrainedWeights, pieces

_DATA = "__0_0.distcp"
_WITHOUT_EXTRA_STATE = ("norm", "router", "embedding", "output_layer")
"""In a name of a module: Megatron asks for an extra state of all others, which is nothing unless they compute in 8
bits."""


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
                for fields, box, numbers in self._parts(weights, name, shape):
                    place = _append(file, numbers)
                    for field in fields:
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
    ) -> Iterator[tuple[list[Field], Box, torch.Tensor]]:
        """A weight in parts of some megabytes: the tensor that it is in, under all its names, where in that, and its
        numbers."""
        names, index, first_axes = place_of(name, self._model)
        dtype = "float32" if name.endswith("expert_bias") else self._dtype  # as Megatron keeps it
        fields, ones = [Field(one, dtype, (*first_axes, *shape)) for one in names], [1] * len(index)
        for start, rows in pieces(shape):
            box = Box((start, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
            numbers = torch.empty(box.shape, dtype=getattr(torch, dtype))
            for part in hugging_face_parts(name, shape, box, self._model):
                numbers[part.box.slices_in(box)] = weights.read(part.name, Box(part.offset, part.box.shape))
            yield fields, Box((*index, *box.offset), (*ones, *box.shape)), numbers.view(*ones, *box.shape)

    def _extra_states(self) -> Iterator[str]:
        """The names of all extra states, one a layer and expert."""
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self._weights)
        layers = (f"decoder.layers.{number}" for number in range(self._model.layers))
        for module in (*modules, *(f"{layer}.self_attention.core_attention" for layer in layers)):
            if not any(word in module for word in _WITHOUT_EXTRA_STATE):
                names, index, first_axes = place_of(f"{module}._extra_state", self._model)
                shard = (".".join(map(str, numbers or (0,))) for numbers in (index, first_axes or (1,)))
                yield f"{names[0]}/shard_{'_'.join(shard)}"


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
