"""Model FLOP utilization: against counts by hand."""

import json

import pytest
from test_profiles_table import HERE

from copus.checkpoints.trainer_state import TrainerState
from copus.events import Start, parse_event
from copus.worker import start_of
from profiles.accelerator import accelerator, accelerators
from profiles.cluster import Cluster
from profiles.mfu import flops_per_token, peak_samples_per_second
from profiles.model_shape import ModelShape
from tests.megatron_jobs import tiny_job

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, ffn_hidden=14336, heads=32, kv_heads=8, seq_len=8192, vocab=128256, gated_mlp=True
)
H100 = Cluster(nodes=2, accelerators_per_node=8, accelerator="h100-sxm")


def test_operations_of_a_token() -> None:
    projections = 4096 * (4096 + 1024 + 1024 + 4096)
    mlp = 3 * 4096 * 14336
    output = 128256 * 4096
    causal_attention = 32 * 4096 * 8192
    assert flops_per_token(LLAMA_8B) == 6 * (32 * (projections + mlp) + output + causal_attention)
    assert flops_per_token(LLAMA_8B) == pytest.approx(5.15e10, rel=1e-3)


def test_a_shared_embedding_multiplies_as_often() -> None:
    assert flops_per_token(LLAMA_8B.model_copy(update={"tied_embeddings": True})) == flops_per_token(LLAMA_8B)


def test_only_the_experts_that_a_token_is_sent_to_count() -> None:
    one, two, of_more = (
        LLAMA_8B.model_copy(update={"experts": experts, "experts_per_token": active})
        for experts, active in ((8, 1), (8, 2), (16, 1))
    )
    mlp = 6 * 32 * 3 * 4096 * 14336
    assert flops_per_token(two) - flops_per_token(one) == pytest.approx(mlp)
    assert flops_per_token(of_more) - flops_per_token(one) == pytest.approx(6 * 32 * 8 * 4096)  # the router


def test_the_peak_is_the_data_sheets() -> None:
    peak = peak_samples_per_second(LLAMA_8B, H100, "bf16")
    assert peak is not None
    assert peak * 8192 * flops_per_token(LLAMA_8B) == pytest.approx(16 * accelerator("h100-sxm").flops["bf16"])


@pytest.mark.parametrize(("name", "precision"), [("cpu", "fp32"), ("of-tomorrow", "bf16"), ("v100", "bf16")])
def test_no_utilization_of_a_peak_that_nobody_rates(name: str, precision: str) -> None:
    cluster = H100.model_copy(update={"accelerator": name})
    assert peak_samples_per_second(LLAMA_8B, cluster, precision) is None


def test_fp32_is_not_rated_as_tf32() -> None:
    """torch multiplies in full precision unless it is asked for TF32, and nobody asks."""
    whole, half = (peak_samples_per_second(LLAMA_8B, H100, precision) for precision in ("fp32", "bf16"))
    assert whole is not None
    assert half is not None
    assert half / whole == pytest.approx(989.5 / 66.9)


def test_every_accelerator_but_the_cpu_core_is_rated() -> None:
    assert [name for name in accelerators() if not accelerator(name).rated] == ["cpu"]


def test_the_start_of_a_run_says_the_peak_and_old_logs_do_not() -> None:
    job = tiny_job(8).model_copy(update={"cluster": H100})
    start = start_of(job, TrainerState(), job.training.configuration, HERE, None)
    assert start.peak_samples_per_second == peak_samples_per_second(job.model, H100, "fp32")
    line = json.loads(start.model_dump_json())
    del line["peak_samples_per_second"]
    old = parse_event(json.dumps(line).encode())
    assert isinstance(old, Start)
    assert old.peak_samples_per_second is None
