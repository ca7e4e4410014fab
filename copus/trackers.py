"""Which trackers are installed: those that come with copus, and plugins."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from copus.plugins import find_plugin

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
    plugin = find_plugin("tracker", name, GROUP, {name: place for name, (place, _) in BUILT_IN.items()})
    try:
        tracker: Tracker = plugin.load()(options)
    except ValueError:
        raise
    except Exception as error:  # a stranger's class may raise anything
        raise ValueError(f"{plugin.place}: {type(error).__name__}: {error}") from error
    missing = [method for method in ("start", "write", "close") if not callable(getattr(tracker, method, None))]
    if missing:
        raise ValueError(f"{plugin.place} is no tracker: it lacks {' and '.join(missing)}")
    return tracker


def check_installed(name: str) -> None:
    """Raise ValueError, with what to install, if a built-in tracker's package is missing. Imports none of them."""
    package = BUILT_IN.get(name, ("", None))[1]
    if package is not None and find_spec(package) is None:
        raise ValueError(f"the package {package} is not installed: pip install 'copus[{package}]'")
