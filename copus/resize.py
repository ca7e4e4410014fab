"""Another number of ranks, or another backend: the same job in a configuration that fits there."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from pydantic import ValidationError

from copus.backends.registry import find_backend
from copus.job import JobConfig, JobError, apply_override, load_job, parse_job
from copus.validation_messages import first_message
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


def resized(job: JobConfig, cluster: Cluster, backend: str | None = None) -> JobConfig:
    """The job on another cluster or another backend (None: its own). Its starting configuration is replaced by one that
    fits there (`fitting`), unless it fits itself. What the training depends on stays: the batch that the learning rate
    is for, the length, the seed."""
    training = job.training.model_copy(update={"backend": backend or job.training.backend})
    there = job.model_copy(update={"training": training})
    if cluster == job.cluster and there == job:
        return job
    start = job.training.configuration
    if not fits(start.layout, there, cluster):
        start = fitting(start, there, cluster)
    values = there.model_dump(mode="json")
    values["cluster"] = cluster.model_dump(mode="json")
    values["training"] |= start.model_dump(mode="json") | {"reference_batch": job.reference_batch}
    allowed = [layout for layout in job.planner.layouts or [] if fits(layout, there, cluster)]
    values["planner"]["layouts"] = [layout.model_dump(mode="json") for layout in allowed] or None
    where = "the job on other ranks" if training == job.training else f"the job on the {backend} backend"
    return parse_job(values, where)


def fits(layout: Layout, job: JobConfig, cluster: Cluster) -> bool:
    """Whether the job's model and backend can run the layout on the cluster."""
    backend = find_backend(job.training.backend).for_training(job.training)
    try:
        layout.check(job.model, cluster)
        backend.check_layout(layout)
        backend.check_model_in(layout, job.model)
        backend.check_training(job.training.model_copy(update={"layout": layout}))
    except ValueError:
        return False
    return True


def fitting(
    current: Configuration, job: JobConfig, cluster: Cluster, predict: Predict = lambda configuration: None
) -> Configuration:
    """What to run on a cluster, or a backend, that `current` does not fit.

    The global batch stays, or becomes the next smaller one that the layout divides. Among the layouts that keep it, the
    layout and micro-batch with the highest predicted throughput. If no throughput is known, the share of the weights
    that a rank holds does not grow, since more may not fit into memory. Then ZeRO stage, split over tensor and pipeline
    ranks, and micro-batch stay as far as they can. Data parallelism alone always fits a cluster; if the
    backend refuses even that, `current` is returned, for the check of the job to say why.
    """
    possible = [layout for layout in job.planner.layouts or [] if fits(layout, job, cluster)] or [
        layout for layout in _layouts_like(current.layout, job, cluster) if fits(layout, job, cluster)
    ]
    if not possible:
        return current
    configurations = [
        _with_batch(layout, micro_batch, current)
        for layout in possible
        for micro_batch in {current.micro_batch, *_powers_of_two(job.planner.max_micro_batch)}
    ]
    unchanged = [other for other in configurations if other.global_batch == current.global_batch] or configurations
    predicted = [(other, predict(other)) for other in unchanged]
    fast = [(other, seen.step_seconds / other.global_batch) for other, seen in predicted if seen and seen.step_seconds]
    if fast:
        return min(fast, key=lambda item: item[1])[0]
    untried = [other for other, seen in predicted if not (seen and seen.failure)] or unchanged
    return min(untried, key=lambda other: _distance(current, other))


def _layouts_like(layout: Layout, job: JobConfig, cluster: Cluster) -> Iterator[Layout]:
    """Splits of the cluster with every ZeRO stage of the backend, with as many copies as a layout has or one, and with
    its sequence parallelism and offloading or without. Uneven pipelines are left to the planner: a somewhat smaller
    batch is nearer to what ran."""
    stages = range(find_backend(job.training.backend).largest_zero + 1)
    offloads = {layout.offload_optimizer, False}
    for sequence_parallel, offload, zero in product({layout.sequence_parallel, False}, offloads, stages):
        for copies in {layout.dp_replicate, 1} if zero else {1}:
            template = Layout(
                tp=2,  # sequence parallelism needs tp > 1
                dp=2 * copies,
                sequence_parallel=sequence_parallel,
                recompute=layout.recompute,
                zero=zero,
                dp_replicate=copies,
                offload_optimizer=offload,
            )
            splits = layouts(job.model, cluster, template, layout.cp)
            yield from (split for split in splits if job.model.layers % split.pp == 0)


def _with_batch(layout: Layout, micro_batch: int, current: Configuration) -> Configuration:
    per_pass = layout.dp * micro_batch
    global_batch = max(1, current.global_batch // per_pass) * per_pass
    return Configuration(layout=layout, micro_batch=micro_batch, global_batch=global_batch)


def _distance(current: Configuration, other: Configuration) -> tuple[int, ...]:
    """How far from what runs, the most important difference first."""
    was, now = current.layout, other.layout
    split_was, split_now = _weights_split(was), _weights_split(now)
    return (
        abs(other.global_batch - current.global_batch),
        int((was.tp, was.pp, was.zero) != (now.tp, now.pp, now.zero)),
        int(split_now < split_was),
        abs(now.zero - was.zero),
        int(now.offload_optimizer != was.offload_optimizer),
        abs(split_now - split_was),
        abs(now.cp - was.cp),
        abs(now.tp - was.tp),
        abs(now.expert_tp - was.expert_tp),
        # At ZeRO 1 and 2 the copies are of optimizer state and gradients: their shares do not grow, either.
        int(now.dp_shard < was.dp_shard),
        abs(now.dp_replicate - was.dp_replicate),
        int(now.sequence_parallel != was.sequence_parallel),
        int(other.micro_batch > current.micro_batch),
        abs(other.micro_batch - current.micro_batch),
    )


def _weights_split(layout: Layout) -> int:
    """Among how many ranks one copy of the weights is divided."""
    return layout.tp * layout.pp * (layout.dp_shard if layout.zero == 3 else 1)


def _powers_of_two(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]


def load_resized(job_file: Path, overrides: list[str], engine: str | None = None) -> JobConfig:
    """`load_job`, where `--set cluster.…` and `--set training.backend=…` may change the number of accelerators and the
    backend without naming a layout: one that fits is chosen. Raises JobError."""
    freed = [override for override in overrides if override.startswith(("cluster.", "training.backend="))]
    others = [override for override in overrides if override not in freed]
    if not freed or any(override.startswith("training.layout") for override in others):
        return load_job(job_file, overrides, engine)
    # The layouts that are named are for the new place, where the old ones need not fit.
    layouts_named = [override for override in others if override.startswith("planner.layouts")]
    job = load_job(job_file, [override for override in others if override not in layouts_named], engine)
    values = job.model_dump(mode="json")
    for override in freed:
        apply_override(values, override)
    backend = values["training"]["backend"]
    try:
        cluster = Cluster.model_validate(values["cluster"])
        find_backend(backend)
    except ValidationError as error:
        raise JobError(first_message(error, "cluster")) from None
    except ValueError as error:
        raise JobError(f"training.backend: {error}") from None
    if cluster.accelerators == job.cluster.accelerators and backend == job.training.backend:
        return load_job(job_file, overrides, engine)
    values = resized(job, cluster, backend).model_dump(mode="json")
    for override in layouts_named:
        apply_override(values, override)
    return parse_job(values, str(job_file))
