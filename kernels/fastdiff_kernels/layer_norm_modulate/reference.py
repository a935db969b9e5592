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

    def parameter(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.to(dtype)

    def per_sample(p: Tensor) -> Tensor:
        return p.to(dtype).reshape(p.shape[0], *[1] * (x.ndim - 2), p.shape[1])

    r = x
    if residual is not None:
        branch = x.to(dtype) if gate is None else per_sample(gate) * x.to(dtype)
        r = (residual.to(dtype) + branch).to(x.dtype)
    # The norm sees r as it is returned, rounded, so that r is all that a backward needs.
    y = F.layer_norm(r.to(dtype), x.shape[-1:], parameter(weight), parameter(bias), eps)
    if scale is not None:
        y = y * (1 + per_sample(scale))
    if shift is not None:
        y = y + per_sample(shift)
    return y.to(x.dtype), r
