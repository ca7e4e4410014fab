"""Which trackers are installed: those that come with copus, and plugins."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from copus.plugins import added, load

if TYPE_CHECKING:
    from copus.tracking.base import Tracker

GROUP = "copus.trackers"
"""The entry points of plugins."""
BUILT_IN: dict[str, tuple[str, str | None]] = {
    "tensorboard": ("copus.tracking.tensorboard:TensorBoardTracker", "tensorboard"),
    "wandb": ("copus.tracking.wandb:WandbTracker", "wandb"),
    "mlflow": ("copus.tracking.mlflow:MlflowTracker", "mlflow"),
    "prometheus": ("copus.tracking.prometheus:PrometheusTracker", None),
}
"""Name → where it is, and the package that it needs: also the name of the extra that installs that one."""


def make_tracker(name: str, options: dict[str, Any]) -> "Tracker":
    """A tracker with its options; nothing is opened yet. Raises ValueError for an unknown name or a wrong option."""
    if name in BUILT_IN:
        place = BUILT_IN[name][0]
    else:
        plugins = added(GROUP)
        if name not in plugins:
            listed = [f"{known} (built in)" for known in BUILT_IN]
            listed += [f"{known} ({source})" for known, (_, source) in plugins.items() if known not in BUILT_IN]
            raise ValueError(f"no tracker {name!r} is installed; there are {', '.join(listed)}")
        place = plugins[name][0]
    try:
        tracker: Tracker = load(place)(options)
    except ValueError:
        raise
    except Exception as error:  # a stranger's class may raise anything
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    missing = [method for method in ("start", "write", "close") if not callable(getattr(tracker, method, None))]
    if missing:
        raise ValueError(f"{place} is no tracker: it lacks {' and '.join(missing)}")
    return tracker


def check_installed(name: str) -> None:
    """Raise ValueError, with what to install, where a built-in tracker's package is missing. Imports none of them."""
    package = BUILT_IN.get(name, ("", None))[1]
    if package is not None and find_spec(package) is None:
        raise ValueError(f"the package {package} is not installed: pip install 'copus[{package}]'")
