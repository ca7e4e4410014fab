"""`copus calibrate`: the command with a worker that makes up losses, and real branches on gloo ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch_jobs import copus_here, write_job
from test_end_to_end import _write_job as write_tiny_job

import launch.calibrate
from copus.branches import Branches, read_plan
from copus.checkpoints.trainer_state import TrainerState
from copus.events import Branch, Evaluate, Event, Noise, Step, read_events
from copus.job import JobConfig, JobError, load_job
from copus.manifest import describe, files_of, write_manifest
from planner.config import PlannerConfig
from profiles.calibration import Calibration
from tests.megatron_jobs import configuration, random_batches, tiny_job
from tests.ranks import own_device, run_ranks


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped with two checkpoints: batch 4, micro-batch 2, on TP2."""
    job_file = write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "runs" / "small"
    for samples in (60, 100):
        checkpoint = made / "checkpoints" / f"samples-{samples:012d}"
        checkpoint.mkdir(parents=True)
        at = configuration(4, 2, tp=2)
        (checkpoint / "trainer.json").write_text(json.dumps({"configuration": at.model_dump(mode="json")}))
        write_manifest(checkpoint, describe(checkpoint, files_of(checkpoint)))
    os.rename(job_file, made / "job.yaml")
    return made


def test_the_critical_batch_is_found_and_the_planner_can_read_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """φ = 24 in the made-up losses, and a noise scale of 8: c = 3."""
    assert copus_here("calibrate", "small", worker=[]) == 0
    printed = capsys.readouterr()
    assert "critical_batch_factor: 3" in printed.out
    assert "branch 12/12 batch 32" in printed.err
    found = Calibration.model_validate_json((run / "calibration.json").read_text())
    assert found.critical_batch_factor == pytest.approx(3.0, rel=1e-3)
    assert found.factor_low == pytest.approx(3 * 8 / 10, rel=1e-2)
    assert found.factor_high == pytest.approx(3 * 8 / 6, rel=1e-2)
    assert found.batches == [4, 8, 16, 32]
    assert found.sequences == 16 * 32
    assert found.checkpoint == "samples-000000000100"
    assert found.within_tolerance == 4
    job = load_job(run / "job.yaml", [f"planner.critical_batch_factor={run / 'calibration.json'}"])
    assert job.planner.critical_batch_factor == pytest.approx(3.0, rel=1e-3)


def test_branches_begin_at_the_newest_checkpoint_that_verifies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    newest = checkpoints / "samples-000000000100"
    shutil.copytree(newest, checkpoints / "samples-000000000100.replaced")
    (checkpoints / "samples-000000000120").mkdir()
    (newest / "trainer.json").write_text("{")
    assert copus_here("calibrate", "small", "--orders", "1", worker=[]) == 0
    said = capsys.readouterr().err
    assert "checkpoints/samples-000000000120 does not verify: half-written: it has no manifest.json: skipped" in said
    assert "checkpoints/samples-000000000100 does not verify: trainer.json has 1 bytes instead of" in said
    assert "branches from samples-000000000060" in said
    for text in ("100", newest.name, str(newest)):
        assert copus_here("calibrate", "small", "--checkpoint", text, worker=[]) == 2
        said = capsys.readouterr().err
        assert f"--checkpoint {text}: does not verify: trainer.json has 1 bytes instead of" in said
    (checkpoints / "samples-000000000060" / "manifest.json").unlink()
    assert copus_here("calibrate", "small", worker=[]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint that verifies: checkpoints/samples-000000000120 does not verify: half-written" in said
    assert said.count("\n") == 1


def test_a_calibration_that_failed_goes_on_after_its_last_branch(run: Path) -> None:
    assert copus_here("calibrate", "small", "--orders", "2", worker=["--fail-at", "5"]) == 1
    assert not (run / "calibration.json").exists()
    folder = run / "calibration" / "samples-000000000100-512"
    assert sum(isinstance(event, Branch) for event in read_events(folder)) == 5
    assert copus_here("calibrate", "small", "--orders", "2", worker=[]) == 0
    done = [event.done for event in read_events(folder) if isinstance(event, Branch)]
    assert done == [1, 2, 3, 4, 5, 6, 7, 8]
    assert copus_here("calibrate", "small", "--orders", "2", worker=["--crash-at", "1"]) == 0, "nothing is left to run"


def test_branches_are_kept_wherever_the_others_are_run(run: Path) -> None:
    assert copus_here("calibrate", "small", "--orders", "2", worker=["--fail-at", "5"]) == 1
    values = yaml.safe_load((run / "job.yaml").read_text())
    values["launch"] = {"timeout_seconds": 77.0}
    (run / "job.yaml").write_text(yaml.safe_dump(values))
    assert copus_here("calibrate", "small", "--orders", "2", worker=[]) == 0
    folder = run / "calibration" / "samples-000000000100-512"
    assert [event.done for event in read_events(folder) if isinstance(event, Branch)] == list(range(1, 9))
    assert load_job(folder / "job.yaml").launch.timeout_seconds == 77


def test_a_cancelled_run_starts_no_branches_until_it_is_calibrated_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "stop").touch()  # of an earlier command
    with monkeypatch.context() as patch:
        patch.setattr(launch.calibrate, "prepare", lambda job, *arguments: (copus_here("cancel", "small"), job))
        assert copus_here("calibrate", "small", worker=[]) == 128 + signal.SIGTERM
    assert not list(run.rglob("events.jsonl"))
    assert copus_here("calibrate", "small", worker=[]) == 0


def test_more_orders_keep_what_was_run_and_other_rules_do_not(run: Path) -> None:
    folder = run / "calibration" / "samples-000000000100-512"

    def branches() -> int:
        return sum(isinstance(event, Branch) for event in read_events(folder))

    assert copus_here("calibrate", "small", "--orders", "1", worker=[]) == 0
    assert copus_here("calibrate", "small", "--orders", "2", worker=[]) == 0
    assert branches() == 8
    job = yaml.safe_load((run / "job.yaml").read_text())
    job["training"]["lr"] = 5e-3
    (run / "job.yaml").write_text(yaml.safe_dump(job))
    assert copus_here("calibrate", "small", "--orders", "1", worker=[]) == 0
    assert branches() == 4


def test_the_plan_has_equal_lengths_and_fitting_micro_batches(run: Path) -> None:
    arguments = ["--multiples", "0.25,1,3", "--tokens", "1000", "--orders", "2", "--checkpoint", "60", "--json"]
    assert copus_here("calibrate", "small", *arguments, worker=[]) == 0
    plan = read_plan(run / "calibration" / "samples-000000000060-36")
    assert plan.sequences == 36, "1,000 tokens are 31 sequences; whole steps of 1, 4 and 12 make 36"
    assert [(each.global_batch, each.micro_batch) for each in plan.configurations] == [(1, 1), (4, 2), (12, 2)]
    assert plan.seeds == [1234, 1235]


def test_a_batch_that_diverged_is_left_out(run: Path) -> None:
    assert copus_here("calibrate", "small", "--multiples", "1,2,4,32", worker=[]) == 0
    found = Calibration.model_validate_json((run / "calibration.json").read_text())
    assert found.diverged == [128]
    assert found.batches == [4, 8, 16]
    assert found.critical_batch == pytest.approx(24, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multiples", "1"], "two or more"),
        (["--multiples", "1,x"], "1,2,4,8"),
        (["--multiples", "0.3,1"], "0.3 × batch 4 of the checkpoint = 1.2, which is not whole"),
        (["--checkpoint", "61"], "has samples-000000000060, samples-000000000100"),
        (["--checkpoint", "²"], "--checkpoint ²: no such checkpoint"),
        (["--orders", "0"], "--orders 0"),
        (["--tokens", "0"], "--tokens 0"),
        (["--tolerance", "-1"], "--tolerance -1: finite, at least 0"),
        (["--tolerance", "nan"], "--tolerance nan: finite, at least 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert copus_here("calibrate", "small", *arguments, worker=[]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run / "calibration").exists()


@pytest.mark.parametrize("text", ["no/such.json", "job.yaml"])
def test_a_factor_that_is_no_calibration_is_refused(run: Path, text: str) -> None:
    (run.parent.parent / "job.yaml").write_text("{}")
    with pytest.raises(JobError, match=r"planner\.critical_batch_factor: .*(neither a number|not a file of)"):
        load_job(run / "job.yaml", [f"planner.critical_batch_factor={text}"])


def test_a_calibration_without_a_factor_says_what_it_knows(run: Path) -> None:
    assert copus_here("calibrate", "small", worker=[]) == 0
    path = run / "calibration.json"
    values = json.loads(path.read_text()) | {"critical_batch_factor": None, "factor_low": 4.5}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"only that it is above 4\.5; give a number"):
        PlannerConfig(critical_batch_factor=str(path))


def _train_then_branch(folder: Path, job: JobConfig, more: JobConfig) -> tuple[list[Event], list[Event], list[Event]]:
    """Train `job`, run branches from its checkpoint, then go on with `more`; what each reported."""
    from copus.backends.megatron.backend import MegatronBackend
    from copus.branch_runs import run_branches
    from copus.checkpoints.store import newest_checkpoint, read_state
    from copus.loop import Trainer

    def never() -> bool:
        return False

    backend = MegatronBackend(job, own_device())
    backend.build(job.training.configuration)
    before: list[Event] = []
    Trainer(job, folder, backend, random_batches, random_batches, None, TrainerState(), before.append, never).train()
    checkpoint = newest_checkpoint(folder)
    configurations = [configuration(batch, 2, tp=2) for batch in (8, 4, 8, 16)]
    plan = Branches(
        checkpoint=checkpoint, checkpoint_digest="", configurations=configurations, seeds=[1234], sequences=64
    )
    branches: list[Event] = []

    def open_data(branch: JobConfig):
        assert branch.total_samples == job.total_samples + 64
        return random_batches, random_batches

    run_branches(job, folder, plan, backend, open_data, branches.append, never)
    after: list[Event] = []
    state, at = read_state(checkpoint)
    backend.build(at)
    backend.load(checkpoint, state.optimizer_steps)
    Trainer(more, folder, backend, random_batches, random_batches, None, state, after.append, never).train()
    return before, branches, after


@pytest.mark.dist
@pytest.mark.slow
def test_a_branch_is_the_run_going_on(tmp_path: Path) -> None:
    """With a constant learning rate the branch at the run's own batch ends where the run itself does; and what one
    branch did to weights and moments is gone in the next."""
    settings = dict(
        micro_batch=2, global_batch=4, decay="constant", lr=3e-3, min_lr=0.0, evaluate_every_tokens=16 * 1000
    )
    job = tiny_job(2, {"tp": 2}, tokens=16 * 80, **settings)
    more = tiny_job(2, {"tp": 2}, tokens=16 * 144, **settings)
    before, branches, after = run_ranks(2, _train_then_branch, tmp_path, job, more)[0]
    results = [event for event in branches if isinstance(event, Branch)]
    assert [event.configuration.global_batch for event in results] == [8, 4, 16], "the second 8 is the first again"
    assert [event.done for event in results] == [1, 2, 3]
    checkpoint_loss = [event.loss for event in before if isinstance(event, Evaluate)][-1]
    for event in results:
        assert event.first_loss == pytest.approx(checkpoint_loss, rel=1e-6)
        assert event.last_loss < event.first_loss
        assert event.lr == pytest.approx(3e-3 * (event.configuration.global_batch / 4) ** 0.5)
        assert event.samples_consumed == 80
    assert results[0].noise.samples == sum(isinstance(event, Noise) for event in before)
    assert sum(isinstance(event, Step) for event in after) == 16
    assert results[1].last_loss == pytest.approx([e.loss for e in after if isinstance(e, Evaluate)][-1], rel=1e-6)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["samples-000000000080", "samples-000000000144"], "branches leave no checkpoint"


def _train_prepared(run: Path) -> list[Event]:
    """Train a run on its own prepared data; the events of rank 0."""
    from copus.backends.megatron.backend import MegatronBackend
    from copus.data.prepared import prepared_path
    from copus.data.samples import open_data
    from copus.loop import Trainer

    job = load_job(run / "job.yaml")
    backend = MegatronBackend(job, own_device())
    data = open_data(job, prepared_path(job))
    backend.build(job.training.configuration)
    events: list[Event] = []
    Trainer(job, run, backend, *data, None, TrainerState(), events.append, lambda: False).train()
    return events


@pytest.mark.dist
@pytest.mark.slow
def test_the_command_with_all_of_it_real(tmp_path: Path) -> None:
    """Text, a run, and four branches of it on two ranks under the agent."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    job = write_tiny_job(tmp_path)
    values = yaml.safe_load(job.read_text())
    values["training"]["tokens"] = 16 * 4 * 75
    values["planner"]["noise_half_life_tokens"] = 1000
    values["data"]["cache"] = str(tmp_path / "cache")
    (run / "job.yaml").write_text(yaml.safe_dump(values))
    subprocess.run([sys.executable, "-m", "copus.data", str(run / "job.yaml")], cwd=tmp_path, check=True)
    events = run_ranks(2, _train_prepared, run)[0]
    command = [sys.executable, "-m", "launch.cli", "calibrate", "tiny", "--json"]
    command += ["--multiples", "1,4", "--orders", "2", "--tokens", "1024"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["batches"] == [4, 16]
    assert found["sequences"] == 64
    assert len(found["losses"]) == 2
    assert found["losses"][0] != found["losses"][1], "two orders of the data"
    last = [event.loss for event in events if isinstance(event, Evaluate)][-1]
    assert found["first_loss"] == pytest.approx(last, rel=1e-6)
    assert all(loss != found["first_loss"] for row in found["losses"] for loss in row)
    assert found["noise_scale"] is not None
