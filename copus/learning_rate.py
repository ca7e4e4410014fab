"""The learning rate of the reference batch, a function of tokens. Without torch: `copus simulate` asks it too."""

import math

from copus.job import JobConfig


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
