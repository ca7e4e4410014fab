"""The planner's search against exhaustive search, on spaces that can be enumerated."""

from itertools import product
from math import gcd

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.backend_traits import ANY_BACKEND
from planner.config import PlannerConfig
from planner.memory_check import LIKELY
from planner.pruning import worthwhile
from planner.space import candidates
from profiles.accelerator import memory_bytes, node_size
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel
from profiles.layout import Layout
from profiles.memory import MEGATRON, MemoryModel
from profiles.model_shape import ModelShape

DENSE = ModelShape(
    layers=8, hidden=4096, ffn_hidden=14336, heads=32, kv_heads=8, seq_len=4096, vocab=32000, gated_mlp=True
)
MODELS = {
    "dense": DENSE,
    "deep": DENSE.model_copy(update={"layers": 30, "hidden": 8192, "ffn_hidden": 28672, "heads": 64}),
    "long": DENSE.model_copy(update={"layers": 6, "seq_len": 16384}),
    "experts": DENSE.model_copy(update={"experts": 8, "experts_per_token": 2, "ffn_hidden": 4096}),
    "many experts": DENSE.model_copy(update={"layers": 6, "experts": 64, "experts_per_token": 8, "ffn_hidden": 2048}),
    "long experts": DENSE.model_copy(update={"experts": 8, "experts_per_token": 1, "seq_len": 8192}),
}


@st.composite
def problems(draw):
    """A planner section, a model, a cluster and a starting configuration."""
    accelerator = draw(st.sampled_from(["h100-sxm", "a100-40g", "l40s", "gb200"]))
    nodes, per_node = draw(st.sampled_from([(1, 4), (1, 8), (2, 4), (2, 8), (3, 4), (4, 2)]))
    cluster = Cluster(nodes=nodes, accelerators_per_node=per_node, accelerator=accelerator)
    lowest = cluster.accelerators * draw(st.sampled_from([1, 2]))
    config = PlannerConfig(
        batch_multiple=cluster.accelerators,
        min_global_batch=lowest,
        max_global_batch=2 * lowest,
        max_micro_batch=draw(st.sampled_from([1, 2])),
    )
    layout = Layout(dp=cluster.accelerators, zero=draw(st.sampled_from([0, 1])))
    start = Configuration(layout=layout, micro_batch=1, global_batch=lowest)
    return config, MODELS[draw(st.sampled_from(sorted(MODELS)))], cluster, start


def exhaustive(config, model, cluster, start):
    """Every combination of all degrees that holds, by nothing but the rules of docs/planner.md."""
    size, found = cluster.accelerators, set()
    divisors = [degree for degree in range(1, size + 1) if size % degree == 0]
    chunks = range(1, model.layers + 3)
    for tp, pp, cp in product(divisors, divisors, divisors):
        if size % (tp * pp * cp) or tp > node_size(cluster) or cp > max(model.seq_len // 4096, 1):
            continue
        dp = size // (tp * pp * cp)
        split_or_whole = {tp, 1} if model.experts else {tp}
        for etp, ep, vp, recompute in product(
            split_or_whole, range(1, max(model.experts, 1) + 1), chunks, ("none", "selective", "full")
        ):
            ranks = tp * cp * dp // etp
            if (vp > 1 and pp == 1) or (ep > 1 and gcd(model.experts, ranks) % ep):
                continue
            fewer = [other for other in range(1, ep) if gcd(model.experts, ranks) % other == 0]
            if etp * ep > node_size(cluster) and fewer:
                weights = model.expert_layers * model.experts * model.expert_matrices / (etp * pp * fewer[-1])
                if weights * (6 if start.layout.zero else 18) <= 0.5 * memory_bytes(cluster):
                    continue
            layout = start.layout.model_copy(
                update={
                    **{"tp": tp, "pp": pp, "vp": vp, "cp": cp, "ep": ep, "dp": dp, "recompute": recompute},
                    **{"sequence_parallel": tp > 1 and model.experts > 0, "etp": None if etp == tp else etp},
                }
            )
            try:
                layout.check(model, cluster)
            except ValueError:
                continue
            found |= {
                Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)
                for batch, micro_batch in product(range(1, config.max_global_batch + 1), (1, 2))
                if batch >= config.min_global_batch
                and (batch // config.batch_multiple).bit_count() == 1
                and batch % config.batch_multiple == 0
                and micro_batch <= config.max_micro_batch
                and batch % (dp * micro_batch) == 0
                and (vp == 1 or batch // (dp * micro_batch) % pp == 0)
            }
    return found | {start}


def optimum(configurations, model, cluster):
    """Least seconds by global batch of those that fit with the chance that the planner asks for."""
    arrays = Configurations.of(configurations)
    cost = CostModel(optimizer=MEGATRON.optimizer, stack=MEGATRON.stack, context=MEGATRON.context)
    seconds = cost.predict(model, cluster, arrays, "bf16", coverage=None).seconds
    chances = MemoryModel(MEGATRON).predict(model, arrays, "bf16").chance_to_fit(memory_bytes(cluster))
    seconds = np.where(chances >= LIKELY, seconds, np.inf)
    return {int(b): float(seconds[arrays.global_batch == b].min()) for b in np.unique(arrays.global_batch)}


@given(problems())
@settings(max_examples=25, deadline=None)
def test_the_search_looks_at_everything_and_misses_no_optimum(problem):
    config, model, cluster, start = problem
    everything = exhaustive(config, model, cluster, start)
    allowed = candidates(config, model, cluster, start, ANY_BACKEND, "bf16")
    assert set(allowed) == everything
    pruned = worthwhile(config, model, cluster, "bf16", start)
    best = optimum(sorted(everything, key=lambda c: c.label), model, cluster)
    assert optimum(pruned, model, cluster) == {batch: best[batch] for batch in best}
