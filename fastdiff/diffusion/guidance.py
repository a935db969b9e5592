"""Guidance of the reverse process by a condition.

Legend: B batch, C channels, H W pixels, S text positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free(
    model: Callable[..., Tensor],
    scale: float,
    *,
    context: Tensor,
    context_mask: Tensor | None = None,
    pooled: Tensor | None = None,
    y: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn a conditional model into a guided callable (x, t) for the samplers (Eq. 6).

    out = out_u + s (out_c - out_u). Eq. 6 is written for eps; x_0 and v are affine in eps at a
    given x_t, and the weights s and 1 - s sum to one, so it holds for each prediction type.

    Condition and null condition run as one batch of 2B. The null condition is a context_mask row
    that is all False, where the model puts its learned null embedding: the same tensor as the
    condition dropout of training. scale 1 makes the conditional call alone, of B, and scale 0 the
    unconditional one alone.

    Args:
        model: model(x, t, context, context_mask=, pooled=, y=) -> Tensor shaped as x.
        scale: s >= 1 (the paper's range). 0 <= s < 1 weakens the condition and warns.
        context: text features, (B, S, width).
        context_mask: (B, S) bool, True = valid; None: all positions are valid.
        pooled: (B, width), or None for the model's own masked mean. The model replaces it too
            where the mask row is all False.
        y: (B,) int64 class labels, or None; given to both halves: only the text is guided.

    Returns:
        A callable (x (B, C, H, W), t (B,)) -> guided output shaped as x. Where two outputs are
        combined, in float32 at least.

    Raises:
        ValueError: scale is negative or not finite, a shape does not fit the context's (B, S), or
            the callable is given another batch than the context's.
        TypeError: context_mask is not bool.

    Source: Ho and Salimans 2022; Eq. 6 of the paper.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"classifier_free: scale must be finite and at least 0, got {scale}")
    if scale < 1:
        warnings.warn(
            f"classifier_free: scale {scale} is below 1 and weakens the condition; "
            "the paper uses 1 and above",
            UserWarning,
            stacklevel=2,
        )
    if context.ndim != 3:
        raise ValueError(
            f"classifier_free: context must be (B, S, width), got {tuple(context.shape)}"
        )
    batch, positions, _ = context.shape
    if context_mask is None:
        context_mask = context.new_ones((batch, positions), dtype=torch.bool)
    if context_mask.dtype != torch.bool:
        raise TypeError(f"classifier_free: context_mask must be bool, got {context_mask.dtype}")
    if context_mask.shape != (batch, positions):
        raise ValueError(
            f"classifier_free: context_mask must be ({batch}, {positions}) as the context, "
            f"got {tuple(context_mask.shape)}"
        )
    for name, value in (("pooled", pooled), ("y", y)):
        if value is not None and (value.ndim == 0 or value.shape[0] != batch):
            raise ValueError(
                f"classifier_free: {name} must have the context's batch {batch}, "
                f"got {tuple(value.shape)}"
            )

    both = scale not in (0, 1)
    null_mask = torch.zeros_like(context_mask)
    if both:
        # Once here, not once per step.
        context, context_mask = _twice(context), torch.cat([context_mask, null_mask])
        pooled = None if pooled is None else _twice(pooled)
        y = None if y is None else _twice(y)
    elif scale == 0:
        context_mask = null_mask

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if x.shape[0] != batch:
            raise ValueError(f"classifier_free: x has batch {x.shape[0]}, the context has {batch}")
        if both:
            x = _twice(x)
            t = _twice(t.expand(batch))
        out = model(x, t, context, context_mask=context_mask, pooled=pooled, y=y)
        if not both:
            return out
        conditional, null = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
        return null + scale * (conditional - null)

    return guided


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])
