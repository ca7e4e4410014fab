"""Figures of events, and where they go: the same ones to every tracker, none of which can stop or slow a run."""

import json
import re
import time
from pathlib import Path
from threading import Event as Signal
from typing import Any

import pytest
import yaml
from launch_events import DATA, TENSOR, decision, reconfigure, trial
from launch_jobs import JOB, copus_here, write_job
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import copus.trackers
import copus.tracking.fan_out
from copus.event_log import EventLog
from copus.events import Checkpoint, End, Evaluate, Event, Failure, Noise, Restart, Start, Step, Warned
from copus.job import JobConfig, JobError, parse_job
from copus.tracking.fan_out import FanOut
from copus.tracking.figures import FIGURES, Figures
from copus.tracking.productive_time import ProductiveTime
from profiles.noise_scale import NoiseScale

SEQ_LEN = 32
"""Of the job in launch_jobs."""
LOSS = 2.5
ROOT = Path(__file__).resolve().parent.parent


def at(samples: int, time: float = 0.0) -> dict[str, Any]:
    return {"step": samples, "samples_consumed": samples, "time": time}


def a_step(samples: int, time: float = 0.0, loss: float | None = LOSS, seconds: float = 0.5) -> Step:
    load = {"expert_imbalance": 1.5, "dropped_share": 0.0}
    rules = {"grad_norm": 0.5, "lr": 1e-3, "beta2": 0.95, "global_batch": 4}
    return Step(**at(samples, time), loss=loss, seconds=seconds, **rules, **load)


def a_start(samples: int, time: float = 0.0, peak: float | None = 20.0) -> Start:
    where: dict[str, Any] = {"hardware": "h", "software": "s", "peak_samples_per_second": peak}
    return Start(**at(samples, time), configuration=TENSOR, total_samples=400, seq_len=SEQ_LEN, **where)


def a_restart(samples: int, time: float = 0.0) -> Restart:
    return Restart(**at(samples, time), attempt=1, resumed_from=None, samples_repeated=4, ranks=2)


def a_noise(samples: int) -> Noise:
    noise = NoiseScale(grad_sq=1.0, noise_trace=12.0, value=12.0, low=9.0, high=None, samples=30)
    return Noise(**at(samples), value=12.0, low=9.0, high=None, noise=noise, parts=4, part_size=1)


EVERYTHING: list[Event] = [
    a_start(0, 10.0),
    Evaluate(**at(0, 10.5), loss=3.0, sequences=8, seconds=0.1),
    a_step(4, 11.0),
    a_noise(4),
    decision(0, 4, TENSOR, DATA),
    reconfigure(0, 4, TENSOR, DATA),
    trial(0, 4, "stayed"),
    Checkpoint(**at(4, 12.0), path="checkpoints/samples-4", seconds=0.25, bytes=1000),
    Failure(**at(4, 13.0), rank=1, message="gone"),
    a_restart(4, 14.0),
    Warned(**at(4, 14.0), message="look"),
    End(**at(4, 15.0), reason="finished", seconds=5.0),
]


def job_with(**tracking: Any) -> JobConfig:
    return parse_job(yaml.safe_load(JOB) | {"tracking": tracking})


def follow(run: Path, job: JobConfig, events: list[Event]) -> list[str]:
    """What a worker's reporter does with events; the complaints."""
    run.mkdir(exist_ok=True)
    trackers = FanOut(run, job)
    lines = [line for event in events for line in trackers.write(event)]
    return lines + trackers.close()


# Figures


def test_every_figure_comes_from_some_event_and_has_its_explanation() -> None:
    figures = Figures()
    seen: dict[str, float] = {}
    for event in EVERYTHING:
        seen |= figures.of(event)
    assert set(seen) == set(FIGURES) - {"noise/high"}  # unknown here: left out, not sent as 0
    assert (seen["speed/samples_per_second"], seen["speed/mfu"]) == (8.0, 0.4)
    assert (seen["noise/scale"], seen["noise/critical_batch"]) == (12.0, 24.0)
    assert (seen["moves/total"], seen["moves/seconds_total"], seen["moves/bytes_total"]) == (1, 2.5, 10)
    assert (seen["trials/total"], seen["trials/seconds_total"]) == (1, 3.0)
    assert (seen["layout/tp"], seen["layout/dp"]) == (1, 2)
    assert seen["goodput/gain"] == 1.0
    assert (seen["failures/total"], seen["restarts/total"]) == (1, 1)


def test_a_figure_that_is_not_finite_is_left_out() -> None:
    figures = Figures().of(a_step(4, loss=float("nan")))
    assert "loss/train" not in figures
    assert figures["optimizer/lr"] == 1e-3
    assert Figures().of(Evaluate(**at(4), loss=float("inf"), sequences=8, seconds=0.1)) == {}


def test_there_is_no_utilization_of_what_nobody_rates() -> None:
    figures = Figures()
    for event in (a_start(0, peak=None), a_step(4)):
        assert "speed/mfu" not in figures.of(event)


def test_productive_time_leaves_out_what_is_done_again_and_counts_a_crash_but_no_pause() -> None:
    productive = ProductiveTime()
    events: list[Event] = [
        a_start(0, 100.0),  # what came before is no part of it
        a_step(4, 101.0, seconds=1.0),
        a_step(8, 102.0, seconds=1.0),  # done again after the crash
        a_restart(4, 106.0),
        a_start(4, 106.0),
        a_step(8, 107.0, seconds=1.0),
        End(**at(8, 108.0), reason="interrupted", seconds=2.0),
        a_restart(8, 1000.0),  # a night later
        a_start(8, 1000.0),
        a_step(12, 1002.0, seconds=2.0),
    ]
    assert productive.fraction is None
    for event in events:
        productive.add(event)
    assert productive.fraction == pytest.approx((1 + 1 + 2) / (8 + 2))


def test_counts_go_on_where_the_log_of_a_resumed_run_ends(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    for event in (a_start(0), a_step(4), reconfigure(0, 4, TENSOR, DATA), a_noise(4), a_restart(4)):
        log.write(event)
    log.close()
    figures = Figures()
    figures.catch_up(tmp_path)
    assert figures.of(reconfigure(1, 8, DATA, TENSOR))["moves/total"] == 2
    assert figures.of(a_restart(8))["restarts/total"] == 2


# The job file


def test_tensorboard_is_the_default_and_a_name_alone_has_no_options() -> None:
    assert parse_job(yaml.safe_load(JOB)).tracking == {"tensorboard": {}}
    assert job_with(prometheus=None).tracking == {"prometheus": {}}


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        (
            {"tensorbord": {}},
            "tracking.tensorbord: no tracker 'tensorbord' is installed; there are tensorboard (built in), "
            "wandb (built in), mlflow (built in), prometheus (built in)",
        ),
        ({"wandb": {"api_key": "0123456789"}}, "tracking.wandb: api_key: unknown key"),
        ({"wandb": {"mode": "of"}}, "tracking.wandb: mode: input should be 'online' or 'offline', got 'of'"),
        ({"tensorboard": {"x": 1}}, "tracking.tensorboard: x: unknown key"),
        (
            {"mlflow": {"tracking_uri": "https://me:hunter2@host"}},
            "tracking.mlflow: tracking_uri: has a password in it",
        ),
        ({"prometheus": {"folder": "here"}}, "tracking.prometheus: folder: has to be an absolute path, got here"),
        ({"a\nb": {}}, "tracking.a�b: no tracker 'a\\nb' is installed"),
        (["tensorboard"], "tracking: input should be a valid dictionary, got ['tensorboard']"),
    ],
)
def test_mistakes_are_one_line(tracking: Any, said: str) -> None:
    with pytest.raises(JobError) as raised:
        parse_job(yaml.safe_load(JOB) | {"tracking": tracking}, "job.yaml")
    message = str(raised.value)
    assert message.startswith(f"job.yaml: {said}")
    assert "\n" not in message
    assert "hunter2" not in message


def test_a_missing_package_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copus.trackers.BUILT_IN["wandb"][0]
    monkeypatch.setitem(copus.trackers.BUILT_IN, "wandb", (place, "no_such_package"))
    write_job(tmp_path, tracking={"wandb": {}})
    monkeypatch.chdir(tmp_path)
    assert copus_here("submit", "job.yaml", worker=["--steps", "2"]) == 2
    assert "tracking.wandb: the package no_such_package is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# Trackers


class Recorder:
    """A plugin that keeps what it is given."""

    told: list[tuple[str, int, dict[str, float]]]

    def __init__(self, options: dict[str, Any]) -> None:
        Recorder.told = []

    def start(self, run: Path, job: JobConfig) -> None:
        pass

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        self.told.append((event.type, tokens, figures))

    def close(self) -> None:
        self.told.append(("closed", 0, {}))


class Failing(Recorder):
    """A plugin whose service quotes the key that it refuses."""

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        raise OSError("no space left, and your key top-secret-key\nis not valid")


class Stuck(Recorder):
    """A plugin that waits for its network."""

    release = Signal()

    def start(self, run: Path, job: JobConfig) -> None:
        self.release.wait(30)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three, as an installed distribution has them."""
    info = tmp_path / "site" / "plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    names = [f"{each.__name__.lower()} = {__name__}:{each.__name__}" for each in (Recorder, Failing, Stuck)]
    (info / "entry_points.txt").write_text("\n".join(["[copus.trackers]", *names]))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_a_plugin_gets_the_figures_by_tokens(tmp_path: Path, plugins: None) -> None:
    assert follow(tmp_path / "run", job_with(recorder={}), EVERYTHING) == []
    kinds = [kind for kind, _, _ in Recorder.told]
    assert kinds == [event.type for event in EVERYTHING if event.type != "warning"] + ["closed"]
    (step,) = (each for each in Recorder.told if each[0] == "step")
    assert (step[1], step[2]["loss/train"]) == (4 * SEQ_LEN, LOSS)


def test_the_example_of_the_documentation_works(tmp_path: Path, plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "tracking.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    (tmp_path / "site" / "my_package.py").write_text(code)
    (line,) = re.findall(r'^jsonl = "(.+)"$', text, re.MULTILINE)
    entries = tmp_path / "site" / "plugins-1.0.dist-info" / "entry_points.txt"
    entries.write_text(f"[copus.trackers]\njsonl = {line}\n")
    with pytest.raises(JobError, match=r"tracking\.jsonl: the jsonl tracker takes `file` and nothing else, got no"):
        job_with(jsonl={})
    file = tmp_path / "figures.jsonl"
    assert follow(tmp_path, job_with(jsonl={"file": str(file)}), [a_step(4)]) == []
    assert json.loads(file.read_text())["tokens"] == 4 * SEQ_LEN


def test_nothing_is_started_before_there_is_something_to_show(tmp_path: Path, plugins: None) -> None:
    job = job_with(recorder={})
    Recorder.told = []
    assert follow(tmp_path, job, [Warned(**at(0), message="look")]) == []
    assert Recorder.told == []


def test_one_that_fails_is_switched_off_with_one_line_and_the_others_go_on(
    tmp_path: Path, plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "top-secret-key")
    lines = follow(tmp_path, job_with(failing={}, tensorboard={}), [a_step(4 * k) for k in range(1, 6)])
    assert lines == ["tracking.failing is switched off: OSError: no space left, and your key … is not valid"]
    assert len(read_tensorboard(tmp_path).Scalars("loss/train")) == 5


def test_one_that_waits_holds_nobody_up(tmp_path: Path, plugins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copus.tracking.fan_out, "BACKLOG", 3)
    monkeypatch.setattr(copus.tracking.fan_out, "CLOSING_SECONDS", 0.1)
    Stuck.release.clear()
    started = time.monotonic()
    try:
        lines = follow(tmp_path, job_with(stuck={}), [a_step(4 * k) for k in range(1, 9)])
    finally:
        Stuck.release.set()
    assert lines == ["tracking.stuck is switched off: it is 3 events behind"]
    assert time.monotonic() - started < 20


def test_one_that_is_not_done_at_the_end_is_left_behind(
    tmp_path: Path, plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copus.tracking.fan_out, "FAILED_SECONDS", 0.1)
    Stuck.release.clear()
    trackers = FanOut(tmp_path, job_with(stuck={}))
    try:
        assert trackers.write(a_step(4)) == []
        assert trackers.close(failed=True) == ["tracking.stuck is switched off: it was not done in time after the end"]
    finally:
        Stuck.release.set()


def read_tensorboard(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_reads_what_was_written_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    job = job_with(tensorboard={})
    assert follow(tmp_path, job, [a_step(4, 1.0), a_step(8, 2.0, loss=9.0)]) == []
    assert follow(tmp_path, job, [a_restart(4, 3.0), a_step(8, 4.0, loss=2.0)]) == []
    scalars = read_tensorboard(tmp_path).Scalars("loss/train")
    assert [(each.step, each.value) for each in scalars] == [(128, 2.5), (256, 2.0)]
    assert scalars[0].wall_time == 1.0


LABEL = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(
    rf"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{{(?P<labels>{LABEL}(?:,{LABEL})*)\}} "
    r"(?P<value>-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
)


def read_metrics(path: Path) -> dict[str, tuple[str, str, float]]:
    """Name → type, labels, value of a text file in Prometheus' format 0.0.4 (one sample a metric); strict."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = text.splitlines()
    found = {}
    for told, kind, sample in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
        matched = SAMPLE.fullmatch(sample)
        assert matched, sample
        name = matched["name"]
        assert told.startswith(f"# HELP {name} ")
        assert kind in (f"# TYPE {name} gauge", f"# TYPE {name} counter")
        assert name not in found
        found[name] = (kind.split()[-1], matched["labels"], float(matched["value"]))
    return found


def test_prometheus_file(tmp_path: Path) -> None:
    run = tmp_path / 'a "quoted\\run'
    job = job_with(prometheus={"every_seconds": 0})
    assert follow(run, job, EVERYTHING) == []
    found = read_metrics(run / "metrics.prom")
    labels = r'run="a \"quoted\\run",job="small"'
    assert found["copus_loss_train"] == ("gauge", labels, LOSS)
    assert found["copus_moves_total"] == ("counter", labels, 1.0)
    assert found["copus_tokens"][2] == 4 * SEQ_LEN
    assert found["copus_layout_info"][1] == labels + ',layout="TP1·PP1·DP2"'
    assert found["copus_running"][2] == 0
    assert [path.name for path in run.iterdir()] == ["metrics.prom"]


def test_prometheus_file_while_the_run_goes_on_and_in_the_collectors_folder(tmp_path: Path) -> None:
    job = job_with(prometheus={"folder": str(tmp_path), "every_seconds": 3600})
    run = tmp_path / "run"
    run.mkdir()
    trackers = FanOut(run, job)
    trackers.write(a_start(0, 7.0))
    file = tmp_path / "copus-run.prom"
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_metrics(file)["copus_running"][2] == 1
    trackers.write(a_step(4, 8.0))
    trackers.close()
    found = read_metrics(file)
    assert (found["copus_running"][2], found["copus_last_event_timestamp_seconds"][2]) == (0, 8.0)


def test_prometheus_own_parser_reads_the_file(tmp_path: Path) -> None:
    assert follow(tmp_path, job_with(prometheus={}), EVERYTHING) == []
    families = list(text_string_to_metric_families((tmp_path / "metrics.prom").read_text()))
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values == {name: value for name, (_, _, value) in read_metrics(tmp_path / "metrics.prom").items()}


@pytest.mark.slow
def test_mlflow_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'copus[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, job = tmp_path / "run", job_with(mlflow={"experiment": "ours"})
    assert follow(run, job, EVERYTHING) == []
    assert follow(run, job, [a_restart(4, 20.0), a_step(8, 21.0, loss=2.0)]) == []  # killed: no end
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FAILED")
    history = client.get_metric_history(found.info.run_id, "loss/train")
    assert [(each.step, each.value, each.timestamp) for each in history] == [(128, 2.5, 11_000), (256, 2.0, 21_000)]
    assert found.data.params["training.global_batch"] == "4"
    assert set(found.data.metrics) == set(FIGURES) - {"noise/high"}


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'copus[wandb]'")
    key = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", key)
    run, job = tmp_path / "run", job_with(wandb={"mode": "offline", "project": "ours"})
    assert follow(run, job, EVERYTHING) == []
    assert follow(run, job, [a_restart(4, 20.0), a_step(8, 21.0, loss=2.0)]) == []
    first, second = (read_wandb(path) for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")))
    assert first["run"].project == second["run"].project == "ours"
    assert first["run"].run_id == second["run"].run_id == (run / "wandb-id").read_text().strip()
    assert [row["loss/train"] for row in first["history"] + second["history"] if "loss/train" in row] == [2.5, 2.0]
    rows = {name: value for row in first["history"] for name, value in row.items()}
    assert set(FIGURES) - {"noise/high"} <= set(rows)
    assert rows["tokens"] == 4 * SEQ_LEN
    assert (first["exit"], second["exit"]) == (0, 1)  # the second was killed: no end
    assert {item.key for item in first["run"].config.update} == {*JobConfig.model_fields, "_wandb"}
    assert first["run"].host == ""
    assert list(run.glob("wandb/*/files/*")) == []  # no code, requirements, output, machine
    for path in run.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes()


def read_wandb(path: Path) -> dict[str, Any]:
    """What an offline run has on disk: its `run` record, the rows of its `history`, and its `exit` code.

    The file is LevelDB's log format behind 7 bytes of its own: in blocks of 32 KiB, records of checksum (4 bytes),
    length (2) and kind (1: 1 whole, 2 first, 3 middle, 4 last part).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {"history": []}
    data, place, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # the rest of a block that no header fits in
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = Record.FromString(parts)
            parts = b""
            if record.HasField("run"):
                found["run"] = record.run
            elif record.HasField("history"):
                items = record.history.item
                found["history"].append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
            elif record.HasField("exit"):
                found["exit"] = record.exit.exit_code
    return found
