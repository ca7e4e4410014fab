"""Learning rate and betas of a step: functions of tokens and of the batch, with no state of their own."""

import math

from copus.backends.base import StepRules
from copus.job import JobConfig


def rules_at(job: JobConfig, samples_consumed: int, global_batch: int) -> StepRules:
    """What holds for the step that begins after `samples_consumed` sequences and takes `global_batch` of them.

    With κ = B / B_ref: lr(tokens) · κ^a (a = 0.5 for Adam: Malladi et al. 2022, 2205.10287), and β2^κ, which keeps
    β2's half-life in tokens (2507.07101, eq. for β2*). β1 stays. Adam's moments are never rescaled.
    """
    training = job.training
    kappa = global_batch / job.reference_batch
    lr = base_lr(job, samples_consumed * job.model.seq_len) * kappa**training.lr_batch_exponent
    beta1, beta2 = training.betas
    return StepRules(lr=lr, betas=(beta1, beta2**kappa if training.beta2_follows_batch else beta2))


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
