"""What happened, event by event, in words, and figures as text: the same in every view."""

from copus.events import (
    Branch,
    Checkpoint,
    DecisionTaken,
    End,
    Evaluate,
    Event,
    Failure,
    Profile,
    Reconfigure,
    Restart,
    Start,
    Trial,
    Warned,
)
from profiles.formatting import count, duration

LIMITS = ("max_minutes", "target_loss")
"""Fields of `training` that end a run before all of its tokens, as reasons of its end."""


def describe_event(event: Event, seq_len: int | None = None) -> str | None:
    """An event in one line; None for steps and noise, which are figures. With `seq_len` amounts are in tokens."""
    match event:
        case Start():
            return f"training {event.configuration.label}"
        case Profile():
            return describe_measurement(event)
        case DecisionTaken():
            return f"decision {event.number}: {event.reason}"
        case Reconfigure():
            return describe_move(event)
        case Trial():
            return describe_trial(event)
        case Evaluate():
            return f"validation loss {describe_loss(event.loss)} at {_amount(event.samples_consumed, seq_len)}"
        case Checkpoint():
            return f"checkpoint {event.path} in {duration(event.seconds)}"
        case Warned():
            return f"warning: {event.message}"
        case Branch():
            return describe_branch(event)
        case Failure():
            return f"rank {event.rank} failed: {event.message}" if event.fatal else event.message
        case Restart():
            where = event.resumed_from or "the beginning: there is no checkpoint that verifies"
            how = "requeued" if event.requeued else "resumed"
            how = f"restarted (attempt {event.attempt})" if event.attempt else how
            again = f"{event.samples_repeated} sequences are trained on again"
            return f"{how} on {event.ranks} ranks from {where}; {again}"
        case End():
            return f"stopped: {describe_limit(event.reason)}" if event.reason in LIMITS else event.reason
    return None


def describe_limit(reason: str, start: Start | None = None) -> str:
    """Why a run stopped before all of its tokens: `reached max_minutes (6)`."""
    if reason not in LIMITS:
        return "interrupted"
    minutes = start.max_minutes if start is not None and reason == "max_minutes" else None
    return f"reached {reason}" + (f" ({minutes:g})" if minutes is not None else "")


def describe_move(event: Reconfigure) -> str:
    """A move in words; one that belongs to a trial is no lasting one, and says so."""
    verb = "trial: now" if event.trial else "moved"
    return f"{verb} {event.before.label} → {event.after.label} in {duration(event.seconds)} (decision {event.decision})"


def describe_trial(event: Trial) -> str:
    """The outcome of a trial in words."""
    steps = f"{event.steps} step{'s' * (event.steps != 1)}"
    tried = f"tried {event.candidate.label} for {steps} in {duration(event.seconds)} (decision {event.decision})"
    kept = "stayed in it" if event.outcome == "stayed" else f"returned to {event.running.label}"
    return f"{tried}: {describe_ratio(event)}, {kept}"


def describe_ratio(event: Trial) -> str:
    """What a trial said of the step time beside that of the running configuration: `step ×1.32 (1.20 to 1.45)`."""
    if event.ratio is None:
        return "no step was timed"
    ends = (
        ""
        if event.ratio_low is None or event.ratio_high is None
        else f" ({event.ratio_low:.2f} to {event.ratio_high:.2f})"
    )
    return f"step ×{event.ratio:.2f}{ends}"


def describe_measurement(event: Profile) -> str:
    """Progress of the profiler in words."""
    result = event.failure or "no time" if event.step_seconds is None else duration(event.step_seconds)
    return f"measuring {event.done}/{event.total} {event.configuration.label}: {result}"


def describe_branch(event: Branch) -> str:
    """Progress of a calibration in words."""
    losses = ["not finite" if loss is None else f"{loss:.4f}" for loss in (event.first_loss, event.last_loss)]
    batch = event.configuration.global_batch
    return f"branch {event.done}/{event.total} batch {batch}, order {event.seed}: loss {losses[0]} → {losses[1]}"


def describe_loss(value: float | None) -> str:
    """Nats a token, in words."""
    return "not finite" if value is None else f"{value:.3f}"


def _amount(samples: int, seq_len: int | None) -> str:
    return f"{samples} sequences" if seq_len is None else f"{count(samples * seq_len)} tokens"
