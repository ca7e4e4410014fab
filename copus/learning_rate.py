"""The learning rate of the reference batch, a function of tokens. Without torch: `copus simulate` asks it too."""

import math
from collections.abc import Callable

from copus.job import WSD_DECAY_SHARE, JobConfig, TrainingConfig

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
    "exponential": lambda progress: 2 * 0.5**progress - 1,
}
"""Progress of the decay, from 0 to 1 → height above `min_lr`, from 1 to 0. Megatron has the same four for WSD and
calls 1-sqrt `minus_sqrt`."""


def base_lr(job: JobConfig, tokens: int) -> float:
    """Learning rate of the reference batch after `tokens` tokens: linear warm-up, then the decay of the job file.

    `wsd` (warm-up, stable, decay: 2404.06395, 2405.18392) stays at the peak until its decay begins; `inverse-sqrt`
    falls as √(warmup_tokens / tokens) (1706.03762, eq. 3), and no further than to `min_lr`.
    """
    training = job.training
    if tokens < training.warmup_tokens:
        # The first step must not stand still: its tokens count as half done.
        return training.lr * min(1.0, max(tokens, job.reference_batch * job.model.seq_len / 2) / training.warmup_tokens)
    if training.decay == "constant":
        return training.lr
    if training.decay == "inverse-sqrt":
        return max(training.min_lr, training.lr * math.sqrt(training.warmup_tokens / tokens))
    begin, length = decay_span(training)
    progress = min(max(tokens - begin, 0) / max(length, 1), 1.0)
    shape = (training.decay_shape or "1-sqrt") if training.decay == "wsd" else training.decay
    return training.min_lr + (training.lr - training.min_lr) * DECAY_SHAPES[shape](progress)


def decay_span(training: TrainingConfig) -> tuple[int, int]:
    """Where the decay begins, in tokens, and its length, for a decay that has an end: cosine, linear and wsd.

    That of wsd ends with the run, so that a run that is made longer before it has begun stays longer at the peak.
    """
    if training.decay == "wsd":
        length = training.decay_tokens or round(WSD_DECAY_SHARE * training.tokens)
        return training.tokens - length, length
    return training.warmup_tokens, training.decay_tokens or training.tokens - training.warmup_tokens


def lr_decay(job: JobConfig, samples_consumed: int) -> float:
    """How far the learning rate has decayed after so many sequences, over its peak; 1 during the warm-up."""
    tokens = samples_consumed * job.model.seq_len
    return 1.0 if tokens < job.training.warmup_tokens else base_lr(job, tokens) / job.training.lr
