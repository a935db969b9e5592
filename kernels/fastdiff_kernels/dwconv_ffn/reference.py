"""Definition of the depth-wise convolution FFN in plain PyTorch.

B batch, P prefix tokens, H W grid, D width, C hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dwconv_gelu(
    z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int
) -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    weight, bias = weight.to(dtype), bias.to(dtype)
    x = z.to(dtype)
    # (B, C, H, W) as a view: channels_last in memory, no copy.
    pixels = x[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    if 0 in grid:
        pixels = pixels + weight.sum() + bias.sum()  # no pixels; zero gradients for both
    else:
        pixels = F.conv2d(pixels, weight, bias, padding=1, groups=z.shape[2])
    y = pixels.permute(0, 2, 3, 1).flatten(1, 2)
    if prefix:
        y = torch.cat([x[:, :prefix], y], 1)
    return F.gelu(y).to(z.dtype)


def dwconv_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    grid: tuple[int, int],
    prefix: int,
) -> Tensor:
    z = _linear(x, fc1_weight, fc1_bias)
    return _linear(dwconv_gelu(z, conv_weight, conv_bias, grid, prefix), fc2_weight, fc2_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
