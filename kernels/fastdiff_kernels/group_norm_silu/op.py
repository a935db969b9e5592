"""`group_norm_silu`: checks and choice of back end."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastdiff_kernels import _checks, _register
from fastdiff_kernels.group_norm_silu import reference

_NAME = "group_norm_silu"


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Any, ...]:
    activations = {"x": x, "scale": scale, "shift": shift, "skip": skip}
    dtype = _checks.dtype_of(_NAME, activations, {"weight": weight, "bias": bias})
    _checks.check_rank(_NAME, "x", x, "(B, C, H, W)")
    B, C, H, W = x.shape
    if skip is not None:
        _checks.check_rank(_NAME, "skip", skip, "(B, C, H, W)")
        _checks.check_shape(_NAME, "skip", skip, (B, skip.shape[1], H, W))
        C = C + skip.shape[1]
    if num_groups < 1 or C % num_groups or C == 0:
        raise ValueError(f"{_NAME}: num_groups={num_groups} does not divide C={C}")
    _checks.check_shape(_NAME, "weight", weight, (C,))
    _checks.check_shape(_NAME, "bias", bias, (C,))
    _checks.check_shape(_NAME, "scale", scale, (B, C))
    _checks.check_shape(_NAME, "shift", shift, (B, C))
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps={eps}; expected at least 0")
    if activation not in ("silu", "identity"):
        raise ValueError(f"{_NAME}: activation={activation!r}; expected 'silu' or 'identity'")
    x, scale, shift, skip = (_checks.cast(t, dtype) for t in activations.values())  # type: ignore[assignment]
    return x, weight, bias, num_groups, float(eps), scale, shift, skip, activation == "silu"


_OP = _register.Op(_NAME, _arguments, reference.group_norm_silu)
_OP.add("triton", "fastdiff_kernels.group_norm_silu.triton_kernels")
_OP.add("native", "fastdiff_kernels.group_norm_silu.native_kernels")


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Group norm, FiLM and SiLU of an image, or of two images stacked along their channels.

    y = act(GN(cat([x, skip], 1); weight, bias) * (1 + scale) + shift)

    Args:
        x: (B, C1, H, W), contiguous or channels_last (others are copied), float32, bfloat16,
            float16 (float64 on the reference). May be empty.
        weight: (C,), C = C1 + C2, in x's dtype or float32.
        bias: (C,), likewise.
        num_groups: number of groups; divides C. Groups may straddle x and skip.
        eps: added to the variance.
        scale: (B, C) in x's dtype, or None for 0.
        shift: (B, C) in x's dtype, or None for 0.
        skip: (B, C2, H, W) in x's dtype, or None.
        activation: "silu" or "identity".

    Returns:
        (B, C, H, W) in x's dtype, under autocast in the autocast dtype; channels_last where x is
        channels_last and not contiguous as well, else contiguous.

    Raises:
        TypeError: an argument is no tensor, or not of a floating dtype; scale, shift or skip is not
            of x's dtype; weight or bias is neither of x's dtype nor float32.
        ValueError: x or skip is not 4-dimensional; skip's B, H, W differ from x's; num_groups does
            not divide C; weight, bias, scale or shift of another shape; a negative eps; another
            activation; devices differ.

    Numerics: statistics (biased variance) and all that follows in float32; one rounding, at the
    end. A group of equal values gives its bias.

    Source: Group Normalization (Wu & He 2018); the scale-shift norm of ADM (Dhariwal & Nichol
    2021), which ASCEND's ResBlocks use ("Exploring Vision Transformers as Diffusion Learners",
    B.2).
    """
    return cast(Tensor, _OP(x, weight, bias, num_groups, eps, scale, shift, skip, activation))
