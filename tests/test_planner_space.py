"""The candidate space, and what has to be measured to know it."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.backend_traits import BackendTraits
from planner.config import PlannerConfig
from planner.profiling import to_measure
from planner.space import candidates
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.throughput import Throughput

MODEL = ModelShape(layers=4, hidden=64, ffn_hidden=192, heads=4, kv_heads=2, seq_len=32, vocab=512)
HERE = Fingerprint(model=MODEL.digest, precision="fp32", backend="b", hardware="h", software="s")
TWO = Cluster(accelerators_per_node=2)
START = Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=4)


def power(low, high):
    return st.integers(low, high).map(lambda exponent: 2**exponent)


@st.composite
def problems(draw):
    """A planner section, a cluster and a starting configuration that fits it."""
    cluster = Cluster(accelerators_per_node=draw(st.sampled_from([1, 2, 3, 4, 6, 8])))
    low = draw(st.integers(1, 16))
    config = PlannerConfig(
        min_global_batch=low,
        max_global_batch=low * draw(st.integers(1, 32)),
        batch_multiple=draw(st.integers(1, 6)),
        max_micro_batch=draw(power(0, 4)),
    )
    tp = draw(st.sampled_from([tp for tp in (1, 2) if cluster.accelerators % tp == 0]))
    layout = Layout(
        tp=tp,
        dp=cluster.accelerators // tp,
        zero=draw(st.sampled_from([0, 1])),
        recompute=draw(st.sampled_from(["none", "full"])),
        sequence_parallel=tp > 1 and draw(st.booleans()),
    )
    micro_batch = draw(power(0, 3))
    batch = layout.dp * micro_batch * draw(st.integers(1, 5))
    return config, cluster, Configuration(layout=layout, micro_batch=micro_batch, global_batch=batch)


def measured(configuration, memory=None):
    """A row as a machine gives it: affine in the micro-batches, and out of memory above `memory` sequences a pass."""
    layout, n = configuration.layout, configuration.num_microbatches
    fails = memory is not None and configuration.micro_batch > memory
    step_seconds = 0.3 / layout.tp + (0.1 + 0.05 * configuration.micro_batch) * (n + layout.pp - 1)
    return Measurement(
        fingerprint=HERE,
        model=MODEL,
        configuration=configuration,
        step_seconds=None if fails else step_seconds,
        spread_seconds=None if fails else 0.01,
        count=0 if fails else 3,
        failure="out of memory" if fails else None,
        time=0.0,
    )


@given(problems())
def test_every_candidate_is_valid_and_within_the_limits(problem):
    config, cluster, start = problem
    found = candidates(config, MODEL, cluster, start)
    assert start in found
    assert len(set(found)) == len(found)
    assert found == candidates(config, MODEL, cluster, start)
    for candidate in found:
        candidate.layout.check(MODEL, cluster)
        if candidate == start:
            continue
        assert config.min_global_batch <= candidate.global_batch <= config.max_global_batch
        doublings, rest = divmod(candidate.global_batch, config.batch_multiple)
        assert rest == 0
        assert doublings.bit_count() == 1
        assert candidate.micro_batch.bit_count() == 1
        assert candidate.micro_batch <= config.max_micro_batch
        assert candidate.layout.recompute == start.layout.recompute
        assert candidate.layout.zero == start.layout.zero
        assert candidate.layout.sequence_parallel == (start.layout.sequence_parallel and candidate.layout.tp > 1)


def test_the_space_by_hand():
    config = PlannerConfig(min_global_batch=2, max_global_batch=4, max_micro_batch=2)
    assert {candidate.label for candidate in candidates(config, MODEL, TWO, START)} == {
        *("TP1·PP1·DP2 B2 m1", "TP1·PP1·DP2 B4 m1", "TP1·PP1·DP2 B4 m2"),
        *("TP1·PP2·DP1 B2 m1", "TP1·PP2·DP1 B2 m2", "TP1·PP2·DP1 B4 m1", "TP1·PP2·DP1 B4 m2"),
        *("TP1·PP2·DP1·VP2 B2 m1", "TP1·PP2·DP1·VP2 B4 m1", "TP1·PP2·DP1·VP2 B4 m2"),  # whole rounds of two
        *("TP2·PP1·DP1 B2 m1", "TP2·PP1·DP1 B2 m2", "TP2·PP1·DP1 B4 m1", "TP2·PP1·DP1 B4 m2"),
    }


H100 = Cluster(nodes=2, accelerators_per_node=4, accelerator="h100-sxm")
EIGHT = Configuration(layout=Layout(dp=8), micro_batch=1, global_batch=8)


def layouts_of(config, cluster=H100, start=EIGHT):
    return {c.layout for c in candidates(config, WIDE, cluster, start)}


WIDE = MODEL.model_copy(update={"heads": 8, "kv_heads": 8, "layers": 8})


def test_recomputation_and_interleaving_are_in_the_space_and_can_be_pinned():
    found = layouts_of(PlannerConfig(max_global_batch=8))
    assert {layout.recompute for layout in found} == {"none", "selective", "full"}
    assert {(layout.pp, layout.vp) for layout in found} == {
        *((1, 1), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)),
    }
    full = layouts_of(PlannerConfig(max_global_batch=8, recompute="full", max_vp=1))
    assert {(layout.recompute, layout.vp) for layout in full - {EIGHT.layout}} == {("full", 1)}
    cores = Cluster(accelerators_per_node=8)
    assert {layout.recompute for layout in layouts_of(PlannerConfig(max_global_batch=8), cores)} == {"none"}
    pinned = layouts_of(PlannerConfig(max_global_batch=8, recompute="full"), cores)
    assert {layout.recompute for layout in pinned - {EIGHT.layout}} == {"full"}


def test_tensor_parallel_ranks_stay_within_a_node_unless_the_user_says_otherwise():
    config = PlannerConfig(max_global_batch=8)
    assert max(layout.tp for layout in layouts_of(config)) == 4
    across = Configuration(layout=Layout(tp=8), micro_batch=1, global_batch=8)
    assert max(layout.tp for layout in layouts_of(config, start=across)) == 8
    assert {layout.tp for layout in layouts_of(config.model_copy(update={"tp": 8}))} == {1, 8}, "the start stays"
    domain = Cluster(nodes=2, accelerators_per_node=4, accelerator="gb200")
    assert max(layout.tp for layout in layouts_of(config, domain)) == 8, "NVLink joins 72 of them"


def test_experts_are_shared_out_within_a_node_unless_memory_or_the_user_asks_for_more():
    cluster = Cluster(nodes=4, accelerators_per_node=4, accelerator="h100-sxm")
    start = Configuration(layout=Layout(dp=16, zero=1), micro_batch=1, global_batch=16)
    model = MODEL.model_copy(update={"experts": 16, "experts_per_token": 2, "seq_len": 64})
    config = PlannerConfig(max_global_batch=16, recompute="none")

    def degrees(model, config=config, etp=None):
        found = candidates(config, model, cluster, start)
        assert all(candidate.layout.sequence_parallel for candidate in found if candidate.layout.tp > 1)
        return {(c.layout.tp, c.layout.ep) for c in found if c.layout.pp == 1 and c.layout.etp == etp}

    assert degrees(model) == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}
    assert degrees(model, etp=1) == {(2, 1), (2, 2), (2, 4)}, "whole experts, which tensor parallel ranks share out too"
    assert degrees(model, config.model_copy(update={"max_ep": 1})) == {(1, 1), (2, 1)}
    assert (1, 16) in degrees(model, config.model_copy(update={"max_ep": 16}))
    # 4 experts a rank of 12.9 GB each with gradients, of 80 GiB; 2 of them are little enough
    large = model.model_copy(update={"layers": 32, "hidden": 4096, "ffn_hidden": 5462})
    assert degrees(large) == {(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4)}
    assert degrees(large, etp=1) == {(2, 1), (2, 2), (2, 4), (2, 8)}


def test_a_degree_that_the_backend_refuses_is_no_reason_to_share_experts_out_less():
    class WholeReplicas(BackendTraits):
        def check_layout(self, layout):
            if layout.ep > 1 and layout.ep % layout.cp:
                raise ValueError("ep")

    cluster = Cluster(nodes=4, accelerators_per_node=2, accelerator="h100-sxm")
    start = Configuration(layout=Layout(dp=8, zero=1), micro_batch=1, global_batch=8)
    # Four experts of two ranks would fit, but with cp = 4 only four ranks, on two nodes, may share them out.
    model = MODEL.model_copy(update={"experts": 4, "layers": 32, "hidden": 4096, "ffn_hidden": 8192, "seq_len": 2**14})
    config = PlannerConfig(max_global_batch=8, recompute="none", tp=1, max_pp=1, max_cp=4)

    def degrees(backend):
        found = candidates(config, model, cluster, start, backend)
        return {c.layout.ep for c in found if c.layout.cp == 4}

    assert degrees(BackendTraits()) == {1, 2}
    assert degrees(WholeReplicas()) == {1, 4}


def test_long_sequences_are_shared_out_as_far_as_ranks_keep_enough_tokens_of_them():
    def degrees(seq_len, **limits):
        model = WIDE.model_copy(update={"seq_len": seq_len})
        config = PlannerConfig(max_global_batch=8, max_vp=1, recompute="none", **limits)
        return {candidate.layout.cp for candidate in candidates(config, model, H100, EIGHT)}

    assert degrees(4096) == {1}
    assert degrees(8192) == {1, 2}
    assert degrees(16384) == {1, 2, 4}
    assert degrees(16384, max_cp=1) == {1}
    assert degrees(64, max_cp=8) == {1, 2, 4, 8}
    assert degrees(8, max_cp=8) == {1, 2, 4}, "a rank has two pieces"


def test_layouts_that_the_model_does_not_allow_are_left_out():
    found = candidates(
        PlannerConfig(max_global_batch=8),
        MODEL,
        Cluster(accelerators_per_node=8),
        Configuration(layout=Layout(dp=8), micro_batch=1, global_batch=8),
    )
    degrees = {(c.layout.tp, c.layout.pp, c.layout.dp) for c in found}
    assert degrees == {(1, 1, 8), (1, 2, 4), (1, 4, 2), (2, 1, 4), (2, 2, 2), (2, 4, 1)}  # 2 key-value heads, 4 layers


def test_copies_stay_where_every_one_of_them_lies_on_several_ranks():
    start = Configuration(layout=Layout(dp=8, zero=3, dp_replicate=2), micro_batch=1, global_batch=8)
    found = layouts_of(PlannerConfig(max_global_batch=8, max_vp=1, recompute="none"), start=start)
    assert {(layout.dp, layout.dp_replicate) for layout in found} == {(8, 2), (4, 2), (2, 1), (1, 1)}


def test_what_the_backend_runs_in_another_precision_only_is_no_candidate():
    class Sharded(BackendTraits):
        zero_stages = (0, 1)

        def check_precision(self, layout, precision):
            if precision == "bf16" and layout.zero == 0:
                raise ValueError("zero(0)")

    start = Configuration(layout=Layout(dp=8, zero=1), micro_batch=1, global_batch=8)
    for precision, stages in (("fp32", {0, 1}), ("bf16", {1})):
        found = candidates(PlannerConfig(max_global_batch=8), WIDE, H100, start, Sharded(), precision)
        assert {each.layout.zero for each in found} == stages


def test_listed_layouts_are_taken_as_they_are_and_once():
    listed = [Layout(tp=2, sequence_parallel=True), Layout(tp=2, sequence_parallel=True)]
    found = candidates(PlannerConfig(layouts=listed, max_global_batch=2, max_micro_batch=1), MODEL, TWO, START)
    assert [c.label for c in found] == ["TP1·PP1·DP2 B4 m1", "TP2·PP1·DP1·SP B1 m1", "TP2·PP1·DP1·SP B2 m1"]


def test_interleaved_pipelines_get_whole_rounds():
    layout = Layout(pp=2, vp=2)
    found = candidates(PlannerConfig(layouts=[layout], max_global_batch=8, max_micro_batch=4), MODEL, TWO, START)
    assert {c.num_microbatches for c in found if c.layout == layout} == {2, 4, 8}


# What to measure.


@settings(max_examples=60)
@given(problems(), st.randoms(use_true_random=False), st.floats(0, 1))
def test_what_is_measured_makes_everything_predictable(problem, chance, known_share):
    config, cluster, start = problem
    wanted = candidates(config, MODEL, cluster, start)
    rows = [measured(candidate) for candidate in wanted if chance.random() < known_share]
    todo = to_measure(wanted, Throughput(rows), start)
    assert not {row.configuration for row in rows} & set(todo)
    throughput = Throughput(rows + [measured(configuration) for configuration in todo])
    for candidate in wanted:
        assert throughput.predict(candidate).step_seconds == pytest.approx(measured(candidate).step_seconds)
    assert to_measure(wanted, throughput, start) == []


@settings(max_examples=30)
@given(problems(), power(0, 3))
def test_failures_are_learned_and_end(problem, memory):
    config, cluster, start = problem
    wanted = candidates(config, MODEL, cluster, start)
    rows = [measured(configuration, memory=memory) for configuration in to_measure(wanted, Throughput(), start)]
    throughput = Throughput(rows)
    assert to_measure(wanted, throughput, start) == []
    assert all(bool(throughput.predict(c).failure) == (c.micro_batch > memory) for c in wanted)


@settings(max_examples=40)
@given(problems())
def test_no_fewer_measurements_would_do(problem):
    config, cluster, start = problem
    wanted = candidates(config, MODEL, cluster, start)
    todo = to_measure(wanted, Throughput(), start)
    for left_out in range(len(todo)):
        throughput = Throughput([measured(c) for i, c in enumerate(todo) if i != left_out])
        assert any(throughput.predict(candidate) is None for candidate in wanted)


@settings(max_examples=60)
@given(problems())
def test_each_visit_doubles_what_is_measured_of_a_layout_and_the_start_comes_first(problem):
    config, cluster, start = problem
    wanted = candidates(config, MODEL, cluster, start)
    todo = to_measure(wanted, Throughput(), start)
    assert (todo[0].layout, todo[0].micro_batch) == (start.layout, start.micro_batch)
    visits = [(layout, len(list(members))) for layout, members in groupby(todo, key=lambda each: each.layout)]
    layouts = {each.layout for each in wanted}
    assert {layout for layout, _ in visits[: len(layouts)]} == layouts
    for layout in layouts:
        micro_batches = {each.micro_batch for each in wanted if each.layout == layout}
        assert sum(each == layout for each, _ in visits) <= 1 + (2 * len(micro_batches) - 1).bit_length()


def test_the_measurements_by_hand():
    config = PlannerConfig(
        min_global_batch=1, max_global_batch=32, max_micro_batch=8, layouts=[Layout(dp=2), Layout(tp=2)]
    )
    todo = to_measure(candidates(config, MODEL, TWO, START), Throughput(), START, longest_batch=16)
    assert [c.label for c in todo] == [
        *("TP1·PP1·DP2 B2 m1", "TP2·PP1·DP1 B1 m1"),
        *("TP2·PP1·DP1 B4 m1", "TP1·PP1·DP2 B8 m1"),
        *("TP1·PP1·DP2 B4 m2", "TP1·PP1·DP2 B16 m2", "TP2·PP1·DP1 B2 m2", "TP2·PP1·DP1 B8 m2"),
        *("TP2·PP1·DP1 B4 m4", "TP2·PP1·DP1 B16 m4", "TP2·PP1·DP1 B8 m8", "TP2·PP1·DP1 B16 m8"),
        *("TP1·PP1·DP2 B8 m4", "TP1·PP1·DP2 B16 m4"),
        *("TP1·PP1·DP2 B16 m8", "TP1·PP1·DP2 B32 m8"),  # only 16 fits longest_batch, but a line needs two
    ]


def test_one_known_count_needs_one_more():
    config = PlannerConfig(min_global_batch=2, max_global_batch=64, max_micro_batch=1, layouts=[Layout(dp=2)])
    wanted = candidates(config, MODEL, TWO, START)
    todo = to_measure(wanted, Throughput([measured(START)]), START)
    assert [c.label for c in todo] == ["TP1·PP1·DP2 B2 m1"]  # below the known 4; the two make a line
    smallest = Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=2)
    todo = to_measure(wanted, Throughput([measured(smallest)]), START)
    assert [c.label for c in todo] == ["TP1·PP1·DP2 B8 m1"]
