"""Trains one cell of `benchmarks.small_batch`: a transformers Llama in this process, with a job's own updates."""

import functools
import math
from pathlib import Path
from typing import Literal

import torch

from copus.backends.huggingface import build_causal_lm, mean_loss
from copus.backends.initial_weights import initial_weight
from copus.backends.optimizers.build import make_optimizer, step_options
from copus.backends.regions import HeldWeight, Region
from copus.backends.step_contract import Batches, StepRules
from copus.data.prepared import prepared_path
from copus.data.samples import SampleReader
from copus.job import JobConfig
from copus.learning_rate import base_lr
from copus.optimizers import Optimizer
from copus.reshard.boxes import Box
from copus.reshard.table import Field

DIVERGED = 20.0
"""Nats a token after which a run is given up."""


def train(job: JobConfig, optimizer: Optimizer, batch: int, lr: float, seed: int) -> float:
    """Held-out loss in nats per token after all tokens of the job; infinite if training diverged."""
    torch.set_num_threads(1)
    training = job.training.model_copy(update={"optimizer": optimizer, "seed": seed})
    prepared, seq_len = prepared_path(job), job.model.seq_len
    train_batches = _batches(prepared, "train", seq_len, job.total_samples, seed)
    valid = _batches(prepared, "valid", seq_len, job.training.evaluate_sequences, 0)
    model = _model(job, seed)
    held = {param: _whole(name, param) for name, param in model.named_parameters()}
    groups = [
        {"params": [param for param in held if (param.dim() > 1) is decays], "decays": decays}
        for decays in (True, False)
    ]
    updates = make_optimizer(training, groups, held)
    kappa, product = batch / job.reference_batch, 1.0
    for step, first in enumerate(range(0, job.total_samples // batch * batch, batch)):
        loss = mean_loss(model, *train_batches(first, batch))
        if not loss.item() < DIVERGED:
            return math.inf
        model.zero_grad()
        loss.backward()
        rules = StepRules(
            lr=lr * base_lr(job, first * seq_len),
            betas=optimizer.betas_at(kappa),
            weight_decay=optimizer.weight_decay_at(kappa),
            beta2_product=product,
        )
        for group in updates.param_groups:
            group.update(step_options(training, rules, step))
            group["weight_decay"] *= group["decays"]
        updates.step()
        product *= rules.betas[1]
    with torch.no_grad():
        final = mean_loss(model, *valid(0, job.training.evaluate_sequences)).item()
    return final if final < DIVERGED else math.inf


@functools.lru_cache(maxsize=8)
def _batches(prepared: Path, side: Literal["train", "valid"], seq_len: int, sequences: int, seed: int) -> Batches:
    return SampleReader(prepared, side, seq_len, sequences, seed).batch


def _model(job: JobConfig, seed: int) -> torch.nn.Module:
    device = torch.device("cpu")
    model: torch.nn.Module = build_causal_lm(job.model, torch.float32, device, seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(initial_weight(name, param.shape, job.model.layers, seed, device))
    return model


def _whole(name: str, param: torch.Tensor) -> HeldWeight:
    shape = tuple(param.shape)
    return HeldWeight(shape, (Region(Box.whole(shape), Field(name, "float32", shape), (0,) * len(shape)),))
