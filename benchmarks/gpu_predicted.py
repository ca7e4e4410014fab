"""What `copus plan` would say of the configurations that `benchmarks.gpu_check` measures: the device's file alone."""

from typing import Any

import torch

from copus.job import JobConfig
from profiles.accelerator import accelerator
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.memory import MemoryModel

FILES = {
    "H100 80GB HBM3": "h100-sxm",
    "H200": "h200",
    "A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-80GB": "a100-80g",
    "B200": "b200",
    "B300": "b300",
    "GB200": "gb200",
    "GB300": "gb300",
    "V100-SXM2-32GB": "v100",
}
"""Last words of a device's name → its file in `profiles/accelerators`."""


def accelerator_file() -> str | None:
    """The name of this device's file; None for a GPU that has none."""
    if not torch.cuda.is_available():
        return "cpu"
    name = f" {torch.cuda.get_device_name()}"
    return next((file for words, file in FILES.items() if name.endswith(f" {words}")), None)


def predictions(job: JobConfig, candidates: list[Configuration]) -> list[dict[str, Any]]:
    """Of each: step seconds and peak bytes as [low, median, high] of 80 % intervals, and the chance to fit; nothing for
    a device without a file."""
    if accelerator_file() is None:
        return [{} for _ in candidates]
    columns, precision = Configurations.of(candidates), job.training.precision
    times = CostModel(stack=job.training.implementation.stack).predict(job.model, job.cluster, columns, precision)
    peaks = MemoryModel().predict(job.model, columns, precision)
    chances = peaks.chance_to_fit(accelerator(job.cluster.accelerator).memory_bytes)
    return [
        {
            "predicted_seconds": [float(values[row]) for values in (times.low, times.seconds, times.high)],
            "predicted_bytes": [float(values[row]) for values in (peaks.low, peaks.peak_bytes, peaks.high)],
            "chance_to_fit": float(chances[row]),
        }
        for row in range(len(candidates))
    ]
