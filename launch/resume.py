"""What `copus submit --resume` takes from the user: settings that are followed, and settings that are refused.

Every field of the job file is in one of these lists, or is simply followed from the resume on: docs/reliability.md has
the table.
"""

from pathlib import Path
from typing import Any

from copus.checkpoints.files import FOLDER, checkpoint_names, quick_damage, samples_of
from copus.events import has_checkpoint
from copus.job import JobConfig, JobError
from copus.job_text import parse_job_text
from copus.resize import fits, fitting
from copus.resume_request import ResumeRequest, nothing_to_resume
from launch.data import INPUTS
from launch.run_directory import shown, typed

FIXED = (
    *("model", "training.seed", "training.init_from", "training.init_optimizer", "training.optimizer.kind"),
    *("data.eod_mask_loss", "data.reset_attention_mask", "data.reset_position_ids", "data.packing"),
    "planner.noise_metric",
)
"""Sections and fields that the weights, the order of samples or the noise estimate of a run depend on. The text is
compared by its digest. Backend and precision are none of them: the state is the same on every backend."""
KEPT = ("name", "launch.runs")
"""Fields of the run's place: it keeps its own. Another job file may say otherwise, `--set` may not."""
STARTING = ("training.layout", "training.micro_batch", "training.global_batch")
"""The configuration that a run starts in. Naming one of them makes the resumed run go on in the job file's."""


def settled(job: JobConfig, before: JobConfig) -> JobConfig:
    """The job of a resume with what the run keeps of its own: name, place, the digest of the weights that it began
    with and their tokenizer, and the batch that its learning rate is for, unless the user names others."""
    launch = job.launch.model_copy(update={"runs": before.launch.runs})
    training = job.training.model_copy(update={"init_digest": before.training.init_digest})
    if training.reference_batch is None:
        training = training.model_copy(update={"reference_batch": before.reference_batch})
    data = job.data
    if data.tokenizer is None and training.init_from is not None:
        data = data.model_copy(update={"tokenizer": before.data.tokenizer})
    return job.model_copy(update={"name": before.name, "data": data, "launch": launch, "training": training})


def check_settings(run: Path, before: JobConfig, job: JobConfig, overrides: list[str]) -> None:
    """Raise JobError, with both values, for a setting that a resumed run cannot follow."""
    texts = () if job.data.prepared else (f"data.{name}" for name in INPUTS)  # else their digest has been compared
    for field in (*FIXED, *texts):
        for name, was, becomes in _leaves(field, _value(before, field), _value(job, field)):
            if was != becomes:
                raise JobError(f"{shown(run)}: {name} is {was} in this run and cannot become {becomes}")
    for field in KEPT:
        if _is_named(overrides, field):
            raise JobError(
                f"{shown(run)}: {field} is {_value(before, field)} in this run: a resumed run stays in place"
            )
    if job.profile.when == "always" != before.profile.when:
        raise JobError(
            f"{shown(run)}: profile.when(always) measures everything before a run begins, and a resumed run has begun: "
            f"`copus profile run {typed(run)}/job.yaml --set profile.when=always` does so"
        )


def request_of(
    run: Path, before: JobConfig, job: JobConfig, overrides: list[str], *, from_file: bool, may_begin_again: bool
) -> ResumeRequest:
    """What the workers are asked beside the job file, which is another one than the run's own if `from_file`. Raises
    JobError if no checkpoint of the run is whole, and it may not begin again. Files are not read to their ends here:
    the workers do that."""
    names = checkpoint_names(run)
    if not may_begin_again and has_checkpoint(run):
        flaws = {name: quick_damage(run / FOLDER / name) for name in names}
        if all(flaws.values()):
            raise nothing_to_resume(run, [f"{FOLDER}/{name}: {flaw}" for name, flaw in flaws.items()])
    own = before.training.configuration
    if not fits(own.layout, job, job.cluster):  # another cluster or backend: nobody asked for what it becomes there
        own = fitting(own, job, job.cluster)
    asked = from_file and job.training.configuration != own
    named = any(_is_named(overrides, field) for field in STARTING)
    return ResumeRequest(
        configuration=job.training.configuration if asked or named else None,
        until_samples=max(map(samples_of, names), default=0),
        may_begin_again=may_begin_again,
    )


def _value(job: JobConfig, field: str) -> Any:
    value: Any = job
    for name in field.split("."):
        value = getattr(value, name)
    return value


def _leaves(field: str, was: Any, becomes: Any) -> list[tuple[str, Any, Any]]:
    """Name, value before and value after: of a section each field, of a field itself."""
    if field == "model":
        return [(f"model.{name}", value, getattr(becomes, name)) for name, value in was]
    return [(field, was, becomes)]


def _is_named(overrides: list[str], field: str) -> bool:
    """Whether `--set` names the field, a part of it, or a section with the field in it."""
    for override in overrides:
        key, _, text = override.partition("=")
        if key == field or key.startswith(f"{field}."):
            return True
        if field.startswith(f"{key}."):
            value = parse_job_text(text)
            for name in field.removeprefix(f"{key}.").split("."):
                if not isinstance(value, dict) or name not in value:
                    break
                value = value[name]
            else:
                return True
    return False
