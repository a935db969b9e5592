"""`group_norm_silu` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register

_FORMATS = torch.contiguous_format, torch.channels_last


def supports(x: Tensor, *_: Any) -> str | None:
    return "it computes in float32, and x is float64" if x.dtype is torch.float64 else None


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    silu: bool,
) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    y: Tensor = _kernel(x, weight, bias, scale, shift, skip, num_groups, eps, silu, last)
    return y


def _dense(image: Tensor | None, channels_last: bool) -> Tensor | None:
    """The image itself, or a copy where it has another layout or gaps."""
    return image if image is None else image.contiguous(memory_format=_FORMATS[channels_last])


def _empty(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> tuple[Tensor, ...]:
    B, C, H, W = x.shape
    layout = _FORMATS[channels_last]
    if skip is None:
        y = torch.empty_like(x, memory_format=layout)
    else:
        shape = (B, C + skip.shape[1], H, W)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    # Mean and reciprocal deviation, each with what rounding took from it.
    return y, x.new_empty((B, num_groups, 4), dtype=torch.float32)


def _forward(
    results: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> None:
    y, statistics = results
    torch.ops.fastdiff_native.group_norm_forward.default(
        _dense(x, channels_last),
        _dense(skip, channels_last),
        *map(_native.float32, (weight, bias, scale, shift)),
        num_groups,
        eps,
        silu,
        channels_last,
        y,
        statistics,
    )


def _backward(
    gradients: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    statistics: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    channels_last: bool,
) -> None:
    dx, dweight, dbias, dscale, dshift, dskip = gradients
    images = [_dense(d, channels_last) for d in (dx, dskip)]
    with _native.float32_buffers((dweight, dbias, dscale, dshift)) as buffers:
        torch.ops.fastdiff_native.group_norm_backward.default(
            _dense(dy, channels_last),
            _dense(x, channels_last),
            _dense(skip, channels_last),
            *map(_native.float32, (weight, bias, scale, shift)),
            statistics,
            num_groups,
            silu,
            channels_last,
            *images,
            *buffers,
        )
    for d, image in zip((dx, dskip), images, strict=True):
        if d is not None and image is not None and image is not d:
            d.copy_(image)


_kernel = _register.kernel(
    "group_norm_silu_native(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? skip, int num_groups, float eps, bool silu, bool channels_last) "
    "-> (Tensor y, Tensor statistics)",
    empty=_empty,
    forward=_forward,
    backward=_backward,
    saves=("x", "weight", "bias", "scale", "shift", "skip", "statistics"),
)
