"""Thresholding: how samplers bring a predicted x_0 back to the range of pixels, [-1, 1].

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Threshold = Callable[[Tensor], Tensor]


def static_threshold(x0: Tensor) -> Tensor:
    """Clamp x_0 to [-1, 1]."""
    return x0.clamp(-1.0, 1.0)


def dynamic_threshold(quantile: float = 0.995) -> Threshold:
    """Clamp each picture to its own quantile of |x_0| and divide by that, where it is above 1.

    s = max(quantile of |x_0| over the picture, 1);  x_0 <- clamp(x_0, -s, s) / s

    Strong guidance saturates pixels; this moves them inwards at every step, where clamping alone
    leaves them at the border.

    Args:
        quantile: in (0, 1]; Imagen: 0.995. Between two pixels it is interpolated.

    Returns:
        A callable on x_0 (B, ...), for a sampler's `clip_x0`; float32 or float64 throughout.

    Raises:
        ValueError: quantile is out of range.

    Source: Imagen (Saharia et al. 2022), section 2.3.
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"dynamic_threshold: quantile must lie in (0, 1], got {quantile}")

    def threshold(x0: Tensor) -> Tensor:
        size = x0.abs().flatten(1)
        # Not torch.quantile: it refuses batches of more than 16 million pixels.
        place = quantile * (size.shape[1] - 1)
        below = int(place)
        low = size.kthvalue(below + 1, dim=1).values
        high = size.kthvalue(min(below + 2, size.shape[1]), dim=1).values
        limit = torch.lerp(low, high, place - below).clamp(min=1.0)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, limit), -limit) / limit

    return threshold
