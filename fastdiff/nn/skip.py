"""Reading a second input as if it were concatenated to the first, without the concatenation.

Letters: B batch, C channels, D width, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_of_two(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear of cat(x, skip): a product, and a second one that accumulates onto its result.

    x (..., D1), skip (..., D2), weight (D, D1 + D2), bias (D,) or None, to (..., D).

    Numerics: The first product is rounded to the result's dtype before the second adds to it.
    """
    # One `split`: its backward is one concatenation; slices would fill two tensors and add them.
    first, second = weight.split((x.shape[-1], skip.shape[-1]), dim=1)
    # On rows, so that the result is no view: an in-place step on a view copies in its backward.
    out = F.linear(x.reshape(-1, x.shape[-1]), first, bias)
    rows = skip.reshape(-1, skip.shape[-1])
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # passes over what is in place
        rows, second = rows.to(out.dtype), second.to(out.dtype)
    if torch.is_grad_enabled():
        out.addmm_(rows, second.t())
    else:  # the same in memory, under the name that PyTorch's FLOP counter knows
        torch.addmm(out, rows, second.t(), out=out)
    return out.view(*x.shape[:-1], out.shape[-1])


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
        return linear_of_two(x, skip, self.weight, self.bias)


class SkipConnection(nn.Conv2d):
    """1x1 convolution of cat(x, skip) as two products that accumulate.

    Args:
        in_channels: Channels of x and skip together.
        out_channels: C.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C1, H, W), skip (B, C2, H, W) or None, to (B, C, H, W), like x in memory."""
        if skip is None:
            return super().forward(x)
        if all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, skip)):
            pixels = x.permute(0, 2, 3, 1), skip.permute(0, 2, 3, 1)
            return linear_of_two(*pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        split = x.shape[1]
        out = F.conv2d(x, self.weight[:, :split], self.bias)
        return out + F.conv2d(skip, self.weight[:, split:])
