"""The cost model's mathematics: parts and totals, directions, limits, and fits that find what made the rows."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.accelerator import Accelerator, accelerator, accelerators
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.configurations import Configurations
from profiles.cost import CostModel, Timings, predict_unmeasured
from profiles.cost.constants import NAMES, prior
from profiles.cost.effects import Effect, Effects, precision_family, usual_effects
from profiles.cost.residual import Smoothness, coordinates, covariance, variance
from profiles.cost.select import select
from profiles.cost.step_time import OWN, PARTS, parts, step_seconds
from profiles.cost.work import Work, work
from profiles.enumerate import enumerate_configurations
from profiles.layout import ContextExchange, ExpertDispatch, Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape

MODEL = ModelShape(layers=16, hidden=2048, ffn_hidden=8192, heads=16, kv_heads=16, seq_len=2048, vocab=50257)
CLUSTER = Cluster(nodes=2, accelerators_per_node=8, accelerator="a100-80g")
DEVICE = accelerator("a100-80g")
SPACE = enumerate_configurations(MODEL, CLUSTER, (64, 128), max_micro_batch=8)
MEAN, SD = prior(DEVICE)
MATRIX = work(MODEL, CLUSTER, DEVICE, SPACE, "bf16")

places = st.integers(0, len(SPACE) - 1)
constants = st.lists(st.floats(-2, 2), min_size=len(NAMES), max_size=len(NAMES)).map(lambda z: MEAN + SD * np.array(z))


def one(
    c: Configuration | None = None, model: ModelShape = MODEL, cluster: Cluster = CLUSTER, precision: str = "bf16"
) -> float:
    """Predicted seconds of one configuration."""
    c = c or Configuration(layout=Layout(tp=2, dp=8), micro_batch=2, global_batch=64)
    return float(CostModel().predict(model, cluster, Configurations.of([c]), precision, coverage=None).seconds[0])


@given(constants)
@settings(max_examples=20, deadline=None)
def test_parts_add_up_and_are_not_negative(log_constants: np.ndarray) -> None:
    found = parts(MATRIX, log_constants)
    assert set(found) == set(PARTS)
    assert all((part >= -1e-12).all() for part in found.values())
    np.testing.assert_allclose(sum(found.values()), step_seconds(MATRIX, log_constants))


@given(constants, st.sampled_from(NAMES))
@settings(max_examples=60, deadline=None)
def test_a_larger_constant_never_makes_a_step_shorter(log_constants: np.ndarray, name: str) -> None:
    larger = log_constants.copy()
    larger[NAMES.index(name)] += 0.3
    change = np.log(step_seconds(MATRIX, larger) / step_seconds(MATRIX, log_constants))
    hides = name.endswith("_overlap")
    assert (change <= 1e-9).all() if hides else (change >= -1e-9).all()


@pytest.mark.parametrize("what", ["flops", "memory_bytes_per_second", "inside_node", "between_nodes"])
def test_better_hardware_is_never_slower(what: str) -> None:
    now = getattr(DEVICE, what)
    if what == "flops":
        better: object = {name: 2 * rate for name, rate in now.items()}
    elif what == "memory_bytes_per_second":
        better = 2 * now
    else:
        better = now.model_copy(update={"bytes_per_second": 2 * now.bytes_per_second})
    faster = work(MODEL, CLUSTER, DEVICE.model_copy(update={what: better}), SPACE, "bf16")
    ratio = step_seconds(faster, MEAN) / step_seconds(MATRIX, MEAN)
    assert (ratio <= 1 + 1e-9).all()
    assert (ratio < 0.999).any()


@given(places)
@settings(max_examples=40, deadline=None)
def test_more_work_takes_longer(place: int) -> None:
    c = SPACE[place]
    seconds = one(c)
    assert one(c.model_copy(update={"global_batch": 2 * c.global_batch})) > seconds
    assert one(c, MODEL.model_copy(update={"seq_len": 2 * MODEL.seq_len})) > seconds
    assert one(c, MODEL.model_copy(update={"layers": 2 * MODEL.layers})) > seconds
    assert one(c, MODEL.model_copy(update={"ffn_hidden": 2 * MODEL.ffn_hidden})) > seconds


def test_recomputation_costs_a_forward_pass() -> None:
    layout = Layout(dp=16)
    none, selective, full = (
        one(Configuration(layout=layout.model_copy(update={"recompute": kind}), micro_batch=8, global_batch=512))
        for kind in ("none", "selective", "full")
    )
    assert none < selective < full < 4 / 3 * none * 1.01


def test_bubble_is_what_megatron_says() -> None:
    """(pp − 1)/n of the busy time (2104.04473, §2.2.1), and 1/vp of that; exact where nothing but layers take time."""
    model = MODEL.model_copy(update={"vocab": 128, "layers": 64})
    zero = dict.fromkeys(NAMES, -60.0) | {"products": 0.0, "time_scale": 0.0}
    found = {}
    for vp in (1, 4):
        layout = Layout(pp=4, vp=vp, dp=4)
        c = Configurations.of([Configuration(layout=layout, micro_batch=4, global_batch=128)])
        w = work(model, CLUSTER, DEVICE, c, "bf16")
        found[vp] = parts(dataclasses.replace(w, head_products=0 * w.layers), np.array([zero[name] for name in NAMES]))
    assert found[1]["bubble"] / found[1]["compute"] == pytest.approx((4 - 1) / 8, rel=1e-6)
    assert found[4]["bubble"] == pytest.approx(found[1]["bubble"] / 4)


def test_compute_is_the_known_count_of_operations() -> None:
    """6 per weight and token, embedding lookups and norms left out, with no launch, network or memory in the way."""
    zero = dict.fromkeys(NAMES, -60.0) | {"products": 0.0, "time_scale": 0.0}
    c = Configurations.of([Configuration(layout=Layout(tp=4, dp=4), micro_batch=1, global_batch=64)])
    w = work(MODEL, CLUSTER, DEVICE, c, "bf16")
    seconds = step_seconds(w, np.array([zero[name] for name in NAMES]))[0]
    h, f = MODEL.hidden, MODEL.ffn_hidden
    weights = MODEL.layers * (4 * h * h + 3 * h * f) + h * MODEL.padded_vocab
    assert seconds == pytest.approx(6 * weights * 64 * MODEL.seq_len / (16 * DEVICE.peak("bf16")), rel=1e-6)


def test_zero_3_on_a_slow_network_costs_more_and_zero_1_updates_less() -> None:
    slow = DEVICE.model_copy(
        update={"between_nodes": DEVICE.between_nodes.model_copy(update={"bytes_per_second": 1e9})}
    )
    rows = [Configuration(layout=Layout(dp=16, zero=z), micro_batch=1, global_batch=64) for z in (0, 1, 2, 3)]
    found = parts(work(MODEL, CLUSTER, slow, Configurations.of(rows), "bf16"), MEAN)
    assert found["dp"][3] > found["dp"][2] > found["dp"][1]
    assert found["optimizer"][1] == pytest.approx(found["optimizer"][0] / 16)


def test_experts_cost_their_tokens_and_their_way() -> None:
    moe = MODEL.model_copy(update={"experts": 8, "experts_per_token": 2})
    c = Configurations.of([Configuration(layout=Layout(dp=16, ep=ep), micro_batch=2, global_batch=64) for ep in (1, 8)])
    found = CostModel().predict(moe, CLUSTER, c, "bf16", coverage=None)
    assert found.breakdown["ep"][0] == 0 < found.breakdown["ep"][1]
    assert found.breakdown["compute"][0] > CostModel().predict(MODEL, CLUSTER, c, "bf16").breakdown["compute"][0]
    assert any("expert" in line for line in found.assumptions)


H100 = accelerator("h100-sxm")
NVLINK, NIC = H100.inside_node.bytes_per_second, H100.between_nodes.bytes_per_second


def work_of(
    layout: Layout,
    model: ModelShape = MODEL,
    context: ContextExchange = "ring",
    dispatch: ExpertDispatch = "alltoall",
    device: Accelerator = H100,
) -> Work:
    """On nodes of eight H100s."""
    cluster = Cluster(nodes=layout.accelerators // 8, accelerators_per_node=8, accelerator="h100-sxm")
    c = Configurations.of([Configuration(layout=layout, micro_batch=1, global_batch=layout.dp)])
    return work(model, cluster, device, c, "bf16", context=context, dispatch=dispatch)


@pytest.mark.parametrize(("tp", "ep"), [(1, 64), (1, 16), (2, 16), (8, 8)])
def test_tokens_for_experts_on_other_nodes_go_through_the_own_link_of_each_rank(tp: int, ep: int) -> None:
    moe = MODEL.model_copy(update={"experts": 64, "experts_per_token": 2})
    token_bytes, here, nodes = 2 * MODEL.seq_len * MODEL.hidden / tp, max(8 // tp, 1), ep * tp / 8
    plain, once = (work_of(Layout(tp=tp, dp=64, ep=ep), moe, dispatch=how).layer_ep[0] for how in ("alltoall", "flex"))
    copies = 2 * (ep - here) / ep
    assert plain == pytest.approx(4 * copies * token_bytes / NIC), "there and back, forward and backward"
    both_elsewhere_and_together = (nodes - 1) / nodes**2
    assert once == pytest.approx(4 * (copies - both_elsewhere_and_together) * token_bytes / NIC)


def test_inside_a_node_a_token_goes_to_a_rank_once_unless_every_copy_is_sent() -> None:
    moe = MODEL.model_copy(update={"experts": 64, "experts_per_token": 2})
    plain, once = (work_of(Layout(dp=64, ep=8), moe, dispatch=how).layer_ep[0] for how in ("alltoall", "flex"))
    token_bytes = 2 * MODEL.seq_len * MODEL.hidden
    assert plain == pytest.approx(4 * token_bytes * 2 * 7 / 8 / NVLINK)
    assert once == pytest.approx(plain - 4 * token_bytes * 7 / 8**2 / NVLINK), "of 7 / 8² both copies go to one rank"
    for how in ("alltoall", "allgather", "flex"):
        assert work_of(Layout(dp=64), moe, dispatch=how).layer_ep[0] == 0, f"{how}: every rank has all experts"


def test_gathered_tokens_go_to_every_rank_of_the_group_whatever_their_experts() -> None:
    moe = MODEL.model_copy(update={"experts": 8, "experts_per_token": 2})
    token_bytes = 2 * MODEL.seq_len * MODEL.hidden
    found = work_of(Layout(dp=16, ep=8), moe, dispatch="allgather")
    assert found.layer_ep[0] == pytest.approx(4 * 7 * token_bytes / NVLINK)
    split = work_of(Layout(tp=2, dp=8, ep=4, sequence_parallel=True), moe, dispatch="allgather")
    assert split.layer_ep[0] == pytest.approx(4 * 7 * token_bytes / 2 / NVLINK), "of those that split an expert, too"
    plain = work_of(Layout(tp=2, dp=8, ep=4, sequence_parallel=True), moe)
    assert split.layer_tp[0] < plain.layer_tp[0]
    assert split.layer_tp_messages[0] < plain.layer_tp_messages[0]


def test_the_plain_all_to_all_sorts_tokens_twice_where_a_rank_has_several_experts() -> None:
    moe = MODEL.model_copy(update={"experts": 8, "experts_per_token": 2})
    plain, once = (work_of(Layout(dp=8, ep=4), moe, dispatch=how).layer_elementwise[0] for how in ("alltoall", "flex"))
    passes = 4 * 2 * (2 * MODEL.seq_len * MODEL.hidden) * 3  # of both copies, forward and twice that backward
    assert plain - once == pytest.approx(passes / H100.memory_bytes_per_second)
    alone = [work_of(Layout(dp=8, ep=8), moe, dispatch=how).layer_elementwise[0] for how in ("alltoall", "flex")]
    assert alone[0] == alone[1]


def test_what_runs_at_the_clock_of_a_chip_takes_less_if_that_is_higher() -> None:
    fast = H100.model_copy(update={"clock": 1.25})
    usual, found = (work_of(Layout(tp=2, dp=4), device=device) for device in (H100, fast))
    for name in ("layer_products", "layer_operands", "layer_attention", "layer_attention_token", "head_products"):
        assert getattr(found, name)[0] == pytest.approx(getattr(usual, name)[0] / 1.25)
    for name in ("layer_elementwise", "layer_tp", "dp_reduce", "optimizer"):
        assert getattr(found, name)[0] == getattr(usual, name)[0]


def test_a_prediction_for_experts_says_how_tokens_are_assumed_to_come_to_them() -> None:
    moe = MODEL.model_copy(update={"experts": 8})
    assert any("alltoall" in line for line in CostModel().assumptions(moe, CLUSTER))
    assert any("HybridEP" in line for line in CostModel(dispatch="flex").fit([]).assumptions(moe, CLUSTER))


def test_a_context_parallel_ring_leaves_a_node_by_one_link() -> None:
    inside, across = (work_of(Layout(tp=2, cp=cp, dp=32 // cp)).layer_cp[0] for cp in (4, 8))
    tokens = MODEL.seq_len * 2 * MODEL.hidden * 2 / 2 * 3  # keys and values of half the heads, three passes
    assert inside == pytest.approx(tokens * 3 / 4 / NVLINK)
    assert across == pytest.approx(tokens * 7 / 8 / NIC)


def test_gathered_keys_and_values_leave_a_node_by_all_links_and_attention_waits_for_them() -> None:
    tokens = MODEL.seq_len * 2 * MODEL.hidden * 2 / 2 * 7 / 8
    for recompute, exchanges in (("none", 2), ("selective", 3)):
        found = work_of(Layout(tp=2, cp=8, dp=4, recompute=recompute), context="gathered")  # type: ignore[arg-type]
        assert found.layer_cp[0] == pytest.approx(exchanges * tokens / min(4 * NIC, NVLINK))
        assert found.layer_cp_cover[0] == 0


def test_gradients_of_experts_go_as_far_as_their_replicas_are_apart() -> None:
    """With EP8 on nodes of eight there is one replica of an expert on each node: one link for it."""
    moe = MODEL.model_copy(update={"experts": 8})
    near, far = (work_of(Layout(dp=64, ep=ep), moe) for ep in (1, 8))
    matrices = 3 * MODEL.hidden * MODEL.ffn_hidden  # gated
    experts = 2 * 2 * MODEL.layers * matrices  # gradients of two bytes, there and back
    of_others = (64 - 1) / 64 * 8 * experts / min(8 * NIC, NVLINK)
    with_experts_alone = near.dp_reduce[0] - of_others
    assert far.dp_reduce[0] - with_experts_alone == pytest.approx(experts * 7 / 8 / NIC)


@pytest.mark.parametrize(
    ("layout", "crossing"),
    [(Layout(tp=2, pp=4), 0.0), (Layout(tp=2, pp=8), 1 / 7), (Layout(tp=4, pp=8), 3 / 7), (Layout(tp=8, pp=4), 1.0)],
)
def test_a_pipeline_waits_for_its_boundary_between_nodes(layout: Layout, crossing: float) -> None:
    found = work_of(layout)
    sent = 2 * 2 * MODEL.seq_len * MODEL.hidden / layout.tp
    assert found.p2p[0] == pytest.approx(sent / (NIC if crossing else NVLINK))
    assert found.p2p_mean[0] == pytest.approx(sent * (crossing / NIC + (1 - crossing) / NVLINK))


def test_whole_experts_gather_no_tokens_and_their_replicas_are_nearer() -> None:
    moe = MODEL.model_copy(update={"experts": 8, "experts_per_token": 2})
    with_shared = moe.model_copy(update={"shared_expert_hidden": 64})
    layouts = {etp: Layout(tp=4, dp=16, ep=4, sequence_parallel=True, etp=etp) for etp in (None, 2, 1)}
    split, half, whole = (work_of(layouts[etp], moe) for etp in (None, 2, 1))
    assert whole.layer_products[0] == split.layer_products[0]
    of_attention = 2 * 2 * (3 / 4) * 2 * MODEL.seq_len * MODEL.hidden / NVLINK
    assert whole.layer_tp[0] == pytest.approx(of_attention), "those of attention remain"
    assert split.layer_tp[0] == pytest.approx(3 * of_attention), "each of two experts has its copy gathered"
    of_pairs = 2 * (2 / 4) * (1 / 2) / (3 / 4)  # both copies of half of the tokens, among two ranks
    assert half.layer_tp[0] == pytest.approx((1 + of_pairs) * of_attention)
    assert whole.layer_tp_messages[0] == split.layer_tp_messages[0] / 2
    for layout, alone in ((layouts[1], whole), (layouts[None], split)):
        beside = work_of(layout, with_shared)
        assert beside.layer_tp[0] == pytest.approx(alone.layer_tp[0] + of_attention), "a shared expert has its own"
    sent = 2 * MODEL.seq_len * MODEL.hidden * 2 * (3 / 4) / 4  # to two experts, in two bytes each
    assert whole.layer_ep[0] == pytest.approx(4 * sent / NVLINK), "four ranks of a node, and not of two"
    assert split.layer_ep[0] > whole.layer_ep[0]


def test_experts_all_over_the_cluster_exchange_longer_than_within_nodes() -> None:
    """737 B weights on 2,048 H100s: an all-to-all over 64 ranks has an eighth of NVLink."""
    moe = ModelShape(
        **{"layers": 64, "hidden": 7168, "ffn_hidden": 2048, "heads": 128, "kv_heads": 128, "seq_len": 4096},
        **{"vocab": 129280, "gated_mlp": True, "experts": 256, "experts_per_token": 8},
    )
    cluster = Cluster(nodes=256, accelerators_per_node=8, accelerator="h100-sxm")
    layouts = [Layout(pp=8, dp=256, ep=ep, zero=1) for ep in (8, 16, 64)]
    c = Configurations.of([Configuration(layout=layout, micro_batch=1, global_batch=4096) for layout in layouts])
    exchange = CostModel().predict(moe, cluster, c, "bf16", coverage=None).breakdown["ep"]
    assert (np.diff(exchange) > 0).all()
    assert exchange[2] > 3 * exchange[0]


def test_every_accelerator_file_is_read() -> None:
    for name in accelerators():
        device = accelerator(name)
        assert device.sources
        prior(device)
        assert one(cluster=Cluster(nodes=2, accelerators_per_node=8, accelerator=name)) > 0
    with pytest.raises(ValueError, match=r"accelerator\(abacus\) is unknown: expected one of a100-40g"):
        accelerator("abacus")
    with pytest.raises(ValueError, match=r"precision\(int1\) is unknown"):
        DEVICE.peak("int1")
    with pytest.raises(ValueError, match="unknown constants speed"):
        prior(Accelerator.model_validate({**DEVICE.model_dump(), "constants": {"speed": 1.0}}))
    assert accelerator("h100-sxm").peak("mxfp8") == 2 * accelerator("h100-sxm").peak("fp16")
    assert DEVICE.peak("fp8") == DEVICE.peak("bf16")


def test_links_can_be_named() -> None:
    c = Configurations.of([Configuration(layout=Layout(dp=16), micro_batch=1, global_batch=16)])
    ethernet = CostModel(between_nodes="ethernet-10g")
    slow, usual = (model.predict(MODEL, CLUSTER, c, "bf16") for model in (ethernet, CostModel()))
    assert slow.breakdown["dp"][0] > 3 * usual.breakdown["dp"][0]
    assert any("10 Gb/s Ethernet" in line for line in slow.assumptions)
    rows = Timings(MODEL, CLUSTER, "bf16", c, slow.seconds)
    again = ethernet.fit([rows]).predict(MODEL, CLUSTER, c, "bf16").seconds[0]
    assert again == pytest.approx(slow.seconds[0], rel=0.01)
    with pytest.raises(ValueError, match=r"link\(string\) is unknown: expected one of nvlink-2"):
        CostModel(between_nodes="string")


def synthetic(seed: int, z: np.ndarray, how: Smoothness, count: int | None = None) -> Timings:
    """Rows of the formulas with constants z, misses and noise as `how` says."""
    rng = np.random.default_rng(seed)
    chosen = SPACE if count is None else SPACE.take(rng.choice(len(SPACE), count, replace=False))
    where = coordinates(MODEL, CLUSTER, chosen)
    misses = rng.multivariate_normal(np.zeros(len(chosen)), covariance(where, where, how), method="cholesky")
    noise = how.noise_sd * rng.standard_normal(len(chosen))
    seconds = step_seconds(work(MODEL, CLUSTER, DEVICE, chosen, "bf16"), MEAN + SD * z)
    return Timings(MODEL, CLUSTER, "bf16", chosen, seconds * np.exp(misses + noise))


CLEAN = Smoothness(shape_sd=1e-3, layout_sd=1e-3, microbatch_sd=1e-3, step_sd=1e-3, noise_sd=1e-2)


def test_a_fit_finds_the_constants_that_made_the_rows() -> None:
    z = np.zeros(len(NAMES))
    known = {"products": 1.0, "layer_launch_seconds": -1.0, "tp_traffic": 1.5, "dp_traffic": 1.0}
    for name, value in known.items():
        z[NAMES.index(name)] = value
    found = CostModel(CLEAN).fit([synthetic(0, z, CLEAN, 300)]).constants(CLUSTER)
    for name, value in known.items():
        place = NAMES.index(name)
        assert (np.log(found[name]) - MEAN[place]) / SD[place] == pytest.approx(value, abs=0.25), name


def test_rows_bring_predictions_to_what_was_measured() -> None:
    how = Smoothness()
    z = np.full(len(NAMES), 0.5)
    timings = synthetic(1, z, how, 200)
    chosen = select(CostModel(how), MODEL, CLUSTER, timings.configurations, "bf16", 20)
    rest = np.setdiff1d(np.arange(200), chosen)
    blind, fitted = (
        np.abs(model.predict(MODEL, CLUSTER, timings.configurations, "bf16").seconds / timings.step_seconds - 1)[
            rest
        ].mean()
        for model in (CostModel(how), CostModel(how).fit([timings.take(chosen)]))
    )
    assert fitted < 0.08
    assert fitted < blind / 2


def test_a_wild_row_does_not_spoil_a_fit() -> None:
    timings = synthetic(2, np.zeros(len(NAMES)), CLEAN, 60)
    wild = timings.step_seconds.copy()
    wild[7] *= 5
    clean, spoilt = (
        CostModel(CLEAN).fit([dataclasses.replace(timings, step_seconds=seconds)]).constants(CLUSTER)["products"]
        for seconds in (timings.step_seconds, wild)
    )
    assert spoilt == pytest.approx(clean, rel=0.1)


@pytest.mark.parametrize("rows", [0, 8])
def test_intervals_hold_what_they_say(rows: int) -> None:
    """On rows that are made as the model believes they are; the published ones are the benchmark's business."""
    how, inside, size = Smoothness(blind_spread_of_nodes=1.0), 0, 0
    for seed in range(25):
        z = np.random.default_rng(1000 + seed).standard_normal(len(NAMES))
        timings = synthetic(seed, z, how, 30)
        chosen = np.arange(rows)
        fitted = CostModel(how).fit([timings.take(chosen)])
        rest = timings.take(np.arange(rows, 30))
        found = fitted.predict(MODEL, CLUSTER, rest.configurations, "bf16", coverage=0.8)
        inside += int(((found.low <= rest.step_seconds) & (rest.step_seconds <= found.high)).sum())
        size += len(rest.step_seconds)
    assert 0.72 < inside / size < 0.92


def test_intervals_grow_with_coverage_and_shrink_with_rows() -> None:
    timings = synthetic(3, np.zeros(len(NAMES)), Smoothness(), 40)
    widths = {}
    for rows in (0, 4, 30):
        fitted = CostModel().fit([timings.take(np.arange(rows))])
        for coverage in (0.5, 0.9):
            found = fitted.predict(MODEL, CLUSTER, timings.configurations, "bf16", coverage=coverage)
            assert (found.low < found.seconds).all()
            assert (found.seconds < found.high).all()
            widths[rows, coverage] = np.log(found.high / found.low).mean()
        assert widths[rows, 0.5] < widths[rows, 0.9]
    assert widths[0, 0.9] > widths[4, 0.9] > widths[30, 0.9]


def test_predictions_do_not_depend_on_what_is_asked_beside_them() -> None:
    timings = synthetic(4, np.zeros(len(NAMES)), Smoothness(), 12)
    fitted = CostModel().fit([timings])
    some = SPACE.take(np.array([5, 77, 500]))
    everything, few = (fitted.predict(MODEL, CLUSTER, c, "bf16") for c in (SPACE, some))
    for name in ("seconds", "low", "high"):
        np.testing.assert_allclose(getattr(everything, name)[[5, 77, 500]], getattr(few, name))
    np.testing.assert_allclose(sum(few.breakdown.values()), few.seconds)
    assert fitted.rows == 12
    assert CostModel().fit([]).rows == 0
    empty = fitted.predict(MODEL, CLUSTER, SPACE.take(np.arange(0)), "bf16")
    assert len(empty.seconds) == 0


def test_rows_of_two_models_share_the_constants() -> None:
    other = MODEL.model_copy(update={"layers": 32})
    seconds = np.array([1.5 * one(SPACE[index]) for index in (3, 40, 200)])
    rows = Timings(MODEL, CLUSTER, "bf16", SPACE.take(np.array([3, 40, 200])), seconds)
    fitted = CostModel().fit([rows])
    ratio = (
        fitted.predict(other, CLUSTER, SPACE, "bf16").seconds
        / CostModel().predict(other, CLUSTER, SPACE, "bf16").seconds
    )
    assert 1.05 < np.median(ratio) < 1.6


@pytest.mark.parametrize("factor", [0.35, 3.0])
def test_one_row_of_another_core_moves_every_prediction_of_it(factor: float) -> None:
    cluster = Cluster(accelerators_per_node=2)
    model = ModelShape(layers=2, hidden=256, ffn_hidden=688, heads=8, kv_heads=4, seq_len=64, vocab=4096)
    space = enumerate_configurations(model, cluster, (2, 8, 32), max_micro_batch=16)
    before = CostModel().predict(model, cluster, space, "fp32")
    row = Timings(model, cluster, "fp32", space.take(np.array([0])), factor * before.seconds[:1])
    found = CostModel().fit([row]).predict(model, cluster, space, "fp32")
    moved = np.log(found.seconds / before.seconds) / np.log(factor)
    assert moved.min() > 0.85
    assert moved.max() < 1.1


def test_before_a_row_it_is_less_sure_between_nodes() -> None:
    def half(cluster: Cluster) -> float:
        return CostModel().errors(MODEL, cluster, SPACE.take(np.arange(20)), "bf16").widening(0.8)

    here, how = half(Cluster(accelerators_per_node=8, accelerator="a100-80g")), Smoothness()
    assert half(CLUSTER) / here == pytest.approx(how.blind_spread_of_nodes / how.blind_spread)
    assert half(Cluster(accelerators_per_node=8)) / here == pytest.approx(how.blind_spread_of_cores / how.blind_spread)


def test_a_stack_that_nobody_published_is_less_sure_than_one_that_rows_are_from() -> None:
    def width(stack: str | None) -> float:
        errors = CostModel(stack=stack).errors(MODEL, CLUSTER, SPACE.take(np.arange(20)), "bf16")
        return float(errors.half_widths(0.8).mean())

    assert width("megatron-te") < width("unheard-of") == width(None)
    said = CostModel(stack="unheard-of").assumptions(MODEL, CLUSTER)
    assert any("unheard-of" in words and "wider" in words for words in said)
    assert any("megatron-te" in words for words in CostModel(stack="megatron-te").assumptions(MODEL, CLUSTER))


def test_a_stack_multiplies_the_constants_and_a_cpu_has_constants_of_its_own() -> None:
    effects = Effects(
        {"products": 1.2}, {"stack": {"products": 0.2}}, {"stack": {"fast": {"products": Effect(0.5, 0.1)}}}
    )
    fast = CostModel(stack="fast", effects=effects).constants(CLUSTER)["products"]
    assert fast == pytest.approx(0.6)
    assert CostModel(effects=effects).constants(CLUSTER)["products"] == pytest.approx(1.2)
    core = Cluster(accelerators_per_node=2)
    assert CostModel(stack="fast", effects=effects).constants(core) == CostModel().constants(core)


def test_features_multiply_together() -> None:
    both = {name: {"products": Effect(factor, 0.1)} for name, factor in (("one", 0.5), ("other", 3.0))}
    effects = Effects({"products": 1.0}, {"feature": {"products": 0.2}}, {"feature": both})
    cost = CostModel(features=("one", "other"), effects=effects)
    assert cost.constants(CLUSTER)["products"] == pytest.approx(1.5)
    assert cost.fit([]).constants(CLUSTER)["products"] == pytest.approx(1.5)


def test_on_a_pipeline_less_of_the_sum_of_gradients_hides() -> None:
    name, index = "dp_overlap", NAMES.index("pipeline_overlap")
    shown = {}
    for pp in (1, 2):
        layout = Layout(pp=pp, dp=16 // pp)
        arrays = Configurations.of([Configuration(layout=layout, micro_batch=1, global_batch=64)])
        done = work(MODEL, CLUSTER, accelerator(CLUSTER.accelerator), arrays, "bf16")
        constants = prior(accelerator(CLUSTER.accelerator))[0].copy()
        seconds = []
        for share in (0.1, 1.0):
            constants[NAMES.index(name)], constants[index] = 0.0, np.log(share)
            seconds.append(float(parts(done, constants)["dp"][0]))
        shown[pp] = seconds
    assert shown[1][0] == shown[1][1]
    assert shown[2][0] > shown[2][1]


@pytest.mark.parametrize(
    ("precision", "family"),
    [
        *(("bf16", "half"), ("fp32", "half"), ("fp8-cs", "fp8"), ("mxfp8", "mxfp8"), ("fp8-blockwise", "mxfp8")),
        *(("nvfp4", "fp4"), ("fp8 granular/mx", "mxfp8")),
    ],
)
def test_precisions_belong_to_families(precision: str, family: str) -> None:
    assert precision_family(precision) == family


def test_constants_that_are_learned_are_there() -> None:
    effects = usual_effects()
    assert set(effects.constants) == set(NAMES)
    for group, levels in effects.levels.items():
        assert all(set(of) <= set(effects.between[group]) for of in levels.values())
        assert all(
            0 < effect.log_sd <= effects.between[group][name] for of in levels.values() for name, effect in of.items()
        )


@pytest.mark.parametrize("seconds", [0.0, -1.0, np.nan, np.inf])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    rows = Timings(MODEL, CLUSTER, "bf16", SPACE.take(np.arange(1)), np.array([seconds]))
    with pytest.raises(ValueError, match="positive and finite"):
        CostModel().fit([rows])


def test_selection_is_informative_and_never_repeats() -> None:
    chosen = select(CostModel(), MODEL, CLUSTER, SPACE, "bf16", 12)
    assert len(set(chosen.tolist())) == 12
    assert select(CostModel(), MODEL, CLUSTER, SPACE, "bf16", 5).tolist() == chosen[:5].tolist()
    assert len(select(CostModel(), MODEL, CLUSTER, SPACE.take(np.arange(3)), "bf16", 9)) == 3
    rng = np.random.default_rng(0)

    def left(rows: np.ndarray) -> float:
        fitted = CostModel().fit(
            [Timings(MODEL, CLUSTER, "bf16", SPACE.take(rows), np.array([one(SPACE[i]) for i in rows]))]
        )
        found = fitted.predict(MODEL, CLUSTER, SPACE, "bf16")
        return float(np.log(found.high / found.low).mean())

    assert left(chosen) < np.mean([left(rng.choice(len(SPACE), 12, replace=False)) for _ in range(3)])


def test_rows_of_a_table_become_timings_without_the_failures() -> None:
    def row(index: int, precision: str, seconds: float | None) -> Measurement:
        mark = Fingerprint(model=MODEL.digest, precision=precision, backend="x", hardware="x", software="x")
        failure = None if seconds else "out of memory"
        return Measurement(
            **{"fingerprint": mark, "model": MODEL, "configuration": SPACE[index], "time": 0.0},
            **{"step_seconds": seconds, "failure": failure},
        )

    found = Timings.of([row(0, "bf16", 1.0), row(1, "bf16", None), row(2, "fp32", 2.0), row(3, "bf16", 3.0)], CLUSTER)
    assert [(each.precision, each.step_seconds.tolist()) for each in found] == [("bf16", [1.0, 3.0]), ("fp32", [2.0])]
    assert found[0].configurations[1] == SPACE[3]
    assert CostModel().fit(found).rows == 3


def test_shards_teach_the_work_of_a_rank_and_nothing_of_the_network() -> None:
    """Products take twice as long, and the network is as the file says: known from one accelerator."""
    slower = MEAN + np.log(2.0) * np.isin(NAMES, ("products", "half_speed_dimension", "attention"))
    chosen = np.random.default_rng(0).choice(len(SPACE), 24, replace=False)
    alone = np.ones(len(chosen), dtype=bool)
    seconds = step_seconds(MATRIX.take(chosen), slower, alone)
    assert (seconds < step_seconds(MATRIX.take(chosen), slower)).all()
    fitted = CostModel().fit([Timings(MODEL, CLUSTER, "bf16", SPACE.take(chosen), seconds, shard=True)])
    truth = step_seconds(MATRIX, slower)
    found, blind = (each.predict(MODEL, CLUSTER, SPACE, "bf16") for each in (fitted, CostModel()))
    off = np.abs(np.log(found.seconds / truth))
    assert np.median(off) < 0.05 < np.median(np.abs(np.log(blind.seconds / truth)))
    assert ((found.low < truth) & (truth < found.high)).mean() > 0.9
    width, before = (np.log(each.high / each.low) for each in (found, blind))
    assert (width < before).all()
    network = sum(found.breakdown[name] for name in ("tp", "p2p", "dp")) / found.seconds
    most, least = network > np.quantile(network, 0.9), network < np.quantile(network, 0.1)
    assert width[most].mean() > 1.2 * width[least].mean(), "the network is as little known as before"


def test_a_shard_is_what_a_rank_does_by_itself_without_company() -> None:
    chosen, company = MATRIX.take(np.arange(6)), NAMES.index("company")
    breakdown = parts(chosen, MEAN)
    own = sum(breakdown[name] for name in OWN)
    alone = np.ones(6, dtype=bool)
    np.testing.assert_allclose(step_seconds(chosen, MEAN, alone), own / np.exp(MEAN[company]))
    one_each = Cluster(nodes=CLUSTER.accelerators, accelerators_per_node=1, accelerator=CLUSTER.accelerator)
    apart = work(MODEL, one_each, DEVICE, SPACE.take(np.arange(6)), "bf16")
    crowded = MEAN + np.log(2.0) * (np.arange(len(NAMES)) == company)
    np.testing.assert_allclose(step_seconds(apart, MEAN, alone), step_seconds(apart, crowded, alone))
    np.testing.assert_allclose(step_seconds(chosen, MEAN, alone), 2 * step_seconds(chosen, crowded, alone))


def test_a_shard_and_a_step_have_the_shapes_of_products_in_common_and_no_more() -> None:
    how, one = Smoothness(), SPACE.take(np.arange(1))
    step, shard = (coordinates(MODEL, CLUSTER, one, alone) for alone in (False, True))
    assert covariance(step, shard, how).item() == pytest.approx(how.shape_sd**2)
    assert covariance(shard, shard, how).item() == covariance(step, step, how).item() == pytest.approx(variance(how))


def test_shards_that_are_met_well_do_not_make_steps_look_sure() -> None:
    """Steps that scatter by a fifth keep their width when many shards without any scatter are known too."""
    rng = np.random.default_rng(1)
    chosen = rng.choice(len(SPACE), 36, replace=False)
    some = chosen[:6]
    seconds = step_seconds(MATRIX, MEAN) * np.exp(0.2 * rng.standard_normal(len(SPACE)))
    steps = Timings(MODEL, CLUSTER, "bf16", SPACE.take(some), seconds[some])
    alone = step_seconds(MATRIX.take(chosen), MEAN, np.ones(len(chosen), dtype=bool))
    shards = Timings(MODEL, CLUSTER, "bf16", SPACE.take(chosen), alone, shard=True)
    fits = [CostModel().fit(known) for known in ([steps], [steps, shards])]
    spreads = [each.errors(MODEL, CLUSTER, SPACE, "bf16").spread for each in fits]
    assert spreads[1] > spreads[0] > 1, "the shards' own misses, none, do not count"


def test_predictions_say_how_alike_their_errors_are() -> None:
    """The covariances of a posterior: symmetrical, positive, and as wide as the intervals of each."""
    rng = np.random.default_rng(0)
    some = [SPACE[int(place)] for place in rng.choice(len(SPACE), 12, replace=False)]
    for rows in (0, 6):
        cost = CostModel()
        if rows:
            arrays = Configurations.of(some[:rows])
            seconds = cost.predict(MODEL, CLUSTER, arrays, "bf16", coverage=None).seconds * np.exp(
                rng.normal(size=6) / 5
            )
            cost = cost.fit([Timings(MODEL, CLUSTER, "bf16", arrays, seconds)])
        found = predict_unmeasured(cost, MODEL, CLUSTER, "bf16", some)
        alike = np.array([[found.covariance(one, other) for other in some] for one in some])
        errors = np.array([found.predictions[each].error for each in some])
        np.testing.assert_allclose(alike, alike.T, atol=1e-12)
        assert np.linalg.eigvalsh(alike).min() > -1e-9
        assert (np.diag(alike) < errors**2).all(), "a measurement's noise is shared with nobody"
        assert np.sqrt(np.diag(alike))[6:] == pytest.approx(errors[6:], rel=0.1), "which is most of what is not known"
    assert found.covariance(some[0], some[1].model_copy(update={"global_batch": 4096})) == 0
