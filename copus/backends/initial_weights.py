"""The weights that training begins with: the same on every backend and in every layout."""

import hashlib
from collections.abc import Sequence

import torch

_INIT_STD = 0.02
_RESIDUAL_PROJECTIONS = ("o_proj.weight", "down_proj.weight")
"""The matrices that write to the residual stream, by the end of their names."""


def initial_weight(name: str, shape: Sequence[int], layers: int, seed: int, device: torch.device) -> torch.Tensor:
    """The whole parameter of that (Hugging Face) name at the start, fp32: a function of these arguments alone.

    Normal with standard deviation 0.02; the projections that write to the residual stream have 0.02 / √(2·layers), as
    in GPT-2. Norms start at 1, biases at 0.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name:
        return torch.ones(shape, device=device)
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator(device=device).manual_seed(number)
    std = _INIT_STD / (2 * layers) ** 0.5 if name.endswith(_RESIDUAL_PROJECTIONS) else _INIT_STD
    return torch.randn(shape, generator=generator, device=device).mul_(std)
