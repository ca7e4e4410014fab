"""`copus import-hf`: a job file that trains a Hugging Face folder further."""

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from copus.backends.registry import BUILT_IN
from copus.job import JobConfig, JobError, apply_override, parse_job
from copus.weights.eos_token import eos_token_of
from copus.weights.source import TOKENIZER, check_source, find_source, tokens_of
from launch.job_file_output import put_job_file
from profiles.formatting import count
from profiles.huggingface_config import read_config, read_values

LONGEST = 4096
"""Length of the sequences, unless the model's are shorter or the user says another."""
_SHORTEST_SEQUENCES = 32
_USUAL = {"global_batch": 32, "tokens": 50_000_000, "lr": 1e-5, "min_lr": 1e-6, "warmup_tokens": 1_000_000}
"""A cautious fine-tuning: an order of magnitude below the learning rates of pre-training."""


def import_hf(folder: Path, overrides: list[str], out: Path | None, *, as_json: bool = False) -> int:
    """Print a job file that begins with the weights of a folder, after they have been checked.

    The backend is the first that trains the model. Raises JobError if none does, or the folder is not whole.
    """
    folder = folder.expanduser().absolute()
    values = _values(folder)
    for override in overrides:
        apply_override(values, override)
    job = _with_a_backend(values, named=any(override.startswith("training.backend=") for override in overrides))
    check_source(job, find_source(folder), notice=lambda line: print(f"copus: {line}", file=sys.stderr))
    text = f"# Made by copus import-hf from {folder.name}\n" + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True
    )
    shown = {"job": job.model_dump(mode="json"), "out": None if out is None else str(out)}
    put_job_file(text, out, shown, as_json=as_json)
    said = f"{count(job.model.parameters)} weights, trained by {job.training.backend}"
    print(f"{said}; what to begin in: copus plan {out or 'JOB.yaml'}", file=sys.stderr)
    return 0


def _values(folder: Path) -> dict[str, Any]:
    """The sections of the job file, without a backend."""
    source = find_source(folder)
    if source.kind != "hugging_face":
        raise JobError(f"{folder} is no Hugging Face folder")
    try:
        read_config(folder)
        config = read_values(folder / "config.json")
    except ValueError as error:
        raise JobError(str(error)) from None
    longest = config.get("max_position_embeddings") or config.get("n_positions") or LONGEST
    data: dict[str, Any] = {"source": "shakespeare"}
    if (folder / TOKENIZER).is_file():
        data["tokenizer"] = str(folder / TOKENIZER)
        if eos_token := eos_token_of(folder, tokens_of(folder / TOKENIZER)):
            data["eos_token"] = eos_token
    return {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-._")[:64] or "tuned",
        "model": {"from": str(folder), "seq_len": max(_SHORTEST_SEQUENCES, min(LONGEST, int(longest)))},
        "data": data,
        "cluster": {"accelerators_per_node": 1},
        "training": {"init_from": str(folder), **_USUAL},
    }


def _with_a_backend(values: dict[str, Any], *, named: bool) -> JobConfig:
    """The job with the first backend that trains its model, which is put into the values; the one that the user has
    named counts alone."""
    training = values["training"]
    refusals = []
    for name in [training["backend"]] if named else BUILT_IN:
        training["backend"] = name
        try:
            return parse_job(values, "import-hf")
        except JobError as error:
            refusals.append(str(error).removeprefix("import-hf: "))
    raise JobError("; ".join(dict.fromkeys(refusals)))
