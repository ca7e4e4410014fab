"""TensorBoard files of a run, by tokens."""

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch.utils.tensorboard import SummaryWriter

from copus.events import Evaluate, Event, Noise, Restart, Step


class TensorBoardTracker:
    """Writes the figures of events as scalars; the x-axis is tokens, so that runs of different batches can be laid over
    each other."""

    def __init__(self, run: Path, seq_len: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"))
        self._seq_len = seq_len

    def write(self, event: Event) -> None:
        """Add what an event has to show. After a restart TensorBoard forgets what is done again."""
        if isinstance(event, Restart):
            started = {"step": event.samples_consumed * self._seq_len + 1, "wall_time": event.time}
            session = SessionLog(status=SessionLog.START)
            self._writer._get_file_writer().event_writer.add_event(TensorBoardEvent(session_log=session, **started))
        for name, value in _scalars(event).items():
            if value is not None:
                self._writer.add_scalar(name, value, event.samples_consumed * self._seq_len, walltime=event.time)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _scalars(event: Event) -> dict[str, float | None]:
    match event:
        case Step():
            return {
                "loss/train": event.loss,
                "batch/global_batch": event.global_batch,
                "optimizer/lr": event.lr,
                "optimizer/beta2": event.beta2,
                "optimizer/grad_norm": event.grad_norm,
                "speed/samples_per_second": event.global_batch / event.seconds,
            }
        case Evaluate():
            return {"loss/validation": event.loss}
        case Noise():
            return {"noise/scale": event.value, "noise/low": event.low, "noise/high": event.high}
        case _:
            return {}
