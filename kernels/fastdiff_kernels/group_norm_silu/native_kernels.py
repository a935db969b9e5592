"""`group_norm_silu` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register


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


def _flat(x: Tensor | None, channels_last: bool) -> Tensor | None:
    """(B, C, H, W) laid out as (B, H W, C) or (B, C, H W): a view, or a copy of another layout."""
    if x is None:
        return None
    return (x.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else x.flatten(2)).contiguous()


def _image(flat: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """What `_flat` made flat, as (B, C, H, W) again."""
    size = like.shape[2:]
    return flat.unflatten(1, size).permute(0, 3, 1, 2) if channels_last else flat.unflatten(2, size)


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
    C = C if skip is None else C + skip.shape[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((B, C, H, W), dtype=x.dtype, device=x.device, memory_format=layout)
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
    vectors = map(_native.float32, (weight, bias, scale, shift))
    torch.ops.fastdiff_native.group_norm_forward(
        _flat(x, channels_last),
        _flat(skip, channels_last),
        *vectors,
        num_groups,
        eps,
        silu,
        channels_last,
        _flat(y, channels_last),
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
    vectors = map(_native.float32, (weight, bias, scale, shift))
    images = [_flat(d, channels_last) for d in (dx, dskip)]
    with _native.float32_buffers((dweight, dbias, dscale, dshift)) as buffers:
        torch.ops.fastdiff_native.group_norm_backward(
            _flat(dy, channels_last),
            _flat(x, channels_last),
            _flat(skip, channels_last),
            *vectors,
            statistics,
            num_groups,
            silu,
            channels_last,
            *images,
            *buffers,
        )
    for d, image in zip((dx, dskip), images, strict=True):
        if d is not None and image is not None and image.data_ptr() != d.data_ptr():
            d.copy_(_image(image, d, channels_last))


_kernel = _register.kernel(
    "group_norm_silu_native(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? skip, int num_groups, float eps, bool silu, bool channels_last) "
    "-> (Tensor y, Tensor statistics)",
    empty=_empty,
    forward=_forward,
    backward=_backward,
    saves=("x", "weight", "bias", "scale", "shift", "skip", "statistics"),
)
