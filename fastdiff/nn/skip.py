"""Reading a second input as if it were concatenated to the first, without the concatenation.

Letters: B batch, C channels, D width, H W pixels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SkipLinear(nn.Linear):
    """Linear of cat(x, skip) as two products that accumulate.

    Args:
        in_features: Width of x and skip together.
        out_features: D.
    """

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (..., D1), skip (..., D2) or None, to (..., D)."""
        if skip is None:
            return super().forward(x)
        split = x.shape[-1]
        out = F.linear(x, self.weight[:, :split], self.bias)
        return out + F.linear(skip, self.weight[:, split:])


class SkipConnection(nn.Conv2d):
    """1x1 convolution of cat(x, skip) as two products that accumulate.

    Args:
        in_channels: Channels of x and skip together.
        out_channels: C.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C1, H, W), skip (B, C2, H, W) or None, to (B, C, H, W)."""
        if skip is None:
            return super().forward(x)
        split = x.shape[1]
        out = F.conv2d(x, self.weight[:, :split], self.bias)
        return out + F.conv2d(skip, self.weight[:, split:])
