"""Which profilers are installed: those that come with copus, and plugins."""

from dataclasses import dataclass
from typing import Any

from copus.plugins import Plugin, find_plugin, plugins
from profiles.profiler import Processes, ProfilerType

GROUP = "copus.profilers"
"""The entry points of plugins."""
TRIED = "profiling.json"
"""In the run directory while something is measured: workers that start and find it know what ended those before."""
BUILT_IN: dict[str, tuple[str, Processes, bool]] = {
    "live": ("copus.profiling.live:LiveProfiler", "all", False),
    "single": ("copus.profiling.single:SingleProfiler", "one", True),
    "published": ("profiles.published:PublishedProfiler", "one", False),
}
"""Name → where it is, `processes` and `shards`."""
BUILT_IN_OPTIONS: dict[str, tuple[str, ...]] = {"live": (), "single": (), "published": ("csv",)}


@dataclass(frozen=True)
class Installed(Plugin):
    """A profiler that can be named in `profile.profiler`."""

    traits: tuple[Processes, bool] | None = None
    """`processes` and `shards` of a built-in profiler, so that it need not be imported for them."""

    @property
    def processes(self) -> Processes:
        """How many processes it wants. Imports a plugin, and no built-in one; raises as `load` does."""
        return self.traits[0] if self.traits else self.load().processes

    @property
    def shards(self) -> bool:
        """Whether it measures shards and no steps. As `processes`."""
        return self.traits[1] if self.traits else self.load().shards

    def load(self) -> ProfilerType:
        """Import it. Raises ValueError, in one line, if that fails or it is no profiler."""
        try:
            profiler = super().load()
        except ValueError as error:
            raise ValueError(f"profiler {error}") from error
        processes, shards = getattr(profiler, "processes", None), getattr(profiler, "shards", None)
        if not callable(profiler) or processes not in ("one", "all") or shards not in (True, False):
            raise ValueError(
                f"profiler {self.name} ({self.source}): {self.place} is no profiler: it has to be callable, with "
                '`processes` "one" or "all", and `shards` True or False'
            )
        return profiler


def installed() -> dict[str, Installed]:
    """All of them by name, the built-in ones first. A plugin cannot take the name of a built-in one."""
    return {name: _installed(plugin) for name, plugin in plugins(GROUP, _places()).items()}


def check_profiler(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError if there is no such profiler, or a built-in one is given options that it does not take.

    What a plugin takes only the plugin knows.
    """
    find_profiler(name)
    taken = BUILT_IN_OPTIONS.get(name)
    unknown = [option for option in options if taken is not None and option not in taken]
    if unknown:
        raise ValueError(f"options: the {name} profiler takes {', '.join(taken or ()) or 'none'}, got {unknown[0]}")


def find_profiler(name: str) -> Installed:
    """The profiler of that name; only plugins are looked for on disk. Raises ValueError that lists what there is."""
    return _installed(find_plugin("profiler", name, GROUP, _places()))


def _places() -> dict[str, str]:
    return {name: place for name, (place, _, _) in BUILT_IN.items()}


def _installed(plugin: Plugin) -> Installed:
    traits = BUILT_IN[plugin.name][1:] if plugin.name in BUILT_IN else None
    return Installed(plugin.name, plugin.place, plugin.source, traits)
