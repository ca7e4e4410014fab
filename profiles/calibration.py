"""What `copus calibrate` found, as the file that the planner takes c from."""

from pathlib import Path

from pydantic import Field, ValidationError

from profiles.record import Record


class Calibration(Record):
    """The critical batch measured by branches of one checkpoint, and c = φ / B_simple. Batches are in sequences."""

    critical_batch_factor: float | None
    """c; None if the largest batch lost nothing against the smallest: then only `factor_low` is known."""
    factor_low: float | None
    """Lower end of its 90 % interval; None with one data order."""
    factor_high: float | None
    """Upper end; None if it is unbounded, and with one data order."""
    critical_batch: float | None
    """φ."""
    critical_low: float | None
    """Lower end of its 90 % interval."""
    critical_high: float | None
    """Upper end."""
    noise_scale: float | None
    """B_simple at the checkpoint; None if it was unknown."""
    noise_low: float | None
    """Lower end of its 90 % interval."""
    noise_high: float | None
    """Upper end."""
    within_tolerance: float
    """Largest batch whose loss is within `tolerance` of the smallest's: no model (Merrill et al., 2505.23971)."""
    tolerance: float
    """Nats a token."""
    checkpoint: str
    """Where the branches began."""
    samples_consumed: int
    """Sequences that the checkpoint had seen."""
    sequences: int
    """Length of every branch."""
    first_loss: float
    """Held-out loss at the checkpoint, nats per token."""
    batches: list[int]
    """Global batches, ascending."""
    losses: list[list[float]]
    """Held-out loss at the end, by order of the data and batch."""
    residual: float
    """Root mean square of what the fitted model leaves of the losses."""
    diverged: list[int] = Field(default_factory=list)
    """Batches left out because a loss was not finite."""


def read_factor(path: Path) -> tuple[float, float | None]:
    """c from a calibration file, and how far the ends of its 90 % interval lie from it: the larger factor of the two;
    None if one end is not known. Raises ValueError, one line, if there is no such file or it has no c."""
    try:
        path = path.expanduser()
        if path.exists() and not path.is_file():  # opening a pipe waits for a writer
            raise ValueError(f"{path}: neither a number nor a calibration file (not a regular file)")
        calibration = Calibration.model_validate_json(path.read_bytes())
    except (OSError, RuntimeError) as error:  # RuntimeError: `~` of a user that there is not
        why = getattr(error, "strerror", error)
        raise ValueError(f"{path}: neither a number nor a calibration file ({why})") from None
    except ValidationError:
        raise ValueError(f"{path}: not a file of `copus calibrate`") from None
    if calibration.critical_batch_factor is None:
        bound = "" if calibration.factor_low is None else f", only that it is above {calibration.factor_low:.3g}"
        raise ValueError(f"{path}: this calibration does not know c{bound}; give a number")
    c, low, high = calibration.critical_batch_factor, calibration.factor_low, calibration.factor_high
    return c, max(c / low, high / c) if low and high else None
