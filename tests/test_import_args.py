"""Arguments of Megatron-LM, Megatron-Bridge and NeMo become a job file, and what has no field is said."""

import json
import math
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from copus.job import JobConfig, JobError, parse_job
from launch.arguments.batch_steps import BatchSteps
from launch.arguments.command_line import read_command
from launch.arguments.megatron_unmapped import unmapped
from launch.cli import main
from launch.import_args import imported_job

LLAMA = [
    "torchrun",
    "--nproc-per-node",
    "8",
    "--nnodes=2",
    "pretrain_gpt.py",
    "--num-layers",
    "24",
    "--hidden-size",
    "2048",
    "--ffn-hidden-size",
    "5504",
    "--num-attention-heads",
    "16",
    "--group-query-attention",
    "--num-query-groups",
    "4",
    "--seq-length",
    "4096",
    "--max-position-embeddings",
    "4096",
    "--swiglu",
    "--normalization",
    "RMSNorm",
    "--position-embedding-type",
    "rope",
    "--rotary-base",
    "500000",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
    "--attention-dropout",
    "0",
    "--hidden-dropout",
    "0",
    "--vocab-size",
    "32000",
    "--tensor-model-parallel-size",
    "2",
    "--pipeline-model-parallel-size",
    "2",
    "--num-layers-per-virtual-pipeline-stage",
    "3",
    "--sequence-parallel",
    "--use-distributed-optimizer",
    "--overlap-grad-reduce",
    "--recompute-activations",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "64",
    "--train-samples",
    "488281",
    "--lr",
    "3e-4",
    "--min-lr",
    "3e-5",
    "--lr-decay-style",
    "cosine",
    "--lr-warmup-samples",
    "4882",
    "--adam-beta2",
    "0.95",
    "--weight-decay",
    "0.1",
    "--bf16",
    "--eval-interval",
    "100",
    "--eval-iters",
    "2",
    "--save-interval",
    "1000",
    "--save",
    "/checkpoints",
    "--no-rope-fusion",
    "--fp8-format",
    "hybrid",
    "--nobody-knows",
    "1",
    "2",
]
WHOLE_EXPERTS = (
    "--num-experts 8 --disable-bias-linear --tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--sequence-parallel"
)
SMALL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--seq-length",
    "128",
    "--vocab-size",
    "512",
]


MINIMAL = {
    "name": "any",
    "cluster": {"accelerators_per_node": 1},
    "training": {"global_batch": 1, "tokens": 100_000},
}


def job_of(*words: str, sets: tuple[str, ...] = ()) -> JobConfig:
    """The job of a command line."""
    return imported_job(list(words), list(sets))[1]


def test_a_llama_becomes_the_job_that_a_person_would_write() -> None:
    expected = {
        "name": "pretrain_gpt",
        "model": {
            **{"layers": 24, "hidden": 2048, "ffn_hidden": 5504, "heads": 16, "kv_heads": 4, "seq_len": 4096},
            **{"vocab": 32000, "rope_base": 500_000},
        },
        "cluster": {"nodes": 2, "accelerators_per_node": 8, "accelerator": "h200"},
        "training": {
            "layout": {
                **{"tp": 2, "pp": 2, "vp": 4, "dp": 4, "sequence_parallel": True, "zero": 1},
                "recompute": "selective",
            },
            **{"micro_batch": 2, "global_batch": 64, "overlap_grad_reduce": True},
            **{"tokens": 488281 * 4096, "lr": 3e-4, "min_lr": 3e-5, "warmup_tokens": 4882 * 4096},
            **{"evaluate_every_tokens": 100 * 64 * 4096, "evaluate_sequences": 128},
            "checkpoint_every_tokens": 1000 * 64 * 4096,
        },
    }
    imported, job = imported_job(LLAMA, ["cluster.accelerator=h200"])
    assert job == parse_job(expected)
    effects = {each.argument: each.effect for each in imported.unmapped}
    assert effects == {
        "--save /checkpoints": "is not needed",
        "--max-position-embeddings 4096": "is not needed",
        "--no-rope-fusion": "is not needed",
        "--fp8-format hybrid": "changes the training",
        "--nobody-knows 1 2": "is unknown",
    }
    words = [word for word in LLAMA[4:] if word.startswith("--")]
    assert imported.mapped + len(imported.unmapped) == len(words)  # every argument is accounted for


def test_the_text_is_the_job_and_has_every_argument_without_a_field_in_a_comment() -> None:
    imported, job = imported_job(LLAMA, [])
    text = imported.text(["From a test"])
    assert parse_job(yaml.safe_load(text)) == job
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(each.argument in comments for each in imported.unmapped)
    assert "tokens: 1_999_998_976  # --train-samples 488281 × 4096" in text
    assert "accelerator: h100-sxm  # assumed" in text
    assert all(len(line) <= 120 for line in comments.splitlines())


def test_the_defaults_are_those_of_megatron() -> None:
    job = job_of(*SMALL)
    model, training = job.model, job.training
    assert (model.norm, model.bias, model.positions, model.tied_embeddings) == ("layernorm", "all", "learned", True)
    assert (model.mlp_activation, model.ffn_hidden, model.kv_heads) == ("gelu", 256, 4)
    assert (training.dropout, training.optimizer.betas, training.optimizer.weight_decay) == (0.1, (0.9, 0.999), 0.01)
    assert (training.decay, training.min_lr, training.precision, training.layout.zero) == ("linear", 0.0, "fp32", 0)
    assert job_of(*SMALL, "--swiglu").model.ffn_hidden == 128  # int(4 · 64 · 2/3 / 64) · 64


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        ("--squared-relu", "model.activation", "squared_relu"),
        ("--disable-bias-linear --add-qkv-bias", "model.bias", "qkv"),
        ("--qk-layernorm", "model.qk_norm", "head"),
        ("--window-size 31,0 --window-attn-skip-freq 2", "model.sliding_window", 32),
        ("--window-size 31,0 --window-attn-skip-freq 2", "model.full_attention_every", 2),
        ("--use-rotary-position-embeddings --rotary-percent 0.5", "model.rope_fraction", 0.5),
        ("--kv-channels 32", "model.head_dim", 32),
        ("--softmax-scale 0.1", "model.attention_scale", 0.1),
        ("--layernorm-epsilon 1e-6", "model.norm_epsilon", 1e-6),
        ("--recompute-granularity full --recompute-method uniform", "training.layout.recompute", "full"),
        ("--lr-decay-style WSD --train-samples 1000 --lr-wsd-decay-samples 100", "training.decay_tokens", 12_800),
        ("--lr-decay-style WSD --lr-wsd-decay-style minus_sqrt", "training.decay_shape", "1-sqrt"),
        ("--train-samples 1000 --lr-decay-samples 500 --lr-warmup-samples 10", "training.decay_tokens", 490 * 128),
        ("--train-iters 50 --global-batch-size 8 --lr-warmup-fraction 0.1", "training.warmup_tokens", 5 * 8 * 128),
        ("--micro-batch-size 4", "training.global_batch", 4),
        (
            "--train-iters 100 --rampup-batch-size 4 4 40 --global-batch-size 12",
            "training.tokens",
            (5 * 4 + 3 * 8 + 92 * 12) * 128,
        ),
        ("--rampup-batch-size 4 4 40 --global-batch-size 12", "planner.ramp_samples", 40),
        ("--step-batch-size-schedule '0:4 2560:8 5120:12'", "planner.ramp_increment", 4),
        ("--step-batch-size-schedule '0:4 2560:8 5120:16'", "planner.policy", "goodput"),
        ("--step-batch-size-schedule '0:4 2560:8 5120:16'", "training.global_batch", 16),
        ("--optimizer sgd --sgd-momentum 0.5 --weight-decay 0", "training.optimizer.momentum", 0.5),
        ("--optimizer muon", "training.optimizer.kind", "muon"),
        ("--optimizer lion", "training.optimizer.kind", "adamw"),
        ("--distributed-timeout-minutes 5", "launch.timeout_seconds", 300.0),
        ("--exit-duration-in-mins 230", "training.max_minutes", 230.0),
        ("--num-experts 8 --disable-bias-linear --moe-ffn-hidden-size 96 --moe-router-topk 3", "model.ffn_hidden", 96),
        (
            "--num-experts 8 --disable-bias-linear --moe-layer-freq '([0]*1+[1]*1)' --moe-ffn-hidden-size 96",
            "model.expert_hidden",
            96,
        ),
        (
            "--num-experts 8 --disable-bias-linear --moe-layer-freq '([0]*1+[1]*1)' --moe-ffn-hidden-size 96",
            "model.dense_layers",
            1,
        ),
        (
            "--num-experts 8 --disable-bias-linear --moe-router-load-balancing-type seq_aux_loss",
            "model.router.aux_loss_over",
            "sequence",
        ),
        ("--num-experts 8 --disable-bias-linear --moe-aux-loss-coeff 1e-2", "model.router.aux_loss", 0.01),
        (
            "--num-experts 8 --disable-bias-linear --moe-router-score-function sigmoid --moe-router-enable-expert-bias",
            "model.router.bias_update_rate",
            0.001,
        ),
        ("--num-experts 8 --disable-bias-linear --moe-router-pre-softmax", "model.router.normalized", False),
        ("--num-experts 8 --disable-bias-linear", "training.expert_dispatch", "allgather"),
        (f"{WHOLE_EXPERTS} --expert-tensor-parallel-size 1", "training.layout.etp", 1),
        (f"{WHOLE_EXPERTS} --expert-tensor-parallel-size 1", "training.layout.dp", 1),
        (f"{WHOLE_EXPERTS} --expert-tensor-parallel-size 2", "training.layout.dp", 2),
        ("--wandb-project p --wandb-exp-name 'my run/1'", "name", "my-run-1"),
        (
            "--wandb-project p --wandb-entity e",
            "tracking",
            {"tensorboard": {}, "wandb": {"project": "p", "entity": "e"}},
        ),
    ],
)
def test_arguments_become_fields(words: str, place: str, value: object) -> None:
    read: object = job_of(*SMALL, *shlex.split(words))
    for name in place.split("."):
        read = getattr(read, name)
    assert read == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "many"], "--num-layers many: expected a whole number"),
        (["--num-layers", "2", "--seq-length", "8"], "--hidden-size is not given, and the model needs it"),
        ([*SMALL, "--lr", "fast"], "--lr fast: expected a number"),
        ([*SMALL[:-2]], "neither --vocab-size nor a tokenizer that is here tells the vocabulary"),
        (["--micro-batch-size", "2"], "the arguments name no model (--num-layers is missing)"),
        (
            [*SMALL, "--global-batch-size", "12", "--rampup-batch-size", "4", "3", "10"],
            "12 − 4 = 8 is not a multiple of 3",
        ),
        ([*SMALL, "--step-batch-size-schedule", "500:4"], "thresholds begin with 0 and grow"),
        ([*SMALL, "--num-attention-heads", "5"], "hidden(64) ÷ heads(5) is not whole"),
        (
            ["torchrun", "--nproc-per-node", "3", "train.py", *SMALL, "--tensor-model-parallel-size", "2"],
            "3 accelerators",
        ),
        (["absent.sh"], "absent.sh: No such file or directory"),
        (["X=1"], "expected a script"),
    ],
)
def test_what_cannot_become_a_job_is_said_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(JobError) as refused:
        imported_job(words, [])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_the_arguments_do_not_say_can_be_set() -> None:
    sets = ["cluster.accelerator=a100-80g", "cluster.accelerators_per_node=4", "model.vocab=999"]
    imported, job = imported_job(SMALL[:-2], [*sets, "training.tokens=1000000"])
    assert (job.cluster.accelerators, job.training.layout.dp, job.model.vocab) == (4, 4, 999)
    assert not any("cluster" in text or "tokens" in text for text in imported.assumed)
    assert job_of("--micro-batch-size", "2", sets=("model={from: llama-3.2-1b, seq_len: 512}",)).model.layers == 16
    with pytest.raises(
        JobError, match=r"cluster\.nodes: input should be a valid integer, .* got '²'"
    ):  # a digit, no number
        imported_job(SMALL, [*sets, "cluster.nodes=²"])


def test_samples_have_the_length_that_is_set_where_no_argument_says_it() -> None:
    words = ["--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "100"]
    sets = ["model.from=llama-3.2-1b", "cluster.accelerators_per_node=1"]
    imported, job = imported_job(words, [*sets, "model.seq_len=4096"])
    assert (job.model.seq_len, job.training.tokens) == (4096, 100 * 8 * 4096)
    assert job_of(*words, sets=(sets[1], "model={from: llama-3.2-1b, seq_len: 512}")).training.tokens == 100 * 8 * 512
    assert imported.comments["training.tokens"] == "--train-iters 100 × 8 × 4096"
    with pytest.raises(JobError, match="--seq-length is missing, which says how many tokens a sample has"):
        imported_job(words, sets)
    for length in ("long", "0"):
        with pytest.raises(JobError, match=rf"--set model\.seq_len={length}: expected a whole number, at least 1"):
            imported_job(words, [*sets, f"model.seq_len={length}"])


@pytest.mark.parametrize("name", ["--seq-length", "--encoder-seq-length"])
def test_a_length_that_is_set_leaves_iterations_and_samples_as_many_as_they_are(name: str) -> None:
    words = [name if word == "--seq-length" else word for word in LLAMA]
    before, after = job_of(*words), job_of(*words, sets=("model.seq_len=512",))
    assert (before.model.seq_len, after.model.seq_len) == (4096, 512)
    for tokens in ("tokens", "warmup_tokens", "evaluate_every_tokens", "checkpoint_every_tokens"):
        assert getattr(before.training, tokens) == 8 * getattr(after.training, tokens) > 0, tokens


SCRIPT = """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
HIDDEN=${HIDDEN:-64}
TOKENIZER=$1
MODEL_ARGS=(
    --num-layers 4 --hidden-size $HIDDEN --num-attention-heads 4 # small
    --seq-length 128
)
if [ "$HIDDEN" -gt 64 ]; then MODEL_ARGS+=(--qk-layernorm); fi
OPTIONS="--micro-batch-size 2 --global-batch-size $((2 * 16)) --tokenizer-model $TOKENIZER \\
  --tokenizer-type HuggingFaceTokenizer"
srun bash -c "python pretrain_gpt.py ${MODEL_ARGS[*]} $OPTIONS"
"""


def test_a_script_is_read_with_its_arguments_and_variables(tmp_path: Path) -> None:
    script, tokenizer = tmp_path / "train.sh", tmp_path / "tokenizer.json"
    script.write_text(SCRIPT)
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 8}]}
    tokenizer.write_text(json.dumps(tokens))
    job = job_of(str(script), str(tokenizer))
    assert (job.name, job.cluster.nodes, job.training.layout.dp, job.training.global_batch) == ("train", 2, 16, 32)
    assert (job.model.vocab, job.data.tokenizer, job.model.qk_norm) == (9, tokenizer, "none")
    wider = job_of("HIDDEN=128", "bash", str(script), str(tokenizer))
    assert (wider.model.hidden, wider.model.qk_norm) == (128, "head")


def test_configurations_of_bridge_and_nemo_are_read(tmp_path: Path) -> None:
    bridge = {
        "_target_": "ConfigContainer",
        "model": {
            **{"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "seq_length": 128},
            **{"gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm", "vocab_size": 512},
            **{
                "position_embedding_type": "rope",
                "share_embeddings_and_output_weights": False,
                "layernorm_epsilon": 1e-6,
            },
            **{"tensor_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": None, "bf16": True},
        },
        "train": {"micro_batch_size": 2, "global_batch_size": 16, "train_iters": 100},
        "optimizer": {"lr": 3e-4, "min_lr": 3e-5, "adam_beta2": 0.95},
        "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 10},
        "ddp": {"use_distributed_optimizer": True},
        "rng": {"seed": 7},
        "dataset": {"blend": [["/d/a", "/d/b"], [0.3, 0.7]], "split": "90,10,0", "eod_mask_loss": True},
    }
    file = tmp_path / "bridge.yaml"
    file.write_text(yaml.safe_dump(bridge))
    job = job_of(str(file), "train.global_batch_size=32", sets=("cluster.accelerators_per_node=8",))
    model, training = job.model, job.training
    assert (model.kv_heads, model.gated_mlp, model.bias, model.norm, model.norm_epsilon) == (
        2,
        True,
        "none",
        "rmsnorm",
        1e-6,
    )
    assert (training.layout.tp, training.layout.dp, training.layout.zero) == (2, 4, 1)
    assert (job.data.source, job.data.weights) == ([Path("/d/a"), Path("/d/b")], [0.3, 0.7])
    assert (job.data.held_out_share, job.data.eod_mask_loss) == (0.1, True)
    assert (training.global_batch, training.tokens, training.warmup_tokens) == (32, 100 * 32 * 128, 10 * 32 * 128)
    assert (training.seed, training.optimizer.betas, training.precision) == (7, (0.9, 0.95), "bf16")

    nemo = {
        "trainer": {"devices": 4, "num_nodes": 2, "max_steps": 50, "precision": "bf16-mixed", "gradient_clip_val": 0.5},
        "model": {
            **{"micro_batch_size": 1, "global_batch_size": 8, "encoder_seq_length": 128, "num_layers": 4},
            **{
                "hidden_size": 64,
                "num_attention_heads": 4,
                "activation": "fast-swiglu",
                "bias": False,
                "vocab_size": 512,
            },
            "optim": {"lr": 1e-4, "betas": [0.9, 0.98], "sched": {"warmup_steps": 5, "min_lr": 1e-5}},
        },
    }
    file.write_text(yaml.safe_dump(nemo))
    job = job_of(str(file))
    assert (job.cluster.nodes, job.cluster.accelerators, job.training.clip_grad) == (2, 8, 0.5)
    assert (job.model.gated_mlp, job.model.bias, job.training.optimizer.betas) == (True, "none", (0.9, 0.98))
    assert (job.training.tokens, job.training.warmup_tokens) == (50 * 8 * 128, 5 * 8 * 128)

    file.write_text("hidden: 3\n")
    with pytest.raises(JobError, match="is one of Megatron-Bridge or NeMo"):
        imported_job([str(file)], [])


TITAN = """
[job]
description = "Llama 3 8B"
[model]
name = "llama3"
flavor = "8B"
[optimizer]
lr = 3e-4
[lr_scheduler]
warmup_steps = 200
decay_ratio = 0.2
min_lr_factor = 0.1
[training]
local_batch_size = 2
global_batch_size = 64
seq_len = 8192
steps = 1000
dataset = "c4"
[parallelism]
tensor_parallel_degree = 2
[activation_checkpoint]
mode = "full"
[quantize.linear.float8]
filter_fqns = ["output"]
"""


def test_configurations_of_torchtitan_are_read_with_their_arguments(tmp_path: Path) -> None:
    file = tmp_path / "llama3_8b.toml"
    file.write_text(TITAN)
    words = ["torchrun", "--nproc_per_node=8", "-m", "torchtitan.train", "--job.config_file", str(file)]
    imported, job = imported_job([*words, "--training.steps", "2000"], [])
    training, tokens = job.training, 64 * 8192
    assert job.model == parse_job(MINIMAL | {"model": {"from": "llama-3.1-8b", "seq_len": 8192}}).model
    assert (training.backend, training.layout.tp, training.layout.dp, training.layout.zero) == ("fsdp", 2, 4, 3)
    assert (training.micro_batch, training.global_batch, training.tokens) == (2, 64, 2000 * tokens)
    assert (training.warmup_tokens, training.decay, training.decay_shape) == (200 * tokens, "wsd", "linear")
    assert (training.decay_tokens, training.min_lr, training.layout.recompute) == (400 * tokens, 3e-5, "full")
    effects = {each.argument.split(" ")[0]: each.effect for each in imported.unmapped}
    assert effects == {
        "job.description": "is lost",
        "training.dataset": "is lost",
        "quantize.linear": "is not needed",
    }
    assert (
        job_of(str(file), "--training.steps", "10", sets=("cluster.accelerators_per_node=4",)).training.layout.dp == 2
    )
    shorter = job_of(str(file), sets=("model.seq_len=1024",))
    assert (shorter.model.seq_len, shorter.training.tokens) == (1024, 1000 * 64 * 1024)
    file.write_text("[model\n")
    with pytest.raises(JobError, match="not TOML"):
        imported_job([str(file)], [])


def test_a_dataset_of_megatron_is_the_source_with_its_weights_and_split(tmp_path: Path) -> None:
    data = job_of(*SMALL, "--data-path", "0.3", "/d/a", "0.7", "/d/b", "--split", "90,10,0", "--eod-mask-loss").data
    assert (data.source, data.weights) == ([Path("/d/a"), Path("/d/b")], [0.3, 0.7])
    assert (data.held_out_share, data.eod_mask_loss, data.reset_position_ids) == (0.1, True, False)
    apart = job_of(*SMALL, "--train-data-path", "/d/a", "/d/b", "--valid-data-path", "/d/c").data
    assert (apart.source, apart.weights, apart.held_out_source) == ([Path("/d/a"), Path("/d/b")], None, [Path("/d/c")])
    (tmp_path / "blend.txt").write_text("0.3 /d/a 0.7 /d/b\n")
    (tmp_path / "splits.json").write_text('{"train": ["0.3", "/d/a", "0.7", "/d/b"], "valid": ["/d/c"]}')
    read = job_of(*SMALL, "--data-args-path", str(tmp_path / "blend.txt"), "--split", "90,10,0").data
    assert (read.source, read.weights, read.held_out_share) == (data.source, data.weights, data.held_out_share)
    read = job_of(*SMALL, "--per-split-data-args-path", str(tmp_path / "splits.json")).data
    assert (read.source, read.weights, read.held_out_source) == (data.source, data.weights, [Path("/d/c")])
    gone, _ = imported_job([*SMALL, "--data-args-path", "/nowhere/blend.txt"], [])
    lost = [(left.argument, left.effect) for left in gone.unmapped]
    assert ("--data-args-path /nowhere/blend.txt", "is lost") in lost
    imported, job = imported_job([*SMALL, "--data-path", "", "--split", "99,1,0"], [])
    assert job.data.source == "shakespeare"
    assert any("data.source" in text for text in imported.assumed)


def test_the_command_prints_the_job_on_stdout_and_the_summary_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-args", "--set", "cluster.accelerator=h200", "--", *LLAMA]) == 0
    output, errors = capsys.readouterr()
    assert parse_job(yaml.safe_load(output)).cluster.accelerator == "h200"
    assert errors.startswith(
        "36 arguments mapped, 5 commented (1 changes the training, 1 is unknown, 3 are not needed)"
    )
    assert "unknown: --nobody-knows" in errors

    out = tmp_path / "job.yaml"
    assert main(["import-args", "--out", str(out), "--json", "--", *SMALL]) == 0
    values = json.loads(capsys.readouterr().out)
    assert parse_job(yaml.safe_load(out.read_text())) == parse_job(values["resolved"])
    assert main(["import-args", "--out", str(out), "--", "--num-layers", "x"]) == 2
    assert out.read_text()  # the file from before is whole


def test_every_reason_belongs_to_one_argument_and_none_to_a_field() -> None:
    without = {"--save", "--no-rope-fusion", "--fp8-format", "--max-position-embeddings"}
    mapped = {word for word in LLAMA if word.startswith("--")} - without
    assert not [word for word in mapped if unmapped(word) is not None]
    assert unmapped("--fp8-anything-new") is not None


# Batches that grow


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 64)), min_size=1, max_size=5),
    st.integers(0, 300),
)
def test_sequences_after_iterations_are_those_of_training_step_by_step(
    stretches: list[tuple[int, int]], iterations: int
) -> None:
    places = [0]
    for length, _ in stretches[:-1]:
        places.append(places[-1] + length)
    steps = BatchSteps(tuple(zip(places, (batch for _, batch in stretches), strict=True)))
    samples = 0
    for _ in range(iterations):
        samples += [batch for place, batch in steps.steps if place <= samples][-1]
    assert steps.samples_after(iterations) == samples


@given(st.integers(1, 32), st.integers(1, 32), st.integers(1, 12), st.integers(200, 100_000))
def test_a_ramp_is_known_again_from_its_steps(start: int, increment: int, count: int, samples: int) -> None:
    ramp = BatchSteps.ramp(start, increment, samples, start + count * increment)
    assert ramp.increments() == (start, increment, samples)
    assert BatchSteps.parse(ramp.text(128), 128) == ramp
    # As in num_microbatches_calculator.py: int(consumed ÷ (samples ÷ increments)) increments are taken.
    for consumed in (0, samples // 3, samples - 1):
        batch = [each for place, each in ramp.steps if place <= consumed][-1]
        exact = consumed / (samples / count)
        assert batch - start in {increment * math.floor(exact), increment * round(exact)}


def test_suffixes_of_thresholds_are_thousands() -> None:
    assert BatchSteps.parse("0:16 2.4B:320,4.8b:624", 2048).steps == ((0, 16), (1171875, 320), (2343750, 624))


def test_a_launcher_says_how_many_accelerators_there_are() -> None:
    for words, nodes, per_node in (
        ("torchrun --nproc_per_node=4 --nnodes 2 x.py", 2, 4),
        ("srun -N 3 --ntasks-per-node=8 python x.py", 3, 8),
        ("srun --nodes=2 --gpus-per-node=h100:4 python -u x.py", 2, 4),
        ("deepspeed --num_gpus 8 --num_nodes 2 x.py", 2, 8),
        ("python -m torch.distributed.run --nproc-per-node 2 x.py", None, 2),
        ("python x.py", None, None),
    ):
        command = read_command(words.split())
        assert (command.nodes, command.per_node, command.program) == (nodes, per_node, "x.py"), words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--expert-tensor-parallel-size 1 --context-parallel-size 2", "etp·ep(2) ÷ tp·cp(4) is not whole: 0.5"),
        ("--expert-tensor-parallel-size 4", "tp(2) ÷ etp(4) is not whole: 0.5"),
    ],
)
def test_a_split_of_the_experts_that_the_backend_does_not_run_is_reported(words: str, message: str) -> None:
    imported, job = imported_job([*SMALL, *shlex.split(f"{WHOLE_EXPERTS} {words}")], [])
    (left,) = (left for left in imported.unmapped if left.argument.startswith("--expert-tensor-parallel-size"))
    assert left.effect == "is lost"
    assert left.reason.startswith(message)
    assert job.training.layout.etp is None
