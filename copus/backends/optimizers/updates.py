"""One update of each kind of optimizer, on one parameter in fp32: see `by_region.ParameterStep`.

torch has SGD, Adafactor and Muon too. Its Adafactor works on whole tensors that one rank has, and counts the memory of
its averages in steps; its Muon knows nothing of fused matrices, nor of the AdamW beside it. Tests compare with both.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from copus.backends.optimizers.by_region import ParameterStep, Update
from copus.backends.regions import HeldWeight
from copus.optimizers import Adafactor, AdamW, Muon, is_hidden_matrix

_SMALLEST_SQUARE = 1e-30
"""ε₁ of Adafactor's paper, added to squared gradients: a row without gradients divides nothing by 0."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd polynomial of degree 5 that brings singular values near 1 (Jordan et al. 2024)."""
_NEWTON_SCHULZ_STEPS = 5


def _adamw(step: ParameterStep) -> None:
    assert isinstance(step.optimizer, AdamW)
    gradient, options = step.gradient, step.options
    beta1, beta2 = options["betas"]
    first = step.state["exp_avg"].lerp_(gradient, 1 - beta1)
    second = step.state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (second / options["correction"]).sqrt_().add_(step.optimizer.epsilon)
    step.decay_weight()
    step.weight.addcdiv_(first, scale, value=-options["lr"] / (1 - beta1 ** (options["steps"] + 1)))


def _sgd(step: ParameterStep) -> None:
    gradient = step.gradient.add_(step.weight, alpha=step.options["weight_decay"])
    step.weight.sub_(_momentum(gradient, step.state.get("momentum_buffer"), step.options), alpha=step.options["lr"])


def _signum(step: ParameterStep) -> None:
    step.decay_weight()
    average = _momentum(step.gradient, step.state.get("exp_avg"), step.options)
    step.weight.sub_(average.sign(), alpha=step.options["lr"])


def _momentum(gradient: torch.Tensor, average: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor:
    return gradient if average is None else average.lerp_(gradient, 1 - options["betas"][0])


def _adafactor(step: ParameterStep) -> None:
    """Means over rows, columns and whole tensors are those of the whole tensor, wherever its parts lie."""
    assert isinstance(step.optimizer, Adafactor)
    weight, gradient, held, options = step.weight, step.gradient, step.held, step.options
    if weight.dim() == 2:
        _scale_by_rows_and_columns(step)
    else:
        average = _averaged(step.state["exp_avg_sq"], _squares(gradient), options["betas"][1])
        gradient.mul_((average / options["correction"]).rsqrt_())
    update_sq = _sum_over_ranks(_sums_of_names(gradient.square(), held), held.row_groups + held.column_groups)
    step.decay_weight()
    for region in held.regions:
        root_mean_square = (update_sq[held.names.index(region.weight.name)] / math.prod(region.weight.shape)).sqrt()
        clipped = (root_mean_square / step.optimizer.clip_threshold).clamp(min=1.0)
        weight[region.slices].sub_(gradient[region.slices].div_(clipped), alpha=options["lr"])


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.square().add_(_SMALLEST_SQUARE)


def _scale_by_rows_and_columns(step: ParameterStep) -> None:
    """Divide the gradient of a matrix by √v̂, v̂ the product of the means over its row and over its column, over the mean
    of all (1804.04235, algorithm 4)."""
    gradient, state, held = step.gradient, step.state, step.held
    squares = _squares(gradient)
    beta2, correction = step.options["betas"][1], step.options["correction"]
    width = held.regions[0].weight.shape[1]
    of_rows = _sum_over_ranks(squares.sum(dim=1), held.column_groups) / width
    rows = _averaged(state["row_sq"], of_rows, beta2)
    heights = {region.weight.name: region.weight.shape[0] for region in held.regions}
    height = torch.tensor([heights[name] for name in held.names], dtype=torch.float32, device=gradient.device)
    of_columns = torch.zeros_like(state["column_sq"])
    for region in held.regions:
        of_columns[held.names.index(region.weight.name)] += squares[region.slices].sum(dim=0)
    del squares
    of_columns, of_all = _sums_over_ranks([of_columns, _sums_of_names(rows, held)], held.row_groups)
    columns = _averaged(state["column_sq"], of_columns / height[:, None], beta2)
    means = of_all / height
    for region in held.regions:
        number = held.names.index(region.weight.name)
        # Two factors, not one product: each may be as small as ε₁, whose square is 0.
        gradient[region.slices].mul_((rows[region.slices[0]] / means[number]).rsqrt_()[:, None])
        gradient[region.slices].mul_((columns[number] / correction).rsqrt_())


def _averaged(average: torch.Tensor, values: torch.Tensor, beta: float) -> torch.Tensor:
    """The moving average, in place. Not `lerp_`, which `torch.func.vmap` does not batch."""
    return average.mul_(beta).add_(values, alpha=1 - beta)


def _sums_of_names(values: torch.Tensor, held: HeldWeight) -> torch.Tensor:
    """This rank's sum of each tensor of the state; `values` has the parameter's rows."""
    sums = values.new_zeros(len(held.names))
    for region in held.regions:
        sums[held.names.index(region.weight.name)] += values[region.slices[: values.dim()]].sum()
    return sums


def _sum_over_ranks(values: torch.Tensor, groups: Iterable[dist.ProcessGroup]) -> torch.Tensor:
    for group in groups:
        dist.all_reduce(values, group=group)
    return values


def _sums_over_ranks(values: list[torch.Tensor], groups: Sequence[dist.ProcessGroup]) -> list[torch.Tensor]:
    """Several sums in one exchange."""
    if not groups:
        return values
    together = _sum_over_ranks(torch.cat([part.flatten() for part in values]), groups)
    sizes = [part.numel() for part in values]
    return [part.view_as(like) for part, like in zip(together.split(sizes), values, strict=True)]


def _muon(step: ParameterStep) -> None:
    """Every matrix of the state by itself, gathered from its rows in a fused one: their order does not matter, since an
    exchange of rows goes through the Newton–Schulz steps unchanged."""
    assert isinstance(step.optimizer, Muon)
    weight, held, momentum = step.weight, step.held, step.optimizer.momentum
    whole = held.regions[0].weight
    if not is_hidden_matrix(whole.name, whole.shape):
        _adamw(step)
        return
    average = step.state["exp_avg"].lerp_(step.gradient, 1 - momentum)
    ahead = step.gradient.lerp_(average, momentum)  # Nesterov's
    step.decay_weight()
    for name in held.names:
        regions = [region for region in held.regions if region.weight.name == name]
        update = orthogonal(torch.cat([ahead[region.slices] for region in regions]))
        size = 0.2 * math.sqrt(max(update.shape))
        for region, rows in zip(regions, update.split([region.box.shape[0] for region in regions]), strict=True):
            weight[region.slices].sub_(rows, alpha=step.options["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U·Vᵀ of a matrix U·S·Vᵀ, approximately: singular values come out between 0.7 and 1.2. Computed in bf16, as Muon's
    authors do; fp32 in and out."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(torch.bfloat16)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


UPDATES: dict[str, Update] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "signum": _signum,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""By kind of optimizer."""
