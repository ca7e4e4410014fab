"""The installed backends: those that come with copus, and plugins."""

from copus.backends.description import BackendDescription
from copus.plugins import find_plugin

GROUP = "copus.backends"
"""Entry points of plugins; an entry point names a subclass of `BackendDescription`."""
BUILT_IN = {
    "megatron": "copus.backends.megatron.description:MegatronDescription",
    "deepspeed": "copus.backends.deepspeed.description:DeepSpeedDescription",
    "fsdp": "copus.backends.fsdp.description:FsdpDescription",
}
"""Name → `module:class` of its description."""
MEASURED = {
    "megatron": "copus.backends.megatron.measured:MegatronModel",
    "deepspeed": "copus.backends.deepspeed.measured:DeepSpeedModel",
    "fsdp": "copus.backends.fsdp.measured:FsdpModel",
}
"""Framework → `module:class` that a meter in somebody else's loop sees its models by (`copus.meter.measured`)."""


def find_backend(name: str) -> BackendDescription:
    """The description of the backend of that name. Raises ValueError, which lists the installed backends or says why a
    plugin is not one."""
    plugin = find_plugin("backend", name, GROUP, BUILT_IN)
    description = plugin.load()
    if not (isinstance(description, type) and issubclass(description, BackendDescription)):
        raise ValueError(f"backend {name} ({plugin.source}): {plugin.place} is no BackendDescription")
    return description()
