"""The planner refuses what surely does not fit, and nobody measures it."""

from functools import partial
from pathlib import Path

from copus.backends.registry import find_backend
from planner.config import PlannerConfig
from planner.memory_check import MemoryCheck
from planner.planner import Planner
from planner.predictor import Predictor
from planner.sampling import measured_configuration
from planner.space import candidates
from profiles.accelerator import memory_bytes
from profiles.cluster import Cluster
from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.noise_scale import NoiseScale

LLAMA = ModelShape(
    **{"layers": 32, "hidden": 4096, "ffn_hidden": 14336, "heads": 32, "kv_heads": 8, "seq_len": 4096, "vocab": 128256}
)
GPUS = Cluster(accelerators_per_node=8, accelerator="h100-sxm")
CPUS = Cluster(accelerators_per_node=8)
TP8 = Configuration(layout=Layout(tp=8, sequence_parallel=True), micro_batch=1, global_batch=8)
DP8 = Configuration(layout=Layout(dp=8), micro_batch=1, global_batch=8)
HERE = Fingerprint(model=LLAMA.digest, precision="bf16", backend="b", hardware="8 × NVIDIA H100", software="s")


def planner(rows: list[Measurement], cluster: Cluster = GPUS) -> Planner:
    config = PlannerConfig(min_global_batch=8, max_global_batch=8, max_micro_batch=1, layouts=[TP8.layout, DP8.layout])
    return Planner(Predictor.from_rows(config, LLAMA, cluster, "bf16", TP8, rows, use_cost_model=False))


def verdict(found: Planner, configuration: Configuration) -> str:
    noise = NoiseScale(grad_sq=1.0, noise_trace=1.0, value=10.0, low=9.0, high=11.0, samples=100)
    decision = found.decide(noise, TP8, 0)
    return next(each.verdict for each in decision.candidates if each.configuration == configuration)


def row(configuration: Configuration) -> Measurement:
    return Measurement(
        fingerprint=HERE, model=LLAMA, configuration=configuration, step_seconds=1.0, spread_seconds=0.0, time=1.0
    )


def test_data_parallelism_alone_does_not_hold_8_billion_weights() -> None:
    """8 B weights × 18 bytes are 135 GiB; a step would never run."""
    said = verdict(planner([row(TP8)]), DP8)
    assert said.startswith("does not fit: 1")
    assert said.endswith(" of 80.0 GiB")


def test_what_has_run_is_not_refused() -> None:
    assert not verdict(planner([row(TP8), row(DP8)]), DP8).startswith("does not fit")


def test_on_cpu_cores_nothing_is_checked() -> None:
    assert memory_bytes(CPUS) is None
    assert memory_bytes(Cluster(accelerators_per_node=1, accelerator="abacus")) is None
    assert MemoryCheck(LLAMA, CPUS, "bf16").refusals([DP8]) == {}
    assert verdict(planner([row(TP8)], CPUS), DP8) == "not measured"


def test_steps_that_measure_the_noise_count_where_they_need_more() -> None:
    """Two halves of a lone micro-batch: FSDP then has gathered weights and sums of gradients at once."""
    fsdp = find_backend("fsdp")
    measured = partial(measured_configuration, PlannerConfig(), fsdp)
    lone, how = Configuration(layout=Layout(), micro_batch=2, global_batch=2), fsdp.implementation(dropout=False)
    model = LLAMA.model_copy(update={"seq_len": 256})
    plain, aware = (MemoryCheck(model, GPUS, "bf16", (), how, *also).peaks([lone])[0] for also in ((), (measured,)))
    halves = MemoryCheck(model, GPUS, "bf16", (), how).peaks([measured(lone)])[0]
    assert (measured(lone).micro_batch, measured(lone).num_microbatches) == (1, 2)
    assert plain.expected_bytes < aware.expected_bytes == halves.expected_bytes


def test_what_may_fit_is_kept_in_order() -> None:
    config = PlannerConfig(min_global_batch=8, max_global_batch=64, max_micro_batch=8)
    space = candidates(config, LLAMA, GPUS, TP8)
    check = MemoryCheck(LLAMA, GPUS, "bf16")
    refused = check.refusals(space)
    assert 0 < len(refused) < len(space)
    assert check.possible(space, TP8) == [each for each in space if each not in refused]
    assert TP8 not in refused


def test_what_the_job_starts_with_is_measured_all_the_same() -> None:
    larger = DP8.model_copy(update={"global_batch": 16})
    other = DP8.model_copy(update={"micro_batch": 2, "global_batch": 16})
    check = MemoryCheck(LLAMA, GPUS, "bf16")
    assert len(check.refusals([DP8, larger, other])) == 3
    assert check.possible([DP8, larger, other], DP8) == [DP8, larger]


def test_it_reads_a_table(tmp_path: Path) -> None:
    """A peak that was seen to be small makes room for neighbours."""
    seen = row(TP8).model_copy(update={"peak_bytes": 10 * 2**30})
    others = [
        seen.model_copy(update={"configuration": TP8.model_copy(update={"micro_batch": m, "global_batch": 8 * m})})
        for m in (1, 2, 4)
    ]
    large = TP8.model_copy(update={"micro_batch": 64, "global_batch": 64})
    ignorant, taught = (MemoryCheck(LLAMA, GPUS, "bf16", rows) for rows in ([], others))
    assert large in ignorant.refusals([large])
    assert large not in taught.refusals([large]) or (
        taught.refusals([large])[large] != ignorant.refusals([large])[large]
    )
