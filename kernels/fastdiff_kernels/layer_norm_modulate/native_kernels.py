"""`layer_norm_modulate` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register

_Maybe = Tensor | None
_Vectors = tuple[_Maybe, _Maybe, _Maybe, _Maybe]  # weight, bias, scale, shift


def supports(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32, and x is float64" if x.dtype is torch.float64 else None


def call(
    x: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    scale: _Maybe,
    shift: _Maybe,
    residual: _Maybe,
    gate: _Maybe,
    eps: float,
) -> tuple[Tensor, Tensor]:
    stream, x = x, x.contiguous()
    vectors = (weight, bias, scale, shift)
    if residual is None:
        return _plain(x, *vectors, eps), stream
    residual = residual.contiguous()
    if gate is None:
        return _residual(x, residual, *vectors, eps)
    return _gated(x, residual, gate, *vectors, eps)


def _forward(
    x: Tensor,
    vectors: _Vectors,
    residual: _Maybe,
    gate: _Maybe,
    eps: float,
    y: Tensor,
    r: _Maybe,
    statistics: Tensor,
) -> None:
    torch.ops.fastdiff_native.layer_norm_forward(
        x,
        *map(_native.float32, vectors),
        residual,
        _native.float32(gate),
        eps,
        y,
        r,
        statistics[0],
        statistics[1],
    )


def _backward(
    dx: _Maybe,
    dresidual: _Maybe,
    dvectors: tuple[_Maybe, ...],
    dgate: _Maybe,
    dy: _Maybe,
    dr: _Maybe,
    r: Tensor,
    x: _Maybe,
    vectors: _Vectors,
    gate: _Maybe,
    statistics: Tensor,
) -> None:
    with _native.float32_buffers((*dvectors, dgate)) as buffers:
        torch.ops.fastdiff_native.layer_norm_backward(
            None if dy is None else dy.contiguous(),
            None if dr is None else dr.contiguous(),
            r,
            x,
            *map(_native.float32, vectors[:3]),
            _native.float32(gate),
            statistics[0],
            statistics[1],
            dx,
            dresidual,
            *buffers,
        )


def _statistics(x: Tensor) -> Tensor:
    """Mean and reciprocal deviation of each row, for the backward."""
    return x.new_empty((2, math.prod(x.shape[:-1])), dtype=torch.float32)


_VECTORS = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_SAVED = ("weight", "bias", "scale", "shift", "statistics")

# Three forms, because x is saved for the gradient of the gate only, and r is x without a residual.
_plain = _register.kernel(
    f"layer_norm_modulate_native(Tensor x, {_VECTORS}, float eps) -> (Tensor y, Tensor statistics)",
    empty=lambda x, *_: (torch.empty_like(x), _statistics(x)),
    forward=lambda out, x, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), None, None, eps, out[0], None, out[1]
    ),
    backward=lambda d, dy, x, w, b, scale, shift, statistics, eps: _backward(
        d[0], None, d[1:], None, dy, None, x, None, (w, b, scale, shift), None, statistics
    ),
    saves=("x", *_SAVED),
)

# The two terms of the sum have one gradient, and one tensor holds it.
_residual = _register.kernel(
    f"layer_norm_modulate_residual_native(Tensor x, Tensor residual, {_VECTORS}, float eps) "
    "-> (Tensor y, Tensor r, Tensor statistics)",
    empty=lambda x, *_: (torch.empty_like(x), torch.empty_like(x), _statistics(x)),
    forward=lambda out, x, residual, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), residual, None, eps, *out
    ),
    backward=lambda d, dy, dr, r, w, b, scale, shift, statistics, eps: _backward(
        None, d[1], d[2:], None, dy, dr, r, None, (w, b, scale, shift), None, statistics
    ),
    saves=("r", *_SAVED),
    grad_like={"residual": "r"},
    grad_same={"x": "residual"},
    returned=2,
)

_gated = _register.kernel(
    "layer_norm_modulate_gated_native(Tensor x, Tensor residual, Tensor gate, "
    f"{_VECTORS}, float eps) -> (Tensor y, Tensor r, Tensor statistics)",
    empty=lambda x, *_: (torch.empty_like(x), torch.empty_like(x), _statistics(x)),
    forward=lambda out, x, residual, gate, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), residual, gate, eps, *out
    ),
    backward=lambda d, dy, dr, r, x, gate, w, b, scale, shift, statistics, eps: _backward(
        *(d[0], d[1], d[3:], d[2], dy, dr, r, x, (w, b, scale, shift), gate, statistics)
    ),
    saves=("r", "x", "gate", *_SAVED),
    grad_like={"residual": "r"},
    returned=2,
)
