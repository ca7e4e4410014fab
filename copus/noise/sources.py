"""The ways to see parts of a step's gradient. What each costs and gets wrong is in docs/noise.md.

A step is measured from one *full* source, from the norm layers, or from both at once: `"microbatch"`,
`"microbatch+normlayer"`. The backend takes such a name for every step; which one is `planner/sampling.py`'s to say.
All use `step_estimate.estimate_step`, with J parts of n sequences.
"""

MICROBATCH = "microbatch"
"""A part is a micro-batch of a replica: J = dp × micro-batches, n = micro_batch."""
REPLICA = "replica"
"""A part is all that a data parallel replica does in the step: J = dp, n = global_batch ÷ dp."""
NORMLAYER = "normlayer"
"""A part is a sequence, in the coordinates of the norm layers' weights alone: J = global_batch, n = 1."""


def split(source: str | None) -> tuple[str | None, bool]:
    """The full source in the name of a step's source (None where there is none), and whether norm layers are measured.

    Raises ValueError for a name that is not made of at most one full source and `normlayer`.
    """
    names = source.split("+") if source else []
    full = [name for name in names if name != NORMLAYER]
    if len(full) > 1 or len(set(names)) < len(names) or not {*full} <= {MICROBATCH, REPLICA}:
        raise ValueError(
            f"noise source {source!r}: expected at most one of microbatch and replica, and normlayer, joined by +"
        )
    return (full[0] if full else None), NORMLAYER in names
