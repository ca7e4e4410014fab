"""MLflow. Needs `pip install 'copus[mlflow]'`."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import NonNegativeFloat, field_validator

from copus.events import End, Event
from copus.tracking import identity
from profiles.record import Record

if TYPE_CHECKING:
    from copus.job import JobConfig

ID_FILE = "mlflow-id"
"""In the run directory."""
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
"""As many as MLflow takes in a request."""


class MlflowOptions(Record):
    """Options of `tracking.mlflow`. Passwords are not among them: they belong in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""

    tracking_uri: str | None = None
    """Server, or database (`sqlite:////a/file.db`). None: the environment's MLFLOW_TRACKING_URI, else
    `RUN/mlflow.db`."""
    experiment: str = "copus"
    """Experiment that the run belongs to; made where there is none."""
    every_seconds: NonNegativeFloat = 5.0
    """Least time between two requests: each takes some 40 ms of a core where the store is a file."""

    @field_validator("tracking_uri")
    @classmethod
    def _check_no_password(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password is not None:
            raise ValueError("has a password in it, which would be in every copy of the job file: use the environment")
        return value


class MlflowTracker:
    """Logs figures over tokens, and the fields of the job file as parameters."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = MlflowOptions.model_validate(options)
        self._client: Any = None
        self._id: str | None = None
        self._status = "FAILED"
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()

    def start(self, run: Path, job: "JobConfig") -> None:
        """Open the run, or go on with it."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.entities import Param

        uri = self._options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        run_id = identity.remembered(run / ID_FILE)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return
        experiment = self._client.get_experiment_by_name(self._options.experiment)
        where = experiment.experiment_id if experiment else self._client.create_experiment(self._options.experiment)
        self._id = self._client.create_run(where, run_name=run.name).info.run_id
        identity.remember(run / ID_FILE, self._id)
        params = [Param(name, value) for name, value in _flat(job.model_dump(mode="json"))]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        """Keep the figures, and send what has gathered where the last request is long enough ago."""
        from mlflow.entities import Metric

        milliseconds = round(event.time * 1000)
        self._waiting += [Metric(name, value, milliseconds, tokens) for name, value in figures.items()]
        if isinstance(event, End):
            self._status = "FINISHED"
        if time.monotonic() - self._sent_at >= self._options.every_seconds:
            self._send()

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:METRICS_AT_ONCE])
            del self._waiting[:METRICS_AT_ONCE]
        self._sent_at = time.monotonic()

    def close(self) -> None:
        """Send what is left, and say whether the run ended in order."""
        if self._id is not None:
            self._send()
            self._client.set_terminated(self._id, status=self._status)


def _flat(values: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """`training.lr` → `0.001` for every field of the job file, within MLflow's limits on names and lengths."""
    for key, value in values.items():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(value, dict) and value:
            yield from _flat(value, name)
        else:
            yield re.sub(r"[^\w./ -]", "_", name)[:250], str(value)[:6000]
