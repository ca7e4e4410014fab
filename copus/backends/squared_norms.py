"""Norms of gradients, exact enough to be equal on every layout.

Long sums on a CPU are in float64: in fp32 they are off by some 1e-5, by another amount on every layout.
"""

from collections.abc import Sequence

import torch

_ROW = 1024
"""Elements added up in fp32 before float64 takes over: exact to 1e-8, and 25 times faster on a CPU than float64
throughout."""


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The norms of tensors, as 0-d tensors on their device, to some 1e-7 relative.

    On a GPU this takes one kernel per dtype: tree sums are exact enough in fp32, and with hundreds of tensors per
    micro-batch the launches would cost more than the sums. Nothing waits for the device.
    """
    if tensors and tensors[0].is_cuda:
        return list(torch._foreach_norm([tensor.detach() for tensor in tensors], 2, torch.float32))
    return [_norm_on_cpu(tensor.detach().reshape(-1)) for tensor in tensors]


def _norm_on_cpu(flat: torch.Tensor) -> torch.Tensor:
    whole = flat.numel() // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32).double()
    rest = flat[whole:].double()
    return (rows.dot(rows) + rest.dot(rest)).sqrt()


def sum_of_squares(norms: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Σ norm² as a 0-d float64 tensor on the device."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(list(norms)).to(device, torch.float64).square().sum()
