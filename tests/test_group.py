"""`copus submit --seeds --matrix`: a group of runs with a worker that only counts, and their table of results."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_api import fake_cluster
from launch_events import start, step
from launch_jobs import copus_here, write_job
from rich.console import Console
from test_kubernetes import on_volume
from test_launch_submit import Copus, copus, submitted, wait_for  # noqa: F401
from test_slurm_engine import Says, asked, job_file, slurm  # noqa: F401

import launch.group_watch
import launch.submit
import launch.submit_group
from copus.event_log import EventLog
from copus.events import End, Step, read_events
from copus.job import JobError, load_job
from launch.engines import engine_of, slurm_job
from launch.engines.slurm import SlurmEngine
from launch.group import parse_matrix, plan_group, runs_of_group
from launch.interrupts import Interrupts
from launch.intervals import interval, interval_of_ratio
from launch.run_names import runs_in
from launch.run_state import RunState
from launch.status import RunStatus

QUICK = ["--steps", "3"]
GROUP = ("submit", "job.yaml", "--matrix", "training.lr=1e-3,2e-3", "--seeds", "2")
NAMES = [f"small-lr-{lr}-seed-{seed}" for lr in ("1e-3", "2e-3") for seed in (1234, 1235)]


def planned(folder: Path, *matrix: str, seeds: int | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    job = load_job(write_job(folder), list(overrides))
    return [run.name for run in plan_group(job, parse_matrix(matrix, overrides), seeds)]


def starts(folder: Path) -> int:
    return len((folder / "runs" / "starts-0").read_text().splitlines())


def test_names_say_what_differs(tmp_path: Path) -> None:
    assert planned(tmp_path, "training.lr=1e-3,2e-3", seeds=2, overrides=("training.seed=7",)) == [
        f"small-lr-{lr}-seed-{seed}" for lr in ("1e-3", "2e-3") for seed in (7, 8)
    ]


def test_commas_in_brackets_do_not_separate_values(tmp_path: Path) -> None:
    assert planned(tmp_path, "training.layout={tp: 2, dp: 1},{dp: 2}") == [
        "small-layout-tp_2_dp_1",
        "small-layout-dp_2",
    ]


def test_fields_with_the_same_end_are_named_with_more_of_it(tmp_path: Path) -> None:
    matrix = ["training.optimizer.kind=adamw", "profile.kind=a", "training.lr=1e-3"]
    assert planned(tmp_path, *matrix) == ["small-optimizer.kind-adamw-profile.kind-a-lr-1e-3"]


def test_a_name_that_is_too_long_is_cut_and_stays_different(tmp_path: Path) -> None:
    names = planned(tmp_path, f"data.tokenizer=/{'a' * 90}/1,/{'a' * 90}/2")
    assert [len(name) for name in names] == [64, 64]
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("matrix", "more", "message"),
    [
        (["training.lr"], {}, "--matrix training.lr: expected section.field=value,value"),
        (["training.lr="], {}, "--matrix training.lr=: expected section.field=value,value"),
        (["training.lr=1,["], {}, "--matrix training.lr=1,[: not YAML"),
        (["training.lr=1,1"], {}, "--matrix training.lr=1,1: 1 stands twice"),
        (["training=1"], {}, "--matrix training=1: expected section.field=value,value"),
        (["training.lr=1", "training.lr=2"], {}, "training.lr is in the matrix already"),
        (["training.layout={dp: 2}", "training.layout.tp=1,2"], {}, "training.layout is in the matrix already"),
        (["training.lr=1"], {"overrides": ("training.lr=2",)}, "--set names training.lr too"),
        (["training.layout={dp: 2}"], {"overrides": ("training.layout.tp=2",)}, "--set names training.layout.tp too"),
        (["launch.engine=local,slurm"], {}, "all runs of a group have the same launch.engine"),
        (["training.seed=1,2"], {"seeds": 2}, "--seeds 2: training.seed is in the matrix already"),
        ([], {"seeds": 0}, "--seeds 0: at least 1"),
        (["training.lr=1,2"], {"seeds": 501}, "2 × 501 = 1002 runs, at most 1000"),
        (["data.tokenizer=/a/b,/a_b"], {}, "would both be named small-tokenizer-a_b"),
    ],
)
def test_a_matrix_that_is_refused(tmp_path: Path, matrix: list[str], more: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as refused:
        planned(tmp_path, *matrix, **more)
    assert message in str(refused.value)


def test_a_group_is_trained_one_run_after_another_and_compared(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    result = copus(*GROUP, worker=QUICK)
    assert result.returncode == 0, result.stderr
    assert [f"run {number} of 4: runs/{name}" in result.stdout for number, name in enumerate(NAMES, 1)] == [True] * 4
    job = load_job(tmp_path / "runs" / NAMES[3] / "job.yaml")
    assert (job.training.lr, job.training.seed) == (2e-3, 1235)
    assert "ended 2 of 2" in result.stdout
    table = result.stdout.partition("ended 2 of 2")[2].splitlines()
    assert [line.split()[0] for line in table if line.startswith((" training.lr", " 1e-3", " 2e-3"))] == [
        *("training.lr", "1e-3", "2e-3"),
    ]
    assert "copus runs --group small" in result.stdout

    again = copus(*GROUP, "--json", worker=QUICK)
    assert again.returncode == 0
    assert starts(tmp_path) == 4, "what has finished is not trained again"
    answer = json.loads(again.stdout)
    assert [cell["settings"] for cell in answer["cells"]] == [{"training.lr": "1e-3"}, {"training.lr": "2e-3"}]
    assert [run["seed"] for run in answer["cells"][0]["runs"]] == [1234, 1235]
    assert answer["cells"][0]["means"]["loss"]["low"] <= answer["cells"][0]["means"]["loss"]["value"]

    later = copus("runs", "--group", "small")
    assert all(name in later.stdout for name in NAMES)
    assert "2 of 2" in later.stdout
    assert json.loads(copus("runs", "--group", "small", "--json").stdout)["cells"] == answer["cells"]
    assert copus("runs", "--group", "smal").returncode == 2
    assert copus("report", "--group", "small").returncode == 0
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert "2 of 2" in copus("runs", "--group", "elsewhere/small").stdout
    assert copus("report", "--group", "elsewhere/small").returncode == 0
    assert "elsewhere is named too" in copus("runs", "elsewhere", "--group", "elsewhere/small").stderr
    assert "small-lr-2e-3-seed-1235" in (tmp_path / "comparison.html").read_text()


def test_every_job_is_checked_before_any_starts(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    result = copus("submit", "job.yaml", "--matrix", "training.lr=1e-3,-1", worker=QUICK)
    assert result.returncode == 2
    assert "training.lr" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_field_that_is_in_the_matrix_may_be_left_out_of_the_job_file(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    path = write_job(tmp_path)
    values = yaml.safe_load(path.read_text())
    del values["training"]["tokens"]
    path.write_text(yaml.safe_dump(values))
    result = copus("submit", "job.yaml", "--matrix", "training.tokens=6400,12800", "--dry-run", worker=QUICK)
    assert result.returncode == 0, result.stderr
    assert "small-tokens-12800" in result.stdout


def test_one_value_written_in_two_ways_is_no_two_runs(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    result = copus("submit", "job.yaml", "--matrix", "training.lr=1e-3,0.001", worker=QUICK)
    assert result.returncode == 2
    assert "small-lr-1e-3 and small-lr-0.001 would be the same job" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_diverged_is_left_alone_and_not_promised_again(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    assert copus("submit", "job.yaml", "--seeds", "1", worker=QUICK).returncode == 0
    events = tmp_path / "runs" / "small-seed-1234" / "events.jsonl"
    text = events.read_text()
    events.write_text(text.replace('"reason":"finished"', '"reason":"diverged"'))
    assert events.read_text() != text
    again = copus("submit", "job.yaml", "--seeds", "1", worker=QUICK)
    assert again.returncode == 1
    assert "has ended: diverged" in again.stdout
    assert "the same command goes on" not in again.stdout
    assert starts(tmp_path) == 1


def test_a_failed_run_stops_the_others_only_where_that_was_asked_for(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    failing = ["--fail-at", "2"]
    assert copus("submit", "job.yaml", "--seeds", "2", "--fail-fast", worker=failing).returncode == 1
    assert starts(tmp_path) == 1
    assert copus("submit", "job.yaml", "--seeds", "2", worker=failing).returncode == 1
    assert starts(tmp_path) == 3, "the first is tried again"
    result = copus("submit", "job.yaml", "--seeds", "2", worker=QUICK)
    assert result.returncode == 0
    assert "run 1 of 2: runs/small-seed-1234 is resumed" in result.stdout


def test_ctrl_c_ends_the_run_and_the_queue_and_the_same_command_goes_on(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    first, second = (tmp_path / "runs" / f"small-seed-{seed}" for seed in (1234, 1235))
    with submitted(tmp_path, "job.yaml", "--seeds", "2", worker=["--steps", "100000"]) as process:
        wait_for(lambda: (first / "events.jsonl").exists() and any(isinstance(e, Step) for e in read_events(first)))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "2 of 2 runs have not ended: the same command goes on with them" in output
    assert not second.exists()
    done = int((first / "checkpoints" / "done").read_text())
    assert copus("submit", "job.yaml", "--seeds", "2", worker=["--steps", str(done + 2)]).returncode == 0
    assert [event.step for event in read_events(first) if isinstance(event, Step)] == list(range(1, done + 3))


def test_a_run_is_there_with_its_place_in_the_group_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is killed where it would write that place: the next one finds nothing in its way."""
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    child = os.fork()
    if child == 0:
        launch.submit_group.write_member = lambda run, member: os.kill(os.getpid(), signal.SIGKILL)
        copus_here("submit", "job.yaml", "--seeds", "1", worker=QUICK)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = (tmp_path / "runs").iterdir()
    assert left.name.startswith(".small-seed-1234.")
    assert list(runs_in(tmp_path / "runs")) == []
    assert copus_here("submit", "job.yaml", "--seeds", "1", worker=QUICK) == 0
    assert [run.name for run in runs_of_group(tmp_path / "runs", "small")] == ["small-seed-1234"]


def test_a_run_with_other_settings_is_not_taken_for_one_of_the_group(tmp_path: Path, copus: Copus) -> None:  # noqa: F811
    write_job(tmp_path)
    assert copus("submit", "job.yaml", "--seeds", "1", worker=QUICK).returncode == 0
    other = copus("submit", "job.yaml", "--seeds", "1", "--set", "training.lr=5e-3", worker=QUICK)
    assert other.returncode == 2
    assert "training.lr is 0.001 in this run of the group, and 0.005 now" in other.stderr
    (tmp_path / "runs" / "small-seed-1234" / "group.json").unlink()
    assert "is not a run of this group" in copus("submit", "job.yaml", "--seeds", "1", worker=QUICK).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "small", "--seeds", "2"], "--seeds and --matrix go on by the same command again"),
        (["job.yaml", "--fail-fast"], "--fail-fast: only with --seeds or --matrix"),
        (["job.yaml", "--at-once", "2"], "--at-once: only with --seeds or --matrix"),
        (["job.yaml", "--seeds", "2", "--at-once", "0"], "--at-once 0: at least 1"),
        (["job.yaml", "--seeds", "2", "--at-once", "2", "--detach"], "--detach: launch.engine(local) has no queue"),
        (["job.yaml", "--seeds", "2", "--at-once", "2"], "--at-once: launch.engine(local) has no queue"),
        (["--seeds", "2"], "--seeds, --matrix: nothing to train: give a job file"),
        (["job.yaml", "--seeds", "2", "--fail-fast", "--detach"], "--fail-fast: with --detach nobody sees a run fail"),
        (["job.yaml", "--seeds", "2", "--detach"], "--detach: launch.engine(local) has no queue"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, copus: Copus, arguments: list[str], message: str) -> None:  # noqa: F811
    write_job(tmp_path)
    result = copus("submit", *arguments)
    assert (result.returncode, message in result.stderr) == (2, True), result.stderr


def test_a_dry_run_prints_every_job_and_makes_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path)
    arguments = ["submit", str(path), *on_volume(tmp_path), "--matrix", "training.lr=1e-3,2e-3", "--dry-run"]
    assert copus_here(*arguments) == 0
    manifests = [value for value in yaml.safe_load_all(capfd.readouterr().out) if value and value["kind"] == "TrainJob"]
    assert [manifest["spec"]["trainer"]["args"][0].rpartition("/")[2] for manifest in manifests] == [
        "small-lr-1e-3",
        "small-lr-2e-3",
    ]
    assert not (tmp_path / "runs").exists()


def test_on_kubernetes_a_run_is_a_job_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_job(tmp_path)
    with fake_cluster(tmp_path) as (cluster, config):
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        assert copus_here("submit", str(path), *on_volume(tmp_path), "--seeds", "3", "--detach") == 0
        assert len(cluster.jobs) == 3
        assert copus_here("submit", str(path), *on_volume(tmp_path), "--seeds", "3", "--detach") == 0
        assert len(cluster.jobs) == 3, "what is queued is not queued again"


def test_under_slurm_all_runs_are_queued_and_followed_to_their_ends(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    assert copus_here("submit", "job.yaml", "--seeds", "2", "--detach") == 0
    runs = [tmp_path / "runs" / f"small-seed-{seed}" for seed in (1234, 1235)]
    assert [line for line in asked(tmp_path) if line.startswith("sbatch")] == [f"sbatch --parsable {runs[0]}/slurm.sh"]
    tickets = [json.loads((run / "engine.json").read_text())["job_id"] for run in runs]
    assert tickets == ["12_0", "12_1"]
    capfd.readouterr()
    slept: list[float] = []

    def ends(seconds: float) -> None:
        """One finishes and the other fails while the command looks on."""
        slept.append(seconds)
        if len(slept) == 1:
            log = EventLog(runs[0])
            log.write(start())
            log.write(step(4))
            log.write(End(step=1, samples_consumed=4, reason="finished", seconds=1.0))
            slurm("squeue", "COMPLETED|None|n1\n")

    monkeypatch.setattr(launch.group_watch.time, "sleep", ends)
    assert copus_here("submit", "job.yaml", "--seeds", "2") == 1
    output = capfd.readouterr().out
    assert "run 1 of 2: runs/small-seed-1234: queued" in output
    assert "small-seed-1234: finished" in output
    assert "small-seed-1235: crashed: its workers never began (Slurm job 12_1 has ended: COMPLETED)" in output
    assert "(2 of 2 ended)" in output
    assert "1 of 2 runs have not ended: the same command goes on with them\n" in output


def test_a_run_that_another_command_has_made_meanwhile_is_not_made_twice(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    command = ["submit", "job.yaml", "--seeds", "1", "--detach"]
    begin = launch.submit_group.begin

    def begin_second(*arguments: Any) -> Any:
        monkeypatch.setattr(launch.submit_group, "begin", begin)
        assert copus_here(*command) == 0
        return begin(*arguments)

    monkeypatch.setattr(launch.submit_group, "begin", begin_second)
    assert copus_here(*command) == 1
    assert "runs/small-seed-1234 is there already: another command has made it" in capfd.readouterr().err
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["small-seed-1234"]


def test_a_queued_run_that_was_cancelled_is_told_by_the_exit_code(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    assert copus_here("submit", "job.yaml", "--seeds", "1", "--detach") == 0
    log = EventLog(tmp_path / "runs" / "small-seed-1234")
    log.write(start())
    log.write(step(4))

    slept: list[float] = []

    def cancelled(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            log.write(End(step=1, samples_consumed=4, reason="interrupted", seconds=1.0))
            slurm("squeue", "CANCELLED|None|n1\n")

    monkeypatch.setattr(launch.group_watch.time, "sleep", cancelled)
    assert copus_here("submit", "job.yaml", "--seeds", "1") == 1
    assert "small-seed-1234: stopped" in capfd.readouterr().out


def test_a_scheduler_is_asked_about_many_runs_twice_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(launch.group_watch.time, "sleep", slept.append)
    monkeypatch.setattr(launch.group_watch, "status_of", lambda run: RunStatus())
    monkeypatch.setattr(launch.group_watch, "state_of", lambda run, status: RunState("failed"))

    def failed(number: int) -> list[str]:
        queued: Any = {tmp_path / str(index): None for index in range(number)}
        watch = launch.group_watch.Watch(queued, number, Console(quiet=True), fail_fast=False)
        watch.until(0, Interrupts())
        return watch.failed

    assert len(failed(2)) == 2
    assert slept == [1.5, 1.5, 1.5]
    slept.clear()
    assert len(failed(20)) == 20
    assert slept == [0.5] * 39


def oldest_finishes(runs: Path, queued: list[int]) -> Callable[[float], None]:
    """What happens while the command sleeps: the oldest run that is queued finishes; `queued` gets how many there
    were."""

    def sleep(seconds: float) -> None:
        open_runs = [run for run in sorted(runs.iterdir()) if not (run / "events.jsonl").exists()]
        queued.append(len(open_runs))
        if open_runs:
            log = EventLog(open_runs[0])
            log.write(start())
            log.write(End(step=1, samples_consumed=4, reason="finished", seconds=1.0))

    return sleep


def refuse_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler takes every run of a group but the second."""
    queue = launch.submit_group.hand_over

    def hand_over(*arguments: Any) -> Any:
        if arguments[1].name.endswith("1235"):
            raise JobError("sbatch: error: no more jobs for you")
        return queue(*arguments)

    monkeypatch.setattr(launch.submit_group, "hand_over", hand_over)


def test_under_slurm_at_most_so_many_runs_are_queued_at_once(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    queued: list[int] = []
    monkeypatch.setattr(launch.group_watch.time, "sleep", oldest_finishes(tmp_path / "runs", queued))
    assert copus_here("submit", "job.yaml", "--seeds", "5", "--at-once", "2") == 0
    assert max(queued) == 2
    assert sum(line.startswith("sbatch") for line in asked(tmp_path)) == 5
    output = capfd.readouterr().out
    assert all(f"({done} of 5 ended)" in output for done in range(1, 6))


def test_runs_with_the_same_needs_are_one_array(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    seeds = ["submit", "job.yaml", "--seeds", "3", "--detach"]
    assert copus_here(*seeds, "--at-once", "2", "--dry-run") == 0
    script = capfd.readouterr().out
    assert script.count("#!/bin/bash") == 1
    assert "#SBATCH --array=0-2%2\n" in script
    assert copus_here(*seeds, "--at-once", "2") == 0
    made = (tmp_path / "runs" / "small-seed-1236" / "slurm.sh").read_text()
    assert made in script
    assert made == (tmp_path / "runs" / "small-seed-1234" / "slurm.sh").read_text()
    assert copus_here("submit", "job.yaml", "--seeds", "1", "--set", "name=one", "--detach", "--at-once", "1") == 2
    assert "nobody queues the next run, and the runs are not one array of Slurm" in capfd.readouterr().err
    job = load_job(tmp_path / "job.yaml", [])
    engine = engine_of(job)
    assert isinstance(engine, SlurmEngine)
    larger = job.cluster.model_copy(update={"accelerators_per_node": 2 * job.cluster.accelerators_per_node})
    assert engine.array_key(job) == engine.array_key(job.model_copy(update={"name": "another"}))
    assert engine.array_key(job) != engine.array_key(job.model_copy(update={"cluster": larger}))


def test_an_array_that_slurm_refuses_leaves_nothing(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
) -> None:
    job_file(tmp_path)
    slurm("sbatch", "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy\n", 1)
    assert copus_here("submit", "job.yaml", "--seeds", "3") == 1
    assert "Job violates accounting/QOS policy" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_task_of_an_array_is_the_job_that_its_ticket_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "40")
    assert slurm_job.own_job_id() == "40"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "38")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job.own_job_id() == "38_2"


def test_under_slurm_fail_fast_cancels_no_run_that_has_ended(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_file(tmp_path)
    refuse_the_second(monkeypatch)
    monkeypatch.setattr(launch.group_watch.time, "sleep", oldest_finishes(tmp_path / "runs", []))
    assert copus_here("submit", "job.yaml", "--seeds", "3", "--at-once", "1", "--fail-fast") == 1
    assert sum(line.startswith("sbatch") for line in asked(tmp_path)) == 1
    assert not any(line.startswith("scancel") for line in asked(tmp_path))


def test_under_slurm_fail_fast_takes_what_is_queued_out_of_the_queue(
    tmp_path: Path,
    slurm: Says,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_file(tmp_path)
    refuse_the_second(monkeypatch)
    assert copus_here("submit", "job.yaml", "--seeds", "3", "--at-once", "3", "--fail-fast") == 1
    assert sum(line.startswith("sbatch") for line in asked(tmp_path)) == 1
    assert "scancel 12" in asked(tmp_path)
    assert [run.name for run in sorted((tmp_path / "runs").iterdir())] == ["small-seed-1234"]


def test_the_interval_of_a_mean_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(2.0)
    assert high - 2.0 == pytest.approx(2.920 / 3**0.5, rel=1e-3)  # t(0.95; 2 degrees of freedom) = 2.920
    assert interval([1.0]) is None
    assert interval_of_ratio([10.0]) is None
