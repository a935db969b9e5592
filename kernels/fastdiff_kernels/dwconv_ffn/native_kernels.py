"""`dwconv_gelu` and `dwconv_ffn` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register

_Maybe = Tensor | None


def supports(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32, and x is float64" if x.dtype is torch.float64 else None


def gelu(z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    y: Tensor = _gelu(z.contiguous(), weight, bias, *grid, prefix)
    return y


def ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: _Maybe,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: _Maybe,
    grid: tuple[int, int],
    prefix: int,
) -> Tensor:
    weights = (fc1_weight, fc1_bias, conv_weight, conv_bias, fc2_weight, fc2_bias)
    y: Tensor = _ffn(x.contiguous(), *weights, *grid, prefix)
    return y


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) as the kernels read it: (9, C) float32."""
    return weight.reshape(weight.shape[0], 9).t().float().contiguous()


def _middle(z: Tensor, weight: Tensor, bias: Tensor, *place: int) -> Tensor:
    y = torch.empty_like(z)
    vectors = _taps(weight), _native.float32(bias)
    torch.ops.fastdiff_native.dwconv_gelu_forward(z, *vectors, *place, y)
    return y


def _middle_backward(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    place: tuple[int, ...],
    y: _Maybe,
    dz: _Maybe,
    dweight: _Maybe,
    dbias: _Maybe,
) -> None:
    taps = None if dweight is None else z.new_empty((9, z.shape[2]), dtype=torch.float32)
    with _native.float32_buffers((dbias,)) as (dbias_,):
        torch.ops.fastdiff_native.dwconv_gelu_backward(
            dy.contiguous(), z, _taps(weight), _native.float32(bias), *place, y, dz, taps, dbias_
        )
    if dweight is not None and taps is not None:
        dweight.copy_(taps.t().reshape(dweight.shape))


def _gelu_backward(
    gradients: tuple[_Maybe, ...],
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    *place: int,
) -> None:
    dz, dweight, dbias = gradients
    _middle_backward(dy, z, weight, bias, place, None, dz, dweight, dbias)


_gelu = _register.kernel(
    "dwconv_gelu_native(Tensor z, Tensor weight, Tensor bias, int rows, int columns, int prefix) "
    "-> (Tensor y)",
    empty=lambda z, *_: torch.empty_like(z),
    forward=lambda results, z, weight, bias, *place: torch.ops.fastdiff_native.dwconv_gelu_forward(
        z, _taps(weight), _native.float32(bias), *place, results[0]
    ),
    backward=_gelu_backward,
    saves=("z", "weight", "bias"),
)


def _ffn_empty(x: Tensor, fc1_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:2], fc1_weight.shape[0]))


def _ffn_forward(
    results: tuple[Tensor, ...],
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: _Maybe,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: _Maybe,
    *place: int,
) -> None:
    y, z = results
    _linear(x, fc1_weight, fc1_bias, z)
    _linear(_middle(z, conv_weight, conv_bias, *place), fc2_weight, fc2_bias, y)


def _linear(x: Tensor, weight: Tensor, bias: _Maybe, out: Tensor) -> None:
    """out = x weight^T + bias, in x's dtype."""
    rows, columns = out.flatten(0, 1), weight.to(x.dtype).t()
    if bias is None:
        torch.mm(x.flatten(0, 1), columns, out=rows)
    else:
        torch.addmm(bias.to(x.dtype), x.flatten(0, 1), columns, out=rows)


def _ffn_backward(
    gradients: tuple[_Maybe, ...],
    dout: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: _Maybe,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: _Maybe,
    z: Tensor,
    *place: int,
) -> None:
    """Only x and z are kept: y is made again, in the same pass that makes dz."""
    dx, dfc1_weight, dfc1_bias, dconv_weight, dconv_bias, dfc2_weight, dfc2_bias = gradients
    rows = dout.flatten(0, 1)
    below = dx, dfc1_weight, dfc1_bias  # what dz is for
    if dfc2_bias is not None:
        dfc2_bias.copy_(rows.sum(0, dtype=torch.float32))
    dz = None if all(d is None for d in below) else torch.empty_like(z)
    y = None if dfc2_weight is None else torch.empty_like(z)
    if any(d is not None for d in (dz, y, dconv_weight, dconv_bias)):
        dy = (rows @ fc2_weight.to(x.dtype)).view_as(z)
        _middle_backward(dy, z, conv_weight, conv_bias, place, y, dz, dconv_weight, dconv_bias)
    if dfc2_weight is not None and y is not None:
        _product(rows.t(), y.flatten(0, 1), dfc2_weight)
    if dz is None:
        return
    dz = dz.flatten(0, 1)
    if dx is not None:
        torch.mm(dz, fc1_weight.to(x.dtype), out=dx.flatten(0, 1))
    if dfc1_weight is not None:
        _product(dz.t(), x.flatten(0, 1), dfc1_weight)
    if dfc1_bias is not None:
        dfc1_bias.copy_(dz.sum(0, dtype=torch.float32))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    else:  # a float32 weight beside low-precision activations
        out.copy_(a @ b)


_ffn = _register.kernel(
    "dwconv_ffn_native(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor conv_weight, "
    "Tensor conv_bias, Tensor fc2_weight, Tensor? fc2_bias, int rows, int columns, int prefix) "
    "-> (Tensor y, Tensor z)",
    empty=_ffn_empty,
    forward=_ffn_forward,
    backward=_ffn_backward,
    saves=(
        *("x", "fc1_weight", "fc1_bias", "conv_weight", "conv_bias", "fc2_weight", "fc2_bias"),
        "z",
    ),
)
