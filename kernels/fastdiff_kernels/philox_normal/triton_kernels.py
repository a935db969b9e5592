"""Triton kernel of `philox_bits` and `philox_normal`; it writes each element once and reads seeds.

Letters: B pictures, N elements of one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels import _launch
from fastdiff_kernels.philox_normal.op import operator


@triton.jit
def _log_uniform(w):  # type: ignore[no-untyped-def]
    """ln((w + 1/2) / 2^32) in float64."""
    return tl.log((w.to(tl.float64) + 0.5) * 2.3283064365386963e-10)


@triton.jit
def _normal_pair(w, v):  # type: ignore[no-untyped-def]
    """Box-Muller: w gives the radius, v the angle; reference.py says why by quarters of a turn."""
    radius = tl.sqrt(-2.0 * _log_uniform(w))
    quarter = (v + (1 << 29)) >> 30  # 4, the whole turn, wraps to 0
    rest = (v - (quarter << 30)).to(tl.int32, bitcast=True)
    x = (rest.to(tl.float64) + 0.5) * 1.4629180792671596e-09  # 2 pi / 2^32
    z = x * x
    # Taylor, |x| <= pi / 4: no branches, unlike the general functions.
    sin = z * 1.6059043836821613e-10 - 2.505210838544172e-08
    sin = sin * z + 2.7557319223985893e-06
    sin = sin * z - 0.0001984126984126984
    sin = sin * z + 0.008333333333333333
    sin = sin * z - 0.16666666666666666
    sin = (sin * z + 1.0) * x
    cos = z * -1.1470745597729725e-11 + 2.08767569878681e-09
    cos = cos * z - 2.755731922398589e-07
    cos = cos * z + 2.48015873015873e-05
    cos = cos * z - 0.001388888888888889
    cos = cos * z + 0.041666666666666664
    cos = cos * z - 0.5
    cos = cos * z + 1.0
    odd = (quarter & 1) == 1
    scale = tl.where((quarter & 2) == 2, -radius, radius)
    a = scale * tl.where(odd, -sin, cos)
    b = scale * tl.where(odd, cos, sin)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit(do_not_specialize=["N", "stream"])
def philox_fill(  # type: ignore[no-untyped-def]
    seeds, step, y, N, stream, RAW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: BLOCK counters of one picture, four neighbouring elements of each."""
    picture = tl.program_id(1).to(tl.int64)
    seed = tl.load(seeds + picture)
    # int64 until the end: 2^32 counters are allowed.
    block = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.load(step).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0), 10)
    if RAW:
        z0, z1 = w0.to(tl.int32, bitcast=True), w1.to(tl.int32, bitcast=True)
        z2, z3 = w2.to(tl.int32, bitcast=True), w3.to(tl.int32, bitcast=True)
    else:
        z0, z1 = _normal_pair(w0, w1)
        z2, z3 = _normal_pair(w2, w3)
    # Element 4 i + 2 j + k is the join's (i, j, k) where j tells the pairs apart.
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    at = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(y + picture * N + at, tl.reshape(z, (4 * BLOCK,)), mask=at < N)


def supports(*_: Any) -> str | None:
    return None


def _fill(result: Tensor, seeds: Tensor, step: Tensor, stream: int) -> None:
    pictures = seeds.shape[0]
    elements = result.numel() // max(pictures, 1)
    chip = _launch.chip(result.device)
    default = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}
    raw = result.dtype is torch.int32
    config: dict[str, Any] = {**_launch.config("philox_fill", [raw], chip, default)}
    # A grid has at most 2^16 - 1 programs along its second axis.
    for first in range(0, pictures if elements else 0, 65535):
        part = seeds[first : first + 65535]
        _launch.launch(
            philox_fill,
            (_launch.cdiv(elements, 4 * config["BLOCK"]), len(part)),
            seeds=part,
            step=step,
            y=result[first:],
            N=elements,
            stream=stream,
            RAW=raw,
            **config,
        )


bits = operator("philox_bits_triton", torch.int32, _fill)
normal = operator("philox_normal_triton", torch.float32, _fill)
