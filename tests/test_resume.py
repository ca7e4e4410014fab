# ruff: noqa: F811 (the fixture is imported)
"""What `copus submit --resume` follows, and what it refuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_jobs import write_job
from test_launch_submit import Copus, copus  # noqa: F401

from copus import worker
from copus.backends.megatron.backend import MegatronBackend
from copus.checkpoints.files import set_damaged_aside
from copus.checkpoints.store import Writing, newest_checkpoint, read_state
from copus.checkpoints.trainer_state import TrainerState
from copus.event_log import EventLog
from copus.events import Checkpoint, Event, Start, Warned, has_checkpoint, read_events
from copus.job import JobConfig, JobError, load_job, parse_job
from copus.loop import Trainer
from copus.resize import load_resized
from copus.resume import build_or_resume, newest_that_verifies
from copus.resume_request import ResumeRequest, read_resume_request, write_resume_request
from launch.resume import FIXED, KEPT, STARTING, request_of
from profiles.throughput import Throughput
from tests.launch_events import start, step
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks
from tests.test_checkpoints import _flip, names, write

FOLLOWED = {
    *("data.source", "data.weights", "data.text_column", "data.messages_column", "data.chat_template"),
    *("data.held_out", "data.held_out_share", "data.held_out_source", "data.tokenizer", "data.bos_token"),
    *("data.eos_token", "data.processes", "data.cache"),
    *("cluster.nodes", "cluster.accelerators_per_node", "cluster.accelerator"),
    "cluster.network_gbit_per_second",
    *("training.tokens", "training.max_minutes", "training.target_loss", "training.lr", "training.min_lr"),
    *("training.warmup_tokens", "training.decay", "training.decay_tokens", "training.decay_shape"),
    *("training.backend", "training.precision", "training.optimizer", "training.overlap_grad_reduce"),
    *("training.compile", "training.master_weights", "training.expert_dispatch", "training.kernels"),
    "training.optimizer_in_backward",
    *("training.reference_batch", "training.clip_grad", "training.dropout", "training.evaluate_every_tokens"),
    *("training.evaluate_sequences", "training.checkpoint_every_tokens", "training.checkpoint_every_minutes"),
    *("training.async_checkpoints",),
    *("training.staging_bytes", "training.keep_checkpoints", "training.max_skipped_steps"),
    *("launch.engine", "launch.options", "launch.threads_per_rank", "launch.max_restarts", "launch.timeout_seconds"),
    *("planner", "profile", "tracking"),
}
"""All other fields: what the workers do from the resume on. Of `data` the digest is compared."""


def fields(job: JobConfig) -> Iterator[str]:
    for section, value in job:
        if section in ("planner", "profile", "tracking", "model", "name"):
            yield section
        else:
            yield from (f"{section}.{field}" for field, _ in value)


def test_every_field_of_a_job_file_is_followed_or_refused() -> None:
    """A new field has to be put into one of the lists: nothing is accepted and then ignored."""
    parts = {"training.optimizer.kind", "planner.noise_metric"}  # of what is followed otherwise
    listed = [*FOLLOWED, *(field for field in FIXED if field not in parts), *KEPT, *STARTING]
    assert sorted(listed) == sorted(set(fields(tiny_job(1))) - {"data.prepared", "training.init_digest"})


@pytest.fixture
def trained(tmp_path: Path, copus: Copus) -> Path:
    write_job(tmp_path)
    assert copus("submit", "job.yaml", worker=["--steps", "2"]).returncode == 0
    return tmp_path / "runs" / "small"


LONGER = ["--set", "training.tokens=25600"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.layers=6", "model.layers is 4 in this run and cannot become 6"),
        ("training.seed=7", "training.seed is 1234 in this run and cannot become 7"),
        ("planner.noise_metric=adam", "planner.noise_metric is plain in this run and cannot become adam"),
        ("name=other", "name is small in this run: a resumed run stays in place"),
        ("launch.runs=elsewhere", "in this run: a resumed run stays in place"),
        ("launch={runs: elsewhere}", "in this run: a resumed run stays in place"),
        ("profile.when=always", "profile.when(always) measures everything before a run begins"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(
    trained: Path,
    copus: Copus,
    setting: str,
    message: str,
) -> None:
    before = (trained / "job.yaml").read_text()
    result = copus("submit", "--resume", "small", *LONGER, "--set", setting, worker=["--steps", "3"])
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert (trained / "job.yaml").read_text() == before


@pytest.mark.parametrize(
    "setting", ["training.global_batch=16", "training.micro_batch=2", "training.layout={dp: 2}", "training.layout.dp=1"]
)
def test_a_configuration_that_is_named_is_what_the_workers_are_asked_for(
    trained: Path,
    copus: Copus,
    setting: str,
) -> None:
    """Also the one that stands in the job file already: the planner may have moved the run away from it."""
    assert copus("submit", "--resume", "small", *LONGER, "--set", setting, worker=["--steps", "3"]).returncode == 0
    job = load_job(trained / "job.yaml")
    request = read_resume_request(trained)
    assert request == ResumeRequest(configuration=job.training.configuration, until_samples=8)
    assert job.reference_batch == 4, "the learning rate is for the batch that the run began with"
    again = copus("submit", "--resume", "small", "--set", "training.tokens=38400", worker=["--steps", "4"])
    assert again.returncode == 0
    assert read_resume_request(trained) == ResumeRequest(), "an earlier request is over"


def test_the_precision_may_change(trained: Path, copus: Copus) -> None:
    setting = ["--set", "training.precision=bf16"]
    assert copus("submit", "--resume", "small", *LONGER, *setting, worker=["--steps", "3"]).returncode == 0
    assert load_job(trained / "job.yaml").training.precision == "bf16"


@pytest.mark.parametrize(
    ("changes", "setting", "asked"),
    [
        ({}, "backend=fsdp", None),
        ({"global_batch": 16}, "backend=fsdp", "TP1·PP1·DP2 B16 m1"),
        ({"layout": {"tp": 2}}, "backend=fsdp", "TP2·PP1·DP1 B4 m1"),
        ({"layout": {"pp": 2}}, "backend=fsdp", "TP2·PP1·DP1 B4 m1"),  # it has no pipelines
        ({}, "cluster.accelerators_per_node=1", None),
        ({"global_batch": 16}, "cluster.accelerators_per_node=1", "TP1·PP1·DP1 B16 m1"),
    ],
)
def test_the_configuration_of_another_job_file_is_taken_to_another_place(
    tmp_path: Path, changes: dict[str, Any], setting: str, asked: str | None
) -> None:
    """What is chosen there only because the run's own does not fit is not asked for: the planner may have moved."""
    before = tiny_job(2, {"dp": 2}, global_batch=4, micro_batch=1)
    values = before.model_dump(mode="json")
    values["training"] |= changes
    other, overrides = tmp_path / "other.yaml", [setting.replace("backend", "training.backend")]
    other.write_text(yaml.safe_dump(values))
    job = load_resized(other, overrides)
    request = request_of(tmp_path, before, job, overrides, from_file=True, may_begin_again=False)
    assert (request.configuration and request.configuration.label) == asked


def test_other_ranks_ask_for_no_configuration(trained: Path, copus: Copus) -> None:
    result = copus(
        "submit", "--resume", "small", *LONGER, "--set", "cluster.accelerators_per_node=1", worker=["--steps", "3"]
    )
    assert result.returncode == 0, result.stderr
    assert load_job(trained / "job.yaml").training.layout.tp == 1
    assert read_resume_request(trained) == ResumeRequest()


def test_a_run_keeps_its_reference_batch(tmp_path: Path, trained: Path, copus: Copus) -> None:
    """Written when the run begins, and kept where another job file names none."""
    assert yaml.safe_load((trained / "job.yaml").read_text())["training"]["reference_batch"] == 4
    other = yaml.safe_load((tmp_path / "job.yaml").read_text())
    other["training"] |= {"global_batch": 8, "tokens": 25600}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert copus("submit", "other.yaml", "--resume", "small", worker=["--steps", "3"]).returncode == 0
    job = load_job(trained / "job.yaml")
    assert (job.training.global_batch, job.reference_batch) == (8, 4)


def test_a_run_whose_checkpoints_are_lost_does_not_begin_again_unasked(trained: Path, copus: Copus) -> None:
    shutil.rmtree(trained / "checkpoints")
    before = sorted(trained.rglob("*"))
    resume = ["submit", "--resume", "small", *LONGER]
    result = copus(*resume, worker=["--steps", "3"])
    assert result.returncode == 2
    assert "none of its checkpoints verifies (they are gone). To train again from the first step" in result.stderr
    assert sorted(trained.rglob("*")) == before
    assert copus(*resume, "--allow-from-scratch", worker=["--steps", "3"]).returncode == 0
    assert [event.samples_consumed for event in read_events(trained) if isinstance(event, Start)] == [0, 0]


def test_beginning_again_is_for_runs_that_began(tmp_path: Path, copus: Copus) -> None:
    write_job(tmp_path)
    result = copus("submit", "job.yaml", "--allow-from-scratch")
    assert (result.returncode, result.stderr) == (2, "copus: --allow-from-scratch: only with --resume\n")


def test_a_finished_run_needs_no_checkpoint(trained: Path, copus: Copus) -> None:
    shutil.rmtree(trained / "checkpoints")
    assert "finished already" in copus("submit", "--resume", "small").stdout


def test_checkpoints_count_from_the_last_beginning_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    assert not has_checkpoint(tmp_path)
    log.write(start())
    log.write(step(4))
    assert not has_checkpoint(tmp_path)
    log.write(Checkpoint(step=1, samples_consumed=4, path="checkpoints/samples-4", seconds=0.1, bytes=1))
    assert has_checkpoint(tmp_path)
    log.write(start(4, resumed_from="checkpoints/samples-4"))
    assert has_checkpoint(tmp_path)
    log.write(start())
    assert not has_checkpoint(tmp_path)


def _newest(run: Path, may_begin_again: bool) -> str | None:
    try:
        newest = newest_that_verifies(run, ResumeRequest(may_begin_again=may_begin_again), lambda event: None)
    except JobError as error:
        return str(error)
    return newest and newest.name


@pytest.mark.dist
def test_damaged_checkpoints_are_refused_or_set_aside_and_never_removed(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(start())
    for samples in (100, 200, 300):
        _flip(write(tmp_path, samples, keep=3))
    log.write(Checkpoint(step=1, samples_consumed=300, path="checkpoints/samples-300", seconds=0.1, bytes=1))
    for said in run_ranks(2, _newest, tmp_path, False):
        assert "none of its checkpoints verifies (checkpoints/samples-000000000300 does not verify: " in said
    assert names(tmp_path) == [f"samples-000000000{samples}" for samples in (100, 200, 300)], "left as they are"
    assert run_ranks(2, _newest, tmp_path, True) == [None, None]
    write(tmp_path, 250, keep=1)
    assert names(tmp_path) == [
        *(f"samples-000000000{samples}.damaged" for samples in (100, 200)),
        "samples-000000000250",
        "samples-000000000300.damaged",
    ]


def test_a_damaged_checkpoint_takes_the_place_of_no_good_one(tmp_path: Path) -> None:
    write(tmp_path, 100, keep=2)
    _flip(write(tmp_path, 300, keep=2))
    set_damaged_aside(tmp_path, "samples-000000000100")
    write(tmp_path, 400, keep=2)
    assert names(tmp_path) == [
        "samples-000000000100",
        "samples-000000000300.damaged",
        "samples-000000000400",
    ]


def _resume(run: Path, asked: dict[str, Any] | None, ranks: int, settings: dict[str, Any]) -> tuple[str, list[Event]]:
    """A job of `ranks` ranks, saved after 8 sequences, on the ranks that there are; label, and what it says."""
    job = parse_job(tiny_job(ranks, {"dp": ranks}, micro_batch=1, **settings).model_dump(mode="json"))
    events: list[Event] = []
    worker_job = worker._on_these_ranks(job)
    backend = MegatronBackend(worker_job, own_device())
    request = ResumeRequest(configuration=configuration(**asked) if asked else None, until_samples=8)
    newest = newest_checkpoint(run)
    state = build_or_resume(worker_job, newest, backend, Throughput(), request, events.append)
    if newest is None:
        state.samples_consumed = 8
        Writing(run, backend, state, keep=2, in_background=False).finish()
    return backend.configuration.label, events


@pytest.mark.dist
def test_the_configuration_that_was_asked_for_runs(tmp_path: Path) -> None:
    settings = {"global_batch": 4}
    run_ranks(2, _resume, tmp_path, None, 2, settings)
    assert run_ranks(2, _resume, tmp_path, None, 2, settings)[0][0] == "TP1·PP1·DP2 B4 m1"
    asked = {"global_batch": 16, "micro_batch": 2, "tp": 2}
    assert run_ranks(2, _resume, tmp_path, asked, 2, settings)[0][0] == "TP2·PP1·DP1 B16 m2"
    assert run_ranks(1, _resume, tmp_path, asked, 2, settings)[0][0] == "TP1·PP1·DP1 B16 m2", "or what is nearest"


@pytest.mark.dist
def test_a_batch_that_the_ranks_cannot_share_is_said_to_change(tmp_path: Path) -> None:
    settings = {"global_batch": 4}
    run_ranks(1, _resume, tmp_path, None, 1, settings)
    label, events = run_ranks(3, _resume, tmp_path, None, 1, settings)[0]
    assert label == "TP1·PP1·DP3 B3 m1"
    assert [event.message for event in events if isinstance(event, Warned)] == [
        "3 ranks cannot share a global batch of 4 evenly: it is 3 now. On other ranks, --resume --set "
        "training.global_batch=4 goes back to it"
    ]


def test_evaluations_have_their_old_size_again_on_the_old_ranks(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_job(1, evaluate_sequences=4, global_batch=12).model_dump(mode="json")))
    sizes = []
    for ranks in (1, 3, 1):
        job = load_resized(path, [f"cluster.accelerators_per_node={ranks}"])
        sizes.append(job.evaluate_sequences)
        path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert sizes == [4, 3, 4]


def _longer(run: Path, tokens: int) -> list[Event]:
    job = tiny_job(1, micro_batch=1, global_batch=4, tokens=tokens)
    backend, state = MegatronBackend(job, own_device()), TrainerState()
    newest = newest_checkpoint(run)
    backend.build(job.training.configuration)
    if newest is not None:
        state, _ = read_state(newest)
        backend.load(newest, state.optimizer_steps)
    events: list[Event] = []
    Trainer(job, run, backend, random_batches, random_batches, None, state, events.append, lambda: False).train()
    return events


@pytest.mark.dist
def test_a_learning_rate_that_jumps_is_told_with_both_values(tmp_path: Path) -> None:
    """By design: the schedule is that of the whole run, and a longer run is at another place in it."""
    assert not any(isinstance(event, Warned) for event in run_ranks(1, _longer, tmp_path, 16 * 40)[0])
    (warning,) = (event for event in run_ranks(1, _longer, tmp_path, 16 * 80)[0] if isinstance(event, Warned))
    assert warning.message.startswith(
        "the learning rate goes on at 0.00055; the run had come to 0.0001. Its schedule (training.tokens(1280), "
    )


def test_a_request_that_asks_for_nothing_leaves_no_file(tmp_path: Path) -> None:
    write_resume_request(tmp_path, ResumeRequest(may_begin_again=True))
    assert json.loads((tmp_path / "resume.json").read_text())["may_begin_again"]
    write_resume_request(tmp_path, ResumeRequest(until_samples=8))
    assert list(tmp_path.iterdir()) == []
