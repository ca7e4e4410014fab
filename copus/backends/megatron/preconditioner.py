"""Adam's scaling of the coordinates, as weights for the norms of gradients (Pollux, OSDI'21, §3.1)."""

from typing import Any

import torch
import torch.distributed as dist

from copus.backends.megatron import cpu
from copus.backends.megatron.experts import is_shared_out
from copus.backends.megatron.main_params import main_params, shares_out_moments

cpu.before_import()
from megatron.core import parallel_state  # noqa: E402

Weights = dict[torch.nn.Parameter, torch.Tensor]


class Preconditioner:
    """1 / (√v̂ + ε) of every coordinate. v̂ is from before the step: independent of the step's gradients, so the
    estimates stay unbiased.

    A coordinate without any gradient so far (the embedding of an unseen token) has no scale; its weight is 0.
    """

    def __init__(self, params: list[torch.nn.Parameter], optimizer: Any, epsilon: float) -> None:
        self._params = params
        self._optimizer = optimizer
        self._epsilon = epsilon

    @torch.no_grad()
    def weights(self, correction: float) -> tuple[Weights, Weights] | None:
        """Weights by parameter of the model (whole) and by parameter of the optimizer (this rank's share). v̂ is Adam's
        second moment divided by `correction` = 1 − Π β2.

        None before the first optimizer step. If the moments are sharded over data-parallel ranks, this is collective
        over them and gathers an fp32 tensor as large as the model.
        """
        if correction == 0:
            return None
        of_main: Weights = {}
        whole: Weights = {}
        pieces: list[tuple[torch.nn.Parameter, int, torch.Tensor]] = []
        for param, main, _, state, start, _ in main_params(self._optimizer):
            if not state:
                continue
            weight = _weight(state["exp_avg_sq"], correction, self._epsilon)
            of_main[main] = weight
            if start is None:
                whole[param] = weight
            else:
                pieces.append((param, start, weight))
        if shares_out_moments(self._optimizer):
            groups = {
                False: parallel_state.get_data_parallel_group(with_context_parallel=True),
                True: parallel_state.get_expert_data_parallel_group(),
            }
            for of_experts, group in groups.items():
                params = [param for param in self._params if is_shared_out(param) == of_experts]
                own = [piece for piece in pieces if is_shared_out(piece[0]) == of_experts]
                whole |= _gather(params, own, group) if params else {}
        return (whole, of_main) if whole else None


def _gather(
    params: list[torch.nn.Parameter],
    pieces: list[tuple[torch.nn.Parameter, int, torch.Tensor]],
    group: dist.ProcessGroup,
) -> Weights:
    """The weights of whole parameters, from the ranges of them that the ranks of a group own; empty if none has any."""
    offsets, total = {}, 0
    for param in params:
        offsets[param] = total
        total += param.numel()
    flat = torch.zeros(total + 1, dtype=torch.float32, device=params[0].device)
    for param, start, weight in pieces:
        begin = offsets[param] + start
        flat[begin : begin + weight.numel()] = weight.view(-1)
    flat[-1] = len(pieces)
    dist.all_reduce(flat, group=group)
    if flat[-1] == 0:
        return {}
    return {param: flat[offsets[param] : offsets[param] + param.numel()].view(param.shape) for param in params}


def _weight(moment: torch.Tensor, correction: float, epsilon: float) -> torch.Tensor:
    scale = (moment / correction).sqrt_().add_(epsilon)
    return torch.where(moment > 0, 1 / scale, 0.0)
