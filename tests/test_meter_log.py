"""The log that a noise meter writes beside somebody's own training loop."""

import json
from pathlib import Path

import pytest

from copus.meter_log import MeterLog, MeterStep, meter_steps
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale

NOISE = NoiseScale(grad_sq=2.0, noise_trace=64.0, value=32.0, low=25.0, high=None, samples=7, centroid=40.0)
STEPS = [
    MeterStep(step=1, samples=8, global_batch=8),
    MeterStep(
        step=2, samples=16, global_batch=8, micro_batch=2, layout=Layout(dp=4), step_seconds=0.25, loss=3.5, noise=NOISE
    ),
]


def test_steps_come_back_as_they_were_written_and_a_log_goes_on(tmp_path: Path) -> None:
    for step in STEPS:
        log = MeterLog(tmp_path / "folder" / "meter.jsonl")
        log.write(step)
        log.close()
    assert list(meter_steps(tmp_path / "folder" / "meter.jsonl")) == STEPS


def test_a_torn_line_costs_no_other_line(tmp_path: Path) -> None:
    path = tmp_path / "meter.jsonl"
    path.write_text('{"step": 1, "samples": 8, "glob')
    log = MeterLog(path)
    log.write(STEPS[1])
    log.close()
    assert list(meter_steps(path)) == STEPS[1:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"step": 2, "samples": 16, "global_batch": 0}, "global_batch: input should be greater than 0, got 0"),
        ({"step": 2, "samples": -8, "global_batch": 8}, "samples: input should be greater than or equal to 0, got -8"),
        ({"step": 2, "samples": 16, "global_batch": 8, "step_seconds": -1}, "step_seconds: input should be"),
    ],
)
def test_a_step_that_cannot_be_is_refused_and_not_left_out(line: dict[str, int], message: str, tmp_path: Path) -> None:
    """Advice on the steps before it would be on old ones."""
    path = tmp_path / "meter.jsonl"
    path.write_text(f'{{"step": 1, "samples": 8, "global_batch": 8}}\n{json.dumps(line)}\n')
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        list(meter_steps(path))


def test_fields_of_a_later_version_and_lines_of_others_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "meter.jsonl"
    path.write_text('{"note": "warm"}\n{"step": 1, "samples": 8, "global_batch": 8, "later": 1}\n[]\n')
    assert list(meter_steps(path)) == STEPS[:1]
