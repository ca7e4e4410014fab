"""Which part of which parameter each rank of a layout has, from the model's shape alone: for plans of any number of
ranks.

This is arithmetic, without megatron and without processes; tests compare it with what megatron's own
`sharded_state_dict` and distributed optimizer say on real ranks. Line numbers are those of megatron-core 0.16.1.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from copus.reshard.boxes import Box, boxes_of_range
from copus.reshard.pieces import Pieces, Row
from profiles.layout import Layout
from profiles.model_shape import ModelShape

OPTIMIZER = "/optimizer"
"""Added to a parameter's name: its fp32 master, where the weight itself is not fp32, and both Adam moments."""
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Region:
    """Part of a rank's parameter that lies in one piece in a global tensor."""

    name: str
    """The global tensor."""
    box: Box
    """In the rank's parameter."""
    offset: tuple[int, ...]
    """Of that box in the global tensor."""

    def place(self, part: Box) -> Box:
        """A part of the box, in global coordinates."""
        return part.shifted([a - b for a, b in zip(self.offset, self.box.offset, strict=True)])


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of a model chunk on one rank."""

    name: str
    """As in `named_parameters()` of the chunk."""
    shape: tuple[int, ...]
    regions: tuple[Region, ...]
    """One, or two for gate and up of a SwiGLU."""
    own_bucket: bool = False
    """Whether the distributed optimizer keeps it apart: a tied embedding under pipelining."""

    @property
    def elements(self) -> int:
        """Of the rank's part."""
        return math.prod(self.shape)

    def parts_of_range(self, start: int, stop: int) -> Iterator[tuple[Region, Box, int, Box]]:
        """A range of the flattened parameter, as (region, part of it, where a block begins in the range, the block
        around the part)."""
        position = 0
        for block in boxes_of_range(self.shape, start, stop):
            for region in self.regions:
                common = block.intersect(region.box)
                if common is not None:
                    yield region, common, position, block
            position += block.elements


def chunk_parameters(
    model: ModelShape, layout: Layout, tp_rank: int, pp_rank: int, vp_stage: int
) -> list[LocalParameter]:
    """The parameters of one model chunk, in the order of `named_parameters()`."""
    first = pp_rank == 0 and vp_stage == 0
    last = pp_rank == layout.pp - 1 and vp_stage == layout.vp - 1
    per_chunk = model.layers // (layout.pp * layout.vp)
    first_layer = vp_stage * (model.layers // layout.vp) + pp_rank * per_chunk
    shards = _Shards(layout.tp, tp_rank)
    shared = model.tied_embeddings and layout.pp > 1
    found = []
    if first:
        found.append(shards.rows(EMBEDDING, EMBEDDING, model.padded_vocab, model.hidden, shared))
    for local in range(per_chunk):
        found += _layer(model, shards, f"decoder.layers.{local}.", f"decoder.layers.{first_layer + local}.")
    if last:
        found.append(shards.whole("decoder.final_layernorm.weight", "decoder.final_layernorm.weight", model.hidden))
        if shared or not model.tied_embeddings:
            name = EMBEDDING if shared else "output_layer.weight"
            found.append(shards.rows("output_layer.weight", name, model.padded_vocab, model.hidden, shared))
    return found


def _layer(model: ModelShape, shards: "_Shards", local: str, name: str) -> Iterator[LocalParameter]:
    width = model.hidden // model.heads
    hidden, heads = model.hidden, model.heads * width
    for module, make, sizes in (
        ("input_layernorm.weight", shards.whole, (hidden,)),
        ("self_attention.linear_proj.weight", shards.columns, (hidden, heads)),
        ("self_attention.linear_qkv.weight", shards.rows, (heads + 2 * model.kv_heads * width, hidden)),
        ("pre_mlp_layernorm.weight", shards.whole, (hidden,)),
        ("mlp.linear_fc1.weight", shards.two_halves if model.gated_mlp else shards.rows, (model.ffn_hidden, hidden)),
        ("mlp.linear_fc2.weight", shards.columns, (hidden, model.ffn_hidden)),
    ):
        yield make(local + module, name + module, *sizes)


@dataclass(frozen=True)
class _Shards:
    """The ways in which a tensor is cut over tensor parallel ranks; the part of one of them."""

    tp: int
    tp_rank: int

    def whole(self, local: str, name: str, size: int) -> LocalParameter:
        return LocalParameter(local, (size,), (Region(name, Box((0,), (size,)), (0,)),))

    def rows(self, local: str, name: str, rows: int, columns: int, own_bucket: bool = False) -> LocalParameter:
        shape = (rows // self.tp, columns)
        region = Region(name, Box((0, 0), shape), (self.tp_rank * shape[0], 0))
        return LocalParameter(local, shape, (region,), own_bucket)

    def columns(self, local: str, name: str, rows: int, columns: int) -> LocalParameter:
        shape = (rows, columns // self.tp)
        return LocalParameter(local, shape, (Region(name, Box((0, 0), shape), (0, self.tp_rank * shape[1])),))

    def two_halves(self, local: str, name: str, rows: int, columns: int) -> LocalParameter:
        """Gate above up, each cut by itself; global they are one tensor of 2·rows."""
        half = (rows // self.tp, columns)
        gate = Region(name, Box((0, 0), half), (self.tp_rank * half[0], 0))
        up = Region(name, Box((half[0], 0), half), (rows + self.tp_rank * half[0], 0))
        return LocalParameter(local, (2 * half[0], columns), (gate, up))


def owned_ranges(parameters: list[LocalParameter], dp: int) -> Iterator[tuple[int, LocalParameter, int, int]]:
    """What the distributed optimizer of each data parallel rank owns of a chunk: (dp rank, parameter, start, stop),
    ranges of flattened parameters.

    Megatron lines the parameters up last to first, each beginning at a multiple of 64; buckets are padded to a multiple
    of dp and of 128, and every rank owns an equal share of each (param_and_grad_buffer.py:640-760). Without overlapped
    reduction there is one bucket, but that tied embeddings have one of their own.
    """
    bucket: list[tuple[LocalParameter, int]] = []
    begin = place = 0
    for parameter in reversed(parameters):
        place = _up(place, 64)
        if parameter.own_bucket and bucket:
            begin = place = yield from _share(bucket, begin, place, dp)
            bucket = []
        bucket.append((parameter, place))
        place += parameter.elements
        if parameter.own_bucket:
            begin = place = yield from _share(bucket, begin, place, dp)
            bucket = []
    if bucket:
        yield from _share(bucket, begin, place, dp)


def _share(
    bucket: list[tuple[LocalParameter, int]], begin: int, end: int, dp: int
) -> Generator[tuple[int, LocalParameter, int, int], None, int]:
    """Cut a bucket into equal shares; returns where the next one begins."""
    end = _up(end, math.lcm(dp, 128))
    share = (end - begin) // dp
    for parameter, place in bucket:
        low, high = place - begin, place - begin + parameter.elements
        for dp_rank in range(low // share, -(-high // share)):
            start, stop = max(dp_rank * share, low), min((dp_rank + 1) * share, high)
            yield dp_rank, parameter, start - low, stop - low
    return end


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def all_pieces(model: ModelShape, layout: Layout, precision: str) -> Pieces:
    """Weights and optimizer state of every rank of a layout. Ranks count tensor, data, pipeline, the first fastest."""
    weight_bytes, optimizer_bytes = (2, 12) if precision == "bf16" else (4, 8)
    tables = []
    for pp_rank in range(layout.pp):
        for tp_rank in range(layout.tp):
            chunks = [chunk_parameters(model, layout, tp_rank, pp_rank, stage) for stage in range(layout.vp)]
            ranks = tp_rank + layout.tp * (np.arange(layout.dp) + layout.dp * pp_rank)
            whole: list[Row] = []
            for parameter in (each for chunk in chunks for each in chunk):
                for region in parameter.regions:
                    box = region.place(region.box)
                    whole.append((0, region.name, box, weight_bytes))
                    if layout.zero == 0:
                        whole.append((0, region.name + OPTIMIZER, box, optimizer_bytes))
            tables.append(Pieces.of(whole).on_ranks(ranks))
            if layout.zero:
                tables.append(Pieces.of(_sharded(chunks, ranks, optimizer_bytes)))
    return Pieces.concatenate(tables)


def _sharded(chunks: list[list[LocalParameter]], ranks: np.ndarray, optimizer_bytes: int) -> Iterator[Row]:
    for chunk in chunks:
        for dp_rank, parameter, start, stop in owned_ranges(chunk, len(ranks)):
            for region, part, _, _ in parameter.parts_of_range(start, stop):
                yield int(ranks[dp_rank]), region.name + OPTIMIZER, region.place(part), optimizer_bytes
