"""`dwconv_ffn` with the Triton kernels of `dwconv_gelu` in its middle."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff_kernels.dwconv_ffn import ffn, triton_kernels


def supports(x: Tensor, fc1_weight: Tensor, *form: Any) -> str | None:
    """None, or why the kernels cannot run this call of `dwconv_ffn`."""
    return triton_kernels.unsupported(x.dtype, fc1_weight.shape[0], form[-2])


call = ffn.make("dwconv_ffn_triton", triton_kernels.forward, triton_kernels.backward)
