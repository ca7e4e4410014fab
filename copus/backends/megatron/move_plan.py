"""The plan of a move between two layouts of a model: the same on every rank, and worked out once."""

import functools

from copus.backends.megatron.geometry import all_pieces
from copus.reshard.plan import Plan, make_plan
from profiles.layout import Layout
from profiles.model_shape import ModelShape


@functools.lru_cache(maxsize=8)
def plan_move(model: ModelShape, before: Layout, after: Layout, precision: str, ranks_per_node: int) -> Plan:
    """What every rank sends to every other."""
    return make_plan(all_pieces(model, before, precision), all_pieces(model, after, precision), ranks_per_node)
