"""The FSDP backend: every layout trains as one rank does, moves and checkpoints are exact, and the noise is right."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from copus.backends.fsdp.backend import FsdpBackend
from copus.backends.fsdp.mesh import REPLICATE, SHARD, TENSOR, Meshes
from copus.backends.fsdp.shards import fields_of, shard_table
from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.registry import find_backend
from copus.backends.step_contract import StepRequest
from copus.job import JobError, parse_job
from copus.reshard.plan import owned_parts
from copus.reshard.table import Place
from launch.engines.this_machine import check_this_machine
from profiles.layout import Layout
from tests.fsdp_jobs import fsdp_backend_of, fsdp_job
from tests.megatron_jobs import RULES, configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks

TRAINING = fsdp_job(1, {}).training
TIED = {"tied_embeddings": True, "heads": 8}
OF_TWO: list[dict[str, Any]] = [{"dp": 2, "zero": zero} for zero in range(4)] + [{"tp": 2}]
OF_FOUR: list[dict[str, Any]] = [
    {"dp": 4, "zero": 3},
    {"dp": 4, "zero": 3, "dp_replicate": 2},
    {"dp": 4, "zero": 1, "dp_replicate": 2},
    {"tp": 2, "dp": 2, "zero": 2},
    {"tp": 2, "dp": 2},
    {"tp": 4},
    {"tp": 2, "dp": 2, "zero": 3, "recompute": "full"},
]
Figures = tuple[float, float, list[float] | None, list[float] | None, float]
"""Loss, |g|², |g_j|² of parts and of the norm layers' sequences, and the loss of an evaluation."""


def _train(layouts: list[dict[str, Any]], model: dict[str, Any], source: str, **training: Any) -> list[list[Figures]]:
    """The figures of two steps from the same weights, in every layout."""
    backend = fsdp_backend_of(fsdp_job(dist.get_world_size(), layouts[0], model, micro_batch=2, **training))
    shown = []
    for layout in layouts:
        backend.build(configuration(8, 2, **layout))
        steps: list[Figures] = []
        for step in range(2):
            result = backend.train_step(random_batches, StepRequest(8 * step, RULES, source))
            parts, norm_layers = (
                None if kind is None else kind.squared_norms.tolist()
                for kind in (result.parts, result.norm_layer_parts)
            )
            evaluated = backend.evaluate(random_batches, 8)
            steps.append((result.loss, result.grad_sq, parts, norm_layers, evaluated))
        shown.append(steps)
    return shown


@pytest.mark.dist
@pytest.mark.parametrize(
    "layouts", [pytest.param(OF_TWO, id="2 ranks", marks=pytest.mark.slow), pytest.param(OF_FOUR, id="4 ranks")]
)
def test_every_layout_trains_as_one_rank_does(layouts: list[dict[str, Any]]) -> None:
    source = "microbatch+normlayer"
    (expected,) = run_ranks(1, _train, [{}], TIED, source)[0]
    shown = run_ranks(Layout(**layouts[0]).accelerators, _train, layouts, TIED, source)[0]
    for layout, steps in zip(layouts, shown, strict=True):
        for figures, alone in zip(steps, expected, strict=True):
            for figure, right in zip(figures, alone, strict=True):
                np.testing.assert_allclose(figure, right, rtol=3e-6, err_msg=str(layout))


def _train_compiled(compiled: bool) -> list[list[Figures]]:
    layouts: list[dict[str, Any]] = [{"dp": 2, "zero": 3, "recompute": "full"}, {"tp": 2}]
    return _train(layouts, TIED, "microbatch+normlayer", compile=compiled)


@pytest.mark.dist
@pytest.mark.slow
def test_compiled_layers_train_as_others_do() -> None:
    eager, compiled = (run_ranks(2, _train_compiled, flag, timeout_seconds=900)[0] for flag in (False, True))
    for steps, right in zip(compiled, eager, strict=True):
        for figures, expected in zip(steps, right, strict=True):
            for figure, value in zip(figures, expected, strict=True):
                np.testing.assert_allclose(figure, value, rtol=1e-5)


def test_a_compiled_job_without_a_compiler_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copus.backends.fsdp.description._COMPILERS", ("no-such-compiler",))
    with pytest.raises(JobError, match=r"training.compile\(true\) needs a C\+\+ compiler"):
        FsdpBackend(fsdp_job(1, {}, compile=True), torch.device("cpu"))
    with pytest.raises(JobError, match=r"^training.compile\(true\) needs a C\+\+ compiler"):  # before anything starts
        check_this_machine(fsdp_job(1, {}, compile=True))


@pytest.mark.parametrize("backend", ["megatron", "deepspeed"])
def test_other_backends_refuse_to_compile(backend: str) -> None:
    values = fsdp_job(2, {"dp": 2}, compile=True).model_dump(mode="json")
    values["training"] |= {"backend": backend}
    with pytest.raises(JobError, match=r"training: compile\(true\) is not supported by this backend"):
        parse_job(values)


@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
def test_other_backends_refuse_to_offload(backend: str) -> None:
    with pytest.raises(JobError, match=r"offload_optimizer\(true\) is not supported by this backend"):
        tiny_job(2, {"dp": 2, "zero": 1, "offload_optimizer": True}, backend=backend)


def _by_autograd(part_size: int) -> tuple[float, float, list[float], list[float]]:
    """Loss, |g|² of the mean, |g_j|² of the parts and of the norm layers' sequences, by torch alone."""
    job = fsdp_job(1, {}, TIED)
    model = build_causal_lm(job.model, torch.float32, torch.device("cpu"), job.training.seed)

    def gradients(first: int, count: int, norms_only: bool) -> torch.Tensor:
        chosen = [weight for name, weight in model.named_parameters() if "norm" in name or not norms_only]
        loss = mean_loss(model, *random_batches(first, count))
        return torch.cat([each.double().flatten() for each in torch.autograd.grad(loss, chosen)])

    parts = torch.stack([gradients(first, part_size, False) for first in range(0, 8, part_size)])
    sequences = torch.stack([gradients(first, 1, True) for first in range(8)])
    loss = mean_loss(model, *random_batches(0, 8)).item()
    grad_sq = parts.mean(dim=0).square().sum().item()
    return loss, grad_sq, parts.square().sum(dim=1).tolist(), sequences.square().sum(dim=1).tolist()


@pytest.mark.dist
def test_norms_of_parts_are_those_of_autograd() -> None:
    for source, part_size, zero in (("microbatch+normlayer", 2, 3), ("replica", 4, 1)):
        ((figures, *_),) = run_ranks(2, _train, [{"dp": 2, "zero": zero}], TIED, source)[0]
        loss, grad_sq, parts, sequences = _by_autograd(part_size)
        np.testing.assert_allclose(figures[0], loss, rtol=1e-6)
        np.testing.assert_allclose(figures[1], grad_sq, rtol=1e-6)
        np.testing.assert_allclose(figures[2], parts, rtol=1e-6)
        if figures[3] is not None:
            np.testing.assert_allclose(figures[3], sequences, rtol=1e-6)


def _tour(layouts: list[dict[str, Any]], precision: str, folder: Path) -> list[str]:
    """Fields that are not what they were after a tour of moves that ends where it began, or after a checkpoint of the
    last layout on the way was read in the first."""
    backend = fsdp_backend_of(
        fsdp_job(dist.get_world_size(), layouts[0], TIED, micro_batch=2, precision=precision, staging_bytes=4096)
    )
    for step in range(2):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
    assert any(bool(tensor.any()) for (name, _), tensor in before.items() if name.endswith("exp_avg"))
    for layout in layouts[1:]:
        backend.move(configuration(8, 2, **layout))
    save = backend.begin_save(folder, copy=False)
    save.write()
    save.finish()
    backend.move(configuration(8, 2, **layouts[0]))
    changed = _changed(before, backend)
    backend.build(configuration(8, 2, **layouts[0]))
    assert len(_changed(before, backend)) > len(before) / 2, "the build begins anew"
    backend.load(folder, 2)
    assert backend.optimizer_steps == 2
    return changed + _changed(before, backend)


def _changed(before: dict[Place, torch.Tensor], backend: FsdpBackend) -> list[str]:
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    assert before.keys() == after.keys()
    return [place[0] for place, tensor in before.items() if not torch.equal(tensor, after[place])]


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_moves_and_checkpoints_are_exact_to_the_bit(precision: str, tmp_path: Path) -> None:
    assert run_ranks(4, _tour, OF_FOUR, precision, tmp_path) == [[]] * 4


def _go_on(layouts: list[dict[str, Any]]) -> list[float]:
    """Losses of a job that goes through the layouts, two steps in each."""
    backend = fsdp_backend_of(fsdp_job(dist.get_world_size(), layouts[0], TIED, micro_batch=2))
    losses = []
    for index, layout in enumerate(layouts):
        backend.evaluate(random_batches, 8)  # leaves nothing behind that a move would not see
        backend.move(configuration(8, 2, **layout))
        for step in (2 * index, 2 * index + 1):
            losses.append(backend.train_step(random_batches, StepRequest(8 * step, RULES)).loss)
    return losses


@pytest.mark.dist
@pytest.mark.slow
def test_losses_go_on_as_if_nothing_had_moved() -> None:
    stays = run_ranks(1, _go_on, [{}] * 4)[0]
    moves = run_ranks(4, _go_on, [OF_FOUR[index] for index in (1, 3, 0, 5)])[0]
    np.testing.assert_allclose(moves, stays, rtol=1e-5)


def _make_groups_anew() -> list[tuple[float, ...]]:
    """Sums of the ranks over the groups of each dimension, which are made, destroyed and made again."""
    meshes, sums = Meshes(own_device(), 60), []
    for layout in (*(Layout(**degrees) for degrees in OF_FOUR),) * 2:
        mesh, own = meshes.mesh(layout), []
        for dimension in (REPLICATE, SHARD, TENSOR):
            rank = torch.full((1,), float(dist.get_rank()), device=own_device())
            dist.all_reduce(rank, group=mesh.get_group(dimension))
            own.append(rank.item())
        sums.append(tuple(own))
        meshes.destroy()
    return sums


@pytest.mark.dist
def test_groups_that_are_destroyed_are_made_anew() -> None:
    for rank, sums in enumerate(run_ranks(4, _make_groups_anew, timeout_seconds=200)):
        for degrees, own in zip(OF_FOUR * 2, sums, strict=True):
            layout = Layout(**degrees)
            ranks = np.arange(4).reshape(-1, layout.dp_shard, layout.tp)
            replica, shard, tensor = (int(place[0]) for place in np.nonzero(ranks == rank))
            lines = (ranks[:, shard, tensor], ranks[replica, :, tensor], ranks[replica, shard])
            assert own == tuple(float(line.sum()) for line in lines), layout.label


def _living_bytes() -> int:
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = [item.untyped_storage() for item in alive]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held_bytes() -> list[int]:
    """Memory of all tensors that live after each return to the first layout."""
    backend = fsdp_backend_of(fsdp_job(2, {"dp": 2, "zero": 3}, {"hidden": 128, "ffn_hidden": 512}, micro_batch=2))
    held = []
    for _ in range(4):
        for layout in ({"tp": 2}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}):
            backend.move(configuration(8, 2, **layout))
            backend.train_step(random_batches, StepRequest(0, RULES, "microbatch+normlayer"))
        held.append(_living_bytes())
    return held


@pytest.mark.dist
@pytest.mark.slow
def test_moving_to_and_fro_does_not_grow() -> None:
    for held in run_ranks(2, _held_bytes):
        assert max(held) <= 1.02 * held[0]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
def test_every_part_of_the_state_is_held_as_often_as_the_layout_says(
    tp: int, shard: int, replicate: int, zero: int, rows: int, columns: int
) -> None:
    layout = Layout(tp=tp, dp=shard * replicate, zero=zero, dp_replicate=replicate if zero and shard > 1 else 1)  # type: ignore[arg-type]
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("model.layers.0.self_attn.q_proj.weight", (tp * rows, columns)),
        ("model.layers.0.mlp.down_proj.weight", (rows, tp * columns)),
        ("model.norm.weight", (rows,)),
    ]
    table = shard_table(shapes, TRAINING, layout)
    copies = layout.dp // layout.dp_shard
    elements = sum(np.prod(shape) * (1 if name.startswith("model.layers") else tp) for name, shape in shapes)
    assert table.bytes.sum() == 12 * elements * copies
    owned = owned_parts(table)  # raises if a part has no owner
    assert owned.bytes.sum() == 12 * sum(np.prod(shape) for _, shape in shapes)


def test_a_master_copy_is_the_only_weight_of_a_bf16_job() -> None:
    training = fsdp_job(1, {}, precision="bf16").training
    names = [field.name for fields, _ in fields_of("model.norm.weight", (4,), training) for field in fields]
    assert names == [f"model.norm.weight/{kept}" for kept in ("master", "exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"layout": {"pp": 2}}}, r"training: pp\(2\) is not supported by the fsdp backend: at most 1"),
        (
            {"training": {"layout": {"tp": 2, "sequence_parallel": True}}},
            r"training: sequence_parallel\(true\) is not supported by the fsdp backend",
        ),
        ({"training": {"layout": {"dp": 2, "dp_replicate": 2}}}, r"dp_replicate\(2\) needs zero > 0"),
        (
            {"training": {"layout": {"dp": 2, "zero": 3, "dp_replicate": 4}}},
            r"dp\(2\) ÷ dp_replicate\(4\) is not whole: 0.5",
        ),
        (
            {"training": {"layout": {"dp": 2, "zero": 3, "dp_replicate": 2}}},
            r"dp_replicate\(2\) leaves dp\(2\) ÷ dp_replicate = 1 rank for each copy, which shares nothing out",
        ),
        ({"training": {"overlap_grad_reduce": True}}, r"overlap_grad_reduce\(true\): the fsdp backend always overlaps"),
        (
            {"training": {"layout": {"tp": 2}}, "model": {"qk_norm": "head"}},
            r"training.layout: tp\(2\) with model.qk_norm\(head\) is not supported by the fsdp backend",
        ),
        ({"training": {"dropout": 0.1}}, r"training: dropout\(0.1\)"),
        ({"planner": {"noise_metric": "adam"}}, r"planner: noise_metric\(adam\): this backend has plain"),
        ({"model": {"experts": 4}}, r"model: experts\(4\): only dense models"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    values = fsdp_job(2, {"dp": 2}).model_dump(mode="json")
    for section, fields in changes.items():
        values[section] |= fields
    with pytest.raises(JobError, match=message) as caught:
        parse_job(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["megatron", "deepspeed"])
def test_other_backends_refuse_hybrid_sharding(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"dp_replicate\(2\) is not supported by the {backend} backend: at most 1"):
        find_backend(backend).check_layout(Layout(dp=4, zero=1, dp_replicate=2))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copus.backends.description.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'copus\[fsdp\]'"):
        find_backend("fsdp").check_installed()


def test_a_torch_that_is_too_old_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copus.backends.description.version", lambda name: "2.9.1+cu130")
    with pytest.raises(ValueError, match=r"needs torch 2\.13 or newer, and torch 2\.9\.1\+cu130 is installed"):
        find_backend("fsdp").check_installed()
    find_backend("megatron").check_installed()
