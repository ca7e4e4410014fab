"""The `copus` command with all of it real: text, data, two gloo ranks under the elastic agent; interrupt and resume."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from security_checks import SECRETS, listening, with_secrets

from copus.events import Checkpoint, End, Evaluate, Start, Step, read_events

COPUS = [sys.executable, "-m", "launch.cli"]


def _write_job(folder: Path) -> Path:
    """A tiny job on text that can be learnt, with learning rates that change all the time."""
    for name, words in (
        ("one", "to be or not to be that is the question"),
        ("two", "the rest is silence to be or not"),
    ):
        (folder / f"{name}.txt").write_text((words + "\n") * 400)
    job = {
        "name": "tiny",
        "model": dict(layers=2, hidden=32, ffn_hidden=48, heads=4, kv_heads=2, seq_len=16, vocab=280),
        "data": {"source": [str(folder / "one.txt"), str(folder / "two.txt")], "held_out": ["two"], "cache": "cache"},
        "cluster": {"accelerators_per_node": 2},
        "training": dict(
            layout={"tp": 2}, global_batch=4, micro_batch=2, tokens=16 * 4 * 60,
            warmup_tokens=1000, lr=3e-3, min_lr=3e-4, evaluate_every_tokens=16 * 4 * 20, evaluate_sequences=4,
        ),
        "planner": {"policy": "static"},
        "profile": {"when": "never", "table": "table.jsonl"},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _steps(run: Path) -> list[Step]:
    return [event for event in read_events(run) if isinstance(event, Step)]


def _interrupted(folder: Path, job: Path, steps: int) -> tuple[int, str]:
    """Submit a job as the run `tiny-2`, and interrupt it after some steps. Returns exit code and output."""
    command, environment = [*COPUS, "submit", str(job)], os.environ | SECRETS
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while len(_steps(folder / "runs/tiny-2")) < steps:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert listening(process.pid) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.dist
def test_an_interrupted_job_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """SIGINT → checkpoint, exit code 130; `--resume` → the same losses as the run that nobody touched.

    Meanwhile it listens on no address but loopback, and of the secrets in its environment it writes none.
    """
    job = _write_job(tmp_path)
    whole = subprocess.run([*COPUS, "submit", str(job)], cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    expected = _steps(tmp_path / "runs/tiny")
    assert len(expected) == 60

    second = tmp_path / "runs/tiny-2"
    code, output = _interrupted(tmp_path, job, steps=10)
    assert code == 130
    assert "copus submit --resume" in output
    events = list(read_events(second))
    assert isinstance(events[-1], End)
    assert events[-1].reason == "interrupted"
    assert any(isinstance(event, Checkpoint) for event in events)
    done = len(_steps(second))
    assert 10 <= done < 60

    resumed = subprocess.run(
        [*COPUS, "submit", "--resume", "tiny-2", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["reason"] == "finished"
    again = _steps(second)
    assert [step.samples_consumed for step in again] == [step.samples_consumed for step in expected]
    assert [step.lr for step in again] == [step.lr for step in expected]
    assert [step.loss for step in again] == pytest.approx([step.loss for step in expected], rel=1e-5)
    starts = [event for event in read_events(second) if isinstance(event, Start)]
    assert [start.samples_consumed for start in starts] == [0, 4 * done]
    losses = [event.loss for event in read_events(second) if isinstance(event, Evaluate)]
    assert len(losses) >= 3
    assert again[-1].loss is not None
    assert again[-1].loss < 0.8 * (again[0].loss or 0)
    assert (second / "logs").is_dir()
    assert with_secrets(tmp_path) == []


@pytest.mark.dist
@pytest.mark.slow
def test_a_packed_chat_that_is_interrupted_and_moved_reads_what_one_reads_that_is_not(tmp_path: Path) -> None:
    """Whole conversations, a batch that ramps up, several passes; the second half in another layout. A sample that is
    read twice, or another one, changes the loss of its step."""
    path = _write_job(tmp_path)
    job = yaml.safe_load(path.read_text())
    chosen = random.Random(1)
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    texts = [" ".join(chosen.choices(words, k=chosen.randint(1, 24))) for _ in range(80)]
    lines = [
        {"messages": [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}]} for text in texts
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job["model"] |= {"seq_len": 48}
    job["data"] = {"source": [str(tmp_path / "chat.jsonl")], "messages_column": "messages", "cache": "cache"}
    job["data"] |= {"packing": "best-fit", "reset_attention_mask": True, "reset_position_ids": True}
    job["training"] |= {"tokens": 48 * 300, "global_batch": 2, "micro_batch": 1, "warmup_tokens": 0}
    job["planner"] = {"policy": "ramp", "ramp_start": 2, "ramp_increment": 2, "ramp_samples": 60, "max_global_batch": 8}
    path.write_text(yaml.safe_dump(job))
    whole = subprocess.run([*COPUS, "submit", str(path)], cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    expected = _steps(tmp_path / "runs/tiny")
    assert len({step.global_batch for step in expected}) > 1, "the ramp moved"

    assert _interrupted(tmp_path, path, steps=10)[0] == 130
    second = tmp_path / "runs/tiny-2"
    done = len(_steps(second))
    assert 10 <= done < len(expected)
    command = [*COPUS, "submit", "--resume", "tiny-2", "--set", "training.layout={dp: 2}"]
    resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    again = _steps(second)
    starts = [event for event in read_events(second) if isinstance(event, Start)]
    assert [start.configuration.layout.dp for start in starts] == [1, 2]
    by_samples = {step.samples_consumed: step.loss for step in expected}
    shared = [step for step in again if step.samples_consumed in by_samples]
    assert len(shared) > len(expected) // 2
    for step in shared:
        assert step.loss == pytest.approx(by_samples[step.samples_consumed], rel=1e-4), step.samples_consumed
    assert again[-1].samples_consumed == expected[-1].samples_consumed == 300
