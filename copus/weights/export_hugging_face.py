"""A checkpoint as a Hugging Face folder that `transformers` opens."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from copus.data.manifest import read_manifest
from copus.data.prepared import find_prepared
from copus.durable import write_text
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.weights import pretrained, safetensors
from copus.weights.families import Shapes, Stored, stored_weights, weights_of
from copus.weights.model_card import model_card
from copus.weights.safetensors import Planned
from copus.weights.source import CONFIG, TOKENIZER
from copus.weights.trained import TORCH_NAMES, Precision, TrainedWeights, pieces, training_until
from profiles.huggingface_config import read_values
from profiles.huggingface_values import config_values, is_model_of

LARGEST_FILE_BYTES = 5 * 10**9


class HuggingFaceExport:
    """What is to be written, planned: `write` writes it."""

    def __init__(self, run: Path, job: JobConfig, checkpoint: Path, precision: Precision) -> None:
        """Raises JobError for a model that no family has, and if the checkpoint is not of the job's model."""
        self._run, self._job, self._checkpoint = run, job, checkpoint
        self._dtype = TORCH_NAMES[precision]
        self._config = self._configuration()
        stored = stored_weights(self._config["model_type"], job.model)
        self._parts: dict[str, list[tuple[str, Stored]]] = defaultdict(list)
        """The weights that a tensor consists of, by the tensor's name, in the order of its rows."""
        for name, place in stored.items():
            self._parts[place.name].append((name, place))
        tensors = [Planned(name, self._dtype, parts[0][1].shape) for name, parts in self._parts.items()]
        self._files = safetensors.split_into_files(tensors, LARGEST_FILE_BYTES)
        self.bytes = sum(tensor.bytes for tensor in tensors)
        """Size of the weights on disk."""

    def _configuration(self) -> dict[str, Any]:
        """The configuration of the folder that the run began with, if it is still that model; else one from the job."""
        kept, model = self._run / pretrained.FOLDER / CONFIG, self._job.model
        family = None
        values: dict[str, Any] = {}
        if kept.is_file():
            values = read_values(kept)
            family = values["model_type"]
        if not values or not is_model_of(values, model):
            try:
                values = config_values(model, prefer=family)
            except ValueError as error:
                raise JobError(f"{self._run.name}: {error}") from None
        values = {name: value for name, value in values.items() if name not in ("torch_dtype", "transformers_version")}
        return {**values, "dtype": self._dtype}

    def write(self, folder: Path, advance: Callable[[int], None]) -> None:
        """Write everything into an empty folder; `advance` is told of bytes of weights as they are written."""
        shapes, dtype = weights_of(self._job.model), getattr(torch, self._dtype)
        with TrainedWeights(self._checkpoint, self._job.model) as weights:
            for file_name, tensors in self._files.items():
                with open(folder / file_name, "wb") as file:
                    safetensors.write_header(file, tensors)
                    for tensor in tensors:
                        for numbers in self._numbers(weights, self._parts[tensor.name], shapes):
                            written = numbers.to(dtype).contiguous()
                            file.write(written.view(torch.uint8).numpy().data)
                            advance(written.nbytes)
        if len(self._files) > 1:
            write_text(folder / safetensors.INDEX, json.dumps(safetensors.index_of(self._files), indent=2) + "\n")
        self._write_tokenizer(folder)
        write_text(folder / CONFIG, json.dumps(self._config, indent=2, sort_keys=True) + "\n")
        training = training_until(self._checkpoint, self._run, self._job)
        write_text(folder / "README.md", model_card(self._job, self._checkpoint, training, self._config))

    def _numbers(
        self, weights: TrainedWeights, parts: list[tuple[str, Stored]], shapes: Shapes
    ) -> Iterator[torch.Tensor]:
        """A tensor of the folder, in pieces of consecutive numbers."""
        if parts[0][1].is_transposed:  # a row of the file has a column of every part
            width = sum(shapes[name][0] for name, _ in parts)
            for start, rows in pieces((shapes[parts[0][0]][1], width)):
                boxes = [(name, Box((0, start), (shapes[name][0], rows))) for name, _ in parts]
                yield torch.cat([weights.read(name, box).t() for name, box in boxes], dim=1)
            return
        for name, stored in parts:
            height, *row = shapes[name]
            for start, rows in pieces((height, *row)):
                numbers = weights.read(name, Box((start, *[0] * len(row)), (rows, *row)))
                yield numbers.float() - stored.subtracted if stored.subtracted else numbers

    def _write_tokenizer(self, folder: Path) -> None:
        """The tokenizer's files: those that came with the weights if the data was prepared with that one, else the
        data's own. The configuration and the defaults of generation get its end-of-document token."""
        kept = self._run / pretrained.FOLDER
        prepared = find_prepared(self._job)
        own = self._job.data.tokenizer and self._job.data.tokenizer.expanduser()
        came_along = (kept / TOKENIZER).is_file() and (own is None or not own.is_file() or _same(own, kept / TOKENIZER))
        if came_along:
            for name in pretrained.TOKENIZER_FILES:
                if (kept / name).is_file():
                    shutil.copyfile(kept / name, folder / name)
        elif prepared is not None and (prepared / TOKENIZER).is_file():
            shutil.copyfile(prepared / TOKENIZER, folder / TOKENIZER)
        end = read_manifest(prepared).eod if prepared is not None else None
        if (folder / TOKENIZER).is_file() and not (folder / _TOKENIZER_CONFIG).is_file():
            settings = _tokenizer_settings(folder / TOKENIZER, end, self._job.model.seq_len)
            write_text(folder / _TOKENIZER_CONFIG, json.dumps(settings, indent=2) + "\n")
        if not came_along and end is not None:
            self._config["eos_token_id"] = end
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            self._config.setdefault(name, None)  # the defaults of a family are tokens of another vocabulary
        if came_along and (kept / pretrained.GENERATION).is_file():
            shutil.copyfile(kept / pretrained.GENERATION, folder / pretrained.GENERATION)
        else:
            generation = {"eos_token_id": self._config["eos_token_id"], "max_length": self._job.model.seq_len}
            write_text(folder / pretrained.GENERATION, json.dumps(generation, indent=2) + "\n")


_TOKENIZER_CONFIG = "tokenizer_config.json"


def _tokenizer_settings(path: Path, end: int | None, seq_len: int) -> dict[str, Any]:
    """What transformers wants to know of a `tokenizer.json`; `end` ends a document."""
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
    eos = next(({"eos_token": token["content"]} for token in added if token["id"] == end), {})
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len, **eos}


def _same(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()
