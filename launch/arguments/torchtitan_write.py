"""A job as torchtitan's arguments (0.2.2): layout, batch, learning rate. The model is that of `--model.flavor`."""

from copus.job import JobConfig
from launch.arguments.emitted import Emitted
from launch.fixed_run import FixedRun

_DECAYS = {"linear": "linear", "cosine": "cosine"}
_SHAPES = {"linear": "linear", "cosine": "cosine", "1-sqrt": "sqrt"}


def torchtitan_command(job: JobConfig, run: FixedRun) -> tuple[str, list[str]]:
    """The command line, and what of the job it leaves out."""
    out = Emitted()
    _layout(job, run, out)
    _training(job, run, out)
    out.lose("model: choose the --model.name and --model.flavor with these sizes; torchtitan knows models by name")
    out.lose("data: add --training.dataset_path")
    cluster = job.cluster
    start = f"torchrun --nproc-per-node {cluster.accelerators_per_node} --nnodes {cluster.nodes} -m torchtitan.train"
    return out.command(start), out.lost


def _layout(job: JobConfig, run: FixedRun, out: Emitted) -> None:
    layout = run.layout
    out.group()
    # torchtitan shares out optimizer state, gradients and weights together (FSDP2), or none of them.
    shards = layout.dp // layout.dp_replicate if layout.zero else 1
    out.add("--parallelism.data_parallel_replicate_degree", layout.dp // shards)
    out.add("--parallelism.data_parallel_shard_degree", shards)
    out.add("--parallelism.fsdp_reshard_after_forward", "always" if layout.zero == 3 else "never")
    out.add("--parallelism.tensor_parallel_degree", layout.tp)
    out.add("--parallelism.pipeline_parallel_degree", layout.pp)
    out.add("--parallelism.context_parallel_degree", layout.cp)
    if layout.ep > 1:
        out.add("--parallelism.expert_parallel_degree", layout.ep)
        if layout.tp > 1:
            out.add("--parallelism.expert_tensor_parallel_degree", layout.expert_tp)
        if layout.expert_tp not in (1, layout.tp):
            out.lose(f"training.layout.etp({layout.etp}): torchtitan splits experts by tp, or not at all")
    if layout.zero == 1:
        out.lose("training.layout.zero(1): FSDP2 reduces gradients into shards too, which is stage 2")
    if layout.tp > 1 and not layout.sequence_parallel:
        out.lose(
            "training.layout.sequence_parallel(false): torchtitan always splits sequences over tensor parallel ranks"
        )
    if layout.vp > 1:
        out.add("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B")
        out.add("--parallelism.pipeline_parallel_layers_per_stage", -(-job.model.layers // (layout.pp * layout.vp)))
    out.add("--activation_checkpoint.mode", layout.recompute)
    if layout.recompute == "selective":
        out.lose("training.layout.recompute(selective): torchtitan's selective recomputes more than attention")


def _training(job: JobConfig, run: FixedRun, out: Emitted) -> None:
    training, batch, seq_len = job.training, run.main_batch, job.model.seq_len
    steps = max(job.total_samples // batch, 1)
    tokens = batch * seq_len
    # With a pipeline the local batch is all that a replica does in a step, and the micro-batch a part of it.
    pipeline = run.layout.pp > 1
    out.group()
    out.add("--training.local_batch_size", batch // run.layout.dp if pipeline else run.micro_batch)
    if pipeline:
        out.add("--parallelism.pipeline_parallel_microbatch_size", run.micro_batch)
    out.add("--training.global_batch_size", batch)
    out.add("--training.seq_len", seq_len)
    out.add("--training.steps", steps)
    out.add("--debug.seed", training.seed)
    out.add("--training.max_norm", training.clip_grad)
    out.add("--training.mixed_precision_param", "bfloat16" if training.has_bf16_weights else "float32")
    out.group()
    out.add("--optimizer.name", "AdamW")
    out.add("--optimizer.lr", run.lr)
    out.add("--optimizer.beta1", run.betas[0])
    out.add("--optimizer.beta2", run.betas[1])
    out.add("--optimizer.eps", run.epsilon)
    out.add("--optimizer.weight_decay", run.weight_decay)
    out.add("--lr_scheduler.warmup_steps", round(training.warmup_tokens / tokens))
    out.add("--lr_scheduler.min_lr_factor", float(f"{run.min_lr / run.lr:.6g}"))
    _decay(job, out)


def _decay(job: JobConfig, out: Emitted) -> None:
    from copus.learning_rate import decay_span

    training = job.training
    if training.decay == "constant":
        out.add("--lr_scheduler.decay_ratio", 0.0)
        return
    shape = (training.decay_shape or "1-sqrt") if training.decay == "wsd" else training.decay
    if shape not in _SHAPES:
        out.lose(f"training.decay({shape}): torchtitan decays linearly, as a cosine or as 1 − √")
        return
    begin, length = decay_span(training)
    out.add("--lr_scheduler.decay_type", _SHAPES[shape])
    out.add("--lr_scheduler.decay_ratio", float(f"{length / training.tokens:.6g}"))
    if begin + length != training.tokens:
        out.lose("training.decay_tokens: torchtitan's decay ends with the run")
