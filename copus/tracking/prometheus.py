"""A text file for Prometheus, as node_exporter's textfile collector reads it. Nothing listens on any socket."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, field_validator

from copus.durable import replace_text
from copus.events import Event, Reconfigure, Start
from copus.tracking.figures import FIGURES
from profiles.record import Record

if TYPE_CHECKING:
    from copus.job import JobConfig


class PrometheusOptions(Record):
    """Options of `tracking.prometheus`."""

    folder: Path | None = None
    """Folder of node_exporter's `--collector.textfile.directory`; the file is `copus-RUN.prom` there. None: the file is
    `RUN/metrics.prom`."""
    every_seconds: NonNegativeFloat = 5.0
    """Least time between two versions of the file."""

    @field_validator("folder")
    @classmethod
    def _check_absolute(cls, value: Path | None) -> Path | None:
        if value is not None and not value.expanduser().is_absolute():
            raise ValueError(f"has to be an absolute path, got {value}: workers may start in another folder")
        return value


class PrometheusTracker:
    """Keeps one file with the newest of every figure, replaced whole, so that a reader never sees half of it.

    Readers tell a run that died from one that is quiet by `copus_last_event_timestamp_seconds`.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = PrometheusOptions.model_validate(options)
        self._newest: dict[str, float] = {}
        self._labels: dict[str, str] = {}
        self._layout = ""
        self._event_time, self._tokens = 0.0, 0
        self._written_at = -float("inf")

    def start(self, run: Path, job: "JobConfig") -> None:
        """Say where the file will be. An old one of this run stays until there is something new."""
        folder = self._options.folder
        self._path = run / "metrics.prom" if folder is None else folder.expanduser() / f"copus-{run.name}.prom"
        self._labels = {"run": run.name, "job": job.name}

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        """Remember, and write where the last version is old enough."""
        self._newest |= figures
        self._event_time, self._tokens = event.time, tokens
        if isinstance(event, Start):
            self._layout = event.configuration.layout.label
        elif isinstance(event, Reconfigure):
            self._layout = event.after.layout.label
        if time.monotonic() - self._written_at >= self._options.every_seconds:
            self._replace(running=True)

    def close(self) -> None:
        """The last version, which says that nothing runs any more."""
        if self._newest:
            self._replace(running=False)

    def _replace(self, running: bool) -> None:
        self._written_at = time.monotonic()
        replace_text(self._path, self._text(running))

    def _text(self, running: bool) -> str:
        lines = []
        for figure, value in self._newest.items():
            lines += _metric(metric_name(figure), FIGURES[figure], self._labels, value)
        layout = self._labels | {"layout": self._layout}
        for name, help_text, labels, value in (
            ("copus_tokens", "Tokens trained on.", self._labels, self._tokens),
            ("copus_layout_info", "The layout that runs, as a label; always 1.", layout, 1),
            ("copus_running", "1 while the run trains, 0 after its end.", self._labels, int(running)),
            ("copus_last_event_timestamp_seconds", "When the run last told of itself.", self._labels, self._event_time),
        ):
            lines += _metric(name, help_text, labels, value)
        return "\n".join(lines) + "\n"


def metric_name(figure: str) -> str:
    """`copus_loss_train` for `loss/train`."""
    return f"copus_{figure.replace('/', '_')}"


def _metric(name: str, help_text: str, labels: dict[str, str], value: float) -> list[str]:
    kind = "counter" if name.endswith("_total") else "gauge"
    written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    told = help_text.replace("\\", r"\\").replace("\n", r"\n")
    return [f"# HELP {name} {told}", f"# TYPE {name} {kind}", f"{name}{{{written}}} {value!r}"]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
