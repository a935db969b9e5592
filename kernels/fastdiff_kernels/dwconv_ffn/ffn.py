"""`dwconv_ffn` around the kernels of `dwconv_gelu` of either back end.

The Linears are PyTorch's matrix products. Backward keeps x and z = fc1(x), D + C elements a token,
where separate ops keep D + 3 C: z as the convolution reads it, the input of the GELU, its output.
The last of these, y, which fc2's weight needs, is written once more by the kernel that computes dz,
while the convolution is at hand; fc1's bias gets its gradient there, too.
"""

from __future__ import annotations

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
        out, z, taps = results
        prepare(z)
        _linear(x, fc1_weight, None if takes_bias else fc1_bias, z)
        y = torch.empty_like(z)
        gelu((y, taps), z, conv_weight, conv_bias, grid, prefix, **given(fc1_bias))
        _linear(y, fc2_weight, fc2_bias, out)

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
            torch.mm(d_out, fc2_weight.to(x.dtype), out=dy.flatten(0, 1))
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
            _product(rows, fc1_weight.to(x.dtype), dx)

    return _register.kernel(
        f"{name}(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor conv_weight, "
        "Tensor conv_bias, Tensor fc2_weight, Tensor? fc2_bias, SymInt[] grid, SymInt prefix) -> "
        "(Tensor out, Tensor z, Tensor taps)",
        empty=_empty,
        forward=forward,
        backward=backward,
        saves=(
            *("x", "fc1_weight", "fc1_bias", "conv_weight", "conv_bias", "fc2_weight", "fc2_bias"),
            *("z", "taps"),
        ),
    )


def _empty(x: Tensor, fc1_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    C = fc1_weight.shape[0]
    z = x.new_empty((*x.shape[:2], C))
    return x.new_empty(x.shape), z, x.new_empty((9, C), dtype=torch.float32)


def _linear(x: Tensor, weight: Tensor, bias: _Maybe, out: Tensor) -> None:
    """out = x weight^T + bias, in x's dtype."""
    columns = weight.to(x.dtype).t()
    if bias is None:
        torch.mm(x.flatten(0, 1), columns, out=out.flatten(0, 1))
    else:
        torch.addmm(bias.to(x.dtype), x.flatten(0, 1), columns, out=out.flatten(0, 1))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in their dtype; then in out's: a float32 weight beside low-precision activations
    gets what the gradient of its cast would be."""
    if out.dtype is a.dtype and out.is_contiguous():
        torch.mm(a, b, out=out if out.dim() == 2 else out.flatten(0, 1))
    else:
        out.copy_((a @ b).view(out.shape))
