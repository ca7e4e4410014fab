"""Which engines are installed: those that come with copus, and plugins."""

from typing import Any

from pydantic import BaseModel

from copus.plugins import find_plugin

GROUP = "copus.engines"
"""The entry points of plugins: each names a subclass of `launch.engines.base.AttendedEngine` or `QueuedEngine`."""
BUILT_IN = {
    "local": "launch.engines.local:LocalEngine",
    "hosts": "launch.engines.hosts:HostsEngine",
    "slurm": "launch.engines.slurm:SlurmEngine",
    "srun": "launch.engines.slurm_allocation:SrunEngine",
    "kubernetes": "launch.engines.kubernetes:KubernetesEngine",
}
"""Name → where it is, as text: this package imports nothing of `launch`."""


def load_engine(name: str) -> Any:
    """The class of the engine of that name. Raises ValueError, in one line, if there is none."""
    plugin = find_plugin("engine", name, GROUP, BUILT_IN)
    engine = plugin.load()
    options = getattr(engine, "Options", None)
    if not (callable(engine) and isinstance(options, type) and issubclass(options, BaseModel)):
        raise ValueError(
            f"{name} ({plugin.source}): {plugin.place} is no engine: it has to be a subclass of AttendedEngine or "
            "QueuedEngine in launch.engines.base"
        )
    return engine


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError (pydantic's) if an engine does not take these `launch.options`."""
    load_engine(name).Options.model_validate(options)
