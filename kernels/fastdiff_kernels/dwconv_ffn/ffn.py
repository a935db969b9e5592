"""`dwconv_ffn` around the kernels of `dwconv_gelu` of either back end.

The Linears are PyTorch's matrix products. Backward keeps x and z = fc1(x), D + C elements a token,
where separate ops keep D + 3 C: z as the convolution reads it, the input of the GELU, its output.
The last of these, y, which fc2's weight needs, is written once more by the kernel that computes dz,
while the convolution is at hand; fc1's bias gets its gradient there, too.

Under autocast the weights of the Linears are float32 beside low-precision activations. Each is cast
once, in the forward, and the copy is kept for the backward, as autocast keeps those of any Linear.
Gradients of float32 weights come out of the matrix product in float32 (see `_product`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _register

_Maybe = Tensor | None


def make(
    name: str,
    gelu: Callable[..., None],
    gelu_backward: Callable[..., None],
    *,
    prepare: Callable[[Tensor], None] = lambda tensor: None,
    in_place: bool = False,
    takes_bias: bool = False,
) -> Callable[..., Any]:
    """The op in normal form, differentiable.

    Args:
        name: of the operator: `fastdiff::NAME`.
        gelu: takes ((y, taps), z, conv_weight, conv_bias, grid, prefix); fills y, like z, and taps
            (9, C) in float32: the weight as kernels read it.
        gelu_backward: takes ((dz, d_conv_weight, d_conv_bias), dy, z, taps, conv_bias, grid,
            prefix, y, sum_dz); fills those that are there: the gradients, y once more, and the sum
            (C,) of dz over all tokens, which is asked for only with dz.
        prepare: takes a new tensor of the hidden width, before a matrix product fills it.
        in_place: gelu_backward can write dz over dy.
        takes_bias: gelu and gelu_backward take z_bias, fc1's bias, which z is then without: where
            a matrix product would write the bias to memory first and add to it.
    """

    def given(fc1_bias: _Maybe) -> dict[str, Tensor]:
        return {"z_bias": fc1_bias} if takes_bias and fc1_bias is not None else {}

    def forward(
        results: Sequence[Tensor],
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: _Maybe,
        conv_weight: Tensor,
        conv_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: _Maybe,
        grid: Sequence[int],
        prefix: int,
    ) -> None:
        out, z, taps, fc1_cast, fc2_cast = results
        prepare(z)
        for cast, weight in ((fc1_cast, fc1_weight), (fc2_cast, fc2_weight)):
            if weight.dtype is not x.dtype:
                cast.copy_(weight)
        _linear(x, _of(x, fc1_weight, fc1_cast), None if takes_bias else fc1_bias, z)
        y = torch.empty_like(z)
        gelu((y, taps), z, conv_weight, conv_bias, grid, prefix, **given(fc1_bias))
        _linear(y, _of(x, fc2_weight, fc2_cast), fc2_bias, out)

    def backward(
        gradients: Sequence[_Maybe],
        d_out: Tensor,
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: _Maybe,
        conv_weight: Tensor,
        conv_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: _Maybe,
        z: Tensor,
        taps: Tensor,
        fc1_cast: Tensor,
        fc2_cast: Tensor,
        grid: Sequence[int],
        prefix: int,
    ) -> None:
        dx, d_fc1_weight, d_fc1_bias, d_conv_weight, d_conv_bias, d_fc2_weight, d_fc2_bias = (
            gradients
        )
        d_out = d_out.flatten(0, 1)
        if d_fc2_bias is not None:
            torch.sum(d_out, 0, dtype=d_fc2_bias.dtype, out=d_fc2_bias)
        needs_dz = any(d is not None for d in (dx, d_fc1_weight, d_fc1_bias))
        dz = None
        y = None if d_fc2_weight is None else torch.empty_like(z)
        if needs_dz or d_conv_weight is not None or d_conv_bias is not None:
            dy = torch.empty_like(z)
            prepare(dy)
            if needs_dz:
                dz = dy if in_place else torch.empty_like(z)
            torch.mm(d_out, _of(x, fc2_weight, fc2_cast), out=dy.flatten(0, 1))
            filled = dz, d_conv_weight, d_conv_bias
            gelu_backward(
                *(filled, dy, z, taps, conv_bias, grid, prefix, y, d_fc1_bias), **given(fc1_bias)
            )
            del dy
        elif y is not None:
            results = y, torch.empty_like(taps)
            gelu(results, z, conv_weight, conv_bias, grid, prefix, **given(fc1_bias))
        if d_fc2_weight is not None and y is not None:
            _product(d_out.t(), y.flatten(0, 1), d_fc2_weight)
            del y
        if dz is None:
            return
        rows = dz.flatten(0, 1)
        if d_fc1_weight is not None:
            _product(rows.t(), x.flatten(0, 1), d_fc1_weight)
        if dx is not None:
            _product(rows, _of(x, fc1_weight, fc1_cast), dx)

    return _register.kernel(
        f"{name}(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor conv_weight, "
        "Tensor conv_bias, Tensor fc2_weight, Tensor? fc2_bias, SymInt[] grid, SymInt prefix) -> "
        "(Tensor out, Tensor z, Tensor taps, Tensor fc1_cast, Tensor fc2_cast)",
        empty=_empty,
        forward=forward,
        backward=backward,
        saves=(
            *("x", "fc1_weight", "fc1_bias", "conv_weight", "conv_bias", "fc2_weight", "fc2_bias"),
            *("z", "taps", "fc1_cast", "fc2_cast"),
        ),
    )


def _empty(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: _Maybe,
    conv_weight: Tensor,
    conv_bias: Tensor,
    fc2_weight: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    C = fc1_weight.shape[0]
    z = x.new_empty((*x.shape[:2], C))
    taps = x.new_empty((9, C), dtype=torch.float32)
    weights = fc1_weight, fc2_weight
    casts = (x.new_empty(0 if w.dtype is x.dtype else w.shape) for w in weights)
    return (x.new_empty(x.shape), z, taps, *casts)


def _of(x: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
    """The weight in x's dtype: itself, or the copy that the forward filled."""
    return weight if weight.dtype is x.dtype else cast


def _linear(x: Tensor, weight: Tensor, bias: _Maybe, out: Tensor) -> None:
    """out = x weight^T + bias, all in x's dtype; the bias may be float32."""
    columns = weight.t()
    if bias is None:
        torch.mm(x.flatten(0, 1), columns, out=out.flatten(0, 1))
    else:
        torch.addmm(bias.to(x.dtype), x.flatten(0, 1), columns, out=out.flatten(0, 1))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated in float32 and rounded once, to out's dtype.

    A float32 result of low-precision a and b is not rounded to their dtype on the way. A CPU has no
    such product: a and b are widened, some rows of b at a time. Where it multiplies low precision
    in tiles (AMX), about ten times as fast as float32, the product is rounded to their dtype.
    """
    target = out if out.dim() == 2 else out.flatten(0, 1)
    if not out.is_contiguous():
        dense = torch.empty(target.shape, dtype=out.dtype, device=out.device)
        _product(a, b, dense)
        out.copy_(dense.view(out.shape))
    elif out.dtype is a.dtype:
        torch.mm(a, b, out=target)
    elif _rounds(a.device):
        out.copy_((a @ b).view(out.shape))
    elif a.device.type != "cpu":
        torch.mm(a, b, out_dtype=out.dtype, out=target)
    else:
        target.zero_()
        for left, right in zip(a.split(_ROWS, dim=1), b.split(_ROWS), strict=True):
            target.addmm_(left.to(out.dtype), right.to(out.dtype))


_ROWS = 2048
"""Rows that `_product` widens at a time: tens of megabytes."""


@functools.cache
def _multiplies_in_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _rounds(device: torch.device) -> bool:
    """Whether products of low precision are rounded to it on this device."""
    if device.type == "cpu":
        return _multiplies_in_tiles()
    return torch.version.hip is not None  # `out_dtype` is of CUDA
