"""`window_attention` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import _native, _register


def supports(qkv: Tensor, *_: Any) -> str | None:
    return "it computes in float32, and qkv is float64" if qkv.dtype is torch.float64 else None


def call(
    qkv: Tensor,
    bias_table: Tensor | None,
    heads: int,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> Tensor:
    form = (heads, *window_size, *shift, scale, pad_is_value)
    out: Tensor = _kernel(qkv.contiguous(), bias_table, pad_qkv, *form)
    return out


def _empty(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _forward(
    results: tuple[Tensor, ...],
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    *form: Any,
) -> None:
    vectors = _native.float32(bias_table), _native.float32(pad_qkv)
    torch.ops.fastdiff_native.window_attention_forward(qkv, *vectors, *form, results[0])


def _backward(
    gradients: tuple[Tensor | None, ...],
    dout: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    *form: Any,
) -> None:
    dqkv, dtable, dpad = gradients
    if dqkv is None:
        dqkv = torch.empty_like(qkv)
    vectors = _native.float32(bias_table), _native.float32(pad_qkv)
    with _native.float32_buffers((dtable, dpad)) as buffers:
        torch.ops.fastdiff_native.window_attention_backward(
            dout.contiguous(), qkv, *vectors, *form, dqkv, *buffers
        )


_kernel = _register.kernel(
    "window_attention_native(Tensor qkv, Tensor? bias_table, Tensor? pad_qkv, int heads, int h, "
    "int w, int shift_h, int shift_w, float scale, bool pad_is_value) -> (Tensor out)",
    empty=_empty,
    forward=_forward,
    backward=_backward,
    saves=("qkv", "bias_table", "pad_qkv"),
)
