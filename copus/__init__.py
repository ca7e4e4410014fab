"""What runs on every rank: training loop, noise measurement, backends, moves and checkpoints.

The names below are copus for Python, and stable; docs/python.md describes them. They are imported when they are first
asked for: importing this package imports no torch, since `copus.job` and `copus.events` are read by the launcher too.
Their types are in `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "BatchController": "copus.meter.batch_controller",
    "JobConfig": "copus.job",
    "JobError": "copus.job",
    "NoiseMeter": "copus.meter.noise_meter",
    "Planner": "copus.planning",
    "ThroughputTable": "profiles.table",
    "load_job": "copus.job",
    "plan": "copus.planning",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
