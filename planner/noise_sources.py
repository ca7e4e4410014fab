"""The sources of a noise measurement: which parts of a step's gradient are compared. docs/noise.md gives the cost and
the error of every source.

A step is measured from one *full* source, from the norm layers, or from both: `"microbatch"`,
`"microbatch+normlayer"`. `planner/sampling.py` picks the source of a step, `BackendTraits.parts` says what a
configuration has, and the backend measures. Every source feeds the same estimate, from J parts of n sequences.
"""

MICROBATCH = "microbatch"
"""A part is a micro-batch."""
REPLICA = "replica"
"""A part is the whole step of a data-parallel replica."""
NORMLAYER = "normlayer"
"""A part is one sequence, in the coordinates of the norm layers' weights alone."""


def split(source: str | None) -> tuple[str | None, bool]:
    """The full source in a step's source (None if it has none), and whether norm layers are measured.

    Raises ValueError for a name that is not made of at most one full source and `normlayer`.
    """
    names = source.split("+") if source else []
    full = [name for name in names if name != NORMLAYER]
    if len(full) > 1 or len(set(names)) < len(names) or not {*full} <= {MICROBATCH, REPLICA}:
        raise ValueError(
            f"noise source {source!r}: expected at most one of microbatch and replica, and normlayer, joined by +"
        )
    return (full[0] if full else None), NORMLAYER in names
