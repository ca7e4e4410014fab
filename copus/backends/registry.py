"""Which backends are installed: those that come with copus, and plugins."""

from copus.backends.description import BackendDescription
from copus.plugins import find_plugin

GROUP = "copus.backends"
"""The entry points of plugins: each names a subclass of `BackendDescription`."""
BUILT_IN = {"megatron": "copus.backends.megatron.description:MegatronDescription"}
"""Name → where its description is."""


def find_backend(name: str) -> BackendDescription:
    """The description of the backend of that name. Raises ValueError that lists what is installed, or says why a plugin
    is none."""
    plugin = find_plugin("backend", name, GROUP, BUILT_IN)
    found = plugin.load()
    if not (isinstance(found, type) and issubclass(found, BackendDescription)):
        raise ValueError(f"backend {name} ({plugin.source}): {plugin.place} is no BackendDescription")
    return found()
