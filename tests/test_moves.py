"""A job that changes batch and layout, and one that never does: the same losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.megatron_jobs import RULES, backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

STEPS = 4


def _train(layouts: list[dict[str, Any]], model: dict[str, Any], scratch: Path) -> list[float]:
    """Losses of a job that goes through the layouts, a few steps in each."""
    backend = backend_of(tiny_job(dist.get_world_size(), layouts[0], model, micro_batch=2))
    losses, sample = [], 0
    for layout in layouts:
        backend.move(configuration(8, 2, **layout), scratch)
        for _ in range(STEPS):
            losses.append(backend.train_step(random_batches, sample, RULES, None, False).loss)
            sample += 8
    assert backend.optimizer_steps == len(losses)
    assert not scratch.exists()
    return losses


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layouts", "model"),
    [
        ([{"tp": 2}, {"dp": 2}, {"pp": 2}], {}),
        ([{"dp": 2}, {"pp": 2}, {"tp": 2, "sequence_parallel": True}], {"tied_embeddings": True}),
        ([{"tp": 2, "pp": 2}, {"dp": 4}, {"tp": 2, "dp": 2}], {}),
        ([{"dp": 4, "zero": 1}, {"tp": 2, "dp": 2, "zero": 1}, {"pp": 4, "zero": 1}], {"tied_embeddings": True}),
    ],
    ids=str,
)
def test_losses_go_on_as_if_nothing_had_moved(layouts: list[dict[str, Any]], model: dict[str, Any], tmp_path: Path) -> None:
    """Each move is followed by steps: a wrong Adam state (moments, or the shared step counter of upstream) shows there."""
    stays = run_ranks(1, _train, [{}] * 3, model, tmp_path / "one")[0]
    ranks = np.prod([layouts[0].get(name, 1) for name in ("tp", "pp", "dp")])
    moves = run_ranks(int(ranks), _train, layouts, model, tmp_path / "many")[0]
    np.testing.assert_allclose(moves, stays, rtol=1e-4)


def _change_batch() -> tuple[list[float], list[int]]:
    backend = backend_of(tiny_job(2, {"tp": 2}, micro_batch=2))
    losses, sizes = [], []
    for global_batch, micro_batch in ((8, 2), (16, 4), (4, 1)):
        moved = backend.move(configuration(global_batch, micro_batch, tp=2), Path("unused"))
        result = backend.train_step(random_batches, 0, RULES, "microbatch", False)
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


def _refused(layout: dict[str, Any]) -> str:
    backend = backend_of(tiny_job(2))
    with pytest.raises(ValueError) as caught:
        backend.move(configuration(8, 2, **layout), Path("unused"))
    return str(caught.value)


@pytest.mark.dist
def test_impossible_moves_are_refused_with_the_reason() -> None:
    assert "zero(0) to zero(1)" in run_ranks(2, _refused, {"dp": 2, "zero": 1})[0]
