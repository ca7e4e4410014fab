"""Context parallelism on Megatron: the same losses, gradients and part norms as on one rank, moves to the bit, and
masks of windows and documents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.registry import find_backend
from copus.backends.step_contract import NOT_COUNTED, StepRequest
from copus.job import JobConfig, JobError
from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA
from profiles.accelerator import accelerator
from profiles.configurations import Configurations
from profiles.cost.work import HALF, work
from profiles.layout import Layout
from profiles.memory import MEGATRON
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, save_checkpoint, tiny_job
from tests.ranks import run_ranks
from tests.test_experts import MOE, _with_micro_batches_of
from tests.test_model_families import FAMILIES

SOURCE = "microbatch+normlayer"
Figures = tuple[list[float], float, list[np.ndarray]]
"""Losses; |g|² of the first step; |g_j|² of its parts, those of micro-batches and those of norm layers."""
Case = tuple[dict[str, Any], dict[str, Any]]
"""Layout and model."""


def _packed(first: int, count: int) -> tuple[torch.Tensor, ...]:
    """Sequences of two documents each, which attend within themselves, and labels that do not all count."""
    tokens, labels = random_batches(first, count)
    starts = torch.arange(first, first + count)[:, None] % 11 + 3
    documents = (torch.arange(16)[None, :] >= starts).long()
    positions = torch.arange(16)[None, :] - documents * starts
    return tokens, labels.where(tokens % 3 > 0, NOT_COUNTED), positions, documents


def _job(layout: dict[str, Any], model: dict[str, Any], micro_batch: int = 2, **training: Any) -> JobConfig:
    return tiny_job(dist.get_world_size(), layout, model, micro_batch=micro_batch, **training)


def _figures(job: JobConfig, batches: Any, steps: int, source: str = SOURCE) -> Figures:
    backend = backend_of(job)
    results = [
        backend.train_step(batches, StepRequest(8 * step, RULES, source if step == 0 else None))
        for step in range(steps)
    ]
    backend.close()
    parts = [kind for kind in (results[0].parts, results[0].norm_layer_parts) if kind is not None]
    squares = [np.sort(kind.squared_norms) for kind in parts]
    return [result.loss for result in results], results[0].grad_sq, squares


def _train(cases: list[Case], steps: int) -> list[Figures]:
    return [_figures(_job(layout, model), random_batches, steps) for layout, model in cases]


def _check_equal(expected: Figures, figures: Figures) -> None:
    losses, grad_sq, parts = figures
    np.testing.assert_allclose(losses, expected[0], rtol=1e-4)
    assert grad_sq == pytest.approx(expected[1], rel=1e-5)
    for kind, expected_kind in zip(parts, expected[2], strict=True):
        np.testing.assert_allclose(kind, expected_kind, rtol=1e-5)


@pytest.mark.dist
def test_two_ranks_that_share_sequences_out_train_as_one() -> None:
    model = FAMILIES["gemma"]
    (expected,) = run_ranks(1, _train, [({}, model)], 4)[0]
    for figures in run_ranks(2, _train, [({"cp": 2, "zero": zero}, model) for zero in (0, 1)], 4)[0]:
        _check_equal(expected, figures)


LAYOUTS: list[dict[str, Any]] = [
    {"cp": 4},
    {"cp": 2, "tp": 2},
    {"cp": 2, "tp": 2, "sequence_parallel": True},
    {"cp": 2, "pp": 2},
    {"cp": 2, "pp": 2, "vp": 2, "zero": 1},
    {"cp": 2, "dp": 2, "zero": 1, "recompute": "full"},
    {"cp": 2, "dp": 2, "recompute": "selective"},
]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_trains_as_one_rank(family: str) -> None:
    model = FAMILIES[family]
    (expected,) = run_ranks(1, _train, [({}, model)], 20)[0]
    assert expected[0][-1] < expected[0][0]
    for ranks, layouts in ((2, [{"cp": 2}]), (4, LAYOUTS)):
        cases = [(layout, model) for layout in layouts]
        for figures in run_ranks(ranks, _train, cases, 20, timeout_seconds=600)[0]:
            _check_equal(expected, figures)


def _train_experts(layout: dict[str, Any], ep: int, replicas: int, steps: int) -> Figures:
    """Micro-batches of one sequence, or on one rank of those that the replicas of a group run at a time."""
    one = dist.get_world_size() == 1
    batches = _with_micro_batches_of(ep, replicas) if one else random_batches
    return _figures(_job(layout, MOE, micro_batch=ep if one else 1), batches, steps)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "together"),
    [
        ({"cp": 2}, 1),
        ({"cp": 2, "ep": 2, "zero": 1}, 1),
        ({"cp": 2, "dp": 2, "ep": 2}, 1),
        ({"cp": 2, "dp": 2, "ep": 4}, 2),
        ({"cp": 2, "tp": 2, "sequence_parallel": True, "ep": 2}, 1),
        ({"cp": 2, "tp": 2, "sequence_parallel": True, "ep": 4, "etp": 1}, 1),
    ],
    ids=str,
)
def test_ranks_that_share_experts_and_sequences_out_train_as_one(layout: dict[str, Any], together: int) -> None:
    """`together` is the number of replicas whose micro-batches are one part."""
    dp = layout.get("dp", 1)
    expected = run_ranks(1, _train_experts, {}, together, dp, 20)[0]
    figures = run_ranks(Layout(**layout).accelerators, _train_experts, layout, together, dp, 20)[0]
    assert [len(kind) for kind in figures[2]] == [8 // together, 8]
    _check_equal(expected, figures)


def _packed_losses(layout: dict[str, Any], model: dict[str, Any]) -> tuple[list[float], float]:
    """Losses of training on documents, and the held-out loss before it."""
    job = _job(layout, model)
    data = job.data.model_copy(update={"reset_attention_mask": True, "eod_mask_loss": True})
    backend = backend_of(job.model_copy(update={"data": data}))
    held_out = backend.held_out_loss(_packed, 8)
    return [backend.train_step(_packed, StepRequest(8 * step, RULES)).loss for step in range(3)], held_out


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{"cp": 2}, pytest.param({"cp": 2, "pp": 2}, marks=pytest.mark.slow)], ids=str)
def test_documents_and_labels_that_do_not_count_are_those_of_one_rank(layout: dict[str, Any]) -> None:
    model = FAMILIES["gemma"]
    losses, held_out = run_ranks(1, _packed_losses, {}, model)[0]
    other_losses, other_held_out = run_ranks(Layout(**layout).accelerators, _packed_losses, layout, model)[0]
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    assert other_held_out == pytest.approx(held_out, rel=1e-5)


def _replicas(layout: dict[str, Any]) -> Figures:
    return _figures(_job(layout, {}), random_batches, 1, REPLICA)


def _in_adams_metric(layout: dict[str, Any]) -> tuple[float, np.ndarray]:
    """|g|² and |g_j|² divided by Adam's √v̂, of the second step."""
    job = _job(layout, FAMILIES["qwen"])
    backend = backend_of(job.model_copy(update={"planner": job.planner.model_copy(update={"noise_metric": "adam"})}))
    for step in range(2):
        result = backend.train_step(random_batches, StepRequest(8 * step, RULES, MICROBATCH))
    assert result.parts is not None
    return result.parts.grad_sq, np.sort(result.parts.squared_norms)


@pytest.mark.dist
@pytest.mark.slow
def test_replicas_are_the_same_parts_with_and_without_shared_sequences() -> None:
    _check_equal(run_ranks(2, _replicas, {"dp": 2})[0], run_ranks(4, _replicas, {"dp": 2, "cp": 2})[0])


@pytest.mark.dist
@pytest.mark.slow
def test_part_norms_in_adams_metric_are_those_of_one_rank() -> None:
    grad_sq, parts = run_ranks(1, _in_adams_metric, {})[0]
    for layout in ({"cp": 2}, {"cp": 2, "zero": 1}):
        other_grad_sq, other_parts = run_ranks(2, _in_adams_metric, layout)[0]
        assert other_grad_sq == pytest.approx(grad_sq, rel=1e-2)
        np.testing.assert_allclose(other_parts, parts, rtol=1e-2)


def _exchanged_elements(layouts: list[dict[str, Any]]) -> list[float]:
    """Elements that this rank receives in a step of one micro-batch."""
    from megatron.core.tensor_parallel import mappings

    totals = []
    counts: list[float] = []
    gather, scatter = mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func

    def counting(exchange: Any) -> Any:
        def call(output: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
            counts.append(abs(output.numel() - own.numel()))
            return exchange(output, own, **options)

        return call

    mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func = counting(gather), counting(scatter)
    for layout in layouts:
        backend = backend_of(_job(layout, {"kv_heads": 2}, global_batch=2))
        backend.train_step(random_batches, StepRequest(0, RULES))
        backend.close()
        totals.append(sum(counts))
        counts.clear()
    return totals


@pytest.mark.dist
def test_the_exchange_is_the_one_that_the_cost_model_counts() -> None:
    layouts: list[dict[str, Any]] = [{"cp": 2}, {"cp": 2, "recompute": "selective"}, {"cp": 2, "recompute": "full"}]
    job = tiny_job(2, {"cp": 2}, {"kv_heads": 2})
    device = accelerator(job.cluster.accelerator)
    arrays = Configurations.of([configuration(2, 2, **layout) for layout in layouts])
    counted = work(job.model, job.cluster, device, arrays, "fp32", context=MEGATRON.context)
    a_layer = counted.layer_cp * device.inside_node.bytes_per_second / HALF
    np.testing.assert_allclose(run_ranks(2, _exchanged_elements, layouts)[0], job.model.layers * a_layer)


def _tour(layouts: list[dict[str, Any]], precision: str, folder: str) -> tuple[list[str], list[float]]:
    """What was not the same after the state went through all layouts and back, and through a checkpoint; and the loss
    of the same step after each of both."""
    backend = backend_of(_job(layouts[0], {"kv_heads": 2}, micro_batch=1, precision=precision))
    for step in range(2):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
    for layout in [*layouts[1:], layouts[0]]:
        backend.move(configuration(8, 1, **layout))
    changed = _differences(backend, before)
    save_checkpoint(backend, Path(folder) / "state")
    moved = backend.train_step(random_batches, StepRequest(16, RULES)).loss
    backend.close()
    backend.build(configuration(8, 1, **layouts[1]))
    backend.load(Path(folder) / "state", 2)
    loaded = backend.train_step(random_batches, StepRequest(16, RULES)).loss
    backend.load(Path(folder) / "state", 2)
    backend.move(configuration(8, 1, **layouts[0]))
    return changed + _differences(backend, before), [moved, loaded]


def _differences(backend: Any, before: dict[Any, torch.Tensor]) -> list[str]:
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    assert after.keys() == before.keys()
    return [str(place[0]) for place, tensor in before.items() if not torch.equal(tensor, after[place])]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layouts", "precision"),
    [
        ([{"cp": 2, "zero": 1}, {"dp": 2}, {"cp": 2}, {"tp": 2}], "fp32"),
        pytest.param(
            [
                {"cp": 2, "dp": 2, "zero": 1},
                {"cp": 2, "tp": 2, "sequence_parallel": True},
                {"cp": 4, "zero": 1},
                {"cp": 2, "pp": 2, "zero": 1},
                {"dp": 4, "zero": 1},
                {"cp": 4},
                {"tp": 2, "pp": 2},
            ],
            "bf16",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["two ranks", "four ranks"],
)
def test_moves_and_a_checkpoint_change_no_bit(layouts: list[dict[str, Any]], precision: str, tmp_path: Path) -> None:
    ranks = Layout(**layouts[0]).accelerators
    for changed, (moved, loaded) in run_ranks(ranks, _tour, layouts, precision, str(tmp_path)):
        assert changed == []
        assert loaded == pytest.approx(moved, rel=1e-2 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ({"cp": 3}, {"seq_len": 16}, "training.layout: model.seq_len(16) ÷ 2·cp(6) is not whole: 2.66667"),
        (
            {"cp": 4, "tp": 4, "sequence_parallel": True},
            {"seq_len": 24},
            "training.layout: model.seq_len(24) ÷ tp·cp(16) is not whole: 1.5",
        ),
        ({"cp": 4, "ep": 2}, MOE, "training: ep(2) ÷ cp(4) is not whole: 0.5"),
    ],
)
def test_impossible_splits_of_sequences_are_refused(
    layout: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as refused:
        tiny_job(Layout(**layout).accelerators, layout, model)
    assert message in str(refused.value)


def test_other_backends_refuse_shared_sequences() -> None:
    for backend in ("fsdp", "deepspeed"):
        with pytest.raises(ValueError, match=r"cp\(2\)"):
            find_backend(backend).check_layout(Layout(cp=2))


def test_a_part_is_a_micro_batch_whoever_shares_its_sequences() -> None:
    parts = find_backend("megatron").parts
    assert parts(configuration(16, 2, cp=2, dp=4)) == {MICROBATCH: (8, 2), REPLICA: (4, 4), NORMLAYER: (16, 1)}
    assert parts(configuration(16, 2, cp=2, dp=4, ep=2)) == {MICROBATCH: (8, 2), NORMLAYER: (16, 1)}
    assert parts(configuration(16, 2, cp=2, dp=4, ep=4)) == {MICROBATCH: (4, 4), NORMLAYER: (16, 1)}
