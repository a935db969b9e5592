"""The definition of `philox_bits` and `philox_normal`, in integers of 64 bits and in float64.

Letters: B pictures; w a word of 32 bits, kept in int64; u a uniform number in (0, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words, that broadcast, to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product wraps at 64 bits, and these are the bits wanted.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32 & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def _words(seeds: Tensor, step: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """(B, blocks, 4) words of the counters (block, step, stream, 0)."""
    block = torch.arange(-(-math.prod(shape) // 4), device=seeds.device)
    seeds = seeds.unsqueeze(1)
    zero = torch.zeros_like(block)
    counter = block, step & _MASK, zero + stream, zero
    words = philox(counter, (seeds & _MASK, seeds >> 32 & _MASK))
    return torch.stack(torch.broadcast_tensors(*words), dim=2)


def _pictures(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    return blocks.flatten(1)[:, : math.prod(shape)].reshape(len(blocks), *shape)


def philox_bits(seeds: Tensor, step: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Words as int32 with the same bits."""
    words = _words(seeds, step, shape, stream)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return _pictures(signed.int(), shape)


def philox_normal(seeds: Tensor, step: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Box-Muller: of each pair of words the first gives the radius, the second the angle."""
    w, angle = _words(seeds, step, shape, stream).unflatten(2, (2, 2)).unbind(3)
    radius = torch.sqrt(-2.0 * torch.log((w.double() + 0.5) * 2.0**-32))
    # The nearest quarter of a turn, and what is left of it, exactly: so a cosine close to zero
    # has all its digits, which the cosine of a rounded angle has not.
    quarter = angle + (1 << 29) >> 30
    rest = 2.0 * math.pi * ((2 * angle + 1 - (quarter << 31)).double() * 2.0**-33)
    cos, sin = torch.cos(rest), torch.sin(rest)
    odd = quarter & 1 == 1
    cos, sin = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    scale = torch.where(quarter & 2 == 2, -radius, radius)
    return _pictures(torch.stack([scale * cos, scale * sin], dim=3).flatten(2).float(), shape)
