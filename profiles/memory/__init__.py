"""The memory model: how much a configuration takes on its fullest rank, part by part, and whether it fits."""

from profiles.memory.implementation import KORTHIKANTI, MEGATRON, MEGATRON_TE, PYTORCH, Implementation
from profiles.memory.model import MemoryModel, PredictedMemory
from profiles.memory.peaks import Peaks

__all__ = [
    "KORTHIKANTI",
    "MEGATRON",
    "MEGATRON_TE",
    "PYTORCH",
    "Implementation",
    "MemoryModel",
    "Peaks",
    "PredictedMemory",
]
