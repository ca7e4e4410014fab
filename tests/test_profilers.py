"""Profilers as plugins: what is installed, what is refused, and what drives them. No torch, no ranks."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from launch_jobs import JOB, copus_here, write_job

import copus.profiling.fill as fill_module
import launch.submit
from copus.backends.registry import find_backend
from copus.estimate import predictor_of
from copus.event_log import EventLog
from copus.events import Checkpoint, Profile, read_events
from copus.job import JobConfig, JobError, parse_job
from copus.profilers import BUILT_IN, TRIED, find_profiler, installed
from copus.profiling.fill import DIED, _space, fill_table, load_profiler
from launch.attend import Outcome
from launch.status import RunStatus
from planner.last_measurement import last_measurement
from planner.ranking import next_round
from profiles.configuration import Configuration
from profiles.measurement import Fingerprint, Measurement
from profiles.profiler import Task
from profiles.table import ThroughputTable
from profiles.throughput import Throughput

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "profiler-plugin"
COMMAND = [
    sys.executable,
    "-c",
    "'import sys; d, m, B = map(int, sys.argv[1:]); print(9.0, *[0.1 + B / d / 100] * 3) if m < 4 "
    'else sys.exit("CUDA error: out of memory")\'',
    "{dp} {micro_batch} {global_batch}",
]
"""Prints a warm-up step and three times; lacks memory for micro-batches of 4."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed in, as pip does it."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


def job_of(folder: Path, **profile: object) -> JobConfig:
    values = yaml.safe_load(JOB)
    values["profile"] = {"table": str(folder / "table.jsonl"), **profile}
    values["planner"] = {"min_global_batch": 4, "max_global_batch": 16, "max_micro_batch": 4}
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return parse_job(values)


def task_of(job: JobConfig) -> Task:
    here = Fingerprint(model=job.model.digest, precision="fp32", backend="b", hardware="h", software="s")
    return Task(job.model, job.cluster, here, job.profile)


class Told:
    """A profiler that is told what to say: seconds, a failure, or None."""

    processes = "one"
    shards = False

    def __init__(self, answer, shards=False) -> None:
        self.answer, self.shards, self.asked = answer, shards, []

    def __call__(self, task: Task) -> "Told":
        self.task = task
        return self

    def measure(self, configuration: Configuration) -> Measurement | None:
        self.asked.append(configuration)
        said = self.answer(configuration)
        if said is None:
            return None
        what = {"failure": said} if isinstance(said, str) else {"step_seconds": said, "spread_seconds": 0.0, "count": 3}
        return Measurement(
            fingerprint=self.task.fingerprint,
            model=self.task.model,
            configuration=configuration,
            shard=self.shards,
            time=time.time(),
            **what,
        )


def fill(job: JobConfig, folder: Path, profiler: Told, stop=lambda: False) -> list[Profile]:
    events: list[Profile] = []
    fill_table(job, folder, profiler, task_of(job), events.append, stop)
    return events


def affine(configuration: Configuration) -> float:
    return 0.1 + configuration.global_batch * configuration.layout.tp / 100


def test_unknown_names_are_refused_where_the_job_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"profile: no profiler 'fast' is installed; there are live \(built in\)"):
        job_of(tmp_path, profiler="fast")
    with pytest.raises(JobError, match=r"profile\.rounds"):
        job_of(tmp_path, rounds=0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_said_of_built_in_ones_is_so(name: str) -> None:
    profiler = find_profiler(name)
    kind = profiler.load()
    assert (kind.processes, kind.shards) == profiler.traits == (profiler.processes, profiler.shards)


def test_options_are_the_profilers_own_business(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    job = job_of(tmp_path, profiler="command", options={"deep": {"er": [1, True]}})
    assert job.profile.options == {"deep": {"er": [1, True]}}
    with pytest.raises(JobError, match=r"profile\.options: the command profiler needs `command`"):
        fill_table(job, tmp_path, load_profiler(job), task_of(job), print, lambda: False)
    with pytest.raises(JobError, match=r"profile: options: the live profiler takes none, got csv"):
        job_of(tmp_path, options={"csv": "file.csv"})
    with pytest.raises(JobError, match=r"profile: options: the published profiler takes csv, got cvs"):
        job_of(tmp_path, profiler="published", options={"cvs": "file.csv"})
    job = job_of(tmp_path, profiler="published", options={"csv": "no/such/file.csv"})
    with pytest.raises(JobError, match=r"profile\.options: csv\(no/such/file\.csv\): No such file"):
        fill_table(job, tmp_path, load_profiler(job), task_of(job), print, lambda: False)


def test_a_filled_table_predicts_every_candidate_and_is_not_filled_again(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    events = fill(job, tmp_path, Told(affine))
    assert [event.done for event in events] == list(range(1, len(events) + 1))
    assert events[-1].total == len(events)
    rows = ThroughputTable(job.profile.table).rows(task_of(job).fingerprint)
    known = Throughput(rows)
    for candidate in predictor_of(job, rows).candidates:
        assert known.predict(candidate) is not None
    assert fill(job, tmp_path, Told(affine)) == []
    assert not (tmp_path / TRIED).exists()


def test_an_interrupted_profile_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Told(affine)
    (tmp_path / "whole").mkdir()
    fill(job_of(tmp_path / "whole"), tmp_path / "whole", whole)
    job, asked = job_of(tmp_path), []
    for _ in range(100):
        profiler = Told(affine)
        fill(job, tmp_path, profiler, stop=lambda profiler=profiler: len(profiler.asked) == 2)
        asked += profiler.asked
        if not profiler.asked:
            break
    first_round = len(set(whole.asked))
    assert asked[:first_round] == whole.asked[:first_round]
    assert set(asked) == set(whole.asked)
    assert len(asked) == pytest.approx(len(whole.asked), abs=2)  # what is contested is seen anew after each interrupt


def test_the_budget_ends_it(tmp_path: Path) -> None:
    job = job_of(tmp_path, budget_seconds=1e-9)
    assert fill(job, tmp_path, Told(affine)) == []


def test_the_last_measurement_of_a_budget_serves_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, profiler = job_of(tmp_path, budget_seconds=5.5), Told(affine)
    monkeypatch.setattr(fill_module, "time", SimpleNamespace(monotonic=lambda: len(profiler.asked), time=time.time))
    fill(job, tmp_path, profiler)
    assert len(profiler.asked) == 6, "a second each; the last begins within the budget"
    *before, last = profiler.asked
    space = predictor_of(job, []).candidates
    rows = ThroughputTable(job.profile.table).rows(task_of(job).fingerprint)
    earlier = [row for row in rows if row.configuration != last]
    assert before == next_round(space, [], before[0], 1, 0.02)[:5], "the order that a longer time has"
    best = last_measurement(predictor_of(job, earlier))
    assert last == best != next_round(space, [], before[0], 1, 0.02)[5]


def test_always_measures_again_and_never_does_not(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    first = fill(job, tmp_path, Told(affine))
    always = job_of(tmp_path, when="always")
    os.utime(tmp_path / "job.yaml", (time.time() + 1, time.time() + 1))
    time.sleep(1.1)
    assert len(fill(always, tmp_path, Told(affine))) == len(first)
    assert fill(job_of(tmp_path, when="never"), tmp_path, Told(affine)) == []


def test_a_run_that_has_trained_measures_only_on_other_ranks_or_another_machine(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    first = Told(affine)
    stop_after_two = lambda: len(first.asked) == 2  # noqa: E731
    fill(job, tmp_path, first, stop_after_two)
    log = EventLog(tmp_path)
    log.write(Checkpoint(step=5, samples_consumed=20, path="checkpoints/5", seconds=1.0, bytes=1))
    log.close()
    again = Told(affine)
    assert fill(job, tmp_path, again) == []
    assert again.asked == []
    task = task_of(job)
    elsewhere = dataclasses.replace(task, fingerprint=task.fingerprint.model_copy(update={"hardware": "elsewhere"}))
    events: list[Profile] = []
    fill_table(job, tmp_path, Told(affine), elsewhere, events.append, lambda: False)
    assert events
    rows = ThroughputTable(job.profile.table)
    assert len({row.fingerprint.hardware for row in rows.everything()}) == 2


def test_what_nothing_can_be_said_of_is_asked_once_and_not_written(tmp_path: Path) -> None:
    job, profiler = job_of(tmp_path), Told(lambda configuration: None)
    events = fill(job, tmp_path, profiler)
    assert len(profiler.asked) == len(set(profiler.asked)) == len(events) > 0
    assert not Path(job.profile.table).exists()


def test_a_profiler_that_answers_beside_the_question_ends_nevertheless(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    other = task_of(job).fingerprint.model_copy(update={"hardware": "elsewhere"})
    profiler = Told(affine)
    measure = profiler.measure
    profiler.measure = lambda configuration: measure(configuration).model_copy(update={"fingerprint": other})
    fill(job, tmp_path, profiler)
    assert 0 < len(profiler.asked) <= job.profile.rounds * len(set(profiler.asked))


def test_out_of_memory_is_kept_and_what_is_larger_is_not_tried(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    profiler = Told(lambda each: "out of memory" if each.layout.tp == 1 and each.micro_batch > 1 else affine(each))
    events = fill(job, tmp_path, profiler)
    failed = [event.configuration for event in events if event.failure]
    data_parallel = [each for each in failed if each.layout.dp == 2]
    assert {each.micro_batch for each in data_parallel} == {2}
    assert len(failed) == len(set(failed))


def deadly(configuration: Configuration) -> float:
    if configuration.layout.pp == 2:
        raise SystemExit  # as good as a SIGKILL: nothing is tidied up
    return affine(configuration)


def deaths(job: JobConfig, folder: Path) -> list[Configuration]:
    """Attempt after attempt, until one gets through: where the others died."""
    died = []
    for _ in range(50):
        profiler = Told(deadly)
        try:
            fill(job, folder, profiler)
        except SystemExit:
            died.append(profiler.asked[-1])
        else:
            return died
    raise AssertionError("it never got through")


def failures(job: JobConfig) -> list[Configuration]:
    return [row.configuration for row in ThroughputTable(job.profile.table).everything() if row.failure == DIED]


def test_what_two_attempts_died_of_is_left_out(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    died = deaths(job, tmp_path)
    assert len(died) > 0
    assert died[::2] == died[1::2] == failures(job)


def test_what_workers_died_of_that_their_agent_restarted_is_left_out_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "session")
    job = job_of(tmp_path)
    died = deaths(job, tmp_path)
    assert len(died) == len(set(died)) > 0
    assert died == failures(job)


def test_a_restart_blames_nothing_that_an_earlier_session_was_killed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path)

    def killed(configuration: Configuration) -> float:
        raise SystemExit

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(SystemExit):
        fill(job, tmp_path, Told(killed))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fill(job, tmp_path, Told(affine))
    assert failures(job) == []


def test_what_was_measured_when_measuring_ends_is_no_cause_of_later_deaths(tmp_path: Path) -> None:
    job = job_of(tmp_path)

    def killed(configuration: Configuration) -> float:
        raise SystemExit

    with pytest.raises(SystemExit):
        fill(job, tmp_path, Told(killed))
    assert (tmp_path / TRIED).exists()
    fill(job, tmp_path, Told(affine), stop=lambda: True)
    assert not (tmp_path / TRIED).exists()


def test_an_attempt_that_somebody_killed_says_nothing(tmp_path: Path) -> None:
    job, asked = job_of(tmp_path), []

    def killed(configuration: Configuration) -> float:
        asked.append(configuration)
        raise SystemExit

    with pytest.raises(SystemExit):
        fill(job, tmp_path, Told(killed))
    profiler = Told(affine)
    fill(job, tmp_path, profiler)
    assert profiler.asked[0] == asked[0]
    assert failures(job) == []
    assert not (tmp_path / TRIED).exists()


@pytest.mark.parametrize(
    ("planner", "moves"),
    [
        ({"policy": "copus"}, True),
        ({"policy": "cbs", "cbs_layout": "optimistic"}, True),
        ({"policy": "cbs"}, False),
        ({"policy": "ramp"}, False),
        ({"policy": "norm-test"}, False),
    ],
)
def test_layouts_that_the_policy_never_takes_are_not_measured(
    tmp_path: Path, planner: dict[str, str], moves: bool
) -> None:
    job = job_of(tmp_path)
    job = job.model_copy(update={"planner": job.planner.model_copy(update=planner)})
    profiler = Told(affine)
    fill(job, tmp_path, profiler)
    assert len({each.global_batch for each in profiler.asked}) > 1
    assert (len({each.layout for each in profiler.asked}) > 1) == moves


def test_shards_are_kept_apart_from_steps(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    fill(job, tmp_path, Told(affine, shards=True))
    table, here = ThroughputTable(job.profile.table), task_of(job).fingerprint
    assert table.rows(here) == []
    assert len(table.shards(here)) > 0
    assert fill(job, tmp_path, Told(affine, shards=True)) == []
    assert len(fill(job, tmp_path, Told(affine))) > 0


def test_the_example_is_installed_found_and_used(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    assert installed()["command"].source == "copus-command-profiler 0.1.0"
    job = job_of(tmp_path, profiler="command", options={"command": " ".join(COMMAND)})
    task = task_of(job)
    fill_table(job, tmp_path, load_profiler(job), task, lambda event: None, lambda: False)
    rows = ThroughputTable(job.profile.table).rows(task.fingerprint)
    timed = [row for row in rows if row.step_seconds is not None]
    assert {row.failure for row in rows} == {None, "out of memory"}
    assert {row.configuration.micro_batch for row in timed} == {1, 2}
    for row in timed:
        expected = 0.1 + row.configuration.global_batch / row.configuration.layout.dp / 100
        assert row.step_seconds == pytest.approx(expected)
        assert row.count == 3


def test_the_example_runs_in_a_process_of_its_own(site: Path, tmp_path: Path) -> None:
    """`copus profile run` with a plugin: no data is prepared and no rank of the job is started."""
    job_of(tmp_path, profiler="live")
    script = f"import sys; sys.path[:0] = {[str(site), str(ROOT)]}; import launch.cli; sys.exit(launch.cli.main())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    settings = [
        "--set",
        "profile.profiler=command",
        "--set",
        f"profile.options.command={json.dumps(' '.join(COMMAND))}",
    ]
    settings += ["--set", "planner.max_global_batch=4", "--set", "data.source=[nothing.txt]"]
    done = subprocess.run(
        [sys.executable, "-c", script, "profile", "run", "job.yaml", *settings, "--json"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = ThroughputTable(result["table"]).everything()
    assert len(rows) == result["measured"] > 0
    assert rows[0].fingerprint.backend.startswith("megatron-core")
    assert "measuring 1/" in done.stderr


def test_a_job_that_trains_lets_its_profiler_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wants one process runs before the ranks start, in the same run."""
    (tmp_path / "rows.csv").write_text(
        "gpus,layers,hidden,ffn_hidden,gated_mlp,heads,kv_heads,seq_len,vocab,precision,gbs,mbs,tp,step_time_s\n"
        "2,4,64,128,yes,4,2,32,384,fp32,4,1,2,0.25\n"
    )
    write_job(
        tmp_path,
        profile={"profiler": "published", "options": {"csv": str(tmp_path / "rows.csv")}},
        planner={"policy": "static"},
    )
    monkeypatch.chdir(tmp_path)
    assert copus_here("submit", "job.yaml", worker=["--steps", "2"]) == 0
    events = list(read_events(tmp_path / "runs" / "small"))
    kinds = [event.type for event in events]
    assert kinds.index("profile") < kinds.index("start")
    (row,) = ThroughputTable(tmp_path / "table.jsonl").everything()
    assert (row.configuration.label, row.step_seconds) == ("TP2·PP1·DP1 B4 m1", 0.25)


def test_a_run_whose_profiler_was_stopped_goes_on_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume does as the first attempt: what wants one process runs before the ranks start."""
    write_job(tmp_path, profile={"profiler": "single"}, planner={"policy": "goodput"})
    monkeypatch.chdir(tmp_path)
    stopped = Outcome(130, "interrupted", RunStatus(), 0.0)
    asked = []

    def alone(run: Path, *arguments: object) -> Outcome | None:
        asked.append(run.name)
        return stopped if len(asked) == 1 else None

    monkeypatch.setattr(launch.submit, "profile_alone", alone)
    assert copus_here("submit", "job.yaml", worker=["--steps", "2"]) == 130
    assert copus_here("submit", "--resume", "small", "--set", "planner.policy=copus") == 2, "which needs measured steps"
    assert copus_here("submit", "--resume", "small", worker=["--steps", "2"]) == 0
    assert asked == ["small", "small"]


def test_a_profiler_that_answers_something_else_is_told_so(tmp_path: Path) -> None:
    job, profiler = job_of(tmp_path), Told(affine)
    profiler.measure = affine
    with pytest.raises(JobError, match=r"profile\.profiler\(live\): measure returned float, expected a Measurement"):
        fill(job, tmp_path, profiler)


def test_a_file_without_a_row_of_the_job_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "gpus,layers,hidden,heads,seq_len,vocab,gbs,mbs,step_time_s\n2,4,64,4,32,384,4,1,0.25\n"
    )
    job = job_of(tmp_path, profiler="published", options={"csv": str(tmp_path / "rows.csv")})
    with pytest.raises(JobError, match=r"csv\(.*rows\.csv\): none of its 1 usable rows is of this model in fp32 on 2"):
        fill_table(job, tmp_path, load_profiler(job), task_of(job), print, lambda: False)


def test_a_profile_run_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert copus_here("profile", "job.yaml", worker=[]) == 0
    capsys.readouterr()
    assert copus_here("runs", "--json") == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["state"] == "finished"


@pytest.mark.parametrize("command", ["submit", "profile"])
def test_an_option_that_a_profiler_cannot_take_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    write_job(tmp_path, profile={"profiler": "published"}, planner={"policy": "static"})
    monkeypatch.chdir(tmp_path)
    assert copus_here(command, "job.yaml", worker=["--steps", "2"]) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("copus: profile.options: the published profiler takes `csv`")
    assert not (tmp_path / "runs").exists()


def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("broken", "import no_such_module"), ("wrong", "Profiler = 3")):
        (tmp_path / f"{name}_plugin.py").write_text(text)
        info = tmp_path / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[copus.profilers]\n{name} = {name}_plugin:Profiler\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(JobError, match=r"profiler broken \(broken-plugin 1\.0\): ModuleNotFoundError"):
        load_profiler(job_of(tmp_path, profiler="broken"))
    with pytest.raises(JobError, match=r"profiler wrong .* is no profiler"):
        load_profiler(job_of(tmp_path, profiler="wrong"))


def test_the_walk_through_shows_the_example_as_it_is() -> None:
    text = (ROOT / "docs" / "extending-the-profiler.md").read_text()
    assert (EXAMPLE / "copus_command_profiler.py").read_text() in text
    assert (EXAMPLE / "pyproject.toml").read_text() in text


@pytest.mark.parametrize(
    ("backend", "layout"),
    [("megatron", {"dp": 2}), ("fsdp", {"dp": 2, "zero": 3}), ("deepspeed", {"dp": 2, "zero": 2})],
)
def test_what_is_measured_is_what_the_backend_runs(backend: str, layout: dict[str, int]) -> None:
    """A pipeline that FSDP does not have ended the first start of a job in its workers."""
    values = yaml.safe_load(JOB)
    values["training"] |= {"backend": backend, "layout": layout}
    space = _space(parse_job(values))
    assert len(space) > 10
    assert all(find_backend(backend).runs(candidate, "fp32") for candidate in space)
