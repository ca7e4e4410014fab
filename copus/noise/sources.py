"""The ways to see parts of a step's gradient: what each measures, costs and gets wrong; docs/noise.md has the figures.

A step is measured from one *full* source, from the norm layers, or from both at once: `"microbatch"`,
`"microbatch+normlayer"`. The backend takes such a name for every step; which one is `planner/sampling.py`'s to say.
"""

from dataclasses import dataclass

from profiles.configuration import Configuration


@dataclass(frozen=True)
class Source:
    """One estimator. All use `step_estimate.estimate_step`; they differ in what the parts are."""

    name: str
    """As in a step's source and in the event log."""
    parts: str
    """What a part is, how many (J) and how large (n)."""
    cost: str
    """What measuring adds to a step."""
    bias: str
    """What the expectation is off by."""


MICROBATCH = Source(
    name="microbatch",
    parts="a micro-batch of a replica: J = dp × micro-batches, n = micro_batch",
    cost="one read of every micro-batch's gradient; halving a lone micro-batch costs a second pass as well",
    bias="none; the same number on every layout",
)
REPLICA = Source(
    name="replica",
    parts="all that a data parallel replica does in the step: J = dp, n = global_batch ÷ dp",
    cost="one read of the replica's gradient a step, whatever the number of micro-batches",
    bias="none; noisier, since J is small, and needs dp > 1",
)
NORMLAYER = Source(
    name="normlayer",
    parts="a sequence, in the coordinates of the norm layers' weights alone: J = global_batch, n = 1",
    cost="a sum over tokens of x̂·dy in every norm layer",
    bias="none for those coordinates; as a stand-in for the whole gradient a factor, measured against a full source",
)
SOURCES = {source.name: source for source in (MICROBATCH, REPLICA, NORMLAYER)}


def split(source: str | None) -> tuple[str | None, bool]:
    """The full source in the name of a step's source (None where there is none), and whether norm layers are measured.

    Raises ValueError for a name that is not made of at most one full source and `normlayer`.
    """
    names = source.split("+") if source else []
    full = [name for name in names if name != NORMLAYER.name]
    if len(full) > 1 or len(set(names)) < len(names) or any(name not in SOURCES for name in names):
        raise ValueError(
            f"noise source {source!r}: expected at most one of microbatch and replica, and normlayer, joined by +"
        )
    return (full[0] if full else None), NORMLAYER.name in names


def run_as(configuration: Configuration, source: str | None) -> Configuration:
    """As what a step with that source is run: a lone micro-batch that is to be measured as two halves, where it is
    even: the same gradient, and parts."""
    return configuration.halved if split(source)[0] == MICROBATCH.name and configuration.parts == 1 else configuration
