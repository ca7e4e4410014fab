"""A second framework is a second folder: what a backend has to say, and everything that follows from it."""

import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from copus.backends import registry
from copus.backends.deepspeed.description import DeepSpeedDescription
from copus.backends.description import BackendDescription
from copus.backends.fsdp.description import FsdpDescription
from copus.backends.registry import find_backend
from copus.checkpoints.store import newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.estimate import predictor_of
from copus.events import Checkpoint, Event, Reconfigure, Step
from copus.job import JobConfig, JobError, dump_job, parse_job
from copus.learning_rate import base_lr
from copus.loop import Trainer
from copus.resize import resized
from launch.check import check_start
from launch.fixed_run import as_written
from planner.config import PlannerConfig
from profiles.cluster import Cluster
from profiles.model_shape import ModelShape
from tests.eager_planner import EagerPlanner, decide_often
from tests.megatron_jobs import SHAPE, configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 64


@pytest.fixture(autouse=True)
def _toy_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_toy_job` registers it in the process of whoever calls it; other tests count the backends."""
    monkeypatch.setitem(registry.BUILT_IN, "toy", "tests.toy_backend:ToyDescription")


def _toy_job(layout: dict[str, Any], **training: Any) -> JobConfig:
    registry.BUILT_IN["toy"] = "tests.toy_backend:ToyDescription"  # as a plugin would, in this process
    shape = {"layers": 2, "hidden": 8, "ffn_hidden": 8, "heads": 2, "kv_heads": 2, "seq_len": 16, "vocab": 256}
    settings = {"backend": "toy", "layout": layout, "global_batch": 4, "tokens": 16 * SAMPLES, "lr": 0.3}
    return parse_job(
        {
            "name": "toy",
            "model": shape,
            "cluster": {"accelerators_per_node": 2},
            "training": {**settings, "evaluate_sequences": 8, "decay": "constant", **training},
        }
    )


def _train(run: Path, layout: dict[str, Any], after: dict[str, Any], stop_at: int = SAMPLES) -> list[Event]:
    """The real loop, from the newest checkpoint; it moves to `after` at the first decision."""
    decide_often()
    job = _toy_job(layout, checkpoint_every_tokens=16 * 24)
    job = job.model_copy(update={"planner": job.planner.model_copy(update={"every_samples": 16})})
    backend = find_backend("toy").load()(job, own_device())
    backend.build(job.training.configuration)
    state, newest = TrainerState(), newest_checkpoint(run)
    if newest is not None:
        state, _ = read_state(newest)
        backend.load(newest, state.optimizer_steps)
    planner = EagerPlanner(job, configuration(4, 1, **after)) if dist.get_rank() == 0 else None
    events: list[Event] = []
    trainer = Trainer(
        job,
        run,
        backend,
        random_batches,
        random_batches,
        planner,  # type: ignore[arg-type]
        state,
        events.append,
        lambda: state.samples_consumed >= stop_at,
    )
    trainer.train()
    return events


def _losses(events: list[Event]) -> dict[int, float]:
    return {event.samples_consumed: event.loss for event in events if isinstance(event, Step)}


@pytest.mark.dist
def test_another_backend_trains_moves_saves_and_resumes_through_the_same_loop(tmp_path: Path) -> None:
    stays = run_ranks(2, _train, tmp_path / "stays", {"tp": 2}, {"tp": 2})[0]
    moves = run_ranks(2, _train, tmp_path / "moves", {"dp": 2, "zero": 1}, {"tp": 2}, 36)[0]
    (move,) = [event for event in moves if isinstance(event, Reconfigure)]
    assert move.samples_consumed == 0, "the planner is asked before the first step"
    assert move.bytes_moved > 0
    assert [event.samples_consumed for event in moves if isinstance(event, Checkpoint)][-1] == 40
    resumed = run_ranks(2, _train, tmp_path / "moves", {"dp": 2}, {"dp": 2})[0]
    expected = _losses(stays)
    assert _losses(moves) | _losses(resumed) == pytest.approx(expected, rel=1e-5)
    losses = list(expected.values())
    assert min(losses) < 0.9 * losses[0], "the model has to learn, or equal losses say little"


def test_a_backend_says_what_it_can_run() -> None:
    with pytest.raises(JobError, match=r"pp\(2\) is not supported by the toy"):
        _toy_job({"pp": 2})
    with pytest.raises(JobError, match=r"zero\(2\) is not supported by this backend: at most 1"):
        _toy_job({"dp": 2, "zero": 2})
    assert find_backend("megatron").software.startswith("megatron-core ")


def test_the_planner_and_a_resize_choose_among_what_the_backend_runs() -> None:
    job = _toy_job({"dp": 2, "zero": 1})
    layouts = {candidate.layout for candidate in predictor_of(job, []).candidates}
    assert {(layout.tp, layout.pp, layout.dp) for layout in layouts} == {(1, 1, 2), (2, 1, 1)}
    four = resized(job, Cluster(accelerators_per_node=4)).training.layout
    assert (four.pp, four.zero) == (1, 1)
    with pytest.raises(JobError, match=r"noise_source\(replica\): with .* this backend measures nothing"):
        check_start(job.model_copy(update={"planner": PlannerConfig(policy="copus", noise_source="replica")}))


def test_a_least_learning_rate_that_nothing_decays_to_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"^training.min_lr\(0.0005\) is not used: with training.decay\(constant\) the"
    ):
        check_start(tiny_job(1, decay="constant", min_lr=5e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_start(tiny_job(1, decay="constant"))
        check_start(parse_job(yaml.safe_load(dump_job(tiny_job(1, decay="constant")))))  # a run's own job file
        check_start(tiny_job(1, decay="constant", min_lr=0.0))  # as `import-args` writes Megatron-LM's default
        check_start(tiny_job(1, min_lr=5e-4))


def test_a_constant_learning_rate_may_be_below_the_least_one_of_the_default() -> None:
    job = tiny_job(1, decay="constant", lr=5e-5)
    assert base_lr(job, job.training.tokens) == 5e-5
    run = as_written(job)
    assert run.min_lr == run.lr == 5e-5, "Megatron-LM refuses a --min-lr above --lr"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("tests.toy_backend:ToyDescription", None),
        ("tests.toy_backend:ToyBackend", "is no BackendDescription"),
        ("tests.toy_backend:Nothing", "AttributeError"),
    ],
)
def test_backends_are_plugins(place: str, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("another", place, registry.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == registry.GROUP else [])
    if message is None:
        assert find_backend("another").framework == "torch"
    else:
        with pytest.raises(ValueError, match=message):
            find_backend("another")
    with pytest.raises(ValueError, match=r"no backend 'third' is installed; there are megatron \(built in\), "):
        find_backend("third")


def test_nothing_outside_of_its_folder_and_the_registry_names_a_backend() -> None:
    """In imports or in strings that are looked up: a second backend changes no other file."""
    naming = {
        str(path.relative_to(ROOT))
        for package in ("profiles", "planner", "copus", "launch")
        for path in (ROOT / package).rglob("*.py")
        if "backends.megatron" in path.read_text() and "backends/megatron/" not in str(path)
    }
    assert naming == {"copus/backends/registry.py"}


@pytest.mark.parametrize("backend", [FsdpDescription(), DeepSpeedDescription()])
def test_a_replica_whose_micro_batches_are_reduced_one_by_one_has_no_gradient_of_its_own(
    backend: BackendDescription,
) -> None:
    parts = [backend.parts(configuration(8, 2, dp=2, zero=zero)) for zero in (1, 2)]
    assert ["replica" in each for each in parts] == [True, False]
    assert "replica" in backend.parts(configuration(4, 2, dp=2, zero=3)), "a single micro-batch"


@pytest.mark.parametrize("bias", ["attention", "all"])
def test_a_bias_that_follows_a_sum_is_refused_by_the_backend_that_has_no_shard_of_it(bias: str) -> None:
    model = ModelShape(**{**SHAPE, "bias": bias})
    DeepSpeedDescription().check_model(model)
    with pytest.raises(ValueError, match=rf"bias\({bias}\) is not supported by the fsdp backend"):
        FsdpDescription().check_model(model)
