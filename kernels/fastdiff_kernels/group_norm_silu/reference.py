"""Definition of group norm with FiLM and SiLU in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    silu: bool,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    layout = torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        layout = torch.channels_last
    h = (x if skip is None else torch.cat([x, skip], 1)).to(dtype)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if not h.requires_grad and (weight.requires_grad or bias.requires_grad):
        h = h.contiguous()  # torch 2.13 crashes in the backward of channels_last without dx
    if 0 in x.shape[2:]:
        y = h + (weight + bias)[:, None, None]  # no pixels; zero gradients for both
    else:
        # Not F.group_norm: it refuses groups of one value, whose variance is plainly 0.
        y = torch.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(_image(shift, dtype), y, 1 + _image(scale, dtype))
    elif scale is not None:
        y = y * (1 + _image(scale, dtype))
    elif shift is not None:
        y = y + _image(shift, dtype)
    if silu:
        y = F.silu(y)
    return y.to(x.dtype).contiguous(memory_format=layout)


def _image(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C) as (B, C, 1, 1)."""
    return vector.to(dtype)[:, :, None, None]
