"""Advice for a trainer that is not ours, from its own noise scale and step times."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from copus.job import JobConfig, JobError, load_job
from copus.meter_log import MeterLog, MeterStep
from launch.advise import _advisory, advice_of
from launch.cli import main
from launch.trainer_logs import read_trainer_log
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.noise_scale import NoiseScale
from profiles.table import ThroughputTable

LAYOUT = Layout(dp=2)
FIXED, EACH = 0.5, 0.1
"""Seconds of a step, and of each of its micro-batches of one sequence on a replica."""
BATCHES = (4, 8, 16, 32, 64)


def step_seconds(batch: int) -> float:
    """The time of a step on the machine of the tests."""
    return FIXED + EACH * batch / 2


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job on two cores whose step times are measured."""
    path, table = tmp_path / "job.yaml", tmp_path / "table.jsonl"
    values = {
        "name": "advised",
        "model": {"layers": 2, "hidden": 64, "ffn_hidden": 128, "heads": 4, "kv_heads": 4, "seq_len": 64, "vocab": 256},
        "cluster": {"accelerators_per_node": 2},
        "training": {"layout": {"dp": 2}, "global_batch": 8, "tokens": 64 * 200_000},
        "planner": {
            **{"policy": "copus", "layouts": [{"dp": 2}], "max_micro_batch": 1},
            **{"min_global_batch": 4, "max_global_batch": 64},
        },
        "profile": {"table": str(table)},
    }
    path.write_text(yaml.safe_dump(values))
    job = load_job(path)
    for batch in BATCHES:
        ThroughputTable(table).add(
            Measurement(
                fingerprint=Fingerprint(
                    model=job.model.digest, precision="fp32", backend="b", hardware="2 × c core", software="s"
                ),
                model=job.model,
                configuration=Configuration(layout=LAYOUT, micro_batch=1, global_batch=batch),
                **{"step_seconds": step_seconds(batch), "spread_seconds": 0.001, "count": 20, "time": 1.0},
            )
        )
    return path


def noise_of(value: float, steps: int) -> NoiseScale:
    """A noise scale that is known to a tenth."""
    interval = {"low": value * 0.9, "high": value * 1.1}
    return NoiseScale(grad_sq=1.0, noise_trace=value, value=value, samples=steps, **interval)


def steps_of(noise: float, count: int = 60, **changes: Any) -> list[MeterStep]:
    """Steps of a batch of 8 with one noise scale."""
    values: dict[str, Any] = {"global_batch": 8, "micro_batch": 1, "layout": LAYOUT, "step_seconds": step_seconds(8)}
    return [
        MeterStep(step=step, samples=8 * step, noise=noise_of(noise, step), **(values | changes))
        for step in range(1, count + 1)
    ]


def written(path: Path, steps: list[MeterStep]) -> Path:
    """The log of a meter."""
    log = MeterLog(path)
    for step in steps:
        log.write(step)
    log.close()
    return path


@pytest.mark.parametrize("noise", [2.0, 10.0, 40.0])
def test_the_advice_is_the_batch_with_the_best_goodput(noise: float, job_file: Path) -> None:
    job = _advisory(load_job(job_file), restart_seconds=60.0)
    advice = advice_of(job, steps_of(noise))

    def goodput(batch: int) -> float:
        return batch / step_seconds(batch) / (1 + batch / (2 * noise))  # φ = 2 · B_simple

    best = max(BATCHES, key=goodput)
    expected = best if goodput(best) > 1.1 * goodput(8) else 8  # the rule of `copus` wants 10 %
    assert advice.advised == Configuration(layout=LAYOUT, micro_batch=1, global_batch=expected)
    assert advice.moves == (expected != 8)
    assert advice.step_seconds == step_seconds(8)
    assert advice.decision.current.global_batch == 8


def test_a_policy_that_ignores_the_noise_is_replaced_and_nothing_is_tried(job_file: Path) -> None:
    planner = _advisory(load_job(job_file, ["planner.policy=ramp"]), restart_seconds=60.0).planner
    assert (planner.policy, planner.trial_budget, planner.layout_move_seconds) == ("goodput", 0.0, 60.0)
    kept = _advisory(load_job(job_file, ["planner.layout_move_seconds=7"]), restart_seconds=60.0).planner
    assert (kept.policy, kept.layout_move_seconds) == ("copus", 7.0)


def test_savings_and_how_sure_they_are_come_from_the_rule_of_goodput(job_file: Path) -> None:
    job = _advisory(load_job(job_file, ["planner.policy=goodput"]), restart_seconds=60.0)
    advice = advice_of(job, steps_of(40.0, count=200))
    assert advice.advised.global_batch > 8
    assert advice.score is not None
    assert advice.score.saved_expected_seconds is not None
    assert advice.score.saved_expected_seconds > 0
    assert advice.sure is not None
    assert 0.75 < advice.sure <= 1  # it moves only if the pessimistic end of 50 % saves, or nearly
    stays = advice_of(job, steps_of(2.0, count=200))
    assert stays.sure is None or stays.moves


def test_before_enough_noise_is_known_it_stays(job_file: Path) -> None:
    job = _advisory(load_job(job_file), restart_seconds=60.0)
    few = advice_of(job, steps_of(40.0, count=5))
    assert not few.moves
    none = advice_of(job, [step.model_copy(update={"noise": None}) for step in steps_of(40.0)])
    assert not none.moves
    assert none.decision.critical_batch is None


# Logs


def test_tensorboard_and_csv_say_what_the_log_of_the_meter_says(job_file: Path, tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    job, steps = load_job(job_file), steps_of(40.0)
    writer = EventFileWriter(str(tmp_path / "events"))
    with open(tmp_path / "run.csv", "w", newline="") as file:
        table = csv.writer(file)
        names = ("noise_scale", "noise_scale_low", "noise_scale_high", "step_seconds", "global_batch", "train/loss")
        table.writerow(["Step", *(f"my run - {name}" for name in names), "my run - noise_scale__MIN"])
        for step in steps:
            assert step.noise is not None
            noise = step.noise
            figures = (noise.value, noise.low, noise.high, step.step_seconds, 8, 3.5)
            table.writerow([step.step, *figures, "0"])
            values = [
                Summary.Value(tag=f"train/{name}" if "/" not in name else name, simple_value=figure)
                for name, figure in zip(names, figures, strict=True)
            ]
            writer.add_event(Event(step=step.step, wall_time=time.time(), summary=Summary(value=values)))
    writer.close()
    direct = read_trainer_log(written(tmp_path / "meter.jsonl", steps), job)
    assert direct == steps
    advisory = _advisory(job, 60.0)
    for log in (tmp_path / "run.csv", tmp_path / "events"):
        read = read_trainer_log(log, job)
        assert [(each.step, each.samples, each.global_batch) for each in read] == [
            (s.step, s.samples, 8) for s in steps
        ]
        assert [each.step_seconds for each in read] == pytest.approx([each.step_seconds for each in steps])
        assert read[-1].loss == pytest.approx(3.5)
        assert advice_of(advisory, read).advised == advice_of(advisory, direct).advised


def test_the_history_of_a_hugging_face_run_is_read_by_its_global_steps(job_file: Path, tmp_path: Path) -> None:
    """W&B's `_step` counts what was logged there; rows of the machine have no step, and the loss of an evaluation is
    another one."""
    rows = ["_step,train/global_step,train/loss,eval/loss,train/noise_scale,train/samples,train/step_seconds"]
    for index, step in enumerate(range(10, 60, 10)):
        rows += [
            f"{3 * index},{step},4.5,,,,",
            f"{3 * index + 1},{step},,9.0,30,{8 * step},0.5",
            f"{3 * index + 2},,,,,,",
        ]
    (tmp_path / "history.csv").write_text("\n".join(rows))
    steps = read_trainer_log(tmp_path / "history.csv", load_job(job_file))
    assert [(step.step, step.samples, step.loss, step.step_seconds) for step in steps] == [
        (step, 8 * step, 4.5, 0.5) for step in range(10, 60, 10)
    ]


def test_steps_that_a_trainer_did_again_count_once(job_file: Path, tmp_path: Path) -> None:
    job, steps = load_job(job_file), steps_of(10.0, count=10)
    again = [step.model_copy(update={"step_seconds": 9.0}) for step in steps[4:7]]
    log = written(tmp_path / "meter.jsonl", [*steps, *again])
    assert read_trainer_log(log, job) == [*steps[:4], *again]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.jsonl", None, "No such file or directory"),
        ("empty.jsonl", "", "no steps in it"),
        ("words.csv", "a,b\n1,2\n", "no column Step, _step or global_step among a, b"),
        ("bad.csv", "Step,noise_scale\n1,2\n2,many\n", "line 3: expected numbers"),
        ("batch.csv", "Step,global_batch\n1,8\n2,0\n", "step 2: global_batch: input should be greater than 0, got 0"),
        ("layout.csv", "Step,layout/tp,layout/pp,layout/dp\n3,0,1,1\n", "step 3: tp: input should be greater than 0"),
        (
            "step.jsonl",
            '{"step": 1, "samples": 8, "global_batch": 0}\n',
            "line 1: global_batch: input should be greater",
        ),
    ],
)
def test_a_log_that_cannot_be_read_is_one_line(
    name: str, text: str | None, message: str, job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["advise", str(job_file), str(tmp_path / name)]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "figures", [{"value": -10.0}, {"value": 1e300}, {"low": 20.0, "high": 5.0}], ids=["negative", "huge", "no interval"]
)
def test_a_noise_scale_that_is_none_counts_as_unknown(
    figures: dict[str, float], job_file: Path, tmp_path: Path
) -> None:
    """A trainer's own estimate of |G|² may be negative, and the noise scale with it."""
    impossible = noise_of(10.0, 60).model_copy(update=figures)
    steps = [step.model_copy(update={"noise": impossible}) for step in steps_of(10.0)]
    log = written(tmp_path / "meter.jsonl", steps)
    job = load_job(job_file)
    assert advice_of(job, read_trainer_log(log, job)).decision.noise.value is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(dp=4)}, "step 1 of the log ran in TP1·PP1·DP4 on 4 accelerators"),
        ({"micro_batch": 3}, "not a whole number of micro-batches"),
    ],
)
def test_a_log_of_another_job_is_refused(changes: dict[str, Any], message: str, job_file: Path) -> None:
    with pytest.raises(JobError, match=message):
        advice_of(load_job(job_file), steps_of(10.0, **changes))


# The command


def test_the_command_says_what_to_take_what_it_saves_and_how_sure_that_is(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "meter.jsonl", steps_of(40.0, count=200))
    arguments = ["advise", str(job_file), str(log), "--set", "planner.policy=goodput"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    for words in (
        "noise      B_simple = 40 (36–44) sequences",
        "advice     take",
        "saves",
        "that it saves time",
        "ADVISED",
    ):
        assert words in output
    assert "advisory" not in output
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["moves"]
    assert values["saved_low_seconds"] < values["saved_seconds"] < values["saved_high_seconds"]
    assert main([*arguments, "--emit", "megatron"]) == 0
    output, errors = capsys.readouterr()
    assert f"--global-batch-size {values['advised']['global_batch']}" in output
    assert "noise scale 40 (" in errors
    assert main([*arguments, "--emit", "jax"]) == 2


def test_watching_prints_the_advice_again_when_it_changes(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "meter.jsonl", steps_of(10.0, count=5))
    later = [steps_of(40.0, count=60)[5:], [], None]

    def wait(seconds: float) -> None:
        more = later.pop(0)
        if more is None:
            raise KeyboardInterrupt
        written(log, more)

    monkeypatch.setattr("launch.advise.time.sleep", wait)
    assert main(["advise", str(job_file), str(log), "--watch", "--json"]) == 130
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["step"], first["moves"]) == (5, False)
    assert (second["step"], second["moves"]) == (60, True)


def test_the_job_of_a_plan_will_do(job_file: Path) -> None:
    """A model that no backend here trains can be advised on: the trainer is another one."""
    job = load_job(job_file, ["model.logit_softcap=30"], planned_only=True)
    assert isinstance(job, JobConfig)
    assert advice_of(_advisory(job, 60.0), steps_of(10.0)).advised.layout == LAYOUT
