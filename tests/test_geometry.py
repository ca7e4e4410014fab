"""The arithmetic of who has what, against what megatron says of itself on real ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron.geometry import OPTIMIZER, all_pieces
from copus.backends.megatron.sharded import metadata, unwrap
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from tests.megatron_jobs import SHAPE, backend_of, tiny_job
from tests.ranks import run_ranks


def _megatron_cells(layout: dict[str, Any], model: dict[str, Any], precision: str) -> set[tuple[str, int]]:
    """Every element of every tensor of this rank, from megatron's sharded metadata and its optimizer's range maps."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    backend = backend_of(
        tiny_job(dist.get_world_size(), layout, model, global_batch=12, evaluate_sequences=12, precision=precision)
    )
    where: dict[torch.nn.Parameter, tuple[str, np.ndarray]] = {}
    for chunk in backend.built.chunks:
        module = unwrap(chunk)
        by_storage = {param.data_ptr(): param for param in module.parameters()}
        for item in nested_values(module.sharded_state_dict(metadata=metadata())):
            if not isinstance(item, ShardedTensor | ShardedTensorFactory) or item.data is None:
                continue
            param = by_storage[item.data.data_ptr()]
            parts = [item]
            if isinstance(item, ShardedTensorFactory):
                parts = list(nested_values(item.build_fn(item.key, item.data, item.replica_id, None)))
            where[param] = (_name(parts[0]), np.concatenate([_global_indices(part).ravel() for part in parts]))
    cells = {(name, index) for name, indices in where.values() for index in indices.tolist()}
    for wrapper in backend.built.optimizer.chained_optimizers:
        sharded = isinstance(wrapper, DistributedOptimizer)
        for param in wrapper.model_param_group_index_map if sharded else where:
            name, indices = where[param]
            if sharded:
                owned = wrapper._get_model_param_range_map(param)["param"]
                indices = indices[owned.start : owned.end]
            cells |= {(name + OPTIMIZER, index) for index in indices.tolist()}
    return cells


def _name(part: Any) -> str:
    """The layer, which megatron has as a leading axis, goes into the name."""
    if not part.prepend_axis_num:
        return part.key
    return part.key.replace("decoder.layers.", f"decoder.layers.{part.global_offset[0]}.", 1)


def _global_indices(part: Any) -> np.ndarray:
    lead = part.prepend_axis_num
    shape, offset = part.global_shape[lead:], part.global_offset[lead:]
    every = np.arange(int(np.prod(shape))).reshape(shape)
    return every[tuple(slice(start, start + size) for start, size in zip(offset, part.local_shape, strict=True))]


def _planned_cells(layout: Layout, model: dict[str, Any], precision: str) -> Iterator[set[tuple[str, int]]]:
    pieces = all_pieces(ModelShape(**{**SHAPE, **model}), layout, precision)
    width = {name: int(pieces.stop[pieces.name == index, 1].max()) for index, name in enumerate(pieces.names)}
    for rank in range(layout.accelerators):
        own = pieces.of_rank(rank)
        cells: set[tuple[str, int]] = set()
        for name, (top, left), (bottom, right) in zip(
            own.name.tolist(), own.start.tolist(), own.stop.tolist(), strict=True
        ):
            tensor = own.names[name]
            found = {
                (tensor, row * width[tensor] + column) for row in range(top, bottom) for column in range(left, right)
            }
            assert not found & cells, "no rank has a thing twice"
            cells |= found
        yield cells


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({"tp": 2, "dp": 2}, {}),
        ({"tp": 2, "dp": 2, "zero": 1}, {}),
        ({"dp": 4, "zero": 1}, {"tied_embeddings": True, "kv_heads": 2}),
        ({"pp": 2, "dp": 2, "zero": 1}, {"tied_embeddings": True}),
        ({"pp": 4}, {"tied_embeddings": True, "gated_mlp": False}),
        ({"tp": 2, "pp": 2, "sequence_parallel": True, "zero": 1}, {"tied_embeddings": True}),
        ({"pp": 2, "vp": 2, "dp": 2, "zero": 1}, {"tied_embeddings": True}),
        ({"pp": 2, "vp": 2, "tp": 2}, {"gated_mlp": False, "vocab": 100}),
        ({"tp": 4}, {"vocab": 130}),
        ({"dp": 3, "zero": 1}, {"vocab": 130}),
    ],
    ids=str,
)
def test_every_rank_has_what_the_arithmetic_says(layout: dict[str, Any], model: dict[str, Any], precision: str) -> None:
    described = Layout(**layout)
    live = run_ranks(described.accelerators, _megatron_cells, layout, model, precision)
    for rank, planned in enumerate(_planned_cells(described, model, precision)):
        assert planned == live[rank], rank


def test_gathered_shards_make_the_whole_model() -> None:
    """On any layout each element of the model is there, weights once for each replica, and nothing else."""
    for layout in (Layout(tp=2, pp=2, dp=2), Layout(tp=4, dp=3, zero=1), Layout(pp=2, vp=2, dp=5, zero=1)):
        model = ModelShape(**SHAPE)
        pieces = all_pieces(model, layout, "fp32")
        elements = (pieces.stop - pieces.start).prod(axis=1)
        weights = np.array([not name.endswith(OPTIMIZER) for name in pieces.names])[pieces.name]
        head, norms = 2 * SHAPE["layers"] * SHAPE["hidden"] + SHAPE["hidden"], layout.tp - 1  # norms: on every tp rank
        assert elements[weights].sum() == layout.dp * (model.parameters + norms * head)
        copies = 1 if layout.zero else layout.dp
        assert elements[~weights].sum() == copies * (model.parameters + norms * head)


def test_a_large_model_is_described_without_processes() -> None:
    """2048 ranks: weights of a replica add up to the model."""
    model = ModelShape(layers=80, hidden=8192, ffn_hidden=28672, heads=64, kv_heads=8, seq_len=8192, vocab=128256)
    pieces = all_pieces(model, Layout(tp=8, pp=8, dp=32, zero=1), "bf16")
    assert pieces.rank.max() == 2047
    optimizer = np.array([name.endswith(OPTIMIZER) for name in pieces.names])[pieces.name]
    norms = 7 * (2 * 80 + 1) * 8192
    assert pieces.bytes[optimizer].sum() == 12 * (model.parameters + norms)
    per_rank = np.bincount(pieces.rank[optimizer], weights=pieces.bytes[optimizer])
    assert per_rank.max() / per_rank.mean() < 1.1, "the distributed optimizer shares evenly"
