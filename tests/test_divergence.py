"""Steps that are not finite: who is told, when the run ends, and which checkpoints are left."""

from pathlib import Path
from typing import Any

import pytest
from launch_events import start, step, write_run

from copus.backends.megatron.backend import MegatronBackend
from copus.backends.step_contract import StepRequest
from copus.checkpoints.store import newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.divergence import Divergence
from copus.events import Checkpoint, End, Evaluate, Event, Step, Warned
from copus.loop import Trainer
from launch.run_state import state_of
from launch.status import RunStatus
from tests.megatron_jobs import RULES, random_batches, tiny_job
from tests.ranks import own_device, run_ranks
from tests.test_checkpoints import names, write


def _train(run: Path, bad_from: int | None, settings: dict[str, Any]) -> tuple[str, list[Event]]:
    """Train a tiny job, from its newest checkpoint. The step after `bad_from` sequences ruins the weights."""
    job = tiny_job(1, micro_batch=1, global_batch=4, tokens=16 * 160, **settings)
    backend, state = MegatronBackend(job, own_device()), TrainerState()
    newest = newest_checkpoint(run)
    backend.build(job.training.configuration)
    if newest is not None:
        state, _ = read_state(newest)
        backend.load(newest, state.optimizer_steps)
    train_step = backend.train_step

    def ruinous(batches: Any, request: Any) -> Any:
        result = train_step(batches, request)
        if request.first_sample == bad_from:
            for chunk in backend.built.chunks:
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
        return result

    backend.train_step = ruinous  # type: ignore[method-assign]
    events: list[Event] = []
    trainer = Trainer(job, run, backend, random_batches, random_batches, None, state, events.append, lambda: False)
    return trainer.train(), events


def checkpoint_names(run: Path) -> list[str]:
    return [name.removeprefix("samples-000000000") for name in names(run)]


@pytest.mark.dist
def test_a_run_that_diverges_ends_and_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    """Every 8 sequences a checkpoint; the step from 36 to 40 ruins the weights, so that the one of 40 is bad."""
    settings = {"checkpoint_every_tokens": 16 * 8, "keep_checkpoints": 1, "max_skipped_steps": 6}
    reason, events = run_ranks(1, _train, tmp_path, 36, settings)[0]
    assert reason == "diverged"
    skipped = [event for event in events if isinstance(event, Step) and event.skipped]
    assert [event.samples_consumed for event in skipped] == list(range(44, 44 + 6 * 4, 4))
    assert checkpoint_names(tmp_path) == ["032", "040.diverged"], "none is written meanwhile, the last good one stays"
    assert [event.path[-3:] for event in events if isinstance(event, Checkpoint)] == ["008", "016", "024", "032", "040"]
    warnings = [(event.samples_consumed, event.message) for event in events if isinstance(event, Warned)]
    assert [samples for samples, _ in warnings] == [52, 64]
    assert warnings[0][1].startswith(
        "3 steps in a row were skipped: their gradients are not finite. The run ends after"
    )
    assert "the gradients of 6 steps in a row were not finite. Lower the learning rate (0.000" in warnings[1][1]
    assert "resume: the run goes on from checkpoints/samples-000000000032" in warnings[1][1]
    assert run_ranks(1, _train, tmp_path, None, settings)[0][0] == "finished", "and so it does"


@pytest.mark.dist
def test_a_run_whose_last_steps_are_bad_does_not_end_as_a_success(tmp_path: Path) -> None:
    reason, events = run_ranks(1, _train, tmp_path, 152, {"checkpoint_every_tokens": 16 * 40})[0]
    assert reason == "diverged"
    assert isinstance(events[-1], Warned)
    assert "the validation loss at the end is not finite" in events[-1].message
    assert [event.loss == event.loss for event in events if isinstance(event, Evaluate)][-1] is False
    assert checkpoint_names(tmp_path) == ["080", "120"]


@pytest.mark.dist
def test_a_huge_learning_rate_does_not_train_to_the_end(tmp_path: Path) -> None:
    settings = {"lr": 1e30, "min_lr": 1e30, "decay": "constant", "checkpoint_every_tokens": 16 * 4}
    reason, events = run_ranks(1, _train, tmp_path, None, settings)[0]
    assert reason == "diverged"
    assert sum(event.skipped for event in events if isinstance(event, Step)) == 20
    assert "submit the job again: there is no checkpoint from before" in events[-1].message
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.dist
def test_old_checkpoints_go_once_the_newest_one_has_proved_good(tmp_path: Path) -> None:
    settings = {"checkpoint_every_tokens": 16 * 8, "keep_checkpoints": 1}
    assert run_ranks(1, _train, tmp_path, None, settings)[0][0] == "finished"
    assert checkpoint_names(tmp_path) == ["160"]


def test_a_single_skipped_step_is_no_warning_and_the_end_of_a_streak_is_told() -> None:
    events: list[Event] = []
    state = TrainerState()
    divergence = Divergence(5, state, events.append)
    for samples, skipped in enumerate([False, True, False, True, True, True, True, False, True]):
        divergence.note_step(skipped, StepRequest(samples, RULES))
        assert not divergence.is_certain
    assert [event.message[:34] for event in events] == [
        "3 steps in a row were skipped: the",
        "gradients are finite again, after ",
    ]
    assert state.proven_samples == 7


def test_a_resumed_run_goes_on_counting() -> None:
    state = TrainerState(skipped_in_a_row=4)
    divergence = Divergence(5, state, lambda event: None)
    divergence.note_step(True, StepRequest(0, RULES))
    assert divergence.is_certain


def test_the_newest_proven_checkpoint_stays_whatever_comes_after_it(tmp_path: Path) -> None:
    for samples in (100, 200, 300, 400):
        write(tmp_path, samples, keep=2, proven_samples=150)
    assert checkpoint_names(tmp_path) == ["100", "300", "400"]
    write(tmp_path, 500, keep=2, proven_samples=450)
    assert checkpoint_names(tmp_path) == ["400", "500"]


def test_a_diverged_run_has_failed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "small", start(), step(4), step(8, loss=None))
    status = RunStatus()
    status.update([start(), End(step=2, samples_consumed=8, reason="diverged", seconds=1.0)])
    assert state_of(run, status).name == "failed"
