"""Noise that depends on a picture's seed and the step alone, on whatever device it is made.

Step 0 of `fastdiff.ops.philox_normal` is x_T; step i + 1 is the noise of the sampler's i-th call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import philox_normal


def seed_tensor(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds 0..2^64-1 as (B,) int64 with the same bits.

    Raises:
        ValueError: no seeds, or one out of range.
    """
    if len(seeds) == 0:
        raise ValueError("seed_tensor: seeds must not be empty")
    for seed in seeds:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed_tensor: seeds must lie in 0..2^64-1, got {seed}")
    signed = [seed - (1 << 64) if seed >= 1 << 63 else seed for seed in seeds]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def starting_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x_T of pictures with these seeds (B,) int64: (B, *shape) float32, standard normal."""
    return philox_normal(seeds, 0, shape)


@dataclass(frozen=True)
class PhiloxNoise:
    """Step noise of a batch for the samplers' `generator`, independent of `starting_noise`.

    Args:
        seeds: (B,) int64, on the device where the noise is wanted.
    """

    seeds: Tensor

    def __call__(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of the i-th call of the network, float32, shape (B, ...)."""
        if len(shape) == 0 or shape[0] != len(self.seeds):
            raise ValueError(f"PhiloxNoise: {len(self.seeds)} seeds for the shape {tuple(shape)}")
        return philox_normal(self.seeds, i + 1, tuple(shape[1:]))
