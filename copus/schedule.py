"""What one optimizer step uses: functions of tokens, batch and critical batch, equal on every rank."""

import math

from copus.backends.step_contract import StepRules
from copus.job import JobConfig
from copus.trainer_state import TrainerState


def rules_at(job: JobConfig, state: TrainerState, global_batch: int) -> StepRules:
    """Rules for the step that begins at `state` and takes `global_batch` sequences.

    The base learning rate is a function of tokens; optimizer values follow the batch by κ = `batch_ratio`, as each says
    in `copus.optimizers`. Adam's moments are never rescaled.
    """
    optimizer = job.training.optimizer
    kappa = batch_ratio(job, global_batch, state.critical_batch)
    return StepRules(
        lr=base_lr(job, state.samples_consumed * job.model.seq_len) * optimizer.lr_factor(kappa),
        betas=optimizer.betas_at(kappa),
        weight_decay=optimizer.weight_decay_at(kappa),
        beta2_product=state.beta2_product,
    )


def batch_ratio(job: JobConfig, global_batch: int, critical_batch: float | None) -> float:
    """κ = B / B_ref, with B at most max(φ, B_ref) unless the job says otherwise.

    Above the critical batch φ gradients are hardly better than at φ (1812.06162), so larger steps are not either: the
    best learning rate of Adam rises like √B only below it (2405.14578). No cap while φ is unknown (None), and none on
    batches up to B_ref, for which the job file's own values were chosen.
    """
    reference = job.reference_batch
    if critical_batch is None or job.training.optimizer.scale_beyond_critical_batch:
        return global_batch / reference
    return min(global_batch, max(critical_batch, reference)) / reference


def base_lr(job: JobConfig, tokens: int) -> float:
    """Learning rate of the reference batch after `tokens` tokens: linear warm-up, then the decay of the job file."""
    training = job.training
    if tokens < training.warmup_tokens:
        # The first step must not stand still: its tokens count as half done.
        return training.lr * min(1.0, max(tokens, job.reference_batch * job.model.seq_len / 2) / training.warmup_tokens)
    span = max(training.tokens - training.warmup_tokens, 1)
    progress = min((tokens - training.warmup_tokens) / span, 1.0)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[training.decay]
    return training.min_lr + (training.lr - training.min_lr) * left


def lr_decay(job: JobConfig, samples_consumed: int) -> float:
    """How far the learning rate has decayed after so many sequences, over its peak; 1 during the warm-up."""
    tokens = samples_consumed * job.model.seq_len
    return 1.0 if tokens < job.training.warmup_tokens else base_lr(job, tokens) / job.training.lr
