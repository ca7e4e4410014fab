"""A job that changes batch and layout, and one that never does: the same losses."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copus.backends.step_contract import StepRequest
from copus.reshard import execute
from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

STEPS = 4


def _train(layouts: list[dict[str, Any]], model: dict[str, Any]) -> list[float]:
    """Losses of a job that goes through the layouts, a few steps in each."""
    backend = backend_of(tiny_job(dist.get_world_size(), layouts[0], model, micro_batch=2))
    losses, sample = [], 0
    for layout in layouts:
        backend.move(configuration(8, 2, **layout))
        for _ in range(STEPS):
            losses.append(backend.train_step(random_batches, StepRequest(sample, RULES)).loss)
            sample += 8
    assert backend.optimizer_steps == len(losses)
    return losses


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """Losses of a job that never moves, by model."""
    runs: dict[str, list[float]] = {}

    def run(model: dict[str, Any]) -> list[float]:
        if str(model) not in runs:
            runs[str(model)] = run_ranks(1, _train, [{}] * 3, model)[0]
        return runs[str(model)]

    return run


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layouts", "model"),
    [
        ([{"tp": 2}, {"dp": 2}, {"pp": 2}], {}),
        ([{"dp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}], {"tied_embeddings": True}),
        ([{"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}], {}),
        (  # stages of 1, 2, 2 and 1 layers
            [{"dp": 4, "zero": 1}, {"tp": 2, "dp": 2, "zero": 1}, {"pp": 4, "zero": 1}],
            {"tied_embeddings": True, "layers": 6},
        ),
        # Chunks of 1, 2, 2 and 1 layers.
        ([{"tp": 2}, {"pp": 2, "vp": 2}, {"dp": 2}], {"tied_embeddings": True, "layers": 6}),
    ],
    ids=str,
)
def test_losses_go_on_as_if_nothing_had_moved(
    layouts: list[dict[str, Any]], model: dict[str, Any], one_rank: Any
) -> None:
    """Each move is followed by steps: a wrong Adam state (moments, or the shared step counter of upstream) shows
    there."""
    ranks = np.prod([layouts[0].get(name, 1) for name in ("tp", "pp", "dp")])
    moves = run_ranks(int(ranks), _train, layouts, model)[0]
    np.testing.assert_allclose(moves, one_rank(model), rtol=1e-4)


def _change_batch() -> tuple[list[float], list[int]]:
    backend = backend_of(tiny_job(2, {"tp": 2}, micro_batch=2))
    losses, sizes = [], []
    for global_batch, micro_batch in ((8, 2), (16, 4), (4, 1)):
        moved = backend.move(configuration(global_batch, micro_batch, tp=2)).bytes_moved
        result = backend.train_step(random_batches, StepRequest(0, RULES, "microbatch"))
        assert result.parts is not None
        losses.append(result.loss)
        sizes.append(len(result.parts.squared_norms))
        assert moved == 0
    return losses, sizes


@pytest.mark.dist
def test_a_batch_change_moves_nothing() -> None:
    losses, parts = run_ranks(2, _change_batch)[0]
    assert parts == [4, 4, 4]
    assert all(np.isfinite(losses))


def _refused() -> tuple[str, float]:
    """A layout that cannot run is refused before anything is touched: training goes on."""
    backend = backend_of(tiny_job(2, micro_batch=2))
    with pytest.raises(ValueError, match="not supported") as caught:
        backend.move(configuration(8, 2, tp=2, zero=2))
    return str(caught.value), backend.train_step(random_batches, StepRequest(0, RULES)).loss


@pytest.mark.dist
def test_impossible_moves_are_refused_with_the_reason() -> None:
    reason, loss = run_ranks(2, _refused)[0]
    assert "zero(2)" in reason
    assert np.isfinite(loss)


def _there_and_back(
    layouts: list[dict[str, Any]],
    model: dict[str, Any],
    precision: str = "fp32",
    staging_bytes: int = 2**28,
    alone: int = execute.ALONE,
) -> tuple[float, list[int]]:
    """Largest difference in weights and moments after a tour that ends where it began, and the bytes of each move."""
    settings = {"micro_batch": 2, "precision": precision, "staging_bytes": staging_bytes}
    backend = backend_of(tiny_job(dist.get_world_size(), layouts[0], model, **settings))
    for step in range(2):
        backend.train_step(random_batches, StepRequest(8 * step, RULES))
    execute.ALONE = alone  # in this rank, which is a process of its own
    before = {place: tensor().clone() for place, tensor in backend.live_state().items()}
    moves = [backend.move(configuration(8, 2, **layout)) for layout in [*layouts[1:], layouts[0]]]
    after = {place: tensor() for place, tensor in backend.live_state().items()}
    assert before.keys() == after.keys()
    kept = {"exp_avg", "exp_avg_sq"} | ({"master"} if precision == "bf16" else set())
    assert {name.partition("/")[2] for name, _ in after} == {"", *kept}
    pairs = [(before[place], after[place]) for place in before]
    assert any(float(a.abs().max()) > 0 for a, _ in pairs)
    assert all((move.peak_bytes or 0) > 0 for move in moves)
    return max(float((a - b).abs().max()) for a, b in pairs), [move.bytes_moved for move in moves]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("model", "alone"), [({}, execute.ALONE), ({"tied_embeddings": True}, 1024)], ids=["untied", "tied, matrices alone"]
)
@pytest.mark.parametrize("zero", [0, 1])
def test_moves_are_exact_to_the_bit(zero: int, model: dict[str, Any], alone: int) -> None:
    """With few bytes to be a message of its own, the tiny model's matrices leave from where they lie, as large ones do;
    norms are still packed."""
    layouts = [
        {"tp": 2, "dp": 2},
        {"pp": 2, "dp": 2},
        {"tp": 2, "pp": 2},
        {"dp": 4},
        {"pp": 2, "tp": 2, "sequence_parallel": True},
    ]
    layouts = [{**layout, "zero": zero} for layout in layouts]
    for worst, moved in run_ranks(4, _there_and_back, layouts, model, "fp32", 2**28, alone):
        assert worst == 0.0
        assert moved[0] > 0, "replicas of halves have to fetch the other half"
        assert zero or moved[3] == 0, "from DP4 every rank has all that it needs"


@pytest.mark.dist
def test_the_distributed_optimizer_can_be_turned_on_and_off_by_a_move() -> None:
    layouts = [{"dp": 2}, {"dp": 2, "zero": 1}, {"tp": 2}, {"dp": 2, "zero": 1}]
    assert run_ranks(2, _there_and_back, layouts, {})[0][0] == 0.0


@pytest.mark.dist
@pytest.mark.parametrize("zero", [0, 1])
def test_virtual_stages_and_a_vocabulary_that_is_mostly_padding(zero: int) -> None:
    """130 tokens are padded to 256 rows: with TP4 two ranks have nothing but padding."""
    layouts = [{"tp": 4}, {"pp": 2, "vp": 2, "dp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vp": 2, "tp": 2}]
    layouts = [{**layout, "zero": zero} for layout in layouts]
    for worst, _ in run_ranks(4, _there_and_back, layouts, {"vocab": 130, "tied_embeddings": True}):
        assert worst == 0.0


@pytest.mark.dist
def test_masters_move_with_half_precision_weights() -> None:
    layouts = [{"tp": 2, "dp": 2, "zero": 1}, {"pp": 4}, {"dp": 4, "zero": 1}]
    for worst, _ in run_ranks(4, _there_and_back, layouts, {}, "bf16"):
        assert worst == 0.0


@pytest.mark.dist
def test_small_staging_buffers_move_the_same() -> None:
    """1000 bytes: every tensor is cut, into many rounds."""
    layouts = [{"tp": 2, "dp": 2, "zero": 1}, {"pp": 2, "dp": 2}, {"tp": 4}]
    plenty = run_ranks(4, _there_and_back, layouts, {})
    little = run_ranks(4, _there_and_back, layouts, {}, "fp32", 1000)
    assert [moved for _, moved in little] == [moved for _, moved in plenty]
    assert all(worst == 0.0 for worst, _ in little)


def _living_bytes() -> int:
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = [item.untyped_storage() for item in alive]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _held_bytes(zero: int, normlayer: bool) -> list[int]:
    """Memory of all tensors that live after each return to the first layout."""
    backend = backend_of(tiny_job(2, {"dp": 2, "zero": zero}, {"hidden": 128, "ffn_hidden": 512}, micro_batch=2))
    held = []
    for _ in range(4):
        for layout in ({"tp": 2}, {"dp": 2}):
            backend.move(configuration(8, 2, **layout, zero=zero))
            backend.train_step(random_batches, StepRequest(0, RULES, "microbatch+normlayer" if normlayer else None))
        held.append(_living_bytes())
    return held


@pytest.mark.dist
@pytest.mark.parametrize("zero", [0, 1])
def test_moving_to_and_fro_does_not_grow(zero: int) -> None:
    for held in run_ranks(2, _held_bytes, zero, True):
        assert max(held) <= 1.02 * held[0]
