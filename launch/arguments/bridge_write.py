"""A job as overrides of a Megatron-Bridge recipe: arguments of Megatron-LM by the names of its fields."""

from collections.abc import Iterator

from copus.job import JobConfig
from launch.arguments.megatron_write import megatron_arguments
from launch.fixed_run import FixedRun

_SECTIONS = {
    "train": "micro-batch-size global-batch-size train-samples exit-duration-in-mins",
    "validation": "eval-interval eval-iters",
    "optimizer": "lr min-lr adam-beta1 adam-beta2 adam-eps weight-decay clip-grad optimizer",
    "scheduler": "lr-decay-style lr-warmup-samples lr-decay-samples lr-wsd-decay-samples lr-wsd-decay-style",
    "rng": "seed",
    "tokenizer": "tokenizer-type tokenizer-model vocab-size",
    "dataset": "data-path split eod-mask-loss reset-attention-mask reset-position-ids",
    "checkpoint": "save-interval",
    "logger": "wandb-project wandb-entity wandb-exp-name",
    "dist": "distributed-timeout-minutes",
    "ddp": "use-distributed-optimizer overlap-grad-reduce num-distributed-optimizer-instances",
}
"""Section → arguments whose fields it has; those of the model have all others."""
_SECTION = {f"--{name}": section for section, names in _SECTIONS.items() for name in names.split()}
_FIELDS = {
    "--norm-epsilon": "layernorm_epsilon",
    "--num-experts": "num_moe_experts",
    "--num-virtual-stages-per-pipeline-rank": "virtual_pipeline_model_parallel_size",
    "--decoder-first-pipeline-num-layers": "num_layers_in_first_pipeline_stage",
    "--decoder-last-pipeline-num-layers": "num_layers_in_last_pipeline_stage",
    "--rotary-seq-len-interpolation-factor": "seq_len_interpolation_factor",
}
"""Arguments whose field has another name."""
_FLAGS = {
    "--disable-bias-linear": ("model.add_bias_linear=false",),
    "--untie-embeddings-and-output-weights": ("model.share_embeddings_and_output_weights=false",),
    "--swiglu": ("model.gated_linear_unit=true",),
    "--squared-relu": (),
    "--openai-gelu": (),
    "--use-rope-scaling": ("model.rope_scaling=true",),
    "--group-query-attention": (),
    "--max-position-embeddings": (),
    "--step-batch-size-schedule": (),
    "--train-data-path": (),
    "--valid-data-path": (),
    "--use-torch-fsdp2": ("dist.use_torch_fsdp2=true",),
    "--no-gradient-accumulation-fusion": ("model.gradient_accumulation_fusion=false",),
    "--bf16": ("mixed_precision=bf16_mixed",),
    "--fp8-format": (),
    "--fp8-recipe": (),
}
"""Arguments that are said otherwise."""


def bridge_command(job: JobConfig, run: FixedRun) -> tuple[str, list[str]]:
    """The overrides, one group a line, to be put behind the recipe of the model, and what of the job they leave out."""
    out = megatron_arguments(job, run)
    lines = [" ".join(word for name, values in group.items() for word in _words(name, values)) for group in out.groups]
    lost = [sentence.replace("Megatron-LM", "Megatron-Bridge") for sentence in out.lost]
    if "--step-batch-size-schedule" in out.arguments:
        schedule = out.arguments["--step-batch-size-schedule"][0]
        lost.append(f"the schedule of the batch ({schedule}): Megatron-Bridge has one batch if it counts samples")
    if job.data.held_out_source and "--valid-data-path" in out.arguments:
        lost.append("data.held_out_source: it is dataset.blend_per_split of the recipe, as data.source is then")
    lost.append(f"model.activation({job.model.mlp_activation}): it is code there, model.activation_func of the recipe")
    cluster = job.cluster
    start = f"torchrun --nproc-per-node {cluster.accelerators_per_node} --nnodes {cluster.nodes} RECIPE.py"
    own = f"dataset.seq_length={job.model.seq_len} model.vocab_size=null"  # else the recipe's, and not the tokenizer's
    return " \\\n  ".join([start, *lines, own]) + "\n", lost


def _words(name: str, values: list[str]) -> Iterator[str]:
    if name in _FLAGS:
        yield from _FLAGS[name]
        return
    field = _FIELDS.get(name, name.removeprefix("--").replace("-", "_"))
    is_list = name == "--window-size" or len(values) > 1
    value = f"[{','.join(values)}]" if is_list else "".join(values) or "true"
    yield f"{_SECTION.get(name, 'model')}.{field}={value}"
