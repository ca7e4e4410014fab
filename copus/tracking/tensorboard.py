"""TensorBoard files in the run directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from copus.events import Event, Restart
from profiles.record import Record

if TYPE_CHECKING:
    from copus.job import JobConfig


class TensorBoardOptions(Record):
    """Options of `tracking.tensorboard`: none."""


class TensorBoardTracker:
    """Writes `RUN/tensorboard`; the x-axis is tokens, so that runs of different batches can be laid over each other."""

    def __init__(self, options: dict[str, Any]) -> None:
        TensorBoardOptions.model_validate(options)
        self._writer: Any = None

    def start(self, run: Path, job: "JobConfig") -> None:
        """Begin a file; TensorBoard reads all that lie there as one run."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, event: Event, tokens: int, figures: dict[str, float]) -> None:
        """Add scalars. After a restart TensorBoard forgets what is done again."""
        from tensorboard.compat.proto import event_pb2

        if isinstance(event, Restart):
            begun = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            mark = event_pb2.Event(session_log=begun, step=tokens + 1, wall_time=event.time)
            self._writer._get_file_writer().event_writer.add_event(mark)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, tokens, walltime=event.time)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
