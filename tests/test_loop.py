"""The training loop: decisions carried out, interrupts and resumes, checkpoints, what the events say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.checkpoints.store import newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Checkpoint, DecisionMade, Evaluate, Event, Noise, Reconfigure, Step
from copus.job import JobConfig
from copus.loop import Trainer
from planner.planner import Planner
from planner.predictor import Predictor
from profiles.configuration import Configuration
from profiles.measurement import Measurement
from profiles.throughput import Throughput
from tests.eager_planner import decide_often
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks

PLANNER = {
    "every_samples": 32,
    "min_noise_samples": 6,
    "noise_half_life_tokens": 1000,
    "max_global_batch": 32,
    "max_micro_batch": 4,
    "noise_every_steps": 1,
    "noise_halve_every_steps": 1,
    "norm_test_form": "paper",
}


def _job(**training: Any) -> JobConfig:
    settings = {"micro_batch": 1, "global_batch": 4, "tokens": 16 * 320, "evaluate_every_tokens": 16 * 80}
    settings |= {"lr": 3e-3, "min_lr": 3e-4, **training}
    job = tiny_job(2, **{"layout": {"tp": 2}, **settings})
    return job.model_copy(update={"planner": job.planner.model_copy(update=PLANNER)})


def _rows(backend: MegatronBackend, job: JobConfig) -> list[Measurement]:
    """A table in which tensor parallelism is fast at small batches and data parallelism at large ones."""
    rows = []
    for layout, fixed, each in (({"tp": 2}, 0.01, 0.010), ({"dp": 2}, 0.05, 0.002)):
        for micro_batch in (1, 2, 4):
            for count in (1, 4):
                seen = configuration(count * micro_batch * layout.get("dp", 1), micro_batch, **layout)
                rows.append(
                    Measurement(
                        fingerprint=backend.fingerprint(),
                        model=job.model,
                        configuration=seen,
                        step_seconds=fixed + each * seen.global_batch,
                        spread_seconds=0.001,
                        count=5,
                        time=0.0,
                    )
                )
    return rows


class _Table(Throughput):
    """A table that the seconds of a busy test machine do not change, so that two runs decide alike."""

    def observe(self, configuration: Configuration, step_seconds: float) -> None:
        """Learn nothing."""


def _train(run: Path, job: JobConfig, policy: str | None = "static", stop_after: int | None = None) -> list[Event]:
    """Train, from the newest checkpoint of `run` if there is one; the events of rank 0. No policy: no planner."""
    decide_often()
    backend = MegatronBackend(job, own_device())
    state, start = TrainerState(), job.training.configuration
    newest = newest_checkpoint(run)
    if newest is not None:
        state, start = read_state(newest)
    backend.build(start)
    if newest is not None:
        backend.load(newest, state.optimizer_steps)
    planner = None
    if dist.get_rank() == 0 and policy is not None:
        settings = job.planner.model_copy(update={"policy": policy})
        known = _Table(_rows(backend, job))
        first = job.training.configuration
        predictor = Predictor(settings, job.model, job.cluster, job.training.precision, first, known)
        planner = Planner(predictor, number=state.decisions)
        planner.restore(state.planner)
    events: list[Event] = []
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return stop_after is not None and steps >= stop_after

    reason = Trainer(job, run, backend, random_batches, random_batches, planner, state, events.append, stop).train()
    expected = "finished" if stop_after is None else "interrupted"
    assert reason == (expected if job.training.target_loss is None else "target_loss")
    return events


def _losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Step)]


def _rules(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.lr, event.beta2) for event in events if isinstance(event, Step)]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """A run whose planner may move."""
    return run_ranks(2, _train, tmp_path_factory.mktemp("moved"), _job(), "copus")[0]


@pytest.mark.dist
def test_the_planner_changes_batch_and_layout(moved: list[Event]) -> None:
    moves = [event for event in moved if isinstance(event, Reconfigure)]
    decisions = {event.decision.number: event.decision for event in moved if isinstance(event, DecisionMade)}
    assert any(move.before.global_batch != move.after.global_batch for move in moves)
    assert any(move.rung == "layout" and move.bytes_moved > 0 for move in moves)
    for move in moves:
        assert decisions[move.decision].chosen == move.after
        assert decisions[move.decision].predicted_gain >= 0.10
    assert [decision.number for decision in decisions.values()] == list(range(len(decisions)))


@pytest.mark.dist
def test_our_rule_moves_a_job_and_learns_what_that_costs(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, _job(tokens=16 * 800), "goodput")[0]
    moves = [event for event in events if isinstance(event, Reconfigure)]
    assert moves
    layouts = [event.seconds for event in moves if event.rung == "layout"]
    last = [event.decision for event in events if isinstance(event, DecisionMade)][-1]
    assert last.policy == "goodput"
    paid = {c.move_seconds for c in last.candidates if c.configuration.layout != last.current.layout}
    expected = float(np.median(layouts)) if layouts else 10.0
    cheaper = max((event.seconds for event in moves if event.rung != "layout"), default=0.0)
    assert all(cost is None or expected <= cost <= max(expected, cheaper) for cost in paid)


@pytest.mark.dist
def test_a_run_begins_where_the_policy_says(tmp_path: Path) -> None:
    """The job file says a batch of 32, which laws of critical batches find too large for so short a job."""
    job = _job(tokens=16 * 64, global_batch=32, layout={"dp": 2})
    job = job.model_copy(update={"planner": job.planner.model_copy(update={"start": "plan"})})
    events = run_ranks(2, _train, tmp_path, job, "goodput")[0]
    first = next(event for event in events if isinstance(event, DecisionMade))
    assert first.samples_consumed == 0
    move = next(event for event in events if isinstance(event, Reconfigure))
    assert (move.step, move.after, move.trial) == (0, first.decision.chosen, False)
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[0].global_batch == move.after.global_batch < 32
    assert steps[0].beta2 == pytest.approx(0.95 ** (steps[0].global_batch / 32)), "for the batch of the job file"


@pytest.mark.dist
def test_every_sample_is_trained_on_once_and_in_order(moved: list[Event]) -> None:
    consumed = 0
    for event in moved:
        if isinstance(event, Step):
            assert event.samples_consumed == consumed + event.global_batch
            consumed = event.samples_consumed
    assert consumed == 320


@pytest.mark.dist
def test_the_rules_follow_the_batch(moved: list[Event]) -> None:
    critical_batch = None
    for event in moved:
        if isinstance(event, DecisionMade):
            critical_batch = event.decision.critical_batch
        if isinstance(event, Step):
            kappa = min(event.global_batch, max(critical_batch or 1e9, 4)) / 4
            assert event.beta2 == pytest.approx(max(0.95**kappa, 0.9))
    assert critical_batch is not None
    sizes = {event.global_batch for event in moved if isinstance(event, Step)}
    assert len(sizes) > 1


@pytest.mark.dist
def test_noise_and_evaluations_are_reported(moved: list[Event]) -> None:
    noise = [event for event in moved if isinstance(event, Noise)]
    assert len(noise) == len(_losses(moved)), "every step measures here"
    assert noise[-1].value is not None
    evaluations = [event for event in moved if isinstance(event, Evaluate)]
    assert evaluations[0].samples_consumed == 0
    assert evaluations[-1].samples_consumed == 320
    assert evaluations[-1].loss < 0.95 * evaluations[0].loss


@pytest.mark.dist
@pytest.mark.parametrize(
    ("policy", "stop_after"),
    [
        pytest.param("copus", 8, id="at the step of a decision"),
        pytest.param("static", 21, id="static", marks=pytest.mark.slow),
        pytest.param("norm-test", 10, id="between norm tests", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_where_it_was(policy: str, stop_after: int, tmp_path: Path) -> None:
    """Same losses, decisions and moves as the run that nobody stopped. Learning rates are not constant, so samples must
    agree too."""
    job = _job(tokens=16 * (320 if policy == "norm-test" else 160))  # whose batch grows, so that it has few steps
    whole = run_ranks(2, _train, tmp_path / "whole", job, policy)[0]
    first = run_ranks(2, _train, tmp_path / "parts", job, policy, stop_after)[0]
    state, stopped_in = read_state(newest_checkpoint(tmp_path / "parts"))
    assert state.samples_consumed == first[-1].samples_consumed
    assert isinstance(stopped_in, Configuration)
    second = run_ranks(2, _train, tmp_path / "parts", job, policy)[0]
    np.testing.assert_allclose(_losses(first) + _losses(second), _losses(whole), rtol=1e-5)
    # Critical batch and Π β2 are in the checkpoint: what the optimizer is given does not depend on the interrupt.
    np.testing.assert_allclose(_rules(first) + _rules(second), _rules(whole), rtol=1e-5)
    ends = [read_state(newest_checkpoint(tmp_path / name))[0] for name in ("parts", "whole")]
    assert ends[0].beta2_product == ends[1].beta2_product

    def chosen(events: list[Event]) -> list[tuple[int, str]]:
        return [(e.decision.number, e.decision.chosen.label) for e in events if isinstance(e, DecisionMade)]

    assert chosen(first) + chosen(second) == chosen(whole)
    if policy != "norm-test":  # which makes the batch larger than 4
        # Every 32 sequences, and at step 20, when the noise scale may be known for the first time.
        assert len(chosen(first)) == stop_after * 4 // 32 + (stop_after >= 20)
    if policy == "norm-test":  # which looks at the norms since the last decision: the checkpoint has them
        assert len({label for _, label in chosen(whole)}) > 1


@pytest.mark.dist
def test_what_is_left_at_the_end_is_trained_on_too(tmp_path: Path) -> None:
    """323 sequences in batches of 16: two more steps take what is left; the checkpoint remembers the batch of 16."""
    events = run_ranks(2, _train, tmp_path, _job(tokens=16 * 323, global_batch=16, micro_batch=4))[0]
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.global_batch for step in steps] == [16] * 20 + [2, 1]
    assert read_state(newest_checkpoint(tmp_path))[1].global_batch == 16


@pytest.mark.dist
def test_a_batch_of_one_sequence_is_measured_on_steps_that_take_a_second_one(tmp_path: Path) -> None:
    job = _job(tokens=16 * 20, global_batch=1)
    sampled = job.planner.model_copy(update={"noise_every_steps": 4})
    events = run_ranks(2, _train, tmp_path, job.model_copy(update={"planner": sampled}))[0]
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.global_batch for step in steps] == [2] * 6 + [1, 1, 2, 1, 1, 1, 1], "the last has none to take"
    measured = [event for event in events if isinstance(event, Noise)]
    assert [event.step for event in measured] == [1, 2, 3, 4, 5, 6, 9]
    assert {(event.parts, event.part_size) for event in measured} == {(2, 1)}
    assert read_state(newest_checkpoint(tmp_path))[1].global_batch == 1


@pytest.mark.dist
def test_without_a_planner_nothing_is_decided(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, _job(tokens=16 * 64), None)[0]
    assert [event.samples_consumed for event in events if isinstance(event, Step)] == list(range(4, 65, 4))
    assert not any(isinstance(event, DecisionMade) for event in events), "though two would be due"
    assert read_state(newest_checkpoint(tmp_path))[0].decisions == 0


@pytest.mark.dist
def test_a_run_ends_at_its_target_loss(tmp_path: Path) -> None:
    events = run_ranks(2, _train, tmp_path, _job(target_loss=100.0))[0]
    assert [event.samples_consumed for event in events if isinstance(event, Evaluate)] == [0, 80]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_state(newest)[0].samples_consumed == 80


@pytest.mark.dist
def test_a_checkpoint_is_due_by_the_clock_of_the_first_rank(tmp_path: Path) -> None:
    """Every step is longer than the limit here, and half an hour is longer than the run."""
    by_clock = _job(tokens=16 * 40, checkpoint_every_minutes=1e-9, async_checkpoints=False)
    written = [e.samples_consumed for e in run_ranks(2, _train, tmp_path, by_clock)[0] if isinstance(e, Checkpoint)]
    assert len({*written}) >= 3
    assert written[-1] == 40


@pytest.mark.dist
def test_checkpoints_are_kept_and_pruned(tmp_path: Path) -> None:
    job = _job(tokens=16 * 160, checkpoint_every_tokens=16 * 40, keep_checkpoints=2)
    events = run_ranks(2, _train, tmp_path, job)[0]
    written = [event.samples_consumed for event in events if isinstance(event, Checkpoint)]
    assert len(written) == 5, "half an hour has not passed"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["samples-000000000120", "samples-000000000160"]
    assert json.loads((tmp_path / "checkpoints" / names[-1] / "trainer.json").read_text())["state"]["step"] == 40
