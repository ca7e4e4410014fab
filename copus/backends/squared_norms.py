"""Norms of gradients, exact enough to be equal on every layout.

Long sums on a CPU are in float64: in fp32 they are off by some 1e-5, by another amount on every layout.
"""

from collections.abc import Sequence

import torch

_ROW = 1024
"""Elements added up in fp32 before float64 takes over: exact to 1e-8, and 25 times faster on a CPU than float64
throughout."""


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Norms of tensors, or on a CPU of rows of them: vectors on their device, whose squares add up to |tensors|².
    For `sum_of_squares`.

    On a GPU this takes one kernel per dtype: tree sums are exact enough in fp32, and with hundreds of tensors per
    micro-batch the launches would cost more than the sums. Nothing waits for the device. On a CPU it takes one call or
    two for a tensor, since for small ones the calls cost more than the sums too.
    """
    if tensors and tensors[0].is_cuda:
        whole = torch._foreach_norm([tensor.detach() for tensor in tensors], 2, _precision(tensors[0]))
        return [norm.view(1) for norm in whole]
    return [row_norms for tensor in tensors for row_norms in _on_cpu(tensor.detach().reshape(-1))]


def _on_cpu(flat: torch.Tensor) -> list[torch.Tensor]:
    whole = flat.numel() // _ROW * _ROW
    rows = [flat[:whole].view(-1, _ROW)] if whole else []
    rest = [flat[whole:].view(1, -1)] if whole < flat.numel() else []
    precision = _precision(flat)
    return [torch.linalg.vector_norm(part, dim=1, dtype=precision) for part in rows + rest]


def _precision(tensor: torch.Tensor) -> torch.dtype:
    """fp32 for all but float64, whose norms torch does not take in less."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.float32


def sum_of_squares(norms: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Σ norm² as a 0-d float64 tensor on the device."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    all_norms = torch.cat(list(norms)).to(device, torch.float64)
    return all_norms.dot(all_norms)
