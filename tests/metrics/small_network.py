"""A feature extractor small enough for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A random convolution, pooled to 6 features, with logits of 4 classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(6, 3, 5, 5, generator=generator) / 50)
        self.head = nn.Parameter(torch.randn(6, 4, generator=generator))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.conv2d(x / 64, self.weight, stride=3).relu().mean((2, 3))
        return features, features @ self.head
