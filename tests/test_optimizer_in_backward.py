"""`training.optimizer_in_backward`: the same steps as after the backward pass, in less memory."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.small_batch_memory import FULL, IN_BACKWARD, MODEL, job_of, predicted_bytes
from copus.backends.step_contract import NOT_COUNTED, StepRequest
from copus.checkpoints.trainer_state import TrainerState
from copus.job import JobConfig, JobError, parse_job
from copus.schedule import rules_at
from profiles.configurations import Configurations
from profiles.memory import MemoryModel
from tests.fsdp_jobs import fsdp_backend_of
from tests.megatron_jobs import SHAPE, random_batches
from tests.ranks import run_ranks

LEAN = {"precision": "bf16", "master_weights": "none"}
KINDS: list[dict[str, Any]] = [
    {"optimizer": {"kind": "adafactor"}, **LEAN},
    {"optimizer": {"kind": "adamw"}},
    {"optimizer": {"kind": "sgd"}, "precision": "bf16"},
    {"optimizer": {"kind": "adafactor"}, "data": {"eod_mask_loss": True}},
]


def _batches(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some labels do not count; a job that does not mask them takes their losses for 0."""
    tokens, labels = random_batches(first, count)
    return tokens, labels.masked_fill(labels < 3, NOT_COUNTED)


def _job(in_backward: bool, **changes: Any) -> JobConfig:
    training = {"backend": "fsdp", "global_batch": 1, "clip_grad": 0, "tokens": 100_000, "lr": 1e-2}
    sections: dict[str, Any] = {
        "name": "tiny",
        "model": SHAPE | {"layers": 2, "kv_heads": 2},
        "cluster": {"accelerators_per_node": changes.pop("accelerators", 1)},
        "planner": {"policy": changes.pop("policy", "static")},
        "data": changes.pop("data", {}),
    }
    return parse_job(sections | {"training": training | {"optimizer_in_backward": in_backward} | changes})


def _train(in_backward: bool) -> list[tuple[list[tuple[float, float]], list[np.ndarray]]]:
    """Losses and squared norms of the gradient of four steps, and the weights after them, by kind of optimizer. Then,
    if updates are in the backward pass, a step whose gradient is not a number has to leave the weights alone."""
    trained = []
    for settings in KINDS:
        job, state = _job(in_backward, **settings), TrainerState()
        backend = fsdp_backend_of(job)
        figures = []
        for step in range(4):
            result = backend.train_step(_batches, StepRequest(step, rules_at(job, state, 1)))
            figures.append((result.loss, result.grad_sq))
        weights = [sharded.main.detach().float().numpy().copy() for sharded in backend.built.parameters]
        trained.append((figures, weights))
        if in_backward:
            backend.built.parameters[0].main.data.fill_(torch.nan)
            result = backend.train_step(_batches, StepRequest(5, rules_at(job, state, 1)))
            assert (result.skipped, backend.optimizer_steps) == (True, 4)
            for before, sharded in zip(weights[1:], backend.built.parameters[1:], strict=True):
                assert np.array_equal(before, sharded.main.detach().float().numpy())
        backend.close()
    return trained


@pytest.mark.dist
def test_steps_are_those_of_an_optimizer_that_waits_for_all_gradients() -> None:
    (after,), (within,) = (run_ranks(1, _train, in_backward) for in_backward in (False, True))
    for settings, (figures, weights), (own_figures, own_weights) in zip(KINDS, after, within, strict=True):
        assert np.array(own_figures) == pytest.approx(np.array(figures), rel=1e-12), settings
        assert [loss for loss, _ in own_figures] == [loss for loss, _ in figures], settings
        assert all(map(np.array_equal, weights, own_weights)), settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 2}, r"needs training.global_batch\(1\), not 2: noise is measured"),
        ({"clip_grad": 0.5}, r"needs training.clip_grad\(0\), not 0.5: the norm"),
        ({"policy": "smallest-saturating"}, r"needs planner.policy\(static\), not smallest-saturating"),
        ({"accelerators": 2, "layout": {"tp": 2}}, r"accelerators_per_node\(1\), not 2: several"),
        ({"backend": "megatron"}, r"optimizer_in_backward\(true\) is not supported by this backend: only fsdp"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        _job(in_backward=True, **changes)


def test_the_memory_model_counts_gradients_of_one_layer() -> None:
    case = "Adafactor, bf16 weights alone"
    after = predicted_bytes(job_of(FULL[case], MODEL))
    within = predicted_bytes(job_of(IN_BACKWARD[f"{case}, in the backward pass"], MODEL))
    assert within["optimizer"] == after["optimizer"]
    assert sum(within.values()) < 0.8 * sum(after.values())


def test_larger_batches_of_such_a_job_are_predicted_with_all_gradients() -> None:
    """`copus plan` shows them, though the job never runs them."""
    training = _job(in_backward=True).training
    batches = Configurations.of([training.configuration.model_copy(update={"global_batch": n}) for n in (1, 2)])
    within, after = (
        MemoryModel(training.implementation.model_copy(update={"optimizer_in_backward": flag})).predict(
            _job(in_backward=True).model, batches, training.precision, coverage=None
        )
        for flag in (True, False)
    )
    assert within.peak_bytes[0] < after.peak_bytes[0]
    assert within.peak_bytes[1] == after.peak_bytes[1]
