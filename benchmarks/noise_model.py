"""The noise estimate on a real model in training: what every rank runs. See benchmarks/noise.py."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from copus.backends.megatron.backend import MegatronBackend
from copus.backends.megatron.modules import RMSNorm
from copus.backends.registry import find_backend
from copus.backends.step_contract import Batches, StepRequest, StepResult, StepRules
from copus.data.prepared import prepared_path
from copus.data.samples import open_data
from copus.job import JobConfig
from copus.noise.estimator import NoiseEstimator
from copus.noise.memory import Clock
from copus.noise.run_noise import RunNoise
from copus.noise.step_estimate import StepEstimate, estimate_step
from planner.sampling import STEPS, HalfLife, source_of_step
from profiles.configuration import Configuration
from profiles.layout import Layout

LAYOUTS = (
    {"dp": 4},
    {"dp": 4, "zero": 1},
    {"tp": 2, "dp": 2},
    {"tp": 2, "dp": 2, "sequence_parallel": True, "zero": 1},
    {"pp": 2, "dp": 2},
    {"pp": 2, "dp": 2, "zero": 1},
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
)
BOTH = "microbatch+normlayer"


def _start(job: JobConfig, configuration: Configuration) -> tuple[Any, Batches]:
    backend = find_backend(job.training.backend).load()(job, torch.device("cpu"))
    backend.build(configuration)
    return backend, open_data(job, prepared_path(job))[0]


def _frozen(job: JobConfig) -> StepRules:
    """Adam's moments move, the weights do not."""
    return StepRules(lr=0.0, betas=job.training.optimizer.betas_at(1.0))


def brute_force(job: JobConfig, training_steps: int, sequences: int, online_steps: int) -> dict[str, Any]:
    """Train a little; then, at frozen weights, the truth from `sequences` single gradients and the online estimates.

    The truth uses nothing of ours: torch.autograd on the unwrapped model, one sequence at a time. Every estimate sees
    sequences that neither training nor the truth has seen.
    """
    ranks = dist.get_world_size()
    configuration = Configuration(layout=Layout(dp=ranks), micro_batch=4, global_batch=8 * ranks)
    backend, batches = _start(job, configuration)
    pairs, sample = [], 0
    rules = StepRules(lr=job.training.lr, betas=job.training.optimizer.betas_at(1.0))
    for _ in range(training_steps):
        pairs.append(_pair(backend.train_step(batches, StepRequest(sample, rules, BOTH))))
        sample += configuration.global_batch
    result: dict[str, Any] = {"training_steps": training_steps, "training_batch": configuration.global_batch}
    result["correlation"] = correlation(pairs, configuration.global_batch)
    result["sequences"] = sequences
    result.update(_truth(backend, batches, sample, sequences))
    sample += sequences
    _progress(f"truth: {result['truth']:.1f} from {sequences} sequences; {result['correlation']}")
    for name, settings in {
        "auto": job.planner,
        "microbatch": job.planner.model_copy(update={"noise_source": "microbatch"}),
    }.items():
        meter = RunNoise(HalfLife(configuration.global_batch, online_steps // 2))
        for step in range(online_steps):
            source = source_of_step(settings, backend.description, configuration, step)
            first = sample + step * configuration.global_batch
            seen = backend.train_step(batches, StepRequest(first, _frozen(job), source))
            meter.update(seen, (step + 1) * configuration.global_batch, configuration.global_batch)
        noise = meter.estimate()
        result[name] = {"value": noise.value, "low": noise.low, "high": noise.high}
        _progress(f"{name}: {result[name]}")
    return result


def _progress(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _truth(backend: MegatronBackend, batches: Batches, first: int, sequences: int) -> dict[str, Any]:
    """tr Σ / |G|² of the whole gradient and of the norm layers' share, from gradients of single sequences."""
    network: Any = backend.built.chunks[0]
    while hasattr(network, "module"):
        network = network.module
    norm_weights = {id(module.weight) for module in network.modules() if isinstance(module, RMSNorm)}
    params = list(network.parameters())
    is_norm = [id(param) in norm_weights for param in params]
    sums = [torch.zeros_like(param, dtype=torch.float64) for param in params]
    squares = torch.zeros(2, dtype=torch.float64)  # of the whole, of the norm layers
    for index in range(first + dist.get_rank(), first + sequences, dist.get_world_size()):
        tokens, labels = batches(index, 1)
        gradients = torch.autograd.grad(network(tokens, None, None, labels=labels).mean(), params)
        for total, gradient, norm in zip(sums, gradients, is_norm, strict=True):
            total += gradient
            square = (gradient.double() ** 2).sum()
            squares[0] += square
            squares[1] += square * norm
    dist.all_reduce(squares)
    means = torch.zeros(2, dtype=torch.float64)
    for total, norm in zip(sums, is_norm, strict=True):
        dist.all_reduce(total)
        square = ((total / sequences) ** 2).sum()
        means += torch.tensor([1.0, float(norm)], dtype=torch.float64) * square
    truth = []
    for square, mean in zip(squares.tolist(), means.tolist(), strict=True):
        trace = (square - sequences * mean) / (sequences - 1)
        truth.append((trace, mean - trace / sequences))
    (trace, grad_sq), (norm_trace, norm_grad_sq) = truth
    return {
        "truth": trace / grad_sq,
        "truth_grad_sq": grad_sq,
        "truth_noise_trace": trace,
        "norm_layers_truth": norm_trace / norm_grad_sq,
    }


def _pair(result: StepResult) -> tuple[StepEstimate, StepEstimate]:
    full, norm_layers = result.parts, result.norm_layer_parts
    assert full is not None
    assert norm_layers is not None
    return (
        estimate_step(full.grad_sq, full.squared_norms, full.part_size),
        estimate_step(norm_layers.grad_sq, norm_layers.squared_norms, norm_layers.part_size),
    )


def correlation(pairs: list[tuple[StepEstimate, StepEstimate]], global_batch: int) -> dict[str, float]:
    """Pearson's r between norm layers and total over a stretch of training: of single steps' tr Σ and |G|², and of the
    logarithm of the smoothed noise scale, which is what decisions see."""
    clock, estimators = Clock(HalfLife(0, STEPS)), (NoiseEstimator(), NoiseEstimator())
    smoothed = []
    for step, pair in enumerate(pairs):
        clock.tick(global_batch)
        for estimator, one in zip(estimators, pair, strict=True):
            estimator.update(one, clock, (step + 1) * global_batch, global_batch)
        values = [estimator.estimate().value for estimator in estimators]
        if all(value is not None for value in values):
            smoothed.append(values)
    logs = np.log(np.array(smoothed, dtype=float))
    of = {
        name: np.array([[getattr(one, name) for one in pair] for pair in pairs]) for name in ("grad_sq", "noise_trace")
    }
    return {
        "steps": len(pairs),
        "step_noise_trace": _pearson(of["noise_trace"]),
        "step_grad_sq": _pearson(of["grad_sq"]),
        "smoothed_noise_scale": _pearson(logs),
        "kappa_first": float(np.exp(logs[0, 0] - logs[0, 1])),
        "kappa_last": float(np.exp(logs[-1, 0] - logs[-1, 1])),
    }


def _pearson(columns: np.ndarray) -> float:
    return float(np.corrcoef(columns.T)[0, 1])


def same_on_every_layout(job: JobConfig) -> list[dict[str, Any]]:
    """The same weights (after a few steps; moves are exact to the bit) and the same 16 sequences on each layout."""
    seen = []
    backend, batches = _start(job, Configuration(layout=Layout(dp=4), micro_batch=2, global_batch=16))
    for step in range(3):
        rules = StepRules(lr=job.training.lr, betas=job.training.optimizer.betas_at(1.0))
        backend.train_step(batches, StepRequest(16 * step, rules))
    for degrees in LAYOUTS:
        layout = Layout.model_validate(degrees)
        backend.move(Configuration(layout=layout, micro_batch=2, global_batch=16))
        micro = backend.train_step(batches, StepRequest(48, _frozen(job), BOTH))
        replica = backend.train_step(batches, StepRequest(48, _frozen(job), "replica"))
        assert micro.parts is not None
        assert micro.norm_layer_parts is not None
        seen.append(
            {
                "layout": layout.label,
                "dp": layout.dp,
                "microbatch": [micro.grad_sq, *micro.parts.squared_norms.tolist()],
                "normlayer": [micro.norm_layer_parts.grad_sq, *micro.norm_layer_parts.squared_norms.tolist()],
                "replica": None if replica.parts is None else replica.parts.squared_norms.tolist(),
            }
        )
    return seen


def step_times(
    job: JobConfig,
    configuration: Configuration,
    rounds: int,
    sources: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of steps, measured from each source and from none, in rounds that go through all of them; every round
    begins with another one. `auto` follows its own schedule, one step a round. With `sources` only these and none."""
    backend, batches = _start(job, configuration)
    several = configuration.layout.dp > 1
    if sources:
        variants = ["off", *sources]
    elif job.planner.noise_metric == "adam":
        variants = ["off", "microbatch", *["replica"] * several]
    elif backend.description.parts(configuration)["microbatch"].number == 1:
        variants = ["off", "microbatch", "normlayer"]
    else:
        variants = ["off", "microbatch", "normlayer", "auto", *["replica"] * several]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    sample = 0
    for index in range(-2, rounds):  # two rounds to warm up
        for place in range(len(variants)):
            variant = variants[(place + index) % len(variants)]
            source: str | None = {"off": None}.get(variant, variant)
            if variant == "auto":
                step = index % job.planner.noise_every_steps
                source = source_of_step(job.planner, backend.description, configuration, step)
            dist.barrier()
            started = clock()
            backend.train_step(batches, StepRequest(sample, _frozen(job), source))
            elapsed = clock() - started
            sample = (sample + configuration.global_batch) % 4096
            if index >= 0:
                seconds[variant].append(elapsed)
    return seconds
