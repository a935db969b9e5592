"""Triton kernels of `layer_norm_modulate`.

Letters: B images, rows of one image, C channels; e bytes of one activation.

A program takes a share of the rows of one image (of all rows, where no vector belongs to an image),
ROWS at a time. A row lies in CHUNKS pieces of BLOCK columns, so that its tail wastes few lanes
though a tile has a power of two. A row stays in registers between its statistics and its use: each
activation is read once and written once. Loads of the next rows are under way meanwhile.

The gradients of vectors are sums over rows of dy * xhat, dy and dr * x. Each thread keeps its own
over the loop, a program writes them once, and a second kernel adds the parts in a fixed order.
"""

# mypy: disable-error-code="assignment"
# (a kernel's tuple of tensors grows chunk by chunk)

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels import _launch, _register
from fastdiff_kernels._jit import round_to


@triton.jit
def _columns(p_vector, c: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Chunk c of a vector over channels, in float32, as a row."""
    o_c = c * BLOCK + tl.arange(0, BLOCK)
    return tl.load(p_vector + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]


# Reads x (residual), writes y (r): 2 e, or 4 e with residual.
@triton.jit(do_not_specialize=["rows", "share"])
def layer_norm_modulate_forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    gate,
    weight,
    bias,
    scale,
    shift,
    y,
    r,
    mean,
    rstd,
    gate_stride,
    scale_stride,
    shift_stride,
    rows,
    share,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    shares = tl.cdiv(rows, share)
    i_image = (tl.program_id(0) // shares).to(tl.int64)
    i_share = tl.program_id(0) % shares
    first = i_image * rows + i_share * share
    count = tl.minimum(share, rows - i_share * share)
    x += first * C
    y += first * C
    mean += first
    rstd += first
    if residual is not None:
        residual += first * C
        r += first * C

    # y = xhat * factor + offset
    b_factor = ()
    b_offset = ()
    b_gate = ()
    for c in tl.static_range(CHUNKS):
        factor = tl.full([1, BLOCK], 1.0, tl.float32)
        offset = tl.zeros([1, BLOCK], tl.float32)
        if weight is not None:
            factor = _columns(weight, c, C, BLOCK)
        if bias is not None:
            offset = _columns(bias, c, C, BLOCK)
        if scale is not None:
            scale_1 = 1.0 + _columns(scale + i_image * scale_stride, c, C, BLOCK)
            factor *= scale_1
            offset *= scale_1
        if shift is not None:
            offset += _columns(shift + i_image * shift_stride, c, C, BLOCK)
        b_factor += (factor,)
        b_offset += (offset,)
        if gate is not None:
            b_gate += (_columns(gate + i_image * gate_stride, c, C, BLOCK),)

    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        o_row = start + tl.arange(0, ROWS)[:, None]
        b_r = ()
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for c in tl.static_range(CHUNKS):
            o_c = c * BLOCK + tl.arange(0, BLOCK)[None, :]
            o, m = o_row * C + o_c, (o_row < count) & (o_c < C)
            value = tl.load(x + o, mask=m, other=0.0)
            if residual is not None:
                stream = tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
                if gate is not None:
                    stream = tl.fma(value.to(tl.float32), b_gate[c], stream)
                else:
                    stream += value.to(tl.float32)
                value = round_to(stream, r.dtype.element_ty)
                tl.store(r + o, value, mask=m)
            b_r += (value.to(tl.float32),)
            total += b_r[c]
        center = tl.sum(total, axis=1, keep_dims=True) / C
        # The second pass also corrects the mean, which a large one needs.
        error = tl.zeros([ROWS, BLOCK], tl.float32)
        square = tl.zeros([ROWS, BLOCK], tl.float32)
        for c in tl.static_range(CHUNKS):
            o_c = c * BLOCK + tl.arange(0, BLOCK)[None, :]
            centred = tl.where(o_c < C, b_r[c] - center, 0.0)
            error += centred
            square += centred * centred
        correction = tl.sum(error, axis=1, keep_dims=True) / C
        variance = tl.sum(square, axis=1, keep_dims=True) / C - correction * correction
        center += correction
        inverse = tl.rsqrt(variance + eps)
        tl.store(mean + o_row, center, mask=o_row < count)
        tl.store(rstd + o_row, inverse, mask=o_row < count)
        for c in tl.static_range(CHUNKS):
            o_c = c * BLOCK + tl.arange(0, BLOCK)[None, :]
            o, m = o_row * C + o_c, (o_row < count) & (o_c < C)
            value = (b_r[c] - center) * inverse * b_factor[c] + b_offset[c]
            tl.store(y + o, round_to(value, y.dtype.element_ty), mask=m)


# Reads dy, r (and dr: the gradient of r from elsewhere), writes dx: 3 e, or 4 e.
# With a gate reads x too and writes d_residual: 6 e.
@triton.jit(do_not_specialize=["rows", "share"])
def layer_norm_modulate_backward(  # type: ignore[no-untyped-def]
    dy,
    dr,
    r,
    x,
    gate,
    weight,
    scale,
    mean,
    rstd,
    d_r,
    d_x,
    sum_xhat,
    sum_dy,
    sum_gate,
    gate_stride,
    scale_stride,
    rows,
    share,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    shares = tl.cdiv(rows, share)
    i_image = (tl.program_id(0) // shares).to(tl.int64)
    i_share = tl.program_id(0) % shares
    first = i_image * rows + i_share * share
    count = tl.minimum(share, rows - i_share * share)
    r += first * C
    mean += first
    rstd += first
    if dy is not None:
        dy += first * C
    if dr is not None:
        dr += first * C
    if x is not None:
        x += first * C
    if d_r is not None:
        d_r += first * C
    if d_x is not None:
        d_x += first * C

    b_factor = ()
    b_gate = ()
    b_sum_xhat = ()
    b_sum_dy = ()
    b_sum_gate = ()
    for c in tl.static_range(CHUNKS):
        factor = tl.full([1, BLOCK], 1.0, tl.float32)
        if weight is not None:
            factor = _columns(weight, c, C, BLOCK)
        if scale is not None:
            factor *= 1.0 + _columns(scale + i_image * scale_stride, c, C, BLOCK)
        b_factor += (factor,)
        if d_x is not None:
            b_gate += (_columns(gate + i_image * gate_stride, c, C, BLOCK),)
        if sum_xhat is not None:
            b_sum_xhat += (tl.zeros([ROWS, BLOCK], tl.float32),)
        if sum_dy is not None:
            b_sum_dy += (tl.zeros([ROWS, BLOCK], tl.float32),)
        if sum_gate is not None:
            b_sum_gate += (tl.zeros([ROWS, BLOCK], tl.float32),)

    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        o_row = start + tl.arange(0, ROWS)[:, None]
        if dy is not None:
            center = tl.load(mean + o_row, mask=o_row < count, other=0.0)
            inverse = tl.load(rstd + o_row, mask=o_row < count, other=0.0)
            b_dy = ()
            b_xhat = ()
            next_xhat = ()
            next_dy = ()
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            total_xhat = tl.zeros([ROWS, BLOCK], tl.float32)
            for c in tl.static_range(CHUNKS):
                o_c = c * BLOCK + tl.arange(0, BLOCK)[None, :]
                o, m = o_row * C + o_c, (o_row < count) & (o_c < C)
                value = tl.load(dy + o, mask=m, other=0.0).to(tl.float32)
                xhat = (tl.load(r + o, mask=m, other=0.0).to(tl.float32) - center) * inverse
                if sum_xhat is not None:
                    next_xhat += (b_sum_xhat[c] + value * xhat,)
                if sum_dy is not None:
                    next_dy += (b_sum_dy[c] + value,)
                value *= b_factor[c]
                total += value
                total_xhat += value * xhat
                b_dy += (value,)
                b_xhat += (xhat,)
            b_sum_xhat = next_xhat
            b_sum_dy = next_dy
            center_dy = tl.sum(total, axis=1, keep_dims=True) / C
            slope = tl.sum(total_xhat, axis=1, keep_dims=True) / C
        next_gate = ()
        if d_r is not None or d_x is not None or sum_gate is not None:
            for c in tl.static_range(CHUNKS):
                o_c = c * BLOCK + tl.arange(0, BLOCK)[None, :]
                o, m = o_row * C + o_c, (o_row < count) & (o_c < C)
                d = tl.zeros([ROWS, BLOCK], tl.float32)
                if dy is not None:
                    d = (b_dy[c] - center_dy - b_xhat[c] * slope) * inverse
                if dr is not None:
                    d += tl.load(dr + o, mask=m, other=0.0).to(tl.float32)
                if d_r is not None:
                    tl.store(d_r + o, round_to(d, d_r.dtype.element_ty), mask=m)
                if d_x is not None:
                    tl.store(d_x + o, round_to(d * b_gate[c], d_x.dtype.element_ty), mask=m)
                if sum_gate is not None:
                    branch = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
                    next_gate += (b_sum_gate[c] + d * branch,)
        b_sum_gate = next_gate

    part = tl.program_id(0).to(tl.int64) * C
    for c in tl.static_range(CHUNKS):
        o_c = c * BLOCK + tl.arange(0, BLOCK)
        if sum_xhat is not None:
            tl.store(sum_xhat + part + o_c, tl.sum(b_sum_xhat[c], axis=0), mask=o_c < C)
        if sum_dy is not None:
            tl.store(sum_dy + part + o_c, tl.sum(b_sum_dy[c], axis=0), mask=o_c < C)
        if sum_gate is not None:
            tl.store(sum_gate + part + o_c, tl.sum(b_sum_gate[c], axis=0), mask=o_c < C)


# A program sums up BLOCK columns of one image; reads the parts, which the cache still holds.
@triton.jit(do_not_specialize=["parts"])
def layer_norm_modulate_images(  # type: ignore[no-untyped-def]
    sum_xhat,
    sum_dy,
    sum_gate,
    weight,
    bias,
    d_scale,
    d_shift,
    d_gate,
    parts,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    i_image = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o_c < C
    first = i_image * parts * C
    # One loop, so that the loads of all sums are under way together.
    b_xhat = tl.zeros([PARTS, BLOCK], tl.float32)
    b_dy = tl.zeros([PARTS, BLOCK], tl.float32)
    b_gate = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        m_part = (o_part < parts) & m[None, :]
        o = first + o_part * C + o_c[None, :]
        if d_scale is not None and sum_xhat is not None:
            b_xhat += tl.load(sum_xhat + o, mask=m_part, other=0.0)
        if sum_dy is not None:
            b_dy += tl.load(sum_dy + o, mask=m_part, other=0.0)
        if d_gate is not None:
            b_gate += tl.load(sum_gate + o, mask=m_part, other=0.0)
    o_image = i_image * C + o_c
    total_dy = tl.sum(b_dy, axis=0)
    if d_shift is not None:
        tl.store(d_shift + o_image, round_to(total_dy, d_shift.dtype.element_ty), mask=m)
    if d_scale is not None:
        value = tl.sum(b_xhat, axis=0)
        if weight is not None:
            value *= tl.load(weight + o_c, mask=m, other=0.0).to(tl.float32)
        if bias is not None:
            value += total_dy * tl.load(bias + o_c, mask=m, other=0.0).to(tl.float32)
        tl.store(d_scale + o_image, round_to(value, d_scale.dtype.element_ty), mask=m)
    if d_gate is not None:
        value = tl.sum(b_gate, axis=0)
        tl.store(d_gate + o_image, round_to(value, d_gate.dtype.element_ty), mask=m)


# A program sums up BLOCK columns of all images: what follows the norm scales them by 1 + scale.
@triton.jit(do_not_specialize=["images", "parts"])
def layer_norm_modulate_parameters(  # type: ignore[no-untyped-def]
    sum_xhat,
    sum_dy,
    scale,
    d_weight,
    d_bias,
    scale_stride,
    images,
    parts,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_weight = tl.zeros([PARTS, BLOCK], tl.float32)
    b_bias = tl.zeros([PARTS, BLOCK], tl.float32)
    for start in range(0, images * parts, PARTS):
        o_part = (start + tl.arange(0, PARTS)[:, None]).to(tl.int64)
        m = (o_part < images * parts) & (o_c < C)[None, :]
        factor = 1.0
        if scale is not None:
            o_scale = (o_part // parts) * scale_stride + o_c[None, :]
            factor += tl.load(scale + o_scale, mask=m, other=0.0).to(tl.float32)
        o = o_part * C + o_c[None, :]
        if d_weight is not None and sum_xhat is not None:
            b_weight += factor * tl.load(sum_xhat + o, mask=m, other=0.0)
        if d_bias is not None and sum_dy is not None:
            b_bias += factor * tl.load(sum_dy + o, mask=m, other=0.0)
    if d_weight is not None:
        value = tl.sum(b_weight, axis=0)
        tl.store(d_weight + o_c, round_to(value, d_weight.dtype.element_ty), mask=o_c < C)
    if d_bias is not None:
        value = tl.sum(b_bias, axis=0)
        tl.store(d_bias + o_c, round_to(value, d_bias.dtype.element_ty), mask=o_c < C)


TUNABLE: dict[str, list[dict[str, int]]] = {
    name: [
        {"PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        for programs, warps, stages in product((2, 3, 4, 6), (4, 8), (2, 4))
    ]
    for name in ("layer_norm_modulate_forward", "layer_norm_modulate_backward")
}


def _plan(
    kernel: str, x: Tensor, images: int, streams: int, programs: Mapping[int, int], stages: int
) -> tuple[dict[str, Any], int]:
    """Arguments that share the rows out, and the number of programs for each image.

    Args:
        kernel: its name.
        x: (B, ..., C).
        images: B, or 1 where all rows are alike.
        streams: activations that the kernel moves.
        programs: by CHUNKS, how many a processor has registers for at the presets' widths.
        stages: default of num_stages.
    """
    C, lanes, chip = x.shape[-1], 16 // x.element_size(), _launch.chip(x.device)
    rows = math.prod(x.shape[:-1]) // max(images, 1)
    # Two or three pieces, whichever wastes fewer lanes; four warps, but for very wide rows.
    chunks = min((2, 3), key=lambda n: n * _launch.power_of_two(_launch.cdiv(C, n)))
    default = {
        "CHUNKS": chunks if C > 64 else 1,
        "PROGRAMS": programs[chunks],
        "num_warps": min(max(4, _launch.power_of_two(_launch.cdiv(C, chunks)) // (64 * lanes)), 16),
        "num_stages": 1 if chip.rdna else stages,
    }
    config = _launch.config(kernel, (C, x.element_size(), streams), chip, default)
    block = _launch.power_of_two(_launch.cdiv(C, config["CHUNKS"]))
    # As many rows as give each thread 16 bytes of each piece.
    tile = max(1, config["num_warps"] * 32 * lanes // block)
    parts = max(1, chip.processors * config["PROGRAMS"] // max(images, 1))
    share = _launch.cdiv(max(_launch.cdiv(rows, parts), 1), tile) * tile
    arguments: dict[str, Any] = {
        "rows": rows,
        "share": share,
        "BLOCK": block,
        "CHUNKS": config["CHUNKS"],
        "ROWS": tile,
        "STAGES": config["num_stages"],
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    return arguments, _launch.cdiv(rows, share)


_Maybe = Tensor | None


def _images(x: Tensor, *vectors: _Maybe) -> int:
    """B where a vector belongs to an image, else 1: all rows are alike then."""
    return 1 if all(v is None for v in vectors) else x.shape[0]


def _stride(vector: _Maybe) -> int:
    return 0 if vector is None else vector.stride(0)


def _forward(
    x: Tensor,
    vectors: tuple[_Maybe, _Maybe, _Maybe, _Maybe],
    residual: _Maybe,
    gate: _Maybe,
    eps: float,
    y: Tensor,
    r: _Maybe,
    stats: Tensor,
) -> None:
    weight, bias, scale, shift = vectors
    images = _images(x, scale, shift, gate)
    streams, programs = (2, {2: 6, 3: 4}) if residual is None else (4, {2: 4, 3: 3})
    plan, parts = _plan("layer_norm_modulate_forward", x, images, streams, programs, 4)
    _launch.launch(
        layer_norm_modulate_forward,
        (images * parts,),
        x=x,
        residual=residual,
        gate=gate,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        y=y,
        r=r,
        mean=stats[0],
        rstd=stats[1],
        gate_stride=_stride(gate),
        scale_stride=_stride(scale),
        shift_stride=_stride(shift),
        eps=eps,
        C=x.shape[-1],
        **plan,
    )


def _backward(
    d_r: _Maybe,
    d_x: _Maybe,
    d_vectors: tuple[_Maybe, ...],
    d_gate: _Maybe,
    dy: _Maybe,
    dr: _Maybe,
    r: Tensor,
    x: _Maybe,
    vectors: tuple[_Maybe, _Maybe, _Maybe, _Maybe],
    gate: _Maybe,
    stats: Tensor,
) -> None:
    """Fill `d_r`, the gradient of r, which residual (and x without a gate) has; `d_x` with one."""
    weight, bias, scale, shift = vectors
    d_weight, d_bias, d_scale, d_shift = d_vectors
    C, images = r.shape[-1], _images(r, scale, shift, gate)
    dy = None if dy is None else dy.contiguous()
    dr = None if dr is None else dr.contiguous()
    streams, programs = (3, {2: 4, 3: 3}) if dr is None else (4, {2: 4, 3: 2})
    if gate is not None:
        streams, programs = 6, {2: 3, 3: 2}
    plan, parts = _plan("layer_norm_modulate_backward", r, images, streams, programs, 3)

    def sums(*of: _Maybe) -> _Maybe:
        if all(d is None for d in of):
            return None
        return torch.empty((images * parts, C), dtype=torch.float32, device=r.device)

    sum_xhat = sum_dy = None
    if dy is not None:
        sum_xhat = sums(d_weight, d_scale)
        sum_dy = sums(d_bias, d_shift, None if bias is None else d_scale)
    sum_gate = sums(d_gate)
    if any(t is not None for t in (d_r, d_x, sum_xhat, sum_dy, sum_gate)):
        _launch.launch(
            layer_norm_modulate_backward,
            (images * parts,),
            dy=dy,
            dr=dr,
            r=r,
            x=None if d_gate is None else x,
            gate=gate,
            weight=weight,
            scale=scale,
            mean=stats[0],
            rstd=stats[1],
            d_r=d_r,
            d_x=d_x,
            sum_xhat=sum_xhat,
            sum_dy=sum_dy,
            sum_gate=sum_gate,
            gate_stride=_stride(gate),
            scale_stride=_stride(scale),
            C=C,
            **plan,
        )
    if any(d is not None for d in (d_scale, d_shift, d_gate)):
        _launch.launch(
            layer_norm_modulate_images,
            (images, _launch.cdiv(C, 32)),
            sum_xhat=sum_xhat,
            sum_dy=sum_dy,
            sum_gate=sum_gate,
            weight=weight,
            bias=bias,
            d_scale=d_scale,
            d_shift=d_shift,
            d_gate=d_gate,
            parts=parts,
            C=C,
            BLOCK=32,
            PARTS=64,
            num_warps=8,  # with 4, triton 3.6 spills
        )
    if d_weight is not None or d_bias is not None:
        _launch.launch(
            layer_norm_modulate_parameters,
            (_launch.cdiv(C, 8),),
            sum_xhat=sum_xhat,
            sum_dy=sum_dy,
            scale=scale,
            d_weight=d_weight,
            d_bias=d_bias,
            scale_stride=_stride(scale),
            images=images,
            parts=parts,
            C=C,
            # 32 bytes of a part, so that more programs share the sums of few columns.
            BLOCK=8,
            PARTS=512,
            num_warps=16,  # with 8, triton 3.6 spills on sm_80
        )


def _stats(x: Tensor) -> Tensor:
    """Mean and 1 / deviation of each row, for the backward: 8 bytes a row."""
    return x.new_empty((2, math.prod(x.shape[:-1])), dtype=torch.float32)


_VECTORS = "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift"
_SAVED = ("weight", "bias", "scale", "shift", "stats")

# Three forms, because x is saved for the gradient of the gate only, and r is x without a residual.
_plain = _register.kernel(
    f"layer_norm_modulate_triton(Tensor x, {_VECTORS}, float eps) -> (Tensor y, Tensor stats)",
    empty=lambda x, *_: (torch.empty_like(x), _stats(x)),
    forward=lambda out, x, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), None, None, eps, out[0], None, out[1]
    ),
    backward=lambda d, dy, x, w, b, scale, shift, stats, eps: _backward(
        d[0], None, d[1:], None, dy, None, x, None, (w, b, scale, shift), None, stats
    ),
    saves=("x", *_SAVED),
)

# The two terms of the sum have one gradient, and one tensor holds it.
_residual = _register.kernel(
    f"layer_norm_modulate_residual_triton(Tensor x, Tensor residual, {_VECTORS}, float eps)"
    " -> (Tensor y, Tensor r, Tensor stats)",
    empty=lambda x, *_: (torch.empty_like(x), torch.empty_like(x), _stats(x)),
    forward=lambda out, x, residual, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), residual, None, eps, *out
    ),
    backward=lambda d, dy, dr, r, w, b, scale, shift, stats, eps: _backward(
        d[1], None, d[2:], None, dy, dr, r, None, (w, b, scale, shift), None, stats
    ),
    saves=("r", *_SAVED),
    grad_like={"residual": "r"},
    grad_same={"x": "residual"},
    returned=2,
)

_gated = _register.kernel(
    f"layer_norm_modulate_gated_triton(Tensor x, Tensor residual, Tensor gate, {_VECTORS}, "
    "float eps) -> (Tensor y, Tensor r, Tensor stats)",
    empty=lambda x, *_: (torch.empty_like(x), torch.empty_like(x), _stats(x)),
    forward=lambda out, x, residual, gate, w, b, scale, shift, eps: _forward(
        x, (w, b, scale, shift), residual, gate, eps, *out
    ),
    backward=lambda d, dy, dr, r, x, gate, w, b, scale, shift, stats, eps: _backward(
        d[1], d[0], d[3:], d[2], dy, dr, r, x, (w, b, scale, shift), gate, stats
    ),
    saves=("r", "x", "gate", *_SAVED),
    grad_like={"residual": "r"},
    returned=2,
)


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
    """The op in normal form. Copies what has no dense rows, for autograd to see."""
    stream = x
    x, vectors = x.contiguous(), tuple(map(_dense, (weight, bias, scale, shift)))
    if residual is None:
        return _plain(x, *vectors, eps), stream
    residual = residual.contiguous()
    if gate is None:
        return _residual(x, residual, *vectors, eps)
    return _gated(x, residual, _dense(gate), *vectors, eps)


def _dense(vector: _Maybe) -> _Maybe:
    """The vector if its rows are dense and lie whole rows apart, as a part of a Linear's result."""
    if vector is None or vector.is_contiguous():
        return vector
    apart = vector.stride(0) % vector.shape[-1]
    return vector if vector.stride(-1) == 1 and apart == 0 else vector.contiguous()


def supports(
    x: Tensor,
    weight: _Maybe,
    bias: _Maybe,
    scale: _Maybe,
    shift: _Maybe,
    residual: _Maybe,
    gate: _Maybe,
    eps: float,
) -> str | None:
    """Why the kernels cannot run a call, or None."""
    if x.dtype is torch.float64:
        return "float64; it takes float32, bfloat16 and float16"
    if x.shape[-1] > 8192:
        return f"{x.shape[-1]} channels; a row fits on chip up to 8192"
    return None
