"""`dwconv_gelu` and `dwconv_ffn`: checks and choice of back end."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastdiff_kernels import _checks, _register
from fastdiff_kernels.dwconv_ffn import reference


def _check_grid(op: str, name: str, z: Tensor, grid: tuple[int, int], prefix: int) -> None:
    _checks.check_rank(op, name, z, "(B, P + H*W, C)")
    rows, columns = _checks.pair(op, "grid", grid, least=0)
    if prefix < 0:
        raise ValueError(f"{op}: prefix={prefix}; expected at least 0")
    if z.shape[1] != prefix + rows * columns:
        raise ValueError(
            f"{op}: {name} has {z.shape[1]} tokens; expected "
            f"{prefix + rows * columns} = prefix {prefix} + grid {rows} x {columns}"
        )


def _gelu_arguments(
    z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int = 0
) -> tuple[Any, ...]:
    op = "dwconv_gelu"
    dtype = _checks.dtype_of(op, {"z": z}, {"weight": weight, "bias": bias})
    _check_grid(op, "z", z, grid, prefix)
    _checks.check_shape(op, "weight", weight, (z.shape[2], 1, 3, 3))
    _checks.check_shape(op, "bias", bias, (z.shape[2],))
    return cast(Tensor, _checks.cast(z, dtype)), weight, bias, (grid[0], grid[1]), prefix


def _ffn_arguments(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    grid: tuple[int, int],
    prefix: int = 0,
) -> tuple[Any, ...]:
    op = "dwconv_ffn"
    weights = {"fc1_weight": fc1_weight, "conv_weight": conv_weight, "conv_bias": conv_bias}
    weights |= {"fc2_weight": fc2_weight}
    dtype = _checks.dtype_of(op, {"x": x}, weights, {"fc1_bias": fc1_bias, "fc2_bias": fc2_bias})
    _check_grid(op, "x", x, grid, prefix)
    D = x.shape[2]
    _checks.check_rank(op, "fc1_weight", fc1_weight, "(C, D)")
    C = fc1_weight.shape[0]
    _checks.check_shape(op, "fc1_weight", fc1_weight, (C, D))
    _checks.check_shape(op, "fc1_bias", fc1_bias, (C,))
    _checks.check_shape(op, "conv_weight", conv_weight, (C, 1, 3, 3))
    _checks.check_shape(op, "conv_bias", conv_bias, (C,))
    _checks.check_shape(op, "fc2_weight", fc2_weight, (D, C))
    _checks.check_shape(op, "fc2_bias", fc2_bias, (D,))
    x = cast(Tensor, _checks.cast(x, dtype))
    grid = (grid[0], grid[1])
    return (x, fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias, grid, prefix)


_GELU = _register.Op("dwconv_gelu", _gelu_arguments, reference.dwconv_gelu)
_GELU.add("triton", "fastdiff_kernels.dwconv_ffn.triton_kernels")
_FFN = _register.Op("dwconv_ffn", _ffn_arguments, reference.dwconv_ffn)
_FFN.add("triton", "fastdiff_kernels.dwconv_ffn.triton_ffn")
_GELU.add("native", "fastdiff_kernels.dwconv_ffn.native_kernels:gelu")
_FFN.add("native", "fastdiff_kernels.dwconv_ffn.native_kernels:ffn")


def dwconv_gelu(
    z: Tensor, weight: Tensor, bias: Tensor, *, grid: tuple[int, int], prefix: int = 0
) -> Tensor:
    """Depth-wise 3x3 convolution over a grid of tokens, then GELU, in token layout.

    y = GELU(conv3x3(z) + bias) on the H*W grid tokens, zero padding 1; y = GELU(z) on the first P
    tokens (time, label), which have no place on the grid. GELU is the exact one, by erf.

    Args:
        z: (B, P + H*W, C), float32, bfloat16, float16 (float64 on the reference); grid tokens row
            by row. May be non-contiguous or empty.
        weight: (C, 1, 3, 3), in z's dtype or float32.
        bias: (C,), likewise.
        grid: (H, W) in tokens.
        prefix: P, the number of tokens in front of the grid.

    Returns:
        (B, P + H*W, C) in z's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is no tensor, or not of a floating dtype; a weight is neither of z's
            dtype nor float32.
        ValueError: z is not 3-dimensional; its tokens are not P + H*W; a negative grid or prefix;
            weight or bias of another shape; devices differ.

    Numerics: convolution and GELU in float32; one rounding, at the end.

    Source: "Exploring Vision Transformers as Diffusion Learners", Figure 8 (DWConv-FFN).
    """
    return cast(Tensor, _GELU(z, weight, bias, grid, prefix))


def dwconv_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    grid: tuple[int, int],
    prefix: int = 0,
) -> Tensor:
    """The whole DWConv-FFN: Linear, depth-wise 3x3 convolution, GELU, Linear.

    y = fc2(dwconv_gelu(fc1(x))), on tokens; see `dwconv_gelu` for the middle.

    Args:
        x: (B, P + H*W, D), float32, bfloat16, float16 (float64 on the reference).
        fc1_weight: (C, D), in x's dtype or float32; so are all that follow.
        fc1_bias: (C,) or None.
        conv_weight: (C, 1, 3, 3).
        conv_bias: (C,).
        fc2_weight: (D, C).
        fc2_bias: (D,) or None.
        grid: (H, W) in tokens.
        prefix: P, the number of tokens in front of the grid.

    Returns:
        (B, P + H*W, D) in x's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is no tensor, or not of a floating dtype; a weight is neither of x's
            dtype nor float32.
        ValueError: x is not 3-dimensional; its tokens are not P + H*W; a negative grid or prefix;
            a weight or bias of another shape; devices differ.

    Numerics: the Linears in x's dtype (accumulation in float32), with their outputs rounded to it.

    Source: "Exploring Vision Transformers as Diffusion Learners", Figure 8 (DWConv-FFN).
    """
    weights = (fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias)
    return cast(Tensor, _FFN(x, *weights, grid, prefix))
