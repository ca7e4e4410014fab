"""The torch optimizer of a job: made, told the values of a step, and its state found. The same on every backend."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from copus.backends.adamw import adamw_options
from copus.backends.optimizers.by_region import RegionOptimizer
from copus.backends.optimizers.updates import UPDATES
from copus.backends.regions import HeldWeight
from copus.backends.step_contract import StepRules
from copus.job import TrainingConfig
from copus.optimizers import SGD, AdamW


def make_optimizer(
    training: TrainingConfig, groups: Sequence[Mapping[str, Any]], held: Mapping[torch.nn.Parameter, HeldWeight]
) -> torch.optim.Optimizer:
    """An optimizer of the job's kind over groups of parameters; `step_options` gives its values before each step.

    torch's own, fused, for AdamW and SGD of fp32 parameters. Everything else needs to know what the parameters consist
    of (`held`; not needed for updates that treat every element alike).
    """
    optimizer, parameters = training.optimizer, [dict(group) for group in groups]
    if optimizer.kind == "adamw" and training.has_fp32_weights:
        return torch.optim.AdamW(parameters, lr=0.0, fused=True)
    if optimizer.kind == "sgd" and training.has_fp32_weights:
        return _sgd(parameters, with_momentum=optimizer.momentum > 0)
    return RegionOptimizer(parameters, UPDATES[optimizer.kind], held, optimizer, training.seed)


def _sgd(parameters: list[dict[str, Any]], *, with_momentum: bool) -> torch.optim.SGD:
    """torch's SGD with a momentum that begins at 0. Where there is no buffer yet, torch begins with the first gradient:
    a job that moved, or wrote a checkpoint, before its first step would go on otherwise than one that did not."""
    optimizer = torch.optim.SGD(parameters, lr=0.0, fused=True)
    if with_momentum:
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param.data)
    return optimizer


def step_options(training: TrainingConfig, rules: StepRules, optimizer_steps: int) -> dict[str, Any]:
    """Values for the groups of `make_optimizer`'s optimizer, for the step after `optimizer_steps` others."""
    optimizer = training.optimizer
    weight_decay = optimizer.weight_decay if rules.weight_decay is None else rules.weight_decay
    if type(optimizer) is AdamW and training.has_fp32_weights:
        return vars(adamw_options(optimizer, rules, optimizer_steps))
    if isinstance(optimizer, SGD) and training.has_fp32_weights:
        momentum = rules.betas[0]
        return {"lr": rules.lr, "momentum": momentum, "dampening": momentum, "weight_decay": weight_decay}
    return {
        "lr": rules.lr,
        "betas": rules.betas,
        "weight_decay": weight_decay,
        "steps": optimizer_steps,
        "correction": 1 - rules.beta2_product_before(optimizer_steps) * rules.betas[1],
    }


def count_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Give every state that counts steps, which is torch's AdamW's, a counter of its own with that many."""
    for param, state in optimizer.state.items():
        if "step" in state:
            state["step"] = torch.full((), float(steps), dtype=torch.float32, device=param.device)
