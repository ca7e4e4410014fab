"""A job as a configuration of Hugging Face accelerate, with FSDP2, DeepSpeed or Megatron-LM by the job's backend."""

from typing import Any

import yaml

from copus.job import JobConfig
from launch.fixed_run import FixedRun


def accelerate_configuration(job: JobConfig, run: FixedRun) -> tuple[str, list[str]]:
    """The configuration in YAML, for `accelerate launch --config_file`, and what of the job it leaves out."""
    training, layout, batch, cluster = job.training, run.layout, run.main_batch, job.cluster
    accumulation = batch // (run.micro_batch * layout.dp)
    lost = [
        "batch and optimizer, which are arguments of your program: for transformers' Trainer "
        f"--per_device_train_batch_size {run.micro_batch} --gradient_accumulation_steps {accumulation} "
        f"--learning_rate {run.lr:g} --adam_beta1 {run.betas[0]:g} --adam_beta2 {run.betas[1]:g} "
        f"--weight_decay {run.weight_decay:g} --max_grad_norm {training.clip_grad:g}",
        "model and data: they are those of your program",
    ]
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "num_machines": cluster.nodes,
        "num_processes": cluster.accelerators,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16" if training.has_bf16_weights else "no",
    }
    if training.backend == "deepspeed":
        values |= _deepspeed(job, run, accumulation)
    elif training.backend == "megatron" and (layout.tp, layout.pp, layout.zero) != (1, 1, 0):
        values |= _megatron(job, run)
    elif layout.zero or layout.tp > 1:
        values |= _fsdp(run)
    else:
        values["distributed_type"] = "MULTI_GPU"
    degrees = layout.model_dump(exclude_defaults=True)
    for name in ("cp", "ep", "vp", "etp"):
        if name in degrees:
            lost.append(f"training.layout.{name}({degrees[name]}): it is not in accelerate's configuration")
    if training.backend == "fsdp" and layout.zero in (1, 2):
        lost.append(f"training.layout.zero({layout.zero}): FSDP2 without resharding is stage 2")
    return yaml.safe_dump(values, sort_keys=False), lost


def _fsdp(run: FixedRun) -> dict[str, Any]:
    layout = run.layout
    values: dict[str, Any] = {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": layout.zero == 3,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": layout.recompute == "full",
        },
    }
    if layout.tp > 1 or layout.dp_replicate > 1:
        values["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": layout.dp_replicate,
            "parallelism_config_dp_shard_size": layout.dp // layout.dp_replicate,
            "parallelism_config_tp_size": layout.tp,
        }
    return values


def _deepspeed(job: JobConfig, run: FixedRun, accumulation: int) -> dict[str, Any]:
    return {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": run.layout.zero,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": job.training.clip_grad,
            "zero3_init_flag": run.layout.zero == 3,
        },
    }


def _megatron(job: JobConfig, run: FixedRun) -> dict[str, Any]:
    layout = run.layout
    return {
        "distributed_type": "MEGATRON_LM",
        "megatron_lm_config": {
            "megatron_lm_tp_degree": layout.tp,
            "megatron_lm_pp_degree": layout.pp,
            "megatron_lm_num_micro_batches": run.main_batch // (run.micro_batch * layout.dp),
            "megatron_lm_sequence_parallelism": layout.sequence_parallel,
            "megatron_lm_recompute_activations": layout.recompute != "none",
            "megatron_lm_use_distributed_optimizer": layout.zero == 1,
            "megatron_lm_gradient_clipping": job.training.clip_grad,
        },
    }
