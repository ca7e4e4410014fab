"""The short benchmark runs, says what it measured, and says so where there is nothing to measure on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parent.parent


def quick_check(out: Path) -> dict[str, Any]:
    """What `--quick --json` prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--quick", "--json", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "gpu_check.json").read_text()) == json.loads(done.stdout)
    return json.loads(done.stdout)


def check_figures(result: dict[str, Any], on_gpu: bool) -> None:
    """Every figure is there and is possible."""
    small = result["models"]["small"]
    assert [row["configuration"].split()[-1] for row in small["steps"]] == ["m1", "m2", "m4", "m8"]
    for row in small["steps"]:
        step = row["step_seconds"]
        assert 0 < step["low"] <= step["median"] <= step["high"]
        assert row["tokens_per_second"] == pytest.approx(row["samples_per_second"] * small["model"]["seq_len"])
        assert row["samples_per_second"] * step["median"] == pytest.approx(8)
        assert row["count"] >= 3
        assert 0 < row["mfu"] < 1 if on_gpu else "mfu" not in row  # nobody rates a CPU core
        for predicted in (row["predicted_seconds"], row["predicted_bytes"]):
            assert 0 < predicted[0] < predicted[1] < predicted[2]
        assert row["peak_bytes"] > 4 * small["parameters"]
    noise = result["noise"]
    assert noise["pairs"] >= 4
    assert noise["overhead_pct"]["low"] <= noise["overhead_pct"]["median"] <= noise["overhead_pct"]["high"]
    for move in result["moves"]:
        assert move["before"] != move["after"]
        assert move["move_seconds"] < move["later_step_seconds"]  # changing the batch costs less than a step


def test_runs_on_a_cpu(tmp_path: Path) -> None:
    result = quick_check(tmp_path)
    check_figures(result, on_gpu=False)
    assert result["precision"] == "fp32"


@pytest.mark.gpu
def test_runs_on_a_gpu(tmp_path: Path) -> None:
    import torch

    result = quick_check(tmp_path)
    check_figures(result, on_gpu=True)
    assert torch.cuda.get_device_name() in result["device"]
    assert result["precision"] == "bf16"


def test_says_that_there_is_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main(["--json", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["message"] == "no CUDA device"
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == json.loads(printed.out)
    assert "nothing was measured" in printed.err
