"""Definition of layer norm with modulation and gated residual in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    weight, bias, scale, shift, gate = (
        None if p is None else p.to(dtype) for p in (weight, bias, scale, shift, gate)
    )
    r = x
    if residual is not None:
        r = residual.to(dtype)
        if gate is None:
            r = r + x.to(dtype)
        else:
            r = torch.addcmul(r, x.to(dtype), gate.reshape(wide))
        r = r.to(x.dtype)
    # The norm sees r as it is returned, rounded: so r is all that a backward needs.
    y = F.layer_norm(r.to(dtype), x.shape[-1:], weight, bias, eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(shift.reshape(wide), y, 1 + scale.reshape(wide))
    elif scale is not None:
        y = y * (1 + scale.reshape(wide))
    elif shift is not None:
        y = y + shift.reshape(wide)
    return y.to(x.dtype), r
