"""torch's AdamW: what it keeps of a weight, and the right bias corrections if β2 changes from step to step."""

import math
from dataclasses import dataclass

import torch

from copus.backends.step_contract import StepRules
from copus.optimizers import AdamW

ADAM_STATISTICS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight: fp32 tensors of its shape."""


@dataclass(frozen=True)
class AdamWOptions:
    """The options of a parameter group of torch's AdamW for one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adamw_options(optimizer: AdamW, rules: StepRules, optimizer_steps: int) -> AdamWOptions:
    """Options for the step after `optimizer_steps` others that give torch the right bias corrections.

    From v = 0, v ← β2·v + (1−β2)·g² has E[v] = (1 − Π β2)·E[g²] over all steps, however β2 changed. torch divides
    by 1 − β2^t with today's β2, which is wrong once β2 has changed with the batch. With r² = (1 − Π β2) / (1 − β2^t),
    passing lr·r and ε·r turns torch's lr·m̂ / (√(v / (1−β2^t)) + ε) into the update with the right correction, and
    weight_decay/r leaves lr·weight_decay as it is. r is 1 as long as β2 is constant.
    """
    beta2 = rules.betas[1]
    product = rules.beta2_product_before(optimizer_steps) * beta2
    ratio = math.sqrt((1 - product) / (1 - beta2 ** (optimizer_steps + 1)))
    weight_decay = optimizer.weight_decay if rules.weight_decay is None else rules.weight_decay
    return AdamWOptions(rules.lr * ratio, rules.betas, optimizer.epsilon * ratio, weight_decay / ratio)


def adam_state(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state in torch's Adam: `step`, `exp_avg` and `exp_avg_sq`; zeros if it has made no step yet."""
    state = optimizer.state[param]
    if len(state) == 0:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)  # where fused AdamW wants it
        state["exp_avg"] = torch.zeros_like(param.data)
        state["exp_avg_sq"] = torch.zeros_like(param.data)
    return state
