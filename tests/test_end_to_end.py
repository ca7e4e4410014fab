"""The `copus` command with all of it real: text, data, two gloo ranks under the elastic agent; interrupt and resume."""

import json
import os
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
    command, environment = [*COPUS, "submit", str(job)], os.environ | SECRETS
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while len(_steps(second)) < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert listening(process.pid) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
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
