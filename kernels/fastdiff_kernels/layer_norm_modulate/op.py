"""`layer_norm_modulate`: checks and choice of back end."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastdiff_kernels import _checks, _register
from fastdiff_kernels.layer_norm_modulate import reference

_NAME = "layer_norm_modulate"


def _arguments(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    activations = {"x": x, "scale": scale, "shift": shift, "residual": residual, "gate": gate}
    dtype = _checks.dtype_of(_NAME, activations, {}, {"weight": weight, "bias": bias})
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}; expected (B, ..., C), C >= 1")
    B, C = x.shape[0], x.shape[-1]
    _checks.check_shape(_NAME, "weight", weight, (C,))
    _checks.check_shape(_NAME, "bias", bias, (C,))
    _checks.check_shape(_NAME, "scale", scale, (B, C))
    _checks.check_shape(_NAME, "shift", shift, (B, C))
    _checks.check_shape(_NAME, "residual", residual, tuple(x.shape))
    if gate is not None and residual is None:
        raise ValueError(f"{_NAME}: gate is given without residual; expected both or no gate")
    _checks.check_shape(_NAME, "gate", gate, (B, C))
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps={eps}; expected at least 0")
    x, scale, shift, residual, gate = (_checks.cast(t, dtype) for t in activations.values())  # type: ignore[assignment]
    return x, weight, bias, scale, shift, residual, gate, float(eps)


_OP = _register.Op(_NAME, _arguments, reference.layer_norm_modulate)
_OP.add("triton", "fastdiff_kernels.layer_norm_modulate.triton_kernels")
_OP.add("native", "fastdiff_kernels.layer_norm_modulate.native_kernels")


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Gated residual add, layer norm and modulation: one step of an adaptive-norm transformer.

    r = residual + gate * x (r = x without residual, gate = 1 without gate);
    y = LN(r; weight, bias) * (1 + scale) + shift

    Args:
        x: (B, ..., C), float32, bfloat16, float16 (float64 on the reference): the branch to add, or
            without residual the stream itself. May be non-contiguous or empty.
        weight: (C,) in x's dtype or float32, or None for 1.
        bias: (C,), likewise, or None for 0.
        scale: (B, C) in x's dtype, or None for 0.
        shift: (B, C) in x's dtype, or None for 0.
        residual: the shape and dtype of x, or None.
        gate: (B, C) in x's dtype, or None for 1; only with residual.
        eps: added to the variance.

    Returns:
        (y, r), each the shape and dtype of x; under autocast in the autocast dtype. Without
        residual r is x itself (cast, under autocast).

    Raises:
        TypeError: an argument is no tensor, or not of a floating dtype; scale, shift, residual or
            gate is not of x's dtype; weight or bias is neither of x's dtype nor float32.
        ValueError: x has fewer than two dimensions or no channels; weight, bias, scale, shift,
            residual or gate of another shape; gate without residual; a negative eps; devices
            differ.

    Numerics: r is computed in float32 and rounded to x's dtype; statistics (biased variance) of the
    rounded r, and all that follows, in float32.

    Source: Layer Normalization (Ba et al. 2016); the adaptive norm with zero-initialised gate of
    DiT (Peebles & Xie 2023), which ASCEND's Swin layers use.
    """
    y, r = _OP(x, weight, bias, scale, shift, residual, gate, eps)
    return cast(Tensor, y), cast(Tensor, r)
