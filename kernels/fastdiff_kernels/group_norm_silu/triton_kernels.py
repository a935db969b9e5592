"""Triton kernels of `group_norm_silu`.

A tile is (channels, pixels) in both memory formats; only addresses differ. Bytes moved,
with e those of cat([x, skip], 1):

| map | forward | backward, and then `parameter_gradients` |
|---|---|---|
| small: a tile holds whole groups | `whole_forward`, 2 e | `whole_backward`, 3 e |
| large | `statistics`, `apply`, 3 e | `sums`, `input_gradients`, 5 e |

On large maps every program of the first kernel leaves one partial result a group (a *part*), and
the prologue of the second adds the parts up, in a fixed order. The second kernel takes its tiles in
the reverse order, so it begins with what is still in the L2 cache; tensors larger than that go
through both kernels a few images at a time.

Letters: B images, G groups, C = C1 + C2 channels of x and skip, CPG channels a group, HW pixels. HW
comes as HWV * V, so that the compiler sees how rows of pixels are aligned.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastdiff_kernels import _launch, _register
from fastdiff_kernels._jit import INTERPRETS, round_to, silu, silu_slope
from fastdiff_kernels._launch import cdiv, power_of_two

# --- Programmatic dependent launch (PDL: sm_90 and later) ---
# A kernel launched with the attribute starts when every program of the one before it has called
# gdc_launch_dependents or has ended; gdc_wait waits until that one has completed and its writes are
# visible. The first kernel of a call has no attribute: all earlier work on the stream, which wrote
# x and the vectors and read the memory that this call writes, has completed before it starts.
# Every later kernel waits before its first write and before it reads what this call wrote. It ends
# after its wait, so its own end implies the end of all kernels before it, and what follows the call
# on the stream may reuse the partial results' memory. Inputs of the call may be read before the
# wait. The second round's sums overlap the end of the first round: they have other images, other
# parts.


@triton.jit
def _wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        if not INTERPRETS:
            gdc_wait()


@triton.jit
def _let_the_next_start(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    if PDL:
        if not INTERPRETS:
            gdc_launch_dependents()


# --- Device functions ---


@triton.jit
def _at(base, image, p, c, HW, C: tl.constexpr, NHWC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pointers to pixels p of channels c of an image, (channels, pixels), for any 64-bit offset."""
    image = image.to(tl.int64)
    if NHWC:
        return base + (image * HW + p[None, :]) * C + c[:, None]
    return base + (image * C + c[:, None]) * HW + p[None, :]


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    x, skip, image, p, c, inside, HW, C1: tl.constexpr, C2: tl.constexpr, NHWC: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A tile of cat([x, skip], 1) in float32, 0 outside; LAST: nobody reads it again.

    UNIT channels, aligned to as many, lie in the same tensor.
    """
    at = _at(x, image, p, c, HW, C1, NHWC)
    if skip is not None:
        at = tl.where(c[:, None] < C1, at, _at(skip, image, p, c - C1, HW, C2, NHWC))
        if NHWC:
            # The compiler takes the 8 channels to which C1 aligns the choice for 8 bytes.
            BYTES: tl.constexpr = UNIT * x.dtype.element_ty.primitive_bitwidth // 8
            at = tl.max_contiguous(tl.multiple_of(at, (BYTES, 1)), (UNIT, 1))
    policy: tl.constexpr = "evict_first" if LAST else ""
    return tl.load(at, mask=inside, other=0.0, eviction_policy=policy).to(tl.float32)


@triton.jit
def _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid):  # type: ignore[no-untyped-def]
    """Factor and summand per channel after the normalisation: the affine part, then FiLM."""
    w = tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
    image = image.to(tl.int64)
    if scale is not None:
        s = 1.0 + tl.load(scale + image * scale_row + c, mask=valid, other=0.0).to(tl.float32)
        w, b = w * s, b * s
    if shift is not None:
        b += tl.load(shift + image * shift_row + c, mask=valid, other=0.0).to(tl.float32)
    return w, b


@triton.jit
def _per_group(v, member):  # type: ignore[no-untyped-def]
    """Sum a value per channel over the channels of each group; member is (channels, groups)."""
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def _per_channel(v, which):  # type: ignore[no-untyped-def]
    """Hand each channel its group's value.

    A gather and no product with `member`: that would carry its thread layout into the tile's.
    """
    return tl.gather(v, which, 0)


@triton.jit
def _tile_mean(v, member, n):  # type: ignore[no-untyped-def]
    """Mean per group of a tile, n values a group: what the values are shifted by."""
    return _per_group(tl.sum(v, 1), member) / n


@triton.jit
def _moments(shift, s1, s2, member, n):  # type: ignore[no-untyped-def]
    """Mean and sum of squared deviations per group, of sums per channel of shifted values."""
    s1, s2 = _per_group(s1, member), _per_group(s2, member)
    return shift + s1 / n, tl.maximum(s2 - s1 * s1 / n, 0.0)


# --- Forward ---


@triton.jit(do_not_specialize=["HWV", "scale_row", "shift_row"])
def group_norm_silu_whole_forward(  # type: ignore[no-untyped-def]
    x, skip, weight, bias, scale, shift, y, mean, rstd, scale_row, shift_row, HWV, eps,
    C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr,
    UNIT: tl.constexpr, SILU: tl.constexpr, GT: tl.constexpr, BG: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: GT whole groups of one image, read once, kept in registers, written once."""
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    TILES: tl.constexpr = (G + GT - 1) // GT
    HW = HWV * V
    pid = tl.program_id(0)
    image, tile = pid // TILES, pid % TILES
    lane, group, p = tl.arange(0, BC), tl.arange(0, BG), tl.arange(0, BP)
    which = tl.minimum(lane // CPG, BG - 1)
    member = lane[:, None] // CPG == group[None, :]
    c, g = tile * (GT * CPG) + lane, tile * GT + group
    valid = (lane < GT * CPG) & (c < C)
    inside = valid[:, None] & (p[None, :] < HW)
    v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, True)
    n = HW.to(tl.float32) * CPG
    centre = _tile_mean(v, member, n)
    d = tl.where(inside, v - _per_channel(centre, which)[:, None], 0.0)
    m, m2 = _moments(centre, tl.sum(d, 1), tl.sum(d * d, 1), member, n)
    r = tl.div_rn(1.0, tl.sqrt_rn(m2 / n + eps))
    w, b = _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid)
    u = (v - _per_channel(m, which)[:, None]) * (_per_channel(r, which) * w)[:, None] + b[:, None]
    if SILU:
        u = silu(u)
    tl.store(_at(y, image, p, c, HW, C, NHWC), round_to(u, y.dtype.element_ty), mask=inside)
    at = image.to(tl.int64) * G + g
    mine = (group < GT) & (g < G)
    tl.store(mean + at, m, mask=mine)
    tl.store(rstd + at, r, mask=mine)


@triton.jit(do_not_specialize=["first", "HWV", "blocks", "chunks"])
def group_norm_silu_statistics(  # type: ignore[no-untyped-def]
    x, skip, means, squares, first, HWV, blocks, chunks, C1: tl.constexpr, C2: tl.constexpr,
    CPG: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
    GT: tl.constexpr, BG: tl.constexpr, WIDTH: tl.constexpr, CS: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of one part: `blocks` tiles of an image, e read.

    A tile has GT whole groups, or (CS > 1) WIDTH channels of one. Values are shifted by their mean
    over the first tile and summed per thread; threads meet at the end.
    """
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    TILES: tl.constexpr = (G + GT - 1) // GT * CS
    HW = HWV * V
    pid = tl.program_id(0)
    tile, chunk, image = pid % TILES, pid // TILES % chunks, first + pid // TILES // chunks
    _let_the_next_start(PDL)
    split, g0 = tile % CS, tile // CS * GT
    lane, group = tl.arange(0, BC), tl.arange(0, BG)
    which = tl.minimum(lane // CPG, BG - 1)
    member = lane[:, None] // CPG == group[None, :]
    c = g0 * CPG + split * WIDTH + lane
    valid = (lane < WIDTH) & (c < C)
    channels = CPG
    if CS > 1:
        valid = valid & (split * WIDTH + lane < CPG)
        channels = tl.minimum(CPG - split * WIDTH, WIDTH)
        member = (lane[:, None] >= 0) & (group[None, :] == 0)
    begin, end = chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(HW, BP))
    p = begin * BP + tl.arange(0, BP)
    inside = valid[:, None] & (p[None, :] < HW)
    v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, False)
    n = tl.minimum(HW - begin * BP, BP).to(tl.float32) * channels
    centre = _tile_mean(v, member, n)
    k = _per_channel(centre, which)[:, None]
    s1 = tl.where(inside, v - k, 0.0)
    s2 = s1 * s1
    for i in tl.range(begin + 1, end, num_stages=STAGES):
        p = i * BP + tl.arange(0, BP)
        inside = valid[:, None] & (p[None, :] < HW)
        v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, False)
        d = tl.where(inside, v - k, 0.0)
        s1 += d
        s2 += d * d
    n = tl.minimum(HW - begin * BP, blocks * BP).to(tl.float32) * channels
    m, m2 = _moments(centre, tl.sum(s1, 1), tl.sum(s2, 1), member, n)
    _wait(PDL)
    part = (image * chunks + chunk).to(tl.int64) * CS + split
    g = g0 + group
    mine = (group < GT) & (g < G)
    tl.store(means + part * G + g, m, mask=mine)
    tl.store(squares + part * G + g, m2, mask=mine)


@triton.jit(do_not_specialize=["first", "HWV", "scale_row", "shift_row", "part_pixels", "parts",
                               "blocks", "chunks"])  # fmt: skip
def group_norm_silu_apply(  # type: ignore[no-untyped-def]
    x, skip, weight, bias, scale, shift, y, mean, rstd, means, squares, scale_row, shift_row,
    first, HWV, eps, part_pixels, parts, blocks, chunks, C1: tl.constexpr, C2: tl.constexpr,
    CPG: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, CS: tl.constexpr, BG: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Normalise, modulate, activate: `blocks` tiles of an image, e read and e written.

    The prologue merges the parts of the tile's groups; the first chunk keeps mean and rstd.
    """
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    TILES: tl.constexpr = (C + BC - 1) // BC
    HW = HWV * V
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, chunk, image = pid % TILES, pid // TILES % chunks, first + pid // TILES // chunks
    c = tile * BC + tl.arange(0, BC)
    valid = c < C
    g = tile * BC // CPG + tl.arange(0, BG)
    which = c // CPG - tile * BC // CPG
    w, b = _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid)

    begin, end = chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(HW, BP))
    if PDL:
        # Memory is busy while the statistics end and are merged.
        p = begin * BP + tl.arange(0, BP)
        inside = valid[:, None] & (p[None, :] < HW)
        v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, True)
    _wait(PDL)

    # Parts are merged exactly: shifted by the mean of the first.
    at = image.to(tl.int64) * parts * G + g
    centre = tl.load(means + at, mask=g < G, other=0.0)
    s1 = tl.zeros((PARTS, BG), tl.float32)
    s2 = tl.zeros((PARTS, BG), tl.float32)
    for i in range(0, parts, PARTS):
        part = i + tl.arange(0, PARTS)
        count = tl.minimum(HW - part // CS * part_pixels, part_pixels).to(tl.float32)
        count *= tl.minimum(CPG - part % CS * WIDTH, WIDTH) if CS > 1 else CPG
        count = tl.where(part < parts, count, 0.0)[:, None]
        mask = (part[:, None] < parts) & (g[None, :] < G)
        d = tl.load(means + at[None, :] + part[:, None] * G, mask=mask, other=0.0) - centre[None, :]
        s1 += count * d
        squared = tl.load(squares + at[None, :] + part[:, None] * G, mask=mask, other=0.0)
        s2 += squared + count * d * d
    s1, s2 = tl.sum(s1, 0), tl.sum(s2, 0)
    n = HW.to(tl.float32) * CPG
    m = centre + s1 / n
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(s2 - s1 * s1 / n, 0.0) / n + eps))
    if chunk == 0:
        # A group is kept by the tile that has its first channel.
        mine = (g < G) & (g * CPG >= tile * BC) & (g * CPG < (tile + 1) * BC)
        tl.store(mean + image.to(tl.int64) * G + g, m, mask=mine)
        tl.store(rstd + image.to(tl.int64) * G + g, r, mask=mine)

    m = _per_channel(m, which)[:, None]
    w = (_per_channel(r, which) * w)[:, None]
    b = b[:, None]
    if PDL:
        u = (v - m) * w + b
        if SILU:
            u = silu(u)
        tl.store(_at(y, image, p, c, HW, C, NHWC), round_to(u, y.dtype.element_ty), mask=inside)
        begin += 1
    for i in tl.range(begin, end, num_stages=STAGES):
        p = i * BP + tl.arange(0, BP)
        inside = valid[:, None] & (p[None, :] < HW)
        v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, True)
        u = (v - m) * w + b
        if SILU:
            u = silu(u)
        tl.store(_at(y, image, p, c, HW, C, NHWC), round_to(u, y.dtype.element_ty), mask=inside)
    _let_the_next_start(PDL)


# --- Backward ---
# With u the pre-activation, z = dy * act'(u) and x^ = (x - mean) * rstd:
# dx = rstd * (w z - mean(w z) - x^ mean(w z x^)), means over the group, w with FiLM's factor in it.


@triton.jit
def _slope(dy, u, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    if SILU:
        return dy * silu_slope(u)
    return dy


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    dx, dskip, v, image, p, c, inside, HW, C1: tl.constexpr, C2: tl.constexpr,
    NHWC: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of cat([x, skip], 1), to those of the two that are wanted."""
    if dx is not None:
        at = _at(dx, image, p, c, HW, C1, NHWC)
        tl.store(at, round_to(v, dx.dtype.element_ty), mask=inside & (c < C1)[:, None])
    if dskip is not None:
        at = _at(dskip, image, p, c - C1, HW, C2, NHWC)
        tl.store(at, round_to(v, dskip.dtype.element_ty), mask=inside & (c >= C1)[:, None])


@triton.jit(do_not_specialize=["HWV", "scale_row", "shift_row"])
def group_norm_silu_whole_backward(  # type: ignore[no-untyped-def]
    dy, x, skip, weight, bias, scale, shift, mean, rstd, dx, dskip, zs, zxs, scale_row,
    shift_row, HWV, C1: tl.constexpr, C2: tl.constexpr, CPG: tl.constexpr, NHWC: tl.constexpr,
    V: tl.constexpr, UNIT: tl.constexpr, SILU: tl.constexpr, GT: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program: GT whole groups of one image; dy and x read, dx and sums per channel written."""
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    TILES: tl.constexpr = (G + GT - 1) // GT
    HW = HWV * V
    pid = tl.program_id(0)
    image, tile = pid // TILES, pid % TILES
    lane, group, p = tl.arange(0, BC), tl.arange(0, BG), tl.arange(0, BP)
    which = tl.minimum(lane // CPG, BG - 1)
    member = lane[:, None] // CPG == group[None, :]
    c = tile * (GT * CPG) + lane
    valid = (lane < GT * CPG) & (c < C)
    inside = valid[:, None] & (p[None, :] < HW)
    at = image.to(tl.int64) * G + c // CPG
    v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, True)
    z = tl.load(_at(dy, image, p, c, HW, C, NHWC), mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + at, mask=valid, other=0.0)
    r = tl.load(rstd + at, mask=valid, other=0.0)
    w, b = _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid)
    v = (v - m[:, None]) * r[:, None]
    z = _slope(z, v * w[:, None] + b[:, None], SILU)
    sum_z, sum_zx = tl.sum(z, 1), tl.sum(z * v, 1)
    if zs is not None:
        tl.store(zs + image.to(tl.int64) * C + c, sum_z, mask=valid)
        tl.store(zxs + image.to(tl.int64) * C + c, sum_zx, mask=valid)
    if dx is not None or dskip is not None:
        n = HW.to(tl.float32) * CPG
        mean_z = _per_channel(_per_group(w * sum_z, member) / n, which)
        mean_zx = _per_channel(_per_group(w * sum_zx, member) / n, which)
        v = (z * w[:, None] - mean_z[:, None] - v * mean_zx[:, None]) * r[:, None]
        _store(dx, dskip, v, image, p, c, inside, HW, C1, C2, NHWC)


@triton.jit(do_not_specialize=["first", "HWV", "scale_row", "shift_row", "blocks", "chunks"])
def group_norm_silu_sums(  # type: ignore[no-untyped-def]
    dy, x, skip, weight, bias, scale, shift, mean, rstd, zs, zxs, group_zs, group_zxs,
    scale_row, shift_row, first, HWV, blocks, chunks, C1: tl.constexpr, C2: tl.constexpr,
    CPG: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr, UNIT: tl.constexpr,
    SILU: tl.constexpr, GT: tl.constexpr, BG: tl.constexpr, WIDTH: tl.constexpr,
    CS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums of z and z x^ over one part, 2 e read: per channel for the parameters, and, weighted,
    per group for dx. Tiles as in `statistics`.
    """
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    TILES: tl.constexpr = (G + GT - 1) // GT * CS
    HW = HWV * V
    pid = tl.program_id(0)
    tile, chunk, image = pid % TILES, pid // TILES % chunks, first + pid // TILES // chunks
    _let_the_next_start(PDL)
    split, g0 = tile % CS, tile // CS * GT
    lane, group = tl.arange(0, BC), tl.arange(0, BG)
    member = lane[:, None] // CPG == group[None, :]
    c = g0 * CPG + split * WIDTH + lane
    valid = (lane < WIDTH) & (c < C)
    if CS > 1:
        valid = valid & (split * WIDTH + lane < CPG)
        member = (lane[:, None] >= 0) & (group[None, :] == 0)
    at = image.to(tl.int64) * G + c // CPG
    m = tl.load(mean + at, mask=valid, other=0.0)
    r = tl.load(rstd + at, mask=valid, other=0.0)
    w, b = _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid)
    rw = r * w
    sum_z = tl.zeros((BC, BP), tl.float32)
    sum_zx = tl.zeros((BC, BP), tl.float32)
    for i in tl.range(
        chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(HW, BP)), num_stages=STAGES
    ):
        p = i * BP + tl.arange(0, BP)
        inside = valid[:, None] & (p[None, :] < HW)
        z = tl.load(_at(dy, image, p, c, HW, C, NHWC), mask=inside, other=0.0).to(tl.float32)
        v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, False) - m[:, None]
        z = _slope(z, v * rw[:, None] + b[:, None], SILU)
        sum_z += z
        sum_zx += z * v
    z, zx = tl.sum(sum_z, 1), tl.sum(sum_zx, 1) * r
    _wait(PDL)
    row = (image * chunks + chunk).to(tl.int64)
    if zs is not None:
        tl.store(zs + row * C + c, z, mask=valid)
        tl.store(zxs + row * C + c, zx, mask=valid)
    if group_zs is not None:
        g = g0 + group
        mine = (group < GT) & (g < G)
        tl.store(group_zs + (row * CS + split) * G + g, _per_group(w * z, member), mask=mine)
        tl.store(group_zxs + (row * CS + split) * G + g, _per_group(w * zx, member), mask=mine)


@triton.jit(do_not_specialize=["first", "HWV", "scale_row", "shift_row", "parts", "blocks",
                               "chunks", "tile0", "tiles"])  # fmt: skip
def group_norm_silu_input_gradients(  # type: ignore[no-untyped-def]
    dy, x, skip, weight, bias, scale, shift, mean, rstd, dx, dskip, group_zs, group_zxs,
    scale_row, shift_row, first, HWV, parts, blocks, chunks, tile0, tiles, C1: tl.constexpr,
    C2: tl.constexpr, CPG: tl.constexpr, NHWC: tl.constexpr, V: tl.constexpr,
    UNIT: tl.constexpr, SILU: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """dx and dskip: `blocks` tiles of an image, 2 e read and e written; adds the parts up first."""
    C: tl.constexpr = C1 + C2
    G: tl.constexpr = C // CPG
    HW = HWV * V
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, chunk, image = tile0 + pid % tiles, pid // tiles % chunks, first + pid // tiles // chunks
    c = tile * BC + tl.arange(0, BC)
    valid = c < C
    g = tile * BC // CPG + tl.arange(0, BG)
    which = c // CPG - tile * BC // CPG
    at = image.to(tl.int64) * G + c // CPG
    m = tl.load(mean + at, mask=valid, other=0.0)
    r = tl.load(rstd + at, mask=valid, other=0.0)
    w, b = _film(weight, bias, scale, shift, scale_row, shift_row, image, c, valid)
    # No tile is loaded before the wait, unlike in `apply`: two tensors would take 166 registers
    # instead of 100, and the programs of a launch would no longer be resident all at once.
    _wait(PDL)
    part_z = tl.zeros((PARTS, BG), tl.float32)
    part_zx = tl.zeros((PARTS, BG), tl.float32)
    at = image.to(tl.int64) * parts * G + g
    for i in range(0, parts, PARTS):
        part = i + tl.arange(0, PARTS)
        mask = (part[:, None] < parts) & (g[None, :] < G)
        of = at[None, :] + part[:, None] * G
        part_z += tl.load(group_zs + of, mask=mask, other=0.0)
        part_zx += tl.load(group_zxs + of, mask=mask, other=0.0)
    sum_z, sum_zx = tl.sum(part_z, 0), tl.sum(part_zx, 0)
    n = HW.to(tl.float32) * CPG
    # dx = rw z - offset - (x - mean) slope
    offset = (r * _per_channel(sum_z / n, which))[:, None]
    slope = (r * r * _per_channel(sum_zx / n, which))[:, None]
    rw, m, b = (r * w)[:, None], m[:, None], b[:, None]
    for i in tl.range(
        chunk * blocks, tl.minimum((chunk + 1) * blocks, tl.cdiv(HW, BP)), num_stages=STAGES
    ):
        p = i * BP + tl.arange(0, BP)
        inside = valid[:, None] & (p[None, :] < HW)
        at_dy = _at(dy, image, p, c, HW, C, NHWC)
        z = tl.load(at_dy, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = _load(x, skip, image, p, c, inside, HW, C1, C2, NHWC, UNIT, True) - m
        z = _slope(z, v * rw + b, SILU)
        v = rw * z - offset - v * slope
        _store(dx, dskip, v, image, p, c, inside, HW, C1, C2, NHWC)
    _let_the_next_start(PDL)


@triton.jit(do_not_specialize=["B", "chunks", "scale_row"])
def group_norm_silu_parameter_gradients(  # type: ignore[no-untyped-def]
    zs, zxs, weight, bias, scale, dweight, dbias, dscale, dshift, B, chunks, scale_row,
    C: tl.constexpr, AFFINE: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums per channel, over all images for weight and bias (one row of programs, if AFFINE), and
    over the chunks of an image for scale and shift (one row of programs an image).
    """
    TILES: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    image = pid // TILES - AFFINE  # -1: all images
    c = pid % TILES * BC + tl.arange(0, BC)
    valid = c < C
    _wait(PDL)
    # Threads add up their own rows; they meet once, behind the loop.
    sum_z = tl.zeros((BC, ROWS), tl.float32)
    sum_zx = tl.zeros((BC, ROWS), tl.float32)
    begin, end = image * chunks, (image + 1) * chunks
    if image < 0:
        begin, end = 0, B * chunks
    for i in range(begin, end, ROWS):
        row = i + tl.arange(0, ROWS)
        inside = valid[:, None] & (row[None, :] < end)
        at = row.to(tl.int64)[None, :] * C + c[:, None]
        row_z = tl.load(zs + at, mask=inside, other=0.0)
        row_zx = tl.load(zxs + at, mask=inside, other=0.0)
        if AFFINE and scale is not None:
            if image < 0:
                at = (row // chunks).to(tl.int64)[None, :] * scale_row + c[:, None]
                s = 1.0 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
                row_z, row_zx = row_z * s, row_zx * s
        sum_z += row_z
        sum_zx += row_zx
    z, zx = tl.sum(sum_z, 1), tl.sum(sum_zx, 1)
    if image < 0:
        if dweight is not None:
            tl.store(dweight + c, round_to(zx, dweight.dtype.element_ty), mask=valid)
        if dbias is not None:
            tl.store(dbias + c, round_to(z, dbias.dtype.element_ty), mask=valid)
    else:
        at = image.to(tl.int64) * C + c
        if dscale is not None:
            w = tl.load(weight + c, mask=valid, other=0.0).to(tl.float32)
            b = tl.load(bias + c, mask=valid, other=0.0).to(tl.float32)
            tl.store(dscale + at, round_to(w * zx + b * z, dscale.dtype.element_ty), mask=valid)
        if dshift is not None:
            tl.store(dshift + at, round_to(z, dshift.dtype.element_ty), mask=valid)


# --- Tiles ---

TUNABLE: dict[str, list[dict[str, int]]] = {
    "group_norm_silu_whole_forward": [{"per_thread": n} for n in (16, 32, 64)],
    "group_norm_silu_whole_backward": [{"per_thread": n} for n in (8, 16, 32)],
    **{
        f"group_norm_silu_{name}": [
            {"block": block, "num_warps": num_warps, "num_stages": num_stages}
            for block, num_warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
            for num_stages in (1, 2, 3, 4)
        ]
        for name in ("statistics", "apply", "sums", "input_gradients")
    },
}

_WHOLE = 16384  # elements of a tile that one program keeps in registers, at most
_WIDEST = 256  # channels of a tile, at most
_PARTS = 32  # that a prologue adds up at a time


@dataclass(frozen=True)
class _Shape:
    """What the choice of tiles depends on."""

    B: int
    C1: int
    C2: int
    HW: int
    G: int
    nhwc: bool
    itemsize: int

    @property
    def C(self) -> int:
        return self.C1 + self.C2

    @property
    def CPG(self) -> int:
        return self.C // self.G

    @property
    def key(self) -> tuple[object, ...]:
        return ("nhwc" if self.nhwc else "nchw", self.C1, self.C2, self.G, self.itemsize)

    @property
    def V(self) -> int:
        """Power of two that divides HW, where rows of pixels are contiguous."""
        return 1 if self.nhwc else min(16, self.HW & -self.HW)

    def unit(self, step: int) -> int:
        """Channels, up to 16 bytes, that lie together if tiles begin at multiples of a step."""
        unit = 16 // self.itemsize if self.nhwc else 1
        while self.C1 % unit or self.C2 % unit or step % unit:
            unit //= 2
        return unit

    def aligned(self, step: int) -> bool:
        """Whether such tiles begin at 16 bytes of a pixel, or as the widths allow."""
        return self.unit(step) == self.unit(self.C)

    @property
    def scattered(self) -> bool:
        """Whether the seam of two float32 tensors lies so that a thread has an address for nearly
        every element: two registers each, and twice, for x and for skip."""
        apart = self.unit(self.C) < 4 if self.nhwc else self.V < 8
        return self.C2 > 0 and self.itemsize == 4 and apart

    def constants(self) -> dict[str, Any]:
        return {
            **{"HWV": self.HW // self.V, "V": self.V, "NHWC": self.nhwc},
            **{"C1": self.C1, "C2": self.C2, "CPG": self.CPG},
        }


def _use(n: int, tile: int) -> float:
    """The part of the lanes that n items fill in tiles of a size, in steps of a twentieth."""
    return round(20 * n / (cdiv(n, tile) * tile)) / 20


@functools.lru_cache(1024)
def _whole(shape: _Shape, processors: int) -> dict[str, int] | None:
    """Tile of the kernels that keep whole groups in registers; None: they are too large.

    In channels_last at least 64 bytes of a pixel, if that fits; then enough programs for the chip;
    then few idle lanes; then no more programs than it takes.
    """
    BP = power_of_two(shape.HW)
    found = []
    for GT in range(1, shape.G + 1):
        BC = power_of_two(GT * shape.CPG)
        if BP * BC > (_WHOLE // 2 if shape.scattered else _WHOLE):
            break
        if shape.aligned(GT * shape.CPG):
            width = min(GT * shape.CPG * shape.itemsize, 64) if shape.nhwc else 0
            tiles = cdiv(shape.G, GT)
            programs = min(shape.B * tiles, 2 * processors)
            use = round(20 * shape.C / (tiles * BC))
            size = BP * BC if BP * BC <= 4096 else -BP * BC
            found.append((width, programs, use, size, -GT, GT, BC))
    if not found:
        return None
    *_, GT, BC = max(found)
    unit = shape.unit(GT * shape.CPG)
    return {"GT": GT, "BG": power_of_two(GT), "BP": BP, "BC": BC, "UNIT": unit}


@functools.lru_cache(1024)
def _reduction(shape: _Shape, block: int) -> dict[str, int]:
    """Tile of `statistics` and `sums`: whole groups, in NCHW or of wide groups a piece of one."""
    if shape.nhwc and shape.CPG <= _WIDEST:
        found = []
        for GT in range(1, min(shape.G, _WIDEST // shape.CPG) + 1):
            BC = power_of_two(GT * shape.CPG)
            use = round(20 * shape.C / (cdiv(shape.G, GT) * BC))
            # Around 128 bytes of a pixel: fewer parts than wider tiles give.
            distance = abs(BC * shape.itemsize - 128)
            found.append((shape.aligned(GT * shape.CPG), use, -distance, -GT, GT, BC))
        *_, GT, BC = max(found)
        WIDTH, CS = GT * shape.CPG, 1
    else:
        most = min(power_of_two(shape.CPG), _WIDEST if shape.nhwc else 32)
        widths = [1 << i for i in range(most.bit_length())]
        WIDTH = BC = max(widths, key=lambda n: (min(_use(shape.CPG, n), 0.9), n))
        GT, CS = 1, cdiv(shape.CPG, WIDTH)
    BP = max(1, min(block // BC, power_of_two(shape.HW)))
    unit = shape.unit(math.gcd(GT * shape.CPG, WIDTH))
    tile = {"GT": GT, "BG": power_of_two(GT), "WIDTH": WIDTH, "CS": CS}
    return tile | {"BP": BP, "BC": BC, "UNIT": unit}


@functools.lru_cache(1024)
def _pointwise(shape: _Shape, block: int) -> dict[str, int]:
    """Tile of `apply` and `input_gradients`: few idle lanes, whatever the groups."""
    if shape.nhwc:
        most = min(power_of_two(shape.C), _WIDEST)
        widths = [most >> i for i in range(5) if most >> i]
        BC = max(widths, key=lambda n: (_use(shape.C, n), -abs(n * shape.itemsize - 128)))
        BP = max(1, min(block // BC, power_of_two(shape.HW)))
    else:
        most = min(power_of_two(shape.HW), 2048 // shape.itemsize)
        rows = [most >> i for i in range(4) if most >> i]
        BP = max(rows, key=lambda n: (_use(shape.HW, n), n))
        BC = max(1, min(block // BP, power_of_two(shape.C)))
    groups = max(cdiv(BC - 1, shape.CPG), 1) + 1  # that BC channels from anywhere can touch
    if BC % shape.CPG == 0 or shape.CPG % BC == 0:
        groups = cdiv(BC, shape.CPG)
    return {"BG": power_of_two(groups), "BP": BP, "BC": BC, "UNIT": shape.unit(BC)}


@functools.lru_cache(1024)
def _chunks(HW: int, BP: int, others: int, processors: int, resident: int) -> tuple[int, int]:
    """(tiles of a program, programs along the pixels), with `others` programs for each of these.

    The least time of the processor that has most to do, which takes `resident` programs to be busy;
    but chunks cost the next kernel time, and are 64 at most: it adds up what each leaves.
    """
    tiles = cdiv(HW, BP)

    def time(blocks: int) -> float:
        chunks = cdiv(tiles, blocks)
        programs = max(resident, cdiv(chunks * others, processors))
        return programs * (blocks + 1) * (1 + chunks / 500)  # one for the start of a program

    blocks = min(range(cdiv(tiles, 64), tiles + 1)[:1024], key=time)
    return blocks, cdiv(tiles, blocks)


def _images(B: int, image: int, on: _launch.Chip) -> int:
    """Images a launch: all, or (`image` bytes each are read twice) what half of the L2 can keep.

    No more than four rounds: each costs launches.
    """
    rounds = 1 if B * image <= on.l2 else min(4, cdiv(B * image, on.l2 // 2))
    return cdiv(B, rounds)


def _overlaps(on: _launch.Chip) -> bool:
    """Whether kernels of a call start before the one before them has ended."""
    return on.family in ("sm_90", "sm_100")


# --- Launchers ---


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _dense(x: Tensor | None, nhwc: bool) -> Tensor | None:
    """The tensor as the kernels read it: in that format, aligned."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    if x is None or (x.is_contiguous(memory_format=layout) and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=layout)


def _rows(vector: Tensor | None) -> Tensor | None:
    """(B, C) with contiguous rows, as a chunk of a wider one is."""
    return vector if vector is None or vector.stride(1) == 1 else vector.contiguous()


def _shape(x: Tensor, skip: Tensor | None, num_groups: int) -> _Shape:
    B, C1, H, W = x.shape
    C2 = 0 if skip is None else skip.shape[1]
    # One pixel: both formats are the same, and channels are contiguous.
    nhwc = _channels_last(x) or H * W == 1
    return _Shape(B, C1, C2, H * W, num_groups, nhwc, x.element_size())


def _empty(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    activate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, C, H, W = x.shape
    C = C if skip is None else C + skip.shape[1]
    layout = torch.channels_last if _channels_last(x) else torch.contiguous_format
    y = torch.empty((B, C, H, W), dtype=x.dtype, device=x.device, memory_format=layout)
    mean = torch.empty((B, num_groups), dtype=torch.float32, device=x.device)
    return y, mean, torch.empty_like(mean)


def _given(
    shape: _Shape,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> dict[str, Any]:
    """Arguments that all kernels on pixels have."""
    scale, shift = _rows(scale), _rows(shift)
    return {
        **{"x": _dense(x, shape.nhwc), "skip": _dense(skip, shape.nhwc)},
        **{"weight": weight.contiguous(), "bias": bias.contiguous()},
        **{"scale": scale, "scale_row": 0 if scale is None else scale.stride(0)},
        **{"shift": shift, "shift_row": 0 if shift is None else shift.stride(0)},
        **shape.constants(),
    }


def _launch_whole(
    kernel: Any, tile: dict[str, int], shape: _Shape, on: _launch.Chip, arguments: dict[str, Any]
) -> None:
    name, elements = kernel.__name__, tile["BP"] * tile["BC"]
    # ptxas would squeeze 16 warps of a plain norm's backward into 64 registers, and spill.
    squeezed = elements == 8192 and not arguments["SILU"]
    default = {"per_thread": 32 if kernel is group_norm_silu_whole_forward or squeezed else 16}
    per_thread = _launch.config(name, shape.key, on, default)["per_thread"]
    # 16 warps have 128 registers a thread: too few for 32 elements of float32 in a backward.
    most = 8 if name.endswith("backward") and elements * shape.itemsize >= 65536 else 16
    num_warps = min(most, max(1, elements // (32 * per_thread)))
    grid = (shape.B * cdiv(shape.G, tile["GT"]),)
    _launch.launch(kernel, grid, num_warps=num_warps, **(arguments | tile))


@dataclass(frozen=True)
class _Plan:
    """How a kernel of a large map is launched: its tile, and its share of the pixels."""

    kernel: Any
    tile: dict[str, int]
    across: int
    blocks: int
    chunks: int
    num_warps: int
    num_stages: int

    @classmethod
    def make(
        cls, kernel: Any, shape: _Shape, images: int, on: _launch.Chip, channels: range
    ) -> _Plan:
        name = kernel.__name__
        stages = 1 if on.rdna else 3
        default = {"block": 8192 // shape.itemsize, "num_warps": 4, "num_stages": stages}
        if shape.scattered and kernel is group_norm_silu_input_gradients:
            default["num_warps"] = 8
        if kernel is group_norm_silu_statistics:
            # What else spills: float32 with two tiles loaded ahead, NCHW on sm_100.
            if shape.itemsize == 4:
                default["num_stages"] = min(stages, 2)
            elif on.family == "sm_100" and not shape.nhwc:
                default["num_warps"] = 8
        chosen = _launch.config(name, shape.key, on, default)
        if kernel in (group_norm_silu_statistics, group_norm_silu_sums):
            tile = _reduction(shape, chosen["block"])
            across = cdiv(shape.G, tile["GT"]) * tile["CS"]
        else:
            tile = _pointwise(shape, chosen["block"])
            across = cdiv(channels.stop, tile["BC"]) - channels.start // tile["BC"]
        # By their registers: up to 166 of `sums`, and 139 of `statistics` in channels_last.
        few = kernel is group_norm_silu_sums or (
            kernel is group_norm_silu_statistics and shape.nhwc
        )
        resident = 3 if few else 4
        blocks, chunks = _chunks(shape.HW, tile["BP"], images * across, on.processors, resident)
        return cls(kernel, tile, across, blocks, chunks, chosen["num_warps"], chosen["num_stages"])

    @property
    def parts(self) -> int:
        """Partial results of a group."""
        return self.chunks * self.tile["CS"]

    def launch(self, first: int, images: int, arguments: dict[str, Any], after: bool) -> None:
        """Launch for some images; `after` another kernel of the same call, which it may overlap."""
        own = {"first": first, "blocks": self.blocks, "chunks": self.chunks}
        _launch.launch(
            self.kernel,
            (images * self.chunks * self.across,),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            launch_pdl=after and arguments["PDL"],
            **(arguments | self.tile | own),
            STAGES=self.num_stages,
        )


def _forward(
    results: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    activate: bool,
) -> None:
    y, mean, rstd = results
    if y.numel() == 0:
        return
    shape, on = _shape(x, skip, num_groups), _launch.chip(x.device)
    given = _given(shape, x, skip, weight, bias, scale, shift)
    out = {"y": y, "mean": mean, "rstd": rstd, "eps": eps, "SILU": activate}
    tile = _whole(shape, on.processors)
    if tile is not None:
        _launch_whole(group_norm_silu_whole_forward, tile, shape, on, given | out)
        return
    images = _images(shape.B, shape.C * shape.HW * shape.itemsize, on)
    every = range(shape.C)
    before = _Plan.make(group_norm_silu_statistics, shape, images, on, every)
    after = _Plan.make(group_norm_silu_apply, shape, images, on, every)
    parts = {name: mean.new_empty(shape.B, before.parts, shape.G) for name in ("means", "squares")}
    given["PDL"] = _overlaps(on)
    read = {n: v for n, v in given.items() if n in group_norm_silu_statistics.arg_names} | parts
    merged = {
        **{"part_pixels": before.blocks * before.tile["BP"], "parts": before.parts},
        **{"WIDTH": before.tile["WIDTH"], "CS": before.tile["CS"], "PARTS": _PARTS},
    }
    for first in range(0, shape.B, images):
        n = min(images, shape.B - first)
        before.launch(first, n, read, first > 0)
        after.launch(first, n, given | out | parts | merged, True)


def _backward(
    gradients: tuple[Tensor | None, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    activate: bool,
) -> None:
    dx, dweight, dbias, dscale, dshift, dskip = gradients
    if dy.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    shape, on = _shape(x, skip, num_groups), _launch.chip(x.device)
    given = _given(shape, x, skip, weight, bias, scale, shift)
    given |= {"dy": _dense(dy, shape.nhwc), "mean": mean, "rstd": rstd, "SILU": activate}
    # The kernels write dense tensors: maps in x's format, vectors row by row. Gradients that lie
    # otherwise in memory (those of a transposed scale do) are copied from such afterwards.
    wanted = {"dx": dx, "dskip": dskip, "dscale": dscale, "dshift": dshift}
    wanted |= {"dweight": dweight, "dbias": dbias}
    inputs = {n: _dense_like(wanted[n], shape.nhwc) for n in ("dx", "dskip")}
    vectors = {n: _dense_like(g, False) for n, g in wanted.items() if n not in inputs}
    needs_inputs = dx is not None or dskip is not None
    needs_parameters = any(g is not None for g in (dweight, dbias, dscale, dshift))
    tile = _whole(shape, on.processors)
    images = _images(shape.B, 2 * shape.C * shape.HW * shape.itemsize, on)
    channels = range(0 if dx is not None else shape.C1, shape.C if dskip is not None else shape.C1)
    chunks, overlaps = 1, tile is None and _overlaps(on)
    if tile is None:
        before = _Plan.make(group_norm_silu_sums, shape, images, on, channels)
        chunks = before.chunks

    def partials(needed: bool, *size: int) -> Tensor | None:
        return mean.new_empty(size) if needed else None

    per_channel = {
        name: partials(needs_parameters, shape.B, chunks, shape.C) for name in ("zs", "zxs")
    }
    if tile is not None:
        _launch_whole(group_norm_silu_whole_backward, tile, shape, on, given | inputs | per_channel)
    else:
        per_group = {
            name: partials(needs_inputs, shape.B, before.parts, shape.G)
            for name in ("group_zs", "group_zxs")
        }
        given["PDL"] = overlaps
        after = _Plan.make(group_norm_silu_input_gradients, shape, images, on, channels)
        merged = {"parts": before.parts, "PARTS": _PARTS, "tiles": after.across}
        merged["tile0"] = channels.start // after.tile["BC"]
        for first in range(0, shape.B, images):
            n = min(images, shape.B - first)
            before.launch(first, n, given | per_channel | per_group, first > 0)
            if needs_inputs:
                after.launch(first, n, given | inputs | per_group | merged, True)
    if needs_parameters:
        affine = dweight is not None or dbias is not None
        film = dscale is not None or dshift is not None
        arguments: dict[str, Any] = {
            **{n: given[n] for n in ("weight", "bias", "scale", "scale_row")},
            **vectors,
            **{"B": shape.B, "chunks": chunks, "C": shape.C, "AFFINE": int(affine)},
            # 32 bytes of a row; the rows that a launch of the presets sums in one or two steps.
            **{"BC": 8, "ROWS": 64 if tile is not None else 512},
        }
        grid = (cdiv(shape.C, 8) * (affine + shape.B * film),)
        arguments |= per_channel
        num_warps = 4 if tile is not None else 8
        _launch.launch(
            group_norm_silu_parameter_gradients,
            grid,
            num_warps=num_warps,
            launch_pdl=overlaps,
            PDL=overlaps,
            **arguments,
        )
    written = inputs | vectors
    for name, gradient in wanted.items():
        dense = written[name]
        if gradient is not None and dense is not None and dense is not gradient:
            gradient.copy_(dense)


def _dense_like(gradient: Tensor | None, nhwc: bool) -> Tensor | None:
    """The gradient itself where the kernels can write it, else a tensor to copy from."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    if gradient is None or gradient.is_contiguous(memory_format=layout):
        return gradient
    return torch.empty_like(gradient, memory_format=layout)


_BEFORE_3_9 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    activate: bool,
) -> str | None:
    """None, or why these kernels cannot run the call."""
    if x.dtype is torch.float64:
        return "it has no float64"
    if x.shape[2] * x.shape[3] >= 1 << 30:
        return f"maps of {x.shape[2]} x {x.shape[3]} pixels are too large: 2^30 or more"
    if skip is not None and _BEFORE_3_9 and _launch.amd():
        return f"triton {triton.__version__} compiles a choice of two tensors not for AMD; 3.9 does"
    return None


call = _register.kernel(
    "group_norm_silu_triton(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, "
    "Tensor? scale, Tensor? shift, Tensor? skip, bool silu) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    empty=_empty,
    forward=_forward,
    backward=_backward,
    saves=("x", "weight", "bias", "scale", "shift", "skip", "mean", "rstd"),
)
