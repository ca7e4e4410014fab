"""Weights & Biases. Needs `pip install 'copus[wandb]'`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from copus.events import End, Event
from copus.tracking import identity
from profiles.record import Record

if TYPE_CHECKING:
    from copus.job import JobConfig

ID_FILE = "wandb-id"
"""In the run directory."""


class WandbOptions(Record):
    """Options of `tracking.wandb`. The key is not among them: it belongs in WANDB_API_KEY, or in `wandb login`."""

    project: str = "copus"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team; None: the default one of the key."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: list[str] = Field(default_factory=list)
    """Words to find the run by."""
    mode: Literal["online", "offline"] = "online"
    """offline: everything stays in `RUN/wandb`, until `wandb sync` sends it."""


class WandbTracker:
    """Logs figures over tokens. The job file is sent as the configuration; output, code, machine and environment are
    not."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = WandbOptions.model_validate(options)
        self._run: Any = None
        self._exit_code = 1

    def start(self, run: Path, job: "JobConfig") -> None:
        """Open the run, or go on with it. Waits for the network where the mode is online."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own crash reports, which it sends elsewhere
        import wandb

        name = identity.remembered(run / ID_FILE) or identity.fresh()
        identity.remember(run / ID_FILE, name)
        quiet: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_code": True,
            "disable_git": True,
            "disable_job_creation": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "host": "",
            "username": "",
            "email": "",
        }
        self._run = wandb.init(
            **self._options.model_dump(),
            id=name,
            resume="allow",
            name=run.name,
            dir=str(run),
            config=job.model_dump(mode="json"),
            settings=wandb.Settings(**quiet),
        )
        self._run.define_metric("tokens", hidden=True)
        self._run.define_metric("*", step_metric="tokens")

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        """Log a line. Its own step only counts lines: `tokens` is the x-axis, and may go back after a restart."""
        self._run.log({"tokens": tokens, **figures})
        if isinstance(event, End):
            self._exit_code = 0

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)
