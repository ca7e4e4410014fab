"""Stochastic rounding of fp32 numbers to bf16 (2507.07101, section on bf16 weights; Gupta et al. 2015, 1502.02551).

A number between two neighbours of bf16 becomes the upper one with the probability that makes the mean exact. The random
bits of an element are a function of seed, step, name of the tensor and place in the whole tensor alone (a counter-based
generator), so that every layout rounds alike.
"""

import hashlib

import torch

from copus.backends.regions import HeldWeight, Region

_AT_ONCE = 2**20
"""Elements whose random bits, 8 bytes each, are made at once."""
_KEPT = -(1 << 16)
"""The bits of an fp32 number that bf16 has: sign, exponent and 7 of the mantissa."""


def round_stochastically(weight: torch.Tensor, rounded: torch.Tensor, held: HeldWeight, seed: int, steps: int) -> None:
    """Write an fp32 tensor into a bf16 one of its shape, at the step after `steps` others. Numbers that are not finite
    stay what they are. `weight` is used up."""
    for region in held.regions:
        source, target = weight[region.slices], rounded[region.slices]
        key = _key(seed, steps, region.weight.name)
        rows = max(1, _AT_ONCE // max(1, source[0].numel() if source.dim() else 1))
        for first in range(0, len(source), rows):
            part = source[first : first + rows]
            target[first : first + rows] = _rounded(part, random_16_bits(key, _indices(region, first, part)))


def _rounded(weight: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Adding uniform bits below those that are kept carries over with the probability of what is cut off."""
    moved = random.add_(weight.contiguous().view(torch.int32)).bitwise_and_(_KEPT).view(torch.float32)
    return torch.where(weight.isfinite(), moved, weight).to(torch.bfloat16)


def _key(seed: int, steps: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{steps}/{name}".encode()).digest()[:8], "little", signed=True)


def _indices(region: Region, first: int, part: torch.Tensor) -> torch.Tensor:
    """Numbers of a region's elements, from row `first` on, in the flattened whole tensor: int64 of the part's shape."""
    index = torch.zeros((), dtype=torch.int64, device=part.device)
    stride = 1
    for axis in reversed(range(part.dim())):
        start = region.offset[axis] + (first if axis == 0 else 0)
        along = torch.arange(start, start + part.shape[axis], device=part.device) * stride
        index = index + along.view(-1, *[1] * (part.dim() - 1 - axis))
        stride *= region.weight.shape[axis]
    return index


def random_16_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """16 uniform bits for each index (int64, which is used up), as int32: SplitMix64 (Steele et al. 2014), whose state
    after n steps is a multiple of n and need not be walked to."""
    z = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_(_shifted(z, bits)).mul_(_signed(factor))
    return _shifted(z, 48).to(torch.int32)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted right as an unsigned number."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """An unsigned 64-bit constant as torch's int64 has it: products wrap around alike."""
    return constant - (1 << 64)
