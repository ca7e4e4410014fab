"""Kernels and precisions of a job: which it takes, and what is refused before anything starts."""

from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from copus import kernels
from copus.backends.registry import find_backend
from copus.estimate import estimate_of
from copus.job import JobConfig, JobError, parse_job
from copus.kernels import check_installed_here
from copus.weights.megatron_names import without_fusion
from launch.emit import written
from launch.fixed_run import best_fixed_run
from planner.noise_sources import MICROBATCH, NORMLAYER, REPLICA
from tests.megatron_jobs import SHAPE

WIDE = {"hidden": 64, "ffn_hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "seq_len": 64}
LATENT = {"kv_heads": 4}


def _job(model: dict[str, Any] | None = None, accelerator: str = "b200", **training: Any) -> JobConfig:
    layout = training.pop("layout", {"dp": 8})
    return parse_job(
        {
            "name": "tiny",
            "model": {**SHAPE, **WIDE, **(model or {})},
            "cluster": {"accelerators_per_node": 8, "accelerator": accelerator},
            "training": {"layout": layout, "global_batch": 16, "tokens": 1_000_000, **training},
        }
    )


def _install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    """Let Transformer Engine be there in a version, or not at all."""
    spec = None if version is None else ModuleSpec("transformer_engine", None)
    monkeypatch.setattr(kernels, "find_spec", lambda name: spec)
    monkeypatch.setattr(kernels, "version", lambda name: version)


@pytest.mark.parametrize(
    ("training", "accelerator", "version", "expected"),
    [
        ({}, "b200", "2.20.0", "torch"),
        ({"kernels": "auto"}, "b200", "2.20.0", "transformer-engine"),
        ({"kernels": "auto"}, "b200", None, "torch"),
        ({"kernels": "auto"}, "cpu", "2.20.0", "torch"),
        ({"kernels": "auto", "backend": "fsdp"}, "b200", "2.20.0", "torch"),
        ({"precision": "fp8"}, "b200", None, "transformer-engine"),
        ({"precision": "mxfp8", "kernels": "auto"}, "b200", None, "transformer-engine"),
    ],
)
def test_the_job_of_a_run_says_which_kernels_it_has(
    training: dict[str, Any], accelerator: str, version: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, version)
    assert _job(accelerator=accelerator, **training).training.kernels == expected


@pytest.mark.parametrize(
    ("model", "accelerator", "training", "message"),
    [
        ({}, "b200", {"precision": "fp16"}, "training.precision: fp16 needs a loss scale"),
        ({}, "b200", {"precision": ["fp8"]}, "training.precision: input should be 'fp32', 'bf16', 'fp8' or 'mxfp8'"),
        ({}, "b200", {"precision": "fp8", "kernels": "torch"}, "precision(fp8) needs kernels(transformer-engine)"),
        ({}, "b200", {"precision": "fp8", "backend": "fsdp"}, "precision(fp8): this backend has fp32, bf16"),
        (
            {},
            "b200",
            {"kernels": "transformer-engine", "backend": "fsdp"},
            "kernels(transformer-engine) is not supported by this backend: only megatron has it",
        ),
        (
            {},
            "b200",
            {"kernels": "transformer-engine", "precision": "fp32"},
            "kernels(transformer-engine) needs a precision of bf16, fp8 or mxfp8",
        ),
        ({}, "cpu", {"kernels": "transformer-engine", "precision": "bf16"}, "needs GPUs, and cluster.accelerator is"),
        ({}, "a100-80g", {"precision": "fp8"}, "precision(fp8): a100-80g does not compute so; it has fp32, bf16, fp16"),
        ({}, "h100-sxm", {"precision": "mxfp8"}, "precision(mxfp8): h100-sxm does not compute so in scaled blocks"),
        ({"ffn_hidden": 40}, "b200", {"precision": "fp8"}, "model.ffn_hidden(40) is no multiple of 16"),
        (
            {"kv_heads": 4, "head_dim": 8},
            "b200",
            {"precision": "fp8", "layout": {"tp": 4, "dp": 2}},
            "precision(fp8): model.heads · head_dim(32) ÷ 4 = 8 is no multiple of 16",
        ),
        (
            {**LATENT, "latent_attention": {"kv_rank": 40, "rope_dim": 8, "value_dim": 16}},
            "b200",
            {"precision": "fp8"},
            "precision(fp8): model.latent_attention.kv_rank(40) is no multiple of 16",
        ),
        (
            {**LATENT, "latent_attention": {"kv_rank": 48, "rope_dim": 8, "value_dim": 18}},
            "b200",
            {"precision": "fp8"},
            "precision(fp8): model.heads · (head_dim − rope_dim + value_dim)(104) is no multiple of 16",
        ),
        (
            {"experts": 4, "experts_per_token": 2, "shared_expert_hidden": 24},
            "b200",
            {"precision": "fp8"},
            "precision(fp8): model.shared_expert_hidden(24) is no multiple of 16",
        ),
        (
            {},
            "b200",
            {"precision": "mxfp8", "layout": {"cp": 4, "dp": 2}},
            "precision(mxfp8): model.seq_len(64) ÷ 4 = 16 is no multiple of 32",
        ),
        ({}, "b200", {"precision": "fp8", "master_weights": "none"}, "master_weights(none) needs precision(bf16)"),
    ],
)
def test_kernels_and_precisions_that_cannot_be_are_refused(
    model: dict[str, Any], accelerator: str, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError) as refused:
        _job(model, accelerator, **training)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "needs Transformer Engine 2.3 or newer on every node"), ("2.1.0+cu12", "2.1.0[+]cu12 is installed")],
)
def test_a_node_without_transformer_engine_is_refused(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, version)
    with pytest.raises(ValueError, match=message):
        check_installed_here()
    _install(monkeypatch, "2.20.0")
    check_installed_here()


def test_a_plan_is_for_the_kernels_of_the_job() -> None:
    """The software that its times are of, the rows of a table that it takes, and what of the noise it sees."""
    plain, fused = _job(accelerator="h100-sxm"), _job(accelerator="h100-sxm", kernels="transformer-engine")
    assert (plain.training.implementation.stack, plain.training.step_settings) == ("megatron", [])
    assert fused.training.implementation.stack == "megatron-te"
    assert fused.training.step_settings == ["transformer-engine"]
    sources = [
        find_backend("megatron").for_training(job.training).parts(job.training.configuration).keys()
        for job in (plain, fused)
    ]
    assert sources == [{MICROBATCH, REPLICA, NORMLAYER}, {MICROBATCH, REPLICA}]


@pytest.mark.parametrize(
    ("precision", "arguments"),
    [("bf16", ""), ("fp8", "--fp8-format hybrid --fp8-recipe tensorwise"), ("mxfp8", "--fp8-format e4m3")],
)
def test_arguments_for_megatron_carry_kernels_and_precision(precision: str, arguments: str) -> None:
    job = _job(precision=precision, kernels="transformer-engine")
    run = best_fixed_run(job, estimate_of(job), schedule=False)
    text, _ = written(job, run, "megatron")
    assert "--bf16" in text
    assert "--transformer-impl transformer_engine" in text
    assert arguments in text
    _, lost = written(job, run, "torchtitan")
    assert any("written as bf16" in sentence for sentence in lost) == (precision != "bf16")


def test_names_of_fused_modules_are_those_of_the_modules_without_fusion() -> None:
    layer = "decoder.layers.3"
    for fused, usual in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_bias", "pre_mlp_layernorm.bias"),
        ("mlp.experts.linear_fc2.weight11", "mlp.experts.local_experts.11.linear_fc2.weight"),
        ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc1.weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
    ):
        assert without_fusion(f"{layer}.{fused}") == f"{layer}.{usual}"
