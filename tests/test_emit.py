"""A plan as the arguments of other tools: what is printed says the same run again."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copus.estimate import estimate_of
from copus.job import JobConfig, load_job, parse_job
from launch.arguments.megatron_write import megatron_arguments, megatron_command
from launch.cli import main
from launch.emit import TOOLS, written
from launch.fixed_run import as_written, best_fixed_run
from launch.import_args import imported_job
from planner.forecast import CriticalBatchForecast
from planner.goodput import goodput

SEQ_LEN = 128


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Model sections that Megatron-LM's arguments can say."""
    heads = draw(st.sampled_from([4, 8]))
    kind = draw(st.sampled_from(["swiglu", "gelu", "squared_relu", "gelu_tanh"]))
    rotary = draw(st.booleans())
    model: dict[str, Any] = {
        **{"layers": 8, "hidden": heads * 16, "heads": heads, "seq_len": SEQ_LEN},
        "ffn_hidden": 64 * draw(st.integers(1, 4)),
        "kv_heads": draw(st.sampled_from([2, 4, heads])),
        "vocab": draw(st.integers(256, 100_000)),
        "gated_mlp": kind == "swiglu",
        "tied_embeddings": draw(st.booleans()),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_epsilon": draw(st.sampled_from([1e-5, 1e-6, 3.5e-6])),
        "bias": draw(st.sampled_from(["none", "qkv", "all"])),
        "qk_norm": draw(st.sampled_from(["none", "head"])),
        "positions": "rope" if rotary else "learned",
    }
    if kind in ("squared_relu", "gelu_tanh"):
        model["activation"] = kind
    if draw(st.booleans()):
        model["head_dim"] = 32
    if rotary:
        model["rope_base"] = draw(st.sampled_from([10_000, 500_000, 1_000_000]))
        model["rope_fraction"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
        model["rope_scaling"] = draw(
            st.sampled_from(
                [None, {"kind": "linear", "factor": 4}, {"kind": "llama3", "factor": 32, "original_seq_len": 8192}]
            )
        )
    if draw(st.booleans()):
        model |= {"sliding_window": draw(st.integers(1, 64)), "full_attention_every": draw(st.sampled_from([0, 2, 4]))}
    return model


@st.composite
def jobs(draw: st.DrawFn) -> JobConfig:
    """Jobs that Megatron-LM's arguments can say: lengths are whole sequences, intervals whole steps."""
    tp, pp, dp = draw(st.sampled_from([(1, 1, 1), (2, 1, 4), (1, 2, 2), (2, 2, 1), (1, 4, 1)]))
    vp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    micro = draw(st.sampled_from([1, 2]))
    batch = micro * dp * pp * draw(st.integers(1, 4))
    samples = batch * draw(st.integers(10, 1000))
    decay = draw(st.sampled_from(["constant", "cosine", "linear", "wsd", "inverse-sqrt"]))
    warmup = draw(st.integers(1, samples // 4))
    training: dict[str, Any] = {
        "layout": {
            **{"tp": tp, "pp": pp, "dp": dp, "vp": vp, "zero": draw(st.sampled_from([0, 1]))},
            "sequence_parallel": tp > 1 and draw(st.booleans()),
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
        },
        **{"micro_batch": micro, "global_batch": batch, "tokens": samples * SEQ_LEN, "decay": decay},
        "lr": draw(st.sampled_from([1e-3, 3e-4, 2.5e-5])),
        "min_lr": draw(st.sampled_from([0.0, 1e-5])),
        "warmup_tokens": warmup * SEQ_LEN,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "precision": draw(st.sampled_from(["fp32", "bf16"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "clip_grad": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "overlap_grad_reduce": draw(st.booleans()),
        "optimizer": {
            "betas": draw(st.sampled_from([[0.9, 0.95], [0.9, 0.999], [0.8, 0.98]])),
            "epsilon": draw(st.sampled_from([1e-8, 1e-15])),
            "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.1])),
        },
        "evaluate_every_tokens": batch * SEQ_LEN * draw(st.integers(1, 50)),
        "evaluate_sequences": batch * draw(st.integers(1, 5)),
    }
    if draw(st.booleans()):
        training["checkpoint_every_tokens"] = batch * SEQ_LEN * draw(st.integers(1, 50))
    if decay == "wsd":
        training |= {
            "decay_tokens": draw(st.integers(1, samples // 4)) * SEQ_LEN,
            "decay_shape": draw(st.sampled_from(["linear", "1-sqrt", "cosine", "exponential"])),
        }
    elif decay in ("cosine", "linear") and draw(st.booleans()):
        training["decay_tokens"] = draw(st.integers(1, samples // 2)) * SEQ_LEN
    planner: dict[str, Any] = {}
    if draw(st.booleans()):
        increments, step = draw(st.integers(1, 3)), micro * dp * pp
        start = batch - increments * step
        if start > 0:
            planner = {
                **{"policy": "ramp", "ramp_start": start, "ramp_increment": step},
                **{"ramp_samples": increments * draw(st.integers(1, 50)), "min_global_batch": start},
                "max_global_batch": batch,
            }
    return parse_job(
        {
            **{"name": "job", "model": draw(models()), "training": training, "planner": planner},
            "cluster": {"accelerators_per_node": tp * pp * dp, "accelerator": "h100-sxm"},
        }
    )


@settings(max_examples=50, deadline=None)
@given(jobs(), st.sampled_from(["megatron", "megatron-0.17"]))
def test_a_job_comes_back_from_its_arguments(job: JobConfig, version: Any) -> None:
    run = as_written(job)
    text, lost = megatron_command(job, run, version)
    assert all(sentence.startswith("data:") for sentence in lost)
    words = shlex.split(text.replace("\\\n", " "))[1:]  # without the variable before torchrun
    imported, again = imported_job(words, ["cluster.accelerator=h100-sxm"])
    assert again.model == job.model
    assert again.cluster == job.cluster
    ends = {"decay_tokens": None} if again.training.decay_tokens and not job.training.decay_tokens else {}
    assert again.training.model_copy(update=ends) == job.training
    for name in ("policy", "ramp_start", "ramp_increment", "ramp_samples", "min_global_batch", "max_global_batch"):
        if job.planner.policy == "ramp":
            assert getattr(again.planner, name) == getattr(job.planner, name)
    assert not [each for each in imported.unmapped if each.effect in ("changes the training", "is unknown")]
    assert (
        megatron_arguments(again, as_written(again), version).arguments
        == megatron_arguments(job, run, version).arguments
    )


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job whose best batch grows."""
    path = tmp_path / "job.yaml"
    values = {
        "name": "emitted",
        "model": {"from": "llama-3.2-1b", "seq_len": 2048},
        "cluster": {"accelerators_per_node": 8, "accelerator": "h100-sxm"},
        "training": {
            **{"layout": {"tp": 2, "dp": 4, "zero": 1}, "micro_batch": 1, "global_batch": 16},
            **{"tokens": 2_000_000_000, "warmup_tokens": 20_000_000, "lr": 3e-4, "min_lr": 3e-5},
        },
        "planner": {"max_global_batch": 256},
        "profile": {"table": str(tmp_path / "table.jsonl")},
    }
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_fixed_run_is_the_best_of_those_that_keep_their_layout(job_file: Path) -> None:
    job = load_job(job_file)
    estimate = estimate_of(job)
    laws = CriticalBatchForecast.of_laws(job.total_samples, job.model)

    def seconds(batches: dict[int, float], place: float) -> float:
        """For the same progress, with the batch that runs there: rates by batch."""
        phi = float(laws.at(np.array([place * job.total_samples]))[0])
        batch = max(batches)
        return 1 / goodput(batches[batch], batch, phi)

    one = best_fixed_run(job, estimate, schedule=False)
    assert len(one.batches.steps) == 1
    places = [(stage + 0.5) / 20 for stage in range(20)]

    def total(candidate: Any) -> float:
        batch = candidate.configuration.global_batch
        return sum(seconds({batch: candidate.samples_per_second}, place) for place in places)

    best = min(estimate.eligible, key=total)
    assert one.configurations == [best.configuration]
    growing = best_fixed_run(job, estimate, schedule=True)
    batches = [batch for _, batch in growing.batches.steps]
    assert batches == sorted(batches)
    assert len({each.layout for each in growing.configurations}) == 1
    assert growing.lr == pytest.approx(3e-4 * (growing.main_batch / 16) ** 0.5)


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_gets_the_batch_and_the_layout(
    tool: str, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(job_file), "--set", "planner.policy=static", "--emit", tool]) == 0
    output, errors = capsys.readouterr()
    assert errors.startswith(f"# {tool}: TP2·PP1·DP4·Z1 B16 m1")
    said = {
        "megatron": ["--tensor-model-parallel-size 2", "--global-batch-size 16", "--use-distributed-optimizer"],
        "megatron-0.17": ["--train-samples 976562", "--lr-warmup-samples 9765"],
        "bridge": [
            "model.tensor_model_parallel_size=2",
            "train.global_batch_size=16",
            "scheduler.lr_decay_style=cosine",
        ],
        "torchtitan": ["--parallelism.tensor_parallel_degree 2", "--training.steps 61035", "--optimizer.lr 0.0003"],
    }
    for words in said.get(tool, []):
        assert words in output
    if tool == "deepspeed":
        values = json.loads(output)
        assert values["train_batch_size"] == values["train_micro_batch_size_per_gpu"] * 4 * 4
        assert values["gradient_accumulation_steps"] == 4
        assert values["tensor_parallel"] == {"autotp_size": 2}
        assert values["scheduler"]["params"]["total_num_steps"] == 61035
    if tool == "accelerate":
        values = yaml.safe_load(output)
        assert values["megatron_lm_config"]["megatron_lm_num_micro_batches"] == 4
        assert "--gradient_accumulation_steps 4" in errors


def test_a_tool_that_there_is_not_is_refused(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--emit", "jax"]) == 2
    assert capsys.readouterr().err == (
        "copus: --emit jax: expected megatron, megatron-0.17, bridge, torchtitan, deepspeed or accelerate\n"
    )


@pytest.mark.parametrize("option", [["--json"], ["--all"], ["--price", "3"]])
def test_options_that_change_nothing_of_what_is_emitted_are_refused(
    option: list[str], job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(job_file), "--emit", "megatron", *option]) == 2
    assert capsys.readouterr().err == (
        f"copus: --emit megatron prints the arguments of that tool and nothing else: leave {option[0]} out\n"
    )


def test_what_a_tool_cannot_say_is_said(job_file: Path) -> None:
    sets = ["training.target_loss=2.5", "planner.policy=seesaw", "model.logit_softcap=30", "model.rope_base=1234.5"]
    job = load_job(job_file, sets, planned_only=True)
    run = as_written(job)
    assert "planner.policy(seesaw)" in run.notes[0]
    lost = " ".join(written(job, run, "megatron")[1])
    assert all(name in lost for name in ("target_loss(2.5)", "logit_softcap(30.0)", "rope_base(1234.5)"))
    odd = load_job(job_file, ["planner.policy=ramp", "planner.ramp_start=6", "planner.ramp_increment=2"])
    assert "a batch of 6 is no multiple of micro-batch × dp = 4" in " ".join(
        written(odd, as_written(odd), "megatron")[1]
    )


def test_pipelines_that_are_not_even_are_split_as_here(job_file: Path) -> None:
    job = load_job(job_file, ["training.layout={tp: 1, pp: 4, dp: 2}", "model.layers=14", "planner.policy=static"])
    arguments = megatron_arguments(job, as_written(job)).arguments
    assert arguments["--decoder-first-pipeline-num-layers"] == ["3"]
    assert arguments["--decoder-last-pipeline-num-layers"] == ["3"]


def test_a_dataset_of_megatron_comes_back_from_its_arguments(job_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.idx").touch()
    source = f"data.source=[{tmp_path}/a, {tmp_path}/b]"
    for more in ("data.held_out_share=0.02", f"data.held_out_source=[{tmp_path}/a]", "data.reset_position_ids=true"):
        job = load_job(job_file, [source, "data.weights=[0.25, 0.75]", more])
        text, lost = megatron_command(job, as_written(job))
        again = imported_job(shlex.split(text.replace("\\\n", " "))[1:], [])[1]
        assert (again.data.source, again.data.weights) == (job.data.source, job.data.weights)
        assert again.data.held_out_source == job.data.held_out_source
        assert again.data.reset_position_ids == job.data.reset_position_ids
        if not job.data.held_out_source:
            assert again.data.held_out_share == pytest.approx(job.data.held_out_share or 0.05)
        assert not lost


@pytest.mark.slow
def test_deepspeed_takes_the_configuration(job_file: Path) -> None:
    """Its own schedulers accept the parameters."""
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules")
    torch = pytest.importorskip("torch")
    for decay, name in (("cosine", "WarmupCosineLR"), ("linear", "WarmupDecayLR"), ("constant", "WarmupLR")):
        sets = [f"training.decay={decay}", "training.min_lr=0.0", "training.warmup_tokens=0"]
        job = load_job(job_file, sets)
        scheduler = json.loads(written(job, as_written(job), "deepspeed")[0])["scheduler"]
        assert scheduler["type"] == name
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        getattr(schedules, name)(optimizer, **scheduler["params"])


def test_emit_goes_with_one_backend(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job_file), "--backend", "megatron", "--backend", "fsdp", "--emit", "megatron"]) == 2
    assert "--emit go with one --backend" in capsys.readouterr().err


def test_a_plan_is_for_the_software_that_is_named(job_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = load_job(job_file, ["cluster.accelerator=h100-sxm", "training.precision=bf16"])
    own, engine = estimate_of(job), estimate_of(job, "megatron-te")
    assert any("published runs with megatron" in words for words in own.predictor.assumptions)
    assert any("published runs with megatron-te" in words for words in engine.predictor.assumptions)
    assert own.start.step_seconds != engine.start.step_seconds
    assert main(["plan", str(job_file), "--stack", "megatron-tea"]) == 2
    error = capsys.readouterr().err
    assert "--stack(megatron-tea)" in error
    assert "megatron-te," in error
    assert main(["plan", str(job_file), "--set", "cluster.accelerator=cpu", "--stack", "fsdp"]) == 2
    assert "--stack(fsdp): cluster.accelerator(cpu) has no data sheet" in capsys.readouterr().err
    assert main(["plan", str(job_file), "--backend", "megatron", "--backend", "fsdp", "--stack", "fsdp"]) == 2
    assert "go with one --backend" in capsys.readouterr().err
