"""The table of who holds what, against what megatron says of itself on real ranks."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.megatron import model as megatron_model
from copus.backends.megatron.local_tensors import unwrap
from copus.backends.megatron.shard_table import shard_table
from copus.job import parse_job
from copus.reshard.table import ShardTable
from profiles.layout import Layout
from profiles.model_shape import ModelShape
from tests.megatron_jobs import backend_of, tiny_job
from tests.ranks import run_ranks

LARGE = {
    "layers": 80,
    "hidden": 8192,
    "ffn_hidden": 28672,
    "heads": 64,
    "kv_heads": 8,
    "seq_len": 8192,
    "vocab": 128256,
}
Cells = set[tuple[str, int]]


def _job(ranks: int, layout: dict[str, Any], model: dict[str, Any], precision: str, **training: Any) -> Any:
    return tiny_job(ranks, layout, model, global_batch=12, evaluate_sequences=12, precision=precision, **training)


def _small_buckets() -> None:
    """From now on, in this process, buckets have 4,000 elements or a little more."""
    megatron_model.DistributedDataParallelConfig = functools.partial(  # type: ignore[misc,assignment]
        megatron_model.DistributedDataParallelConfig, bucket_size=4000
    )


def _megatron_cells(
    layout: dict[str, Any], model: dict[str, Any], precision: str, overlap: bool = False
) -> tuple[Cells, Cells]:
    """Every element of every tensor of this rank, from megatron's sharded metadata and its optimizer's range maps; and
    as the table says."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if overlap:
        _small_buckets()
    job = _job(dist.get_world_size(), layout, model, precision, overlap_grad_reduce=overlap)
    backend = backend_of(job)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    where: dict[torch.nn.Parameter, list[tuple[str, int]]] = {}
    for chunk in backend.built.chunks:
        module = unwrap(chunk)
        by_storage = {param.data_ptr(): param for param in module.parameters()}
        for item in nested_values(module.sharded_state_dict(metadata=metadata)):
            if not isinstance(item, ShardedTensor | ShardedTensorFactory) or item.data is None:
                continue
            param = by_storage[item.data.data_ptr()]
            parts = [item]
            if isinstance(item, ShardedTensorFactory):
                parts = list(nested_values(item.build_fn(item.key, item.data, item.replica_id, None)))
            names, indices = _hugging_face(_name(parts[0]), _shape(parts[0]), job.model)
            own = np.concatenate([_global_indices(part).ravel() for part in parts])
            where[param] = list(zip(names[own].tolist(), indices[own].tolist(), strict=True))
    cells = {cell for cells in where.values() for cell in cells}
    kept = ["exp_avg", "exp_avg_sq"] + ["master"] * (precision == "bf16")
    for wrapper in backend.built.optimizer.chained_optimizers:
        sharded = isinstance(wrapper, DistributedOptimizer)
        for param in wrapper.model_param_group_index_map if sharded else where:
            of_param = where[param]
            if sharded:
                owned = wrapper._get_model_param_range_map(param)["param"]
                of_param = of_param[owned.start : owned.end]
            cells |= {(f"{name}/{field}", index) for name, index in of_param for field in kept}
    table = backend.shard_table(job.training.layout)
    assert {*backend.live_state()} == {*table.of_rank(dist.get_rank())}, "and so are the live tensors"
    if overlap and job.training.layout.zero:
        buffers = [len(chunk.buffers[0].buckets) for chunk in backend.built.chunks]
        assert dist.get_rank() or max(buffers) > 3, "there are several buckets"
    backend.close()
    return cells, _cells(table, dist.get_rank())


def _name(part: Any) -> str:
    """The layer, which megatron has as a leading axis, goes into the name."""
    if not part.prepend_axis_num:
        return part.key
    return part.key.replace("decoder.layers.", f"decoder.layers.{part.global_offset[0]}.", 1)


def _shape(part: Any) -> tuple[int, ...]:
    return part.global_shape[part.prepend_axis_num :]


def _hugging_face(name: str, shape: tuple[int, ...], model: ModelShape) -> tuple[np.ndarray, np.ndarray]:
    """For each element of a Megatron tensor, flattened: the Hugging Face tensor that it is in, and where in that."""
    name = name.replace("decoder.layers", "model.layers").replace("pre_mlp_layernorm", "post_attention_layernorm")
    name = name.replace("decoder.final_layernorm", "model.norm").replace("output_layer", "lm_head")
    name = name.replace("embedding.word_embeddings", "model.embed_tokens")
    name = name.replace("self_attention.linear_proj", "self_attn.o_proj").replace("mlp.linear_fc2", "mlp.down_proj")
    if not model.gated_mlp:
        name = name.replace("mlp.linear_fc1", "mlp.up_proj")
    names, indices = np.full(shape, name, object), np.arange(np.prod(shape)).reshape(shape)
    if "linear_fc1" in name:
        for half, which in enumerate(("gate_proj", "up_proj")):
            rows = slice(half * model.ffn_hidden, (half + 1) * model.ffn_hidden)
            names[rows] = name.replace("linear_fc1", which)
            indices[rows] = np.arange(indices[rows].size).reshape(indices[rows].shape)
    if "linear_qkv" in name:
        queries, width = model.heads // model.kv_heads, model.hidden // model.heads
        grouped = (model.kv_heads, queries + 2, width, *shape[1:])
        grouped_names, grouped_indices = names.reshape(grouped), indices.reshape(grouped)  # views
        for which, heads in (("q_proj", slice(0, queries)), ("k_proj", [queries]), ("v_proj", [queries + 1])):
            grouped_names[:, heads] = name.replace("self_attention.linear_qkv", f"self_attn.{which}")
            part = grouped_indices[:, heads]
            grouped_indices[:, heads] = np.arange(part.size).reshape(part.shape)
    return names.ravel(), indices.ravel()


def _global_indices(part: Any) -> np.ndarray:
    shape, offset = _shape(part), part.global_offset[part.prepend_axis_num :]
    every = np.arange(int(np.prod(shape))).reshape(shape)
    return every[tuple(slice(start, start + size) for start, size in zip(offset, part.local_shape, strict=True))]


def _cells(table: ShardTable, rank: int) -> Cells:
    cells: Cells = set()
    for field, box in table.of_rank(rank).values():
        every = np.arange(int(np.prod(field.shape))).reshape(field.shape)
        indices = every[tuple(slice(low, high) for low, high in zip(box.offset, box.stop, strict=True))]
        part = {(field.name, index) for index in indices.ravel().tolist()}
        assert not part & cells, "no rank has a thing twice"
        cells |= part
    return cells


def _in_both_precisions(layout: dict[str, Any], model: dict[str, Any]) -> list[tuple[Cells, Cells]]:
    return [_megatron_cells(layout, model, precision) for precision in ("fp32", "bf16")]


@pytest.mark.dist
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
        ({"tp": 2, "dp": 2, "zero": 1}, {"kv_heads": 2}),
        ({"tp": 4}, {"vocab": 130}),
        ({"dp": 3, "zero": 1}, {"vocab": 130}),
    ],
    ids=str,
)
def test_every_rank_has_what_the_table_says(layout: dict[str, Any], model: dict[str, Any]) -> None:
    for rank in run_ranks(Layout(**layout).accelerators, _in_both_precisions, layout, model):
        for live, planned in rank:
            assert live == planned


@pytest.mark.dist
@pytest.mark.parametrize(
    "layout", [{"dp": 2, "zero": 1}, {"pp": 2, "dp": 2, "zero": 1}, {"pp": 2, "vp": 2, "dp": 2, "zero": 1}], ids=str
)
def test_buckets_that_overlap_with_the_backward_pass_are_those_of_megatron(layout: dict[str, Any]) -> None:
    ranks = Layout(**layout).accelerators
    for live, planned in run_ranks(ranks, _megatron_cells, layout, {"tied_embeddings": True}, "bf16", True):
        assert live == planned


def _is_weight(table: ShardTable) -> np.ndarray:
    return np.array(["/" not in fields[0].name for fields in table.groups])[table.group]


def test_gathered_shards_make_the_whole_model() -> None:
    """On any layout each element of the model is there, weights once for each replica, and nothing else."""
    for layout in (Layout(tp=2, pp=2, dp=2), Layout(tp=4, dp=3, zero=1), Layout(pp=2, vp=2, dp=5, zero=1)):
        job = tiny_job(1)
        table = shard_table(job, layout)
        elements, weights = (table.stop - table.start).prod(axis=1), _is_weight(table)
        norms = (2 * job.model.layers + 1) * job.model.hidden * (layout.tp - 1)  # norms are on every tensor rank
        assert elements[weights].sum() == layout.dp * (job.model.parameters + norms)
        copies = 1 if layout.zero else layout.dp
        assert elements[~weights].sum() == copies * (job.model.parameters + norms)


def test_a_large_model_is_described_without_processes() -> None:
    """2048 ranks: weights of a replica add up to the model."""
    job = parse_job(
        {
            "name": "large",
            "model": LARGE,
            "cluster": {"nodes": 256, "accelerators_per_node": 8},
            "training": {
                "layout": {"dp": 2048},
                "global_batch": 2048,
                "evaluate_sequences": 2048,
                "tokens": 10**12,
                "precision": "bf16",
            },
        }
    )
    table = shard_table(job, Layout(tp=8, pp=8, dp=32, zero=1))
    assert table.rank.max() == 2047
    optimizer = ~_is_weight(table)
    norms = 7 * (2 * 80 + 1) * 8192
    assert table.bytes[optimizer].sum() == 12 * (job.model.parameters + norms)
    per_rank = np.bincount(table.rank[optimizer], weights=table.bytes[optimizer])
    assert per_rank.max() / per_rank.mean() < 1.1, "the distributed optimizer shares evenly"
