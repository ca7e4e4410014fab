"""A job as a configuration of DeepSpeed (`ds_config.json`)."""

import json
from typing import Any

from copus.job import JobConfig
from launch.fixed_run import FixedRun


def deepspeed_configuration(job: JobConfig, run: FixedRun) -> tuple[str, list[str]]:
    """The configuration in JSON, and what of the job it leaves out."""
    training, layout, batch = job.training, run.layout, run.main_batch
    lost = ["model and data: they are those of your program"]
    total = max(job.total_samples // batch, 1)
    warmup = max(round(training.warmup_tokens / (batch * job.model.seq_len)), 1)  # DeepSpeed has no warm-up of 0
    values: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": batch // (run.micro_batch * layout.dp),
        "gradient_clipping": training.clip_grad,
        "bf16": {"enabled": training.has_bf16_weights},
        "zero_optimization": {"stage": layout.zero, "overlap_comm": training.overlap_grad_reduce},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": run.lr,
                "betas": list(run.betas),
                "eps": run.epsilon,
                "weight_decay": run.weight_decay,
            },
        },
    }
    if training.decay == "cosine":
        parameters = {"total_num_steps": total, "warmup_num_steps": warmup, "cos_min_ratio": _ratio(run)}
        values["scheduler"] = {"type": "WarmupCosineLR", "params": {**parameters, "warmup_type": "linear"}}
    elif training.decay == "linear" and run.min_lr == 0:
        parameters = {"total_num_steps": total, "warmup_num_steps": warmup, "warmup_max_lr": run.lr}
        values["scheduler"] = {"type": "WarmupDecayLR", "params": {**parameters, "warmup_type": "linear"}}
    else:
        parameters = {"warmup_num_steps": warmup, "warmup_max_lr": run.lr}
        values["scheduler"] = {"type": "WarmupLR", "params": {**parameters, "warmup_type": "linear"}}
        if training.decay != "constant":
            lost.append(f"training.decay({training.decay}) to {run.min_lr:g}: no scheduler of DeepSpeed decays so")
    if training.decay_tokens:
        lost.append("training.decay_tokens: the decay ends with the run")
    if layout.tp > 1:
        values["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.dp_replicate > 1 and layout.zero == 3:
        values["zero_optimization"]["zero_hpz_partition_size"] = layout.dp_shard
        lost.append("training.layout.dp_replicate: ZeRO++ keeps a copy of the weights in each group, not of all state")
    elif layout.dp_replicate > 1:
        lost.append(f"training.layout.dp_replicate({layout.dp_replicate}): DeepSpeed shares out over all ranks")
    degrees = layout.model_dump(exclude_defaults=True)
    for name in ("pp", "cp", "ep", "etp"):
        if name in degrees:
            lost.append(f"training.layout.{name}({degrees[name]}): no setting of DeepSpeed, but of your program")
    if layout.recompute != "none":
        lost.append(f"training.layout.recompute({layout.recompute}): gradient_checkpointing_enable() of your model")
    return json.dumps(values, indent=2) + "\n", lost


def _ratio(run: FixedRun) -> float:
    return float(f"{run.min_lr / run.lr:.6g}")
