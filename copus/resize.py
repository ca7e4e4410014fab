"""Another number of ranks: the same job on the accelerators that there are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from copus.backends.registry import find_backend
from copus.job import JobConfig, JobError, apply_override, first_message, load_job, parse_job
from planner.space import layouts
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.throughput import Prediction

Predict = Callable[[Configuration], Prediction | None]


def found_cluster(planned: Cluster, ranks: int, ranks_per_node: int) -> Cluster:
    """The cluster that there is, from what the elastic agent tells its workers."""
    if ranks == planned.accelerators:
        return planned
    per_node = ranks_per_node if ranks % ranks_per_node == 0 else 1
    return planned.model_copy(update={"nodes": ranks // per_node, "accelerators_per_node": per_node})


def resized(job: JobConfig, cluster: Cluster) -> JobConfig:
    """The job for another cluster. Its starting configuration is replaced by one that fits (`fitting`); everything that
    the training depends on stays: the batch that the learning rate is for, the length, the seed."""
    if cluster == job.cluster:
        return job
    start = fitting(job.training.configuration, job, cluster)
    values = job.model_dump(mode="json")
    values["cluster"] = cluster.model_dump(mode="json")
    values["training"] |= start.model_dump(mode="json") | {"reference_batch": job.reference_batch}
    allowed = [layout for layout in job.planner.layouts or [] if fits(layout, job, cluster)]
    values["planner"]["layouts"] = [layout.model_dump(mode="json") for layout in allowed] or None
    return parse_job(values, "the job on other ranks")


def fits(layout: Layout, job: JobConfig, cluster: Cluster) -> bool:
    """Whether the job's model and backend can run the layout on the cluster."""
    try:
        layout.check(job.model, cluster)
        find_backend(job.training.backend).check_layout(layout)
    except ValueError:
        return False
    return True


def fitting(
    current: Configuration, job: JobConfig, cluster: Cluster, predict: Predict = lambda configuration: None
) -> Configuration:
    """What to run on a cluster that `current` does not fit.

    The global batch stays, or becomes the next smaller one that the layout divides. Among those that keep it, the
    layout and micro-batch with the highest predicted throughput; where nothing is known of any, the split over tensor
    and pipeline ranks that runs now, else the next larger one, since a rank then holds no more of the model than it
    does already, and the micro-batch that runs now. There is always one that fits: data parallelism alone.
    """
    possible = [layout for layout in job.planner.layouts or [] if fits(layout, job, cluster)]
    template = current.layout.model_copy(update={"tp": 2, "pp": 1, "vp": 1, "dp": 1})  # sequence parallel needs tp > 1
    possible = possible or [each for each in layouts(job.model, cluster, template) if fits(each, job, cluster)]
    found = [
        _with_batch(layout, micro_batch, current)
        for layout in possible
        for micro_batch in {current.micro_batch, *_powers_of_two(job.planner.max_micro_batch)}
    ]
    unchanged = [each for each in found if each.global_batch == current.global_batch] or found
    known = [(each, predict(each)) for each in unchanged]
    fast = [(each, seen.step_seconds / each.global_batch) for each, seen in known if seen and seen.step_seconds]
    if fast:
        return min(fast, key=lambda item: item[1])[0]
    untried = [each for each, seen in known if not (seen and seen.failure)] or unchanged
    return min(untried, key=lambda each: _distance(current, each))


def _with_batch(layout: Layout, micro_batch: int, current: Configuration) -> Configuration:
    per_pass = layout.dp * micro_batch
    global_batch = max(1, current.global_batch // per_pass) * per_pass
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)


def _distance(current: Configuration, other: Configuration) -> tuple[int, ...]:
    """How far from what runs, the most important difference first."""
    was, now = current.layout, other.layout
    split_was, split_now = was.tp * was.pp, now.tp * now.pp
    return (
        abs(other.global_batch - current.global_batch),
        int((was.tp, was.pp) != (now.tp, now.pp)),
        int(split_now < split_was),
        abs(split_now - split_was),
        abs(now.tp - was.tp),
        int(other.micro_batch > current.micro_batch),
        abs(other.micro_batch - current.micro_batch),
    )


def _powers_of_two(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]


def load_resized(job_file: Path, overrides: list[str], engine: str | None = None) -> JobConfig:
    """`load_job`, where `--set cluster.…` may change the number of accelerators without naming a layout: one that fits
    is chosen. Raises JobError."""
    of_cluster = [override for override in overrides if override.startswith("cluster.")]
    others = [override for override in overrides if override not in of_cluster]
    if not of_cluster or any(override.startswith("training.layout") for override in others):
        return load_job(job_file, overrides, engine)
    job = load_job(job_file, others, engine)
    values: dict[str, Any] = {"cluster": job.cluster.model_dump(mode="json")}
    for override in of_cluster:
        apply_override(values, override)
    try:
        cluster = Cluster.model_validate(values["cluster"])
    except ValidationError as error:
        raise JobError(first_message(error, "cluster")) from None
    if cluster.accelerators == job.cluster.accelerators:
        return load_job(job_file, overrides, engine)
    return resized(job, cluster)
