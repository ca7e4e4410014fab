"""What another trainer wrote about its steps: the log of a noise meter, TensorBoard's event files, a CSV of W&B."""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from copus.job import JobConfig, JobError
from copus.meter_log import MeterStep, meter_steps
from copus.validation_messages import first_message
from profiles.layout import Layout
from profiles.noise_scale import NoiseScale
from profiles.record import MOST

NAMES: dict[str, tuple[str, ...]] = {
    "noise": ("noise_scale", "noise/scale"),
    "low": ("noise_scale_low", "noise/low"),
    "high": ("noise_scale_high", "noise/high"),
    "step_seconds": ("step_seconds", "speed/step_seconds", "iteration-time"),
    "global_batch": ("global_batch", "batch/global_batch", "batch-size"),
    "micro_batch": ("micro_batch", "batch/micro_batch"),
    "samples": ("samples", "samples_consumed", "consumed_samples"),
    "loss": ("loss", "loss/train", "lm loss"),
    "tp": ("layout/tp",),
    "pp": ("layout/pp",),
    "dp": ("layout/dp",),
}
"""Figure → what it is called: by `copus.NoiseMeter`, by copus's own trackers, by Megatron-LM."""
_FIGURES = {name: figure for figure, names in NAMES.items() for name in names}
_STEP_COLUMNS = ("global_step", "step", "_step")
"""Where a row of a CSV has its step, after a slash if there is one; the first that is there. W&B's own `_step` counts
what was logged if a trainer has a `global_step` of its own."""
_HELD_OUT = re.compile(r"^(eval|val|valid|validation|test)/")


def read_trainer_log(path: Path, job: JobConfig) -> list[MeterStep]:
    """The steps in a log, in order. What the log does not say of a step (its batch) is taken from the job.

    Raises JobError for a file that is not there, or has no steps in it.
    """
    try:
        if path.is_dir() or path.name.startswith("events.out.tfevents"):
            steps = _in_order(_of_rows(_tensorboard_rows(path), job))
        elif path.suffix == ".csv":
            steps = _in_order(_of_rows(_csv_rows(path), job))
        else:
            steps = _in_order(meter_steps(path))
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"{path}: {error}") from None
    steps = [step if _is_known(step.noise) else step.model_copy(update={"noise": None}) for step in steps]
    if not steps:
        raise JobError(f"{path}: no steps in it; expected lines of copus.NoiseMeter, TensorBoard events, or a CSV")
    return steps


def _in_order(steps: Iterable[MeterStep]) -> list[MeterStep]:
    """What counts: a trainer that went back to a checkpoint has written some steps twice."""
    kept: list[MeterStep] = []
    for step in steps:
        while kept and kept[-1].step >= step.step:
            kept.pop()
        kept.append(step)
    return kept


def _is_known(noise: NoiseScale | None) -> bool:
    """Whether a noise scale is a number of sequences, inside of its interval. An estimate of |G|² that is unbiased may
    be negative where there is much noise, and the ratio with it."""
    if noise is None or noise.value is None:
        return True
    low = noise.value if noise.low is None else noise.low
    high = noise.value if noise.high is None else noise.high
    return 0 < noise.value <= MOST and low <= noise.value <= high


def _of_rows(rows: Mapping[int, Mapping[str, float]], job: JobConfig) -> Iterator[MeterStep]:
    """Steps from figures by step. Sequences are counted up where no figure says them, and batch and layout hold until
    another figure comes."""
    batch, micro, samples, done = job.training.global_batch, None, 0, 0
    degrees: dict[str, int] = {}
    measured = 0
    for number, row in sorted(rows.items()):
        batch = int(row.get("global_batch", batch))
        micro = int(row["micro_batch"]) if "micro_batch" in row else micro
        degrees |= {name: int(row[name]) for name in ("tp", "pp", "dp") if name in row}
        samples = int(row["samples"]) if "samples" in row else samples + (number - done) * batch
        done = number
        noise = None
        if value := row.get("noise"):
            measured += 1
            noise = NoiseScale(
                grad_sq=1.0,  # only their ratio is known
                noise_trace=value,
                value=value,
                low=row.get("low"),
                high=row.get("high"),
                samples=max(measured, number),
            )
        seconds = row.get("step_seconds")
        try:
            yield MeterStep(
                step=number,
                samples=samples,
                global_batch=batch,
                micro_batch=micro,
                layout=Layout(**degrees) if len(degrees) == 3 else None,
                step_seconds=seconds if seconds and seconds > 0 else None,
                loss=row.get("loss"),
                noise=noise,
            )
        except ValidationError as error:
            raise ValueError(f"step {number}: {first_message(error)}") from None


def _figure(name: str) -> str | None:
    """The figure that a tag or a column is: `train/noise_scale`, `run-1 - noise_scale`, `noise/scale`."""
    plain = name.rpartition(" - ")[2].strip()
    if _HELD_OUT.match(plain):  # `eval/loss` is no training loss
        return None
    return _FIGURES.get(plain) or _FIGURES.get(plain.rpartition("/")[2])


def _tensorboard_rows(path: Path) -> dict[int, dict[str, float]]:
    """Figures by step in TensorBoard's event files: one file, or all in a folder."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    files = sorted(path.rglob("events.out.tfevents*")) if path.is_dir() else [path]
    if not files:
        raise ValueError("no event files of TensorBoard in it")
    rows: dict[int, dict[str, float]] = {}
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                figure = _figure(value.tag)
                if figure is not None and value.HasField("tensor"):
                    _add(rows, event.step, figure, float(make_ndarray(value.tensor).reshape(-1)[0]))
    return rows


def _csv_rows(path: Path) -> dict[int, dict[str, float]]:
    """Figures by step in a CSV that W&B exported, of a chart or of the whole history."""
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
    columns = list(reader.fieldnames or [])
    plain = {name.rpartition("/")[2].lower(): name for name in reversed(columns)}
    step_column = next((plain[name] for name in _STEP_COLUMNS if name in plain), None)
    if step_column is None:
        raise ValueError(f"no column Step, _step or global_step among {', '.join(columns[:8])}")
    figures = {name: figure for name in columns if not re.search(r"__M(IN|AX)$", name) and (figure := _figure(name))}
    rows: dict[int, dict[str, float]] = {}
    for line, row in enumerate(reader, start=2):
        if not row[step_column]:  # what W&B measures of the machine
            continue
        try:
            step = int(float(row[step_column]))
            for name, figure in figures.items():
                if row[name] not in ("", None, "NaN", "null"):
                    _add(rows, step, figure, float(row[name]))
        except (ValueError, TypeError):
            raise ValueError(f"line {line}: expected numbers") from None
    return rows


def _add(rows: dict[int, dict[str, float]], step: int, figure: str, value: float) -> None:
    if math.isfinite(value):
        rows.setdefault(step, {})[figure] = value
