"""What happened, event by event, in words: one line each, the same in every view."""

from copus.events import (
    Branch,
    Checkpoint,
    DecisionMade,
    End,
    Evaluate,
    Event,
    Failure,
    Profile,
    Reconfigure,
    Restart,
    Start,
    Warned,
)
from launch.status import LIMITS, branched, count, duration, measured, moved


def told(event: Event, seq_len: int | None = None) -> str | None:
    """An event in one line; None for steps and noise, which are figures. With `seq_len` amounts are in tokens."""
    match event:
        case Start():
            return f"training {event.configuration.label}"
        case Profile():
            return measured(event)
        case DecisionMade():
            return f"decision {event.decision.number}: {event.decision.reason}"
        case Reconfigure():
            return moved(event)
        case Evaluate():
            return f"validation loss {loss(event.loss)} at {_amount(event.samples_consumed, seq_len)}"
        case Checkpoint():
            return f"checkpoint {event.path} in {duration(event.seconds)}"
        case Warned():
            return f"warning: {event.message}"
        case Branch():
            return branched(event)
        case Failure():
            return f"rank {event.rank} failed: {event.message}" if event.fatal else event.message
        case Restart():
            where = event.resumed_from or "the beginning: there is no checkpoint that verifies"
            how = "requeued" if event.requeued else "resumed"
            how = f"restarted (attempt {event.attempt})" if event.attempt else how
            again = f"{event.samples_repeated} sequences are trained on again"
            return f"{how} on {event.ranks} ranks from {where}; {again}"
        case End():
            return f"stopped: {LIMITS[event.reason]}" if event.reason in LIMITS else event.reason
    return None


def loss(value: float | None) -> str:
    """Nats a token."""
    return "not finite" if value is None else f"{value:.3f}"


def _amount(samples: int, seq_len: int | None) -> str:
    return f"{samples} sequences" if seq_len is None else f"{count(samples * seq_len)} tokens"
