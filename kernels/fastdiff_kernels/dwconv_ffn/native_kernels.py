"""`dwconv_gelu` and `dwconv_ffn` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register
from fastdiff_kernels.dwconv_ffn import ffn as _ffn

_Maybe = Tensor | None


def supports(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32, and x is float64" if x.dtype is torch.float64 else None


def forward(
    results: Sequence[Tensor],
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    prefix: int,
    z_bias: _Maybe = None,
) -> None:
    """Fills y, like z, and taps (9, C) in float32: the weight as the kernels read it.

    Args:
        z_bias: (C,), to be added to z first.
    """
    y, taps = results
    taps.copy_(weight.reshape(weight.shape[0], 9).t())
    vectors = _native.float32(z_bias), taps, _native.float32(bias)
    torch.ops.fastdiff_native.dwconv_gelu_forward.default(
        z.contiguous(), *vectors, *grid, prefix, y
    )


def backward(
    gradients: Sequence[_Maybe],
    dy: Tensor,
    z: Tensor,
    taps: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    prefix: int,
    y: _Maybe = None,
    sum_dz: _Maybe = None,
    z_bias: _Maybe = None,
) -> None:
    """Fills those of (dz, dweight, dbias) that are there; y again; and the sum of dz over tokens.

    Args:
        dz: may be dy.
        y: to fill, like z and contiguous.
        sum_dz: (C,), to fill; only with dz.
        z_bias: as in `forward`.
    """
    dz, dweight, dbias = gradients
    z = z.contiguous()
    to_dz = dz if dz is None or dz.is_contiguous() else dz.new_empty(dz.shape)
    dtaps = None if dweight is None else torch.empty_like(taps)
    with _native.float32_buffers((dbias, sum_dz)) as sums:
        vectors = _native.float32(z_bias), taps, _native.float32(bias)
        torch.ops.fastdiff_native.dwconv_gelu_backward.default(
            dy.contiguous(), z, *vectors, *grid, prefix, y, to_dz, dtaps, *sums
        )
    if dz is not None and to_dz is not None and to_dz is not dz:
        dz.copy_(to_dz)
    if dweight is not None and dtaps is not None:
        dweight.copy_(dtaps.t().reshape(dweight.shape))


def _empty(
    z: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], prefix: int
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty((9, z.shape[2]), dtype=torch.float32)


def _backward(
    gradients: Sequence[_Maybe],
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    grid: Sequence[int],
    prefix: int,
) -> None:
    backward(gradients, dy, z, taps, bias, grid, prefix)


gelu = _register.kernel(
    "dwconv_gelu_native(Tensor z, Tensor weight, Tensor bias, SymInt[] grid, SymInt prefix) -> "
    "(Tensor y, Tensor taps)",
    empty=_empty,
    forward=forward,
    backward=_backward,
    saves=("z", "weight", "bias", "taps"),
)

ffn = _ffn.make(
    "dwconv_ffn_native",
    forward,
    backward,
    prepare=_native.huge_pages,
    in_place=True,
    takes_bias=True,
)
