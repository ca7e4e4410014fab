"""Weights and optimizer state on disk, in the format of `torch.distributed.checkpoint`: every rank writes the parts
that it owns, and any layout reads them.

Ownership follows from the shard table of the layout, as a move does. Loading is a move too: the owners of the new
layout read their parts from the files and send them to their replicas, so every byte is read once. Except for a copy
that the caller asks for, neither takes more memory than the staging buffer.

Nothing in the files is executed: the index is unpickled by `load_metadata`, and tensors are read as plain bytes.
"""

import io
import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from copus.checkpoints.safe_loading import DamagedFileError, damage_told, dump_metadata, load_metadata
from copus.collectives import all_gather, gather_on_rank0, run_on_all_ranks
from copus.hardware import room_for_a_copy
from copus.reshard.boxes import Box
from copus.reshard.execute import LiveState, reshard, split_box
from copus.reshard.plan import make_plan
from copus.reshard.table import MASTER, Field, ShardTable

INDEX = ".metadata"
"""The index of the data files, under torch's name for it."""


class Chunk(NamedTuple):
    """A part of a field in a file."""

    box: Box
    stored: Box
    """The tensor in the file, in the coordinates of the field. It is larger than the box if one tensor of the file has
    become several fields; then it may begin before the field does."""
    file: str
    """Relative to the checkpoint's folder."""
    offset: int
    """Bytes from the beginning of the file."""
    length: int
    """Bytes, including torch's own header and trailer of the tensor if it has them."""
    is_plain: bool = False
    """Whether the bytes are the numbers and nothing else, as in safetensors, and not torch's archive of a tensor."""
    is_transposed: bool = False
    """Whether the file has the transpose of the stored tensor."""
    subtracted: float = 0.0
    """How much less than the field the file has; the same for all chunks of a field."""


ZEROS = ""
"""In place of a chunk's file: the box is zeros, and in no file."""

PlaceInFile = tuple[str, int, int]
"""Name of a file, first byte, number of bytes."""
SavedState = dict[Field, list[Chunk]]
"""All fields of a checkpoint and their chunks."""
Sources = dict[str, tuple[Field, list[Chunk]]]
"""The source of every field of a job, by the field's name."""


def zeros_below(shape: tuple[int, ...], whole: tuple[int, ...]) -> list[Chunk]:
    """Zeros for the rows that a tensor of `shape` lacks of one with the shape `whole`."""
    if whole == shape:
        return []
    box = Box((shape[0], *[0] * (len(shape) - 1)), (whole[0] - shape[0], *shape[1:]))
    return [Chunk(box, box, ZEROS, 0, 0)]


class Save:
    """A checkpoint on its way to disk: planned here, then written, then finished."""

    def __init__(self, folder: Path, owned: ShardTable, state: LiveState, staging_bytes: int, copy: bool) -> None:
        """`owned` has every part of the state once, on the rank that writes it. `folder` must exist and be empty.
        Collective.

        With `copy` the state is copied into the host's memory, so that training may go on before it is written. Raises
        RankError on every rank if any rank failed.
        """
        self._folder, self._owned = folder, owned
        rank = dist.get_rank()
        parts = owned.of_rank(rank)
        self._limit = max(1, staging_bytes // 8)  # torch.save and late frees take some four times as much
        self._tensors: list[tuple[Field, Box, torch.Tensor]] = run_on_all_ranks(
            lambda: [(field, box, state[place]()) for place, (field, box) in parts.items()]
        )
        self._records: dict[Field, list[Chunk]] = defaultdict(list)
        self.files = [f"__{rank}_0.distcp"] if parts else []
        """The files that `write` writes on this rank, relative to the folder."""
        own_bytes = sum(tensor.nbytes for _, _, tensor in self._tensors)
        self.is_copy = copy and all(all_gather(own_bytes < room_for_a_copy()))
        """Whether training may go on before `write`. False on every rank if any rank has no room for the copy."""
        if self.is_copy:
            run_on_all_ranks(self._copy)

    def _copy(self) -> None:
        """Replace the live tensors by copies in the host's memory, pinned if they come from a GPU."""
        on_gpu = any(tensor.is_cuda for _, _, tensor in self._tensors)
        for index, (field, box, tensor) in enumerate(self._tensors):
            copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[index] = field, box, copied.copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def write(self) -> None:
        """Write this rank's parts. Not collective."""
        for name in self.files:
            with open(self._folder / name, "wb") as file:
                while self._tensors:
                    field, box, tensor = self._tensors.pop(0)  # frees a copy as soon as it is written
                    for part in _cut(box, tensor.nbytes, self._limit):
                        # torch.save would write the whole storage of a view
                        piece = tensor[part.slices_in(box)].detach().clone(memory_format=torch.contiguous_format).cpu()
                        offset = file.tell()
                        torch.save(piece, file)
                        self._records[field].append(Chunk(part, part, name, offset, file.tell() - offset))

    def finish(self) -> None:
        """Write the index, after every rank has written its parts. Collective. Raises RankError on every rank if rank 0
        failed."""
        records = gather_on_rank0(dict(self._records))
        run_on_all_ranks(lambda: None if records is None else write_index(self._folder, records), OSError)


def _cut(box: Box, size: int, limit: int) -> Iterator[Box]:
    edges = np.array([box.offset, box.stop], np.int64).reshape(2, -1)
    for part in split_box(edges, size, limit):
        yield Box.between(part[0].tolist(), part[1].tolist(), len(box.shape))


def write_index(
    folder: Path, records: list[SavedState], objects: Mapping[str, PlaceInFile] = MappingProxyType({})
) -> None:
    """Write the index of a folder: which tensor of the records, and which object that is none, is where."""
    described: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        for field, chunks in record.items():
            properties = TensorProperties(dtype=getattr(torch, field.dtype))
            entry = described.setdefault(field.name, TensorStorageMetadata(properties, torch.Size(field.shape), []))
            for chunk in chunks:
                offset = torch.Size(chunk.box.offset)
                index = MetadataIndex(field.name, offset, len(entry.chunks))
                entry.chunks.append(ChunkStorageMetadata(offset, torch.Size(chunk.box.shape)))
                places[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    for name, place in objects.items():
        described[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(*place)
    with open(folder / INDEX, "wb") as file:
        dump_metadata(Metadata(described, storage_data=places), file)


def read_index(folder: Path) -> SavedState:
    """The fields of a checkpoint and where their chunks are; entries that are not tensors are left out. Raises
    DamagedFileError if the index cannot be read, UnsafeCheckpointError if it asks for anything that could run code."""
    saved: SavedState = {}
    with damage_told(), open(folder / INDEX, "rb") as file:
        index = load_metadata(file)
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue
            field = Field(name, str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
            saved[field] = []
            for chunk in entry.chunks:
                place = index.storage_data[MetadataIndex(name, chunk.offsets)]
                box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
                saved[field].append(Chunk(box, box, place.relative_path, place.offset, place.length))
    return saved


def read_object(folder: Path, name: str) -> IO[bytes] | None:
    """What torch saved of an object that is no tensor, as a file; None if the checkpoint has none of this name."""
    with damage_told(), open(folder / INDEX, "rb") as file:
        place = load_metadata(file).storage_data.get(MetadataIndex(name))
        if place is None:
            return None
        with open(_path_within(folder, place.relative_path), "rb") as data:
            data.seek(place.offset)
            return io.BytesIO(data.read(place.length))


def _path_within(folder: Path, name: str) -> Path:
    """A file that a checkpoint's index names. Raises ValueError if it is not in the checkpoint's folder."""
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise ValueError(f"the checkpoint's index points to {name}, which is not in its folder")
    return path


def find_sources(saved: SavedState, table: ShardTable, *, begins_anew: bool = False) -> Sources:
    """Find every field of a table in a checkpoint.

    The precision may differ, because training continues from the fp32 numbers: a weight's master if it has one, else
    the weight itself. A bf16 weight is the fp32 one, rounded. Training that `begins_anew` takes weights of any
    precision.

    Raises ValueError if the checkpoint lacks a field, has it with another shape, or has a weight that the table lacks.
    """
    by_name = {field.name: field for field in saved}
    sources: Sources = {}
    for field in table.fields:
        weight, _, suffix = field.name.partition("/")
        names = [field.name]
        if suffix in ("", MASTER):  # the weight and its master stand in for each other
            names.append(weight if suffix else f"{weight}/{MASTER}")
        candidates = [by_name[name] for name in names if name in by_name]
        if not candidates:
            raise ValueError(f"the checkpoint has no {field.name}: another model or optimizer wrote it")
        source = next((other for other in candidates if other.dtype in (field.dtype, "float32")), candidates[0])
        is_precise = begins_anew or source.dtype in (field.dtype, "float32")
        if source.shape != field.shape or not is_precise:
            raise ValueError(
                f"{source.name} is {source.dtype} {list(source.shape)} in the checkpoint, and {field.name} is "
                f"{field.dtype} {list(field.shape)} in this job"
            )
        sources[field.name] = source, saved[source]
    weights = {name.partition("/")[0] for name in sources}
    surplus = next((field.name for field in saved if field.name.partition("/")[0] not in weights), None)
    if surplus is not None:
        raise ValueError(f"the checkpoint has {surplus}, which this job's model does not have: another model wrote it")
    return sources


def load(
    folder: Path,
    sources: Sources,
    owned: ShardTable,
    table: ShardTable,
    state: LiveState,
    staging_bytes: int,
    device: torch.device,
) -> None:
    """Read a checkpoint into the live state of a layout with this table and these owners. Collective.

    In windows: a rank reads at most half of `staging_bytes` at a time, and sends it on through buffers of the other
    half.
    """
    rank, limit = dist.get_rank(), max(1, staging_bytes // 2)
    reading, window = _windows(owned, limit)
    plan = make_plan(reading, table)
    with SavedFiles(folder) as files:
        for number in range(int(window.max(initial=-1)) + 1):
            own = reading.select(np.flatnonzero(window == number)).of_rank(rank)
            held = {}
            for place, (field, box) in own.items():
                held[place] = files.read(*sources[field.name], box).to(device, getattr(torch, field.dtype))
            reshard(plan.select(np.flatnonzero(window[plan.source] == number)), held, state, limit, device)


def _windows(owned: ShardTable, limit: int) -> tuple[ShardTable, np.ndarray]:
    """The rows of a table in the order of a move, cut into at most `limit` bytes; and the number of the window of every
    row. No rank has more than `limit` bytes in a window."""
    order = np.lexsort((owned.rank, *owned.start.T[::-1], owned.group))
    columns: tuple[list[Any], ...] = ([], [], [], [])
    windows: list[int] = []
    used: dict[int, int] = defaultdict(int)
    window = 0
    for row, size in zip(order.tolist(), owned.bytes[order].tolist(), strict=True):
        rank, edges = int(owned.rank[row]), np.stack([owned.start[row], owned.stop[row]])
        for part in [edges] if size <= limit else split_box(edges, size, limit):
            share = size * math.prod((part[1] - part[0]).tolist()) // math.prod((edges[1] - edges[0]).tolist())
            if used[rank] and used[rank] + share > limit:
                window += 1
                used.clear()
            used[rank] += share
            for column, value in zip(columns, (rank, owned.group[row], part[0], part[1]), strict=True):
                column.append(value)
            windows.append(window)
    axes = owned.start.shape[1]
    rank_column, group, start, stop = (np.array(column, np.int64) for column in columns)
    cut = ShardTable(owned.groups, rank_column, group, start.reshape(-1, axes), stop.reshape(-1, axes))
    return cut, np.array(windows, np.int64)


class SavedFiles:
    """The data files of a checkpoint or of another folder with weights, opened when they are first read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, IO[bytes]] = {}

    def __enter__(self) -> "SavedFiles":
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._opened.values():
            file.close()

    def read(self, field: Field, chunks: list[Chunk], box: Box) -> torch.Tensor:
        """A part of a field, in the host's memory: in the field's type, or in fp32 if something was subtracted from it.
        Raises DamagedFileError if the files do not have all of it."""
        numbers = np.empty(box.shape, f"u{field.element_bytes}")
        missing = box.elements
        for chunk in chunks:
            common = chunk.box.intersect(box)
            if common is not None:
                if chunk.file == ZEROS:
                    part: Any = 0
                else:
                    with damage_told():
                        part = self._map(chunk, field)[common.slices_in(chunk.stored)]
                numbers[common.slices_in(box)] = part
                missing -= common.elements
        if missing:
            raise DamagedFileError(f"the checkpoint lacks {missing} elements of {field.name}")
        values = torch.from_numpy(numbers).view(getattr(torch, field.dtype))
        subtracted = chunks[0].subtracted if chunks else 0.0
        return values.float() + subtracted if subtracted else values

    def _map(self, chunk: Chunk, field: Field) -> np.ndarray:
        """The tensor in a chunk, as unsigned integers of its size, mapped from the file: only pages that are read from
        it take memory."""
        if chunk.file not in self._opened:
            path = self._folder / chunk.file if chunk.is_plain else _path_within(self._folder, chunk.file)
            self._opened[chunk.file] = open(path, "rb")  # noqa: SIM115 (closed in __exit__)
        file, size = self._opened[chunk.file], chunk.stored.elements * field.element_bytes
        start = chunk.offset if chunk.is_plain else _start_of_data(file, chunk, size)
        shape = chunk.stored.shape[::-1] if chunk.is_transposed else chunk.stored.shape
        numbers = np.memmap(file, f"u{field.element_bytes}", "r", start, shape)
        return numbers.T if chunk.is_transposed else numbers


def _start_of_data(file: IO[bytes], chunk: Chunk, size: int) -> int:
    """The byte at which the numbers of a tensor begin in a file. torch.save writes a zip archive, whose record `data/0`
    has the numbers as they were in memory."""
    with zipfile.ZipFile(_Section(file, chunk.offset, chunk.length)) as archive:
        (record,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    if record.compress_type != zipfile.ZIP_STORED or record.file_size != size:
        raise ValueError(f"{chunk.file}: the tensor at byte {chunk.offset} has {record.file_size} bytes, not {size}")
    header = chunk.offset + record.header_offset
    file.seek(header + 26)  # lengths of the name and the extra field, which lie between header and data
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return header + 30 + name + extra


class _Section:
    """A part of a file as a readable file, with just the methods that zipfile calls."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._length - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(rest if count < 0 else min(count, rest))
        self._position += len(data)
        return data
