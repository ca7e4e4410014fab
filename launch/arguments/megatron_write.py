"""A job as Megatron-LM's arguments. Every value is written out, so that no default matters."""

import math
from typing import Literal

from copus.job import JobConfig
from copus.kernels import TRANSFORMER_ENGINE
from launch.arguments.emitted import Emitted, spelled
from launch.fixed_run import FixedRun
from profiles.latent_attention import LatentAttention
from profiles.model_shape import VOCAB_MULTIPLE, ModelShape
from profiles.pipeline_split import split_layers

Version = Literal["megatron", "megatron-0.17"]
"""From 0.18 on there is `--step-batch-size-schedule`, and `--rampup-batch-size` is ignored."""
_ACTIVATIONS = {"silu": "--swiglu", "squared_relu": "--squared-relu", "gelu_tanh": "--openai-gelu"}
_DECAYS = {"wsd": "WSD", "inverse-sqrt": "inverse-square-root"}


def megatron_arguments(job: JobConfig, run: FixedRun, version: Version = "megatron") -> Emitted:
    """The arguments of `pretrain_gpt.py` for a run, and what of the job they leave out."""
    out = Emitted()
    _model(job, out)
    _layout(job, run, out)
    _batches(job, run, version, out)
    _training(job, run, out)
    _looking(job, run, out)
    return out


def megatron_command(job: JobConfig, run: FixedRun, version: Version = "megatron") -> tuple[str, list[str]]:
    """The whole command line, for a shell, and what of the job it leaves out."""
    out, cluster = megatron_arguments(job, run, version), job.cluster
    start = f"torchrun --nproc-per-node {cluster.accelerators_per_node}"
    if cluster.nodes > 1:
        start += f" --nnodes {cluster.nodes} --rdzv-backend c10d --rdzv-endpoint $MASTER_ADDR:29500"
    # Megatron-LM wants one queue for tensor parallelism, so that communication begins in the order of the program.
    return out.command(f"CUDA_DEVICE_MAX_CONNECTIONS=1 {start} pretrain_gpt.py"), out.lost


def _model(job: JobConfig, out: Emitted) -> None:
    model = job.model
    out.group()
    out.add("--num-layers", model.layers)
    out.add("--hidden-size", model.hidden)
    out.add("--ffn-hidden-size", model.ffn_hidden)
    out.add("--num-attention-heads", model.heads)
    if model.kv_heads != model.heads:
        out.add("--group-query-attention")
        out.add("--num-query-groups", model.kv_heads)
    if model.latent_attention is not None:
        _latent_attention(model, model.latent_attention, out)
    elif model.head_dim:
        out.add("--kv-channels", model.head_dim)
    out.add("--seq-length", model.seq_len)
    out.add("--max-position-embeddings", model.seq_len)
    out.group()
    out.add("--normalization", "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm")
    out.add("--norm-epsilon", model.norm_epsilon)
    _mlp(job, out)
    if model.bias != "all":
        out.add("--disable-bias-linear")
    if model.bias == "qkv":
        out.add("--add-qkv-bias")
    if model.qk_norm == "head":
        out.add("--qk-layernorm")
    if not model.tied_embeddings:
        out.add("--untie-embeddings-and-output-weights")
    _positions(model, out)
    if model.sliding_window:
        out.add("--window-size", f"{model.sliding_window - 1},0")
        if model.full_attention_every:
            out.add("--window-attn-skip-freq", model.full_attention_every)
    out.add("--attention-dropout", job.training.dropout)
    out.add("--hidden-dropout", job.training.dropout)
    for name, usual in (
        *(("norm_position", "pre"), ("rope_local_base", None), ("attention_scale", None), ("embedding_scale", 1.0)),
        *(("attention_softcap", None), ("logit_softcap", None)),
    ):
        if (value := getattr(model, name)) != usual:
            out.lose(f"model.{name}({value}): Megatron-LM has no argument for it, and the model is another one without")
    for name, refused in (("bias", "attention"), ("qk_norm", "projection")):
        if getattr(model, name) == refused:
            out.lose(
                f"model.{name}({refused}): Megatron-LM has no argument for it, and the model is another one without"
            )


def _latent_attention(model: ModelShape, latent: LatentAttention, out: Emitted) -> None:
    out.add("--multi-latent-attention")
    if latent.query_rank:
        out.add("--q-lora-rank", latent.query_rank)
    out.add("--kv-lora-rank", latent.kv_rank)
    out.add("--qk-head-dim", model.head_width - latent.rope_dim)
    out.add("--qk-pos-emb-head-dim", latent.rope_dim)
    out.add("--v-head-dim", latent.value_dim)
    out.add("--qk-layernorm")
    out.add("--rope-type", "rope")


def _mlp(job: JobConfig, out: Emitted) -> None:
    model = job.model
    activation = model.mlp_activation
    gated = activation == "silu"
    if model.gated_mlp != gated:
        out.lose(f"model.gated_mlp({str(model.gated_mlp).lower()}) with {activation}: Megatron-LM has no such MLP")
    if activation in _ACTIVATIONS:
        out.add(_ACTIVATIONS[activation])
    if model.experts:
        out.add("--num-experts", model.experts)
        out.add("--moe-router-topk", model.experts_per_token)
        out.add("--moe-ffn-hidden-size", model.ffn_hidden)
        if job.training.kernels == TRANSFORMER_ENGINE:
            out.add("--moe-grouped-gemm")


def _positions(model: ModelShape, out: Emitted) -> None:
    if model.positions == "learned":
        out.add("--position-embedding-type", "learned_absolute")
        return
    out.add("--position-embedding-type", "rope")
    if model.rope_base.is_integer():
        out.add("--rotary-base", model.rope_base)
    else:
        out.lose(f"model.rope_base({model.rope_base}): --rotary-base takes whole numbers")
    out.add("--rotary-percent", model.rope_fraction)
    scaling = model.rope_scaling
    if scaling is None:
        return
    if model.latent_attention is not None:
        out.lose(f"model.rope_scaling of kind {scaling.kind}: not written for latent attention")
        return
    as_llama = (scaling.original_seq_len, scaling.low_freq_factor, scaling.high_freq_factor) == (8192, 1.0, 4.0)
    if scaling.kind == "linear" and scaling.factor.is_integer():
        out.add("--rotary-seq-len-interpolation-factor", scaling.factor)
    elif scaling.kind == "llama3" and as_llama:
        out.add("--use-rope-scaling")
        out.add("--rope-scaling-factor", scaling.factor)
    else:
        out.lose(f"model.rope_scaling of kind {scaling.kind}: Megatron-LM has no arguments for these values")


def _layout(job: JobConfig, run: FixedRun, out: Emitted) -> None:
    layout, model = run.layout, job.model
    out.group()
    out.add("--tensor-model-parallel-size", layout.tp)
    out.add("--pipeline-model-parallel-size", layout.pp)
    if layout.vp > 1:
        out.add("--num-virtual-stages-per-pipeline-rank", layout.vp)
    if layout.cp > 1:
        out.add("--context-parallel-size", layout.cp)
    if layout.ep > 1:
        out.add("--expert-model-parallel-size", layout.ep)
    if model.experts and layout.tp > 1:
        out.add("--expert-tensor-parallel-size", layout.expert_tp)
    if layout.sequence_parallel:
        out.add("--sequence-parallel")
    split = split_layers(model.layers, layout.pp, layout.vp)
    if split.first != split.middle or split.last != split.first:
        if layout.vp > 1:
            out.add("--account-for-embedding-in-pipeline-split")
            out.add("--account-for-loss-in-pipeline-split")
        else:
            out.add("--decoder-first-pipeline-num-layers", int(split.first))
            out.add("--decoder-last-pipeline-num-layers", int(split.last))
    if layout.zero == 1:
        out.add("--use-distributed-optimizer")
        if layout.dp_replicate > 1:
            out.add("--num-distributed-optimizer-instances", layout.dp_replicate)
    elif layout.zero == 3:
        out.add("--use-torch-fsdp2")
        out.add("--no-gradient-accumulation-fusion")
    elif layout.zero:
        out.lose(f"training.layout.zero({layout.zero}): Megatron-LM has 1, and 3 with --use-torch-fsdp2")
    if layout.recompute == "full":
        out.add("--recompute-granularity", "full")
        out.add("--recompute-method", "uniform")
        out.add("--recompute-num-layers", 1)
    elif layout.recompute == "selective":
        out.add("--recompute-granularity", "selective")
    if job.training.overlap_grad_reduce:
        out.add("--overlap-grad-reduce")


def _batches(job: JobConfig, run: FixedRun, version: Version, out: Emitted) -> None:
    out.group()
    out.add("--micro-batch-size", run.micro_batch)
    steps = run.batches
    share = run.micro_batch * run.layout.dp
    if uneven := [batch for _, batch in steps.steps if batch % share]:
        out.lose(f"a batch of {uneven[0]} is no multiple of micro-batch × dp = {share}: Megatron-LM refuses it")
    if len(steps.steps) == 1:
        out.add("--global-batch-size", steps.largest)
    elif version == "megatron":
        out.add("--step-batch-size-schedule", steps.text(job.model.seq_len))
    else:
        out.add("--global-batch-size", steps.largest)
        if ramp := steps.increments():
            out.add("--rampup-batch-size", *ramp)
        else:
            schedule = ", ".join(f"{batch} from {place} sequences" for place, batch in steps.steps)
            out.lose(f"the schedule of the batch ({schedule}): --rampup-batch-size has equal increments only")


def _training(job: JobConfig, run: FixedRun, out: Emitted) -> None:
    training, seq_len = job.training, job.model.seq_len
    out.add("--train-samples", job.total_samples)
    if training.max_minutes:
        out.add("--exit-duration-in-mins", math.ceil(training.max_minutes))
    out.add("--seed", training.seed)
    if training.has_bf16_weights:
        out.add("--bf16")
    if training.precision == "fp8":
        out.add("--fp8-format", "hybrid")
        out.add("--fp8-recipe", "tensorwise")
    elif training.precision == "mxfp8":
        out.add("--fp8-format", "e4m3")
        out.add("--fp8-recipe", "mxfp8")
    if training.kernels == TRANSFORMER_ENGINE:
        out.add("--transformer-impl", "transformer_engine")
    out.group()
    out.add("--optimizer", "adam")
    out.add("--lr", run.lr)
    out.add("--min-lr", run.min_lr)
    out.add("--lr-decay-style", _DECAYS.get(training.decay, training.decay))
    out.add("--lr-warmup-samples", training.warmup_tokens // seq_len)
    if training.decay in ("cosine", "linear") and training.decay_tokens:
        out.add("--lr-decay-samples", (training.warmup_tokens + training.decay_tokens) // seq_len)
    if training.decay == "wsd":
        from copus.learning_rate import decay_span

        shape = training.decay_shape or "1-sqrt"
        out.add("--lr-wsd-decay-samples", decay_span(training)[1] // seq_len)
        out.add("--lr-wsd-decay-style", {"1-sqrt": "minus_sqrt"}.get(shape, shape))
    out.add("--adam-beta1", run.betas[0])
    out.add("--adam-beta2", run.betas[1])
    out.add("--adam-eps", run.epsilon)
    out.add("--weight-decay", run.weight_decay)
    out.add("--clip-grad", training.clip_grad)
    if training.target_loss:
        out.lose(f"training.target_loss({training.target_loss:g}): Megatron-LM trains to the end")


def _data(job: JobConfig, out: Emitted) -> None:
    """The dataset, if it is one of Megatron-LM's."""
    data = job.data
    sources = data.source if isinstance(data.source, list) else []
    for name in ("eod_mask_loss", "reset_attention_mask", "reset_position_ids"):
        if getattr(data, name):
            out.add("--" + name.replace("_", "-"))
    if not sources or not all(source.with_name(source.name + ".idx").is_file() for source in sources):
        out.lose(
            "data: add --data-path with the prefix of a dataset that tools/preprocess_data.py made, or --mock-data"
        )
        return
    words = [str(source) for source in sources]
    if data.weights:
        words = [word for pair in zip(map(spelled, data.weights), words, strict=True) for word in pair]
    if data.held_out_source:
        out.add("--train-data-path", *words)
        out.add("--valid-data-path", *data.held_out_source)
    else:
        share = 0.05 if data.held_out_share is None else data.held_out_share
        out.add("--data-path", *words)
        out.add("--split", f"{spelled(1 - share)},{spelled(share)},0")


def _looking(job: JobConfig, run: FixedRun, out: Emitted) -> None:
    training, model = job.training, job.model
    tokens = run.main_batch * model.seq_len
    out.group()
    out.add("--vocab-size", model.vocab)
    # Megatron-LM pads to a multiple of this times tp, copus to 128 in every layout.
    out.add("--make-vocab-size-divisible-by", max(VOCAB_MULTIPLE // run.layout.tp, 1))
    if job.data.tokenizer:
        out.add("--tokenizer-type", "HuggingFaceTokenizer")
        out.add("--tokenizer-model", job.data.tokenizer)
    else:
        out.add("--tokenizer-type", "NullTokenizer")
    _data(job, out)
    out.group()
    out.add("--eval-interval", max(round(job.evaluate_every_tokens / tokens), 1))
    out.add("--eval-iters", max(math.ceil(training.evaluate_sequences / run.main_batch), 1))
    if training.checkpoint_every_tokens:
        out.add("--save-interval", max(round(training.checkpoint_every_tokens / tokens), 1))
    out.add("--distributed-timeout-minutes", math.ceil(job.launch.timeout_seconds / 60))
    if wandb := job.tracking.get("wandb"):
        for option in ("project", "entity"):
            if option in wandb:
                out.add(f"--wandb-{option}", wandb[option])
        out.add("--wandb-exp-name", job.name)
