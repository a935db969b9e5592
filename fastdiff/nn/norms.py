"""Normalisation layers: parameters here, arithmetic in the fused ops.

Letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff import ops


class LayerNorm(nn.Module):
    """LayerNorm with the residual addition before it and the modulation after it in one op.

    r = residual + gate * x;  y = LN(r) * (1 + scale) + shift

    Args:
        dim: C.
        eps: Added to the variance.
        affine: Learned weight and bias; off where the modulation takes their place.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, residual (B, ..., C); gate, scale, shift (B, C). Returns y and r, both like x."""
        return ops.layer_norm_modulate(
            x,
            self.weight,
            self.bias,
            scale=scale,
            shift=shift,
            residual=residual,
            gate=gate,
            eps=self.eps,
        )


class GroupNormSiLU(nn.Module):
    """GroupNorm, FiLM and SiLU in one op, over one tensor or over two as if concatenated.

    y = silu(GN(cat(x, skip)) * (1 + scale) + shift), statistics in float32

    Args:
        channels: C of x and skip together.
        groups: Number of groups.
        eps: Added to the variance.
        activation: "silu", or "identity" for the norm alone.

    Raises:
        ValueError: `groups` does not divide `channels`.
    """

    def __init__(
        self, channels: int, *, groups: int = 32, eps: float = 1e-5, activation: str = "silu"
    ) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"GroupNormSiLU: groups={groups} does not divide channels={channels}")
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Tensor,
        *,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """x, skip (B, C, H, W); scale, shift (B, C). Returns (B, C, H, W)."""
        return ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            num_groups=self.groups,
            eps=self.eps,
            scale=scale,
            shift=shift,
            skip=skip,
            activation=self.activation,
        )
