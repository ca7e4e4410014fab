"""What holds for every engine: how one is named, what a dry run is, logs, cancelling. On the local one, mostly."""

import json
import shlex
import signal
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import DirectEngine, copus_here, write_job
from test_launch_submit import LONG, steps_seen, submitted, wait_for, worker_is_gone

from copus.events import REQUEUED, End, read_events
from copus.job import JobError, load_job
from launch.engines import LocalEngine, engine_of, engine_state, this_machine
from launch.engines.agent import agent_environment
from launch.engines.base import EngineOptions, EngineState, QueuedEngine
from launch.engines.log_files import lines_of
from launch.engines.this_machine import check_interfaces


class ElsewhereEngine(QueuedEngine):
    """A plugin's."""

    class Options(EngineOptions):
        queue: str

    def check(self, job: Any) -> None: ...
    def describe(self, run: Path, job: Any) -> str:
        return f"elsewhere {self.options.queue}"

    def job_state(self, ticket: Any) -> EngineState:
        return EngineState("ended", "gone")

    def withdraw(self, ticket: Any) -> str: ...
    def submit(self, run: Path, job: Any) -> Any: ...


def test_gpus_get_megatrons_one_queue_and_cpu_ranks_see_no_gpu(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path))
    on_cpu, cluster = agent_environment(job, {}), job.cluster.model_copy(update={"accelerator": "h100-sxm"})
    job = job.model_copy(update={"cluster": cluster})
    on_gpus = agent_environment(job, {})
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in on_cpu
    assert on_gpus["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in on_gpus
    users = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "MASTER_ADDR": "elsewhere"}
    assert agent_environment(job, users) == on_gpus | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def test_workers_do_not_take_the_environment_of_another_job_for_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES", "TORCHELASTIC_RUN_ID", REQUEUED)
    others += ("OMPI_COMM_WORLD_LOCAL_RANK",)  # of a shell that mpirun has started: DeepSpeed compares it
    for name in others:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    printer = tmp_path / "print_environment.py"
    printer.write_text("import json, os, pathlib\npathlib.Path('seen.json').write_text(json.dumps(dict(os.environ)))")
    engine = DirectEngine([str(printer)])
    monkeypatch.setattr("launch.submit.engine_of", lambda job: engine)
    copus_here("submit", "job.yaml")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name for name in others if name in seen} == set()
    assert (seen["WANDB_MODE"], seen["OMP_NUM_THREADS"]) == ("offline", "1")


@pytest.mark.parametrize("engine", ["slurm", "srun", "kubernetes", "hosts"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PYTHONUNBUFFERED", "", "PYTHONUNBUFFERED() would be overridden: it is '1'"),
        ("PYTHONSAFEPATH", "0", "PYTHONSAFEPATH(0) would be overridden: it is '1'"),
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE(0) would be overridden"),
        ("CUDA_VISIBLE_DEVICES", "3", "CUDA_VISIBLE_DEVICES(3) would be overridden: it is '' with cluster.acceler"),
        ("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "", "would be overridden: what starts the workers sets it"),
        ("MASTER_PORT", "29500", "MASTER_PORT would be overridden: what starts the workers sets it"),
    ],
)
def test_a_variable_that_would_be_overridden_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    needs = {"kubernetes": {"image": "i", "claim": "c", "mount": str(tmp_path)}, "hosts": {"hosts": ["a"]}}
    options = json.dumps({**needs.get(engine, {}), "env": {name: value}})
    places = [f"{field}={tmp_path}/x" for field in ("launch.runs", "profile.table")]
    path = write_job(tmp_path)
    with pytest.raises(JobError) as caught:
        engine_of(load_job(path, [*places, f"launch.options={options}"], engine=engine))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint(name, f"test_engines:{place}", "copus.engines") for name, place in PLUGINS.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries if group == "copus.engines" else [])


PLUGINS = {"elsewhere": "ElsewhereEngine", "broken": "Nothing", "other": "json", "local": "ElsewhereEngine"}


def test_a_plugin_is_an_engine_with_options_of_its_own(tmp_path: Path, plugin: None) -> None:
    path = write_job(tmp_path)
    job = load_job(path, ["launch.options.queue=long"], engine="elsewhere")
    assert engine_of(job).describe(tmp_path, job) == "elsewhere long"
    assert type(engine_of(load_job(path))).__name__ == "LocalEngine"  # a plugin does not take a built-in one's name


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("cloud", "launch.engine: no engine 'cloud' is installed; there are local (built in), hosts (built in), "),
        ("elsewhere", "launch.options: queue: Field required"),
        ("broken", "launch.engine: broken (unknown distribution): AttributeError: "),
        ("other", "launch.engine: other (unknown distribution): test_engines:json is no engine"),
    ],
)
def test_engines_that_are_refused(tmp_path: Path, plugin: None, engine: str, message: str) -> None:
    path = write_job(tmp_path)
    with pytest.raises(JobError) as caught:
        load_job(path, engine=engine)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_the_files_own_engines(tmp_path: Path, plugin: None) -> None:
    path = write_job(tmp_path, launch={"engine": "elsewhere", "options": {"queue": "long"}})
    assert load_job(path, engine="elsewhere").launch.options == {"queue": "long"}
    assert load_job(path, engine="local").launch.options == {}


def test_a_dry_run_shows_the_command_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "secret")
    write_job(tmp_path, launch={"threads_per_rank": 3})
    before = sorted(tmp_path.rglob("*"))
    assert copus_here("submit", "job.yaml", "--dry-run") == 0
    words = shlex.split(capfd.readouterr().out)
    assert words[0] == "env"
    assert "OMP_NUM_THREADS=3" in words
    assert words[-3:] == ["-m", "copus.worker", str(tmp_path / "runs" / "small")]
    assert words[words.index("--nproc-per-node") + 1] == "2"
    assert "secret" not in " ".join(words)
    assert copus_here("submit", "job.yaml", "--dry-run", "--json") == 0
    assert set(json.loads(capfd.readouterr().out)) == {"schema_version", "engine", "run", "description"}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("now", [False, True])
def test_cancel_stops_a_local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: bool) -> None:
    monkeypatch.chdir(tmp_path)
    write_job(tmp_path)
    run = tmp_path / "runs" / "small"
    worker = [*LONG, *(["--ignore-stop"] if now else [])]
    with submitted(tmp_path, "job.yaml", worker=worker) as process:
        wait_for(lambda: steps_seen(run) > 2)
        state = engine_state(run)
        assert (state.phase, state.words) == ("running", f"its workers are running (launched by process {process.pid})")
        assert copus_here("cancel", "small", *(["--now"] if now else [])) == 0
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + signal.SIGTERM
    assert ("ended at once: " if now else "stopped: ") in output
    assert errors == ""
    assert worker_is_gone(run)
    assert [event.reason for event in read_events(run) if isinstance(event, End)] == ([] if now else ["interrupted"])
    assert engine_state(run).phase == "ended"
    assert copus_here("cancel", "small") == 2  # there is nothing any more


def test_the_state_of_what_is_no_run_is_unknown(tmp_path: Path) -> None:
    assert engine_state(tmp_path).phase == "unknown"
    (tmp_path / "job.yaml").write_text("launch: {engine: cloud}")
    assert "no engine 'cloud'" in engine_state(tmp_path).words


def test_logs_that_grow_are_followed_to_the_end(tmp_path: Path) -> None:
    first, second = tmp_path / "a.log", tmp_path / "b.log"
    first.write_text("[rank0]:one\n[rank1]:eins\n[rank0]:tw")
    alive = [True]

    def write() -> None:
        with open(first, "a") as file:
            file.write("o\n")
        second.write_text("[rank0]:three\n[rank0]:torn")
        alive.clear()

    writer = threading.Timer(0.2, write)
    writer.start()
    began = time.monotonic()
    lines = list(lines_of(lambda: sorted(tmp_path.glob("*.log")), 0, lambda: bool(alive)))
    writer.join()
    assert lines == ["one", "two", "three", "torn"]
    assert time.monotonic() - began > 0.2
    everything = list(lines_of(lambda: sorted(tmp_path.glob("*.log")), None, None))
    assert everything[0] == "==> a.log <=="
    assert everything[4:6] == ["==> b.log <==", "[rank0]:three"]


@pytest.mark.parametrize("rank", [-1, 2])
def test_logs_of_a_rank_that_there_is_not_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    write_job(tmp_path).rename(tmp_path / "runs" / "small" / "job.yaml")
    assert copus_here("logs", "small", f"--rank={rank}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--rank({rank}): runs/small has ranks 0 to 1: " in line
    assert copus_here("logs", "small", "--rank=1") == 0


def test_nccl_may_be_told_a_prefix_a_whole_name_or_what_to_leave_out() -> None:
    for named in ("l", "=lo", "eth99,lo", "^docker"):
        check_interfaces({"NCCL_SOCKET_IFNAME": named}, "h100-sxm")
    for named in ("eth99", "=l"):
        check_interfaces({"NCCL_SOCKET_IFNAME": named}, "cpu")  # which does not use it
        with pytest.raises(JobError, match="has no network interface"):
            check_interfaces({"NCCL_SOCKET_IFNAME": named}, "h100-sxm")


def test_a_gpu_job_is_refused_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = load_job(write_job(tmp_path), ["cluster.accelerator=h100-sxm"])
    monkeypatch.setattr("launch.engines.this_machine._nvidia_gpus", lambda visible: None)
    monkeypatch.setattr("launch.engines.this_machine._has_gpu", lambda: False)
    with pytest.raises(JobError, match=r"cluster\.accelerator\(h100-sxm\): this machine has no GPU"):
        LocalEngine().check(job)
    monkeypatch.setattr("launch.engines.this_machine._has_gpu", lambda: True)
    LocalEngine().check(job)


def test_more_ranks_than_visible_gpus_are_refused_before_a_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(write_job(tmp_path), ["cluster.accelerator=h100-sxm"])  # on 2 GPUs
    devices = [Path(f"/dev/nvidia{number}") for number in range(8)]
    monkeypatch.setattr(this_machine, "_has_gpu", lambda: True)
    monkeypatch.setattr(this_machine.Path, "glob", lambda folder, pattern: iter(devices))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    LocalEngine().check(job)
    for visible in ("3", "", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(
            JobError, match=r"accelerators_per_node\(2\) is more than the \d GPUs that this machine shows"
        ):
            LocalEngine().check(job)
    monkeypatch.setenv(this_machine.SHARING, "1")
    LocalEngine().check(job)
