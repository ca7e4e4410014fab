"""What one optimizer step uses: functions of tokens, batch and critical batch, equal on every rank."""

from copus.backends.step_contract import StepRules
from copus.checkpoints.trainer_state import TrainerState
from copus.job import JobConfig
from copus.learning_rate import base_lr


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
    """κ of a job: `capped_ratio` with its reference batch."""
    beyond = job.training.optimizer.scale_beyond_critical_batch
    return capped_ratio(global_batch, job.reference_batch, None if beyond else critical_batch)


def capped_ratio(global_batch: int, reference: int, critical_batch: float | None) -> float:
    """κ = B / B_ref, with B at most max(φ, B_ref). No cap without a critical batch.

    Above the critical batch φ gradients are hardly better than at φ (1812.06162), so larger steps are not either: the
    best learning rate of Adam rises like √B only below it (2405.14578). No cap while φ is unknown (None), and none on
    batches up to B_ref, for which the values were chosen.
    """
    if critical_batch is None:
        return global_batch / reference
    return min(global_batch, max(critical_batch, reference)) / reference
