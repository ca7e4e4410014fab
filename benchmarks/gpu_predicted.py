"""What `copus plan` would say of the configurations that `benchmarks.gpu_check` measures: the device's file alone."""

from typing import Any

import torch

from copus.job import JobConfig
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.cost.accelerator import accelerator
from profiles.memory import MemoryModel

FILES = {"H100": "h100-sxm", "H200": "h200", "A100-SXM4-40GB": "a100-40g", "A100": "a100-80g", "B200": "b200"}
"""Part of a device's name → its file in `profiles/accelerators`; the first one counts."""


def accelerator_file() -> str:
    """The name of this device's file; h100-sxm for a GPU that has none, whose predictions are then not its own."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().replace(" ", "-")
    return next((file for part, file in FILES.items() if part in name), "h100-sxm")


def predictions(job: JobConfig, candidates: list[Configuration]) -> list[dict[str, Any]]:
    """Of each: step seconds and peak bytes as [low, median, high] of 80 % intervals, and the chance to fit."""
    columns, precision = Configurations.of(candidates), job.training.precision
    times = CostModel().predict(job.model, job.cluster, columns, precision)
    peaks = MemoryModel().predict(job.model, columns, precision)
    chances = peaks.chance_to_fit(accelerator(job.cluster.accelerator).memory_bytes)
    return [
        {
            "predicted_seconds": [float(each[row]) for each in (times.low, times.seconds, times.high)],
            "predicted_bytes": [float(each[row]) for each in (peaks.low, peaks.peak_bytes, peaks.high)],
            "chance_to_fit": float(chances[row]),
        }
        for row in range(len(candidates))
    ]


def model_flops(job: JobConfig, configuration: Configuration) -> float:
    """Floating point operations of a step that the model asks for, recomputation not counted: 6 a parameter and token
    without the embedding, and 6 · layers · hidden · seq_len a token for causal attention (PaLM, 2204.02311, appendix B,
    halved for the mask)."""
    model = job.model
    tokens = configuration.global_batch * model.seq_len
    matrices = model.parameters - model.vocab * model.hidden
    return tokens * (6.0 * matrices + 6.0 * model.layers * model.hidden * model.seq_len)
