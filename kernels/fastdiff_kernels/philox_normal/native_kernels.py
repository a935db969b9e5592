"""`philox_bits` and `philox_normal` by the compiled library: the Python side of cpu.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels.philox_normal.op import operator


def supports(*_: Any) -> str | None:
    return None


def _fill(result: Tensor, seeds: Tensor, step: Tensor, stream: int) -> None:
    torch.ops.fastdiff_native.philox_fill.default(seeds, step, stream, result)


bits = operator("philox_bits_native", torch.int32, _fill)
normal = operator("philox_normal_native", torch.float32, _fill)
