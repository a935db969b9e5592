"""Triton kernels of `dwconv_gelu`, and the back end of it that they are.

Letters: B images, P prefix tokens, H W grid, C channels; e bytes of one activation.

Besides memory it is the number of instructions that bounds these kernels: at the speed of an H200's
memory the forward may spend about 27 on an element and the backward 45, and the multiplications of
the convolutions alone are 9 and 27. So each value is loaded and widened about once: a program walks
along the columns of BANDS x ROWS rows of a plane of BLOCK channels. The ROWS rows of a band are
unrolled, each a tile (BANDS, BLOCK) in registers; the columns to the left and right are registers
of other steps; only the rows above and below a band are loaded by two bands, from the cache. The
forward takes 25 instructions an element. The backward takes 49, and 56 where it also writes y, if
one program has all 16 rows of a grid; in bands of 8 rows it takes 68 with y. A thread has 2
channels, so its loads are of 4 bytes, but those of a warp of a line.
The tail of the normal distribution is, for 2-byte dtypes, one exponential of a polynomial.
"""

# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels import _launch, _register
from fastdiff_kernels._jit import gelu, gelu_slope, round_to


@triton.jit
def _upper_tail(t):  # type: ignore[no-untyped-def]
    """1 - Phi(t) for t >= 0, as 2**polynomial, to 1e-7; relative error 5e-5 to 4, 1e-4 to 5.5."""
    p = -6.28500175e-7 * t + 1.10722822e-5
    p = p * t - 4.38235838e-5
    p = p * t - 4.9320946e-4
    p = p * t + 7.53059052e-3
    p = p * t - 5.28067276e-2
    p = p * t - 0.459115893
    p = p * t - 1.15111399
    return tl.exp2(p * t - 1.0)


@triton.jit
def _cdf(x):  # type: ignore[no-untyped-def]
    tail = _upper_tail(tl.abs(x))
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _gelu(x, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EXACT:
        return gelu(x)
    return x * _cdf(x)


@triton.jit
def _gelu_slope(x, EXACT: tl.constexpr, PRECISE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Derivative of GELU; PRECISE to 1e-7, from the distribution function and the density.

    Else it takes one exponential and is good enough for results of 2 bytes. For t >= 0 the
    derivative at -t is Phi(-t) - t * phi(t) = (a - t) * 2**p(t), a its zero, and at t it is 1 minus
    that. p is the polynomial of degree 7 that minimises the relative error, weighted: 4.5e-5 to
    t = 3, 1.3e-4 to 5, 6e-4 to 6, 1e-2 to 9, where the derivative is 1e-17; absolute error 2.3e-5.
    """
    if EXACT:
        return gelu_slope(x)
    if PRECISE:
        # The density is exp(-x**2 / 2) / sqrt(2 pi).
        return _cdf(x) + x * tl.exp2(-0.7213475 * (x * x) - 1.3257481)
    t = tl.abs(x)
    p = -3.586135562727577e-6 * t + 1.1105337034678087e-4
    p = p * t - 1.439599902369082e-3
    p = p * t + 1.0424693115055561e-2
    p = p * t - 4.8106614500284195e-2
    p = p * t - 0.5656914114952087
    p = p * t - 0.3817773759365082
    slope = (0.7517915246935643 - t) * tl.exp2(p * t - 0.5884696245193481)
    return tl.where(x < 0, slope, 1.0 - slope)


@triton.jit
def _inside(  # type: ignore[no-untyped-def]
    o_row, H, m_c, FIRST: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr
):
    """Masks of rows FIRST to LAST (exclusive) of each band, which begins at row o_row."""
    masks = ()
    for j in tl.static_range(FIRST, LAST):
        if WHOLE and j >= 0 and j < ROWS:
            masks = masks + (m_c,)
        else:
            masks = masks + (m_c & (o_row + j >= 0) & (o_row + j < H),)
    return masks


@triton.jit
def _column(p, stride, masks, FIRST: tl.constexpr, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows FIRST to LAST (exclusive) of each band at one column."""
    rows = ()
    for j in tl.static_range(LAST - FIRST):
        rows = rows + (tl.load(p + (FIRST + j) * stride, mask=masks[j], other=0.0),)
    return rows


@triton.jit
def _reload(rows, old, p, stride, masks, go, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """rows and those up to LAST (exclusive) at p, or any values unless `go`.

    The rows go into registers of `old`, whose values are of no more use. The branch keeps the
    compiler from moving work of the rows before it behind it, which would take registers.
    """
    if go:
        more = ()
        for j in tl.static_range(len(rows), LAST):
            more = more + (tl.load(p + j * stride, mask=masks[j], other=0.0),)
    else:
        more = ()
        for j in tl.static_range(len(rows), LAST):
            more = more + (old[j],)
    return rows + more


@triton.jit
def _taps(p_taps, o_c, m_c, C: tl.constexpr):  # type: ignore[no-untyped-def]
    taps = ()
    for k in tl.static_range(9):
        taps = taps + (tl.load(p_taps + k * C + o_c, mask=m_c, other=0.0),)
    return taps


@triton.jit
def _add_column(sums, x, taps, KX: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums + what column x (rows -1 to ROWS + 1) adds to the output column KX - 1 to its left."""
    out = ()
    for i in tl.static_range(ROWS):
        total = sums[i]
        for ky in tl.static_range(3):
            total += taps[3 * ky + KX] * x[i + ky].to(tl.float32)
        out = out + (total,)
    return out


@triton.jit
def _repeat(x, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (x,)
    return out


@triton.jit
def _store_gelu(p, stride, masks, x, FIRST: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """GELU of rows FIRST to FIRST + ROWS of x."""
    for i in tl.static_range(ROWS):
        y = round_to(_gelu(x[FIRST + i], EXACT), p.dtype.element_ty)
        tl.store(p + i * stride, y, mask=masks[i])


@triton.jit
def _halves(w, DTYPE: tl.constexpr, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile in float32; of words of two values, the tile of the first and that of the second."""
    # One return: the compiler does not leave out what follows one in a branch.
    if not PAIR:
        out = (w.to(tl.float32),)
    elif DTYPE == tl.bfloat16:
        out = (w << 16).to(tl.float32, bitcast=True), (w & -65536).to(tl.float32, bitcast=True)
    else:
        out = (
            w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
            (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
        )
    return out


@triton.jit
def _joined(x, AT: tl.constexpr, PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile whose halves are x[AT] and x[AT + 1]; x[AT] where there are none."""
    if PAIR:
        out = tl.reshape(tl.join(x[AT], x[AT + 1]), [x[AT].shape[0], 2 * x[AT].shape[1]])
    else:
        out = x[AT]
    return out


@triton.jit
def _left_of(masks, column, W, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The masks, where column < W."""
    at = tl.full([1, 1], 0, tl.int32) + column
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (masks[i] & (at < W),)
    return out


@triton.jit
def _store_dz(p, m, m_w, dz, total, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores a row of the halves dz; returns total + dz, masked."""
    PAIR: tl.constexpr = len(dz) == 2
    tl.store(p, round_to(_joined(dz, 0, PAIR), p.dtype.element_ty), mask=m)
    out = total
    if SUM:
        out = ()
        for half in tl.static_range(len(dz)):
            out = out + (total[half] + tl.where(m_w, dz[half], 0.0),)
    return out


@triton.jit
def _correlate_row(  # type: ignore[no-untyped-def]
    sums,
    d,
    z0,
    z1,
    z2,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """sums + products of a half of a row of d with z under each tap, and d itself.

    z0, z1 and z2 are flat tuples of the halves of COUNT rows; FIRST is the one above d's.
    """
    out = ()
    for k in tl.static_range(10):
        for half in tl.static_range(HALVES):
            total = sums[k * HALVES + half]
            if half == HALF:
                if k == 9:
                    total += d
                elif FIRST + k // 3 >= 0 and FIRST + k // 3 < COUNT:
                    if k % 3 == 0:
                        total += d * z0[(FIRST + k // 3) * HALVES + half]
                    elif k % 3 == 1:
                        total += d * z1[(FIRST + k // 3) * HALVES + half]
                    else:
                        total += d * z2[(FIRST + k // 3) * HALVES + half]
            out = out + (total,)
    return out


# Reads z, writes y: 2 e. A program takes columns first to last of one stripe of rows of one image;
# those after `planes` take the prefix tokens of all images, BANDS * ROWS at a time.
@triton.jit(do_not_specialize=["B", "H", "W", "P", "stripes", "spans", "span"])
def dwconv_gelu_forward(  # type: ignore[no-untyped-def]
    z,
    taps,
    bias,
    y,
    B,
    H,
    W,
    P,
    stripes,
    spans,
    span,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BANDS: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    EXACT: tl.constexpr = z.dtype.element_ty == tl.float32
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    if WIDTH > 0:
        W = WIDTH
    tile = tl.program_id(0) // BLOCKS
    o_c = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if C % BLOCK == 0:
        m_c = tl.full([1, BLOCK], True, tl.int1)
    else:
        m_c = o_c < C
    o_band = tl.arange(0, BANDS)[:, None]
    L = P + H * W

    planes = B * stripes * spans
    if tile >= planes:
        for i in tl.static_range(ROWS):
            token = ((tile - planes) * ROWS + i) * BANDS + o_band
            m = (token < B * P) & m_c
            o_token = ((token // P).to(tl.int64) * L + token % P) * C + o_c
            b_z = tl.load(z + o_token, mask=m, other=0.0).to(tl.float32)
            tl.store(y + o_token, round_to(_gelu(b_z, EXACT), y.dtype.element_ty), mask=m)
    else:
        image = tile // (stripes * spans)
        row = tile // spans % stripes * (BANDS * ROWS)
        first = tile % spans * span
        last = tl.minimum(first + span, W)
        stride = W * C
        base = ((image.to(tl.int64) * L + P) + row.to(tl.int64) * W) * C
        o = o_band * (ROWS * stride) + o_c
        z += base
        y += base
        masks = _inside(row + o_band * ROWS, H, m_c, -1, ROWS + 1, ROWS, WHOLE)
        owned = _inside(row + o_band * ROWS, H, m_c, 0, ROWS, ROWS, WHOLE)
        b_taps = _taps(taps, o_c, m_c, C)
        start = _repeat(
            tl.zeros([BANDS, BLOCK], tl.float32)
            + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32),
            ROWS,
        )
        # `here` is short of the column to its right, `right` of two; x is the column after these.
        right = start
        if SPLIT:
            if first > 0:
                x = _column(z + (first - 1) * C + o, stride, masks, -1, ROWS + 1)
                right = _add_column(right, x, b_taps, 0, ROWS)
        x = _column(z + first * C + o, stride, masks, -1, ROWS + 1)
        here = _add_column(right, x, b_taps, 1, ROWS)
        right = _add_column(start, x, b_taps, 0, ROWS)
        x = _column(z + tl.minimum(first + 1, W - 1) * C + o, stride, masks, -1, ROWS + 1)
        for column in tl.range(first + 1, last, num_stages=1):
            full = _add_column(here, x, b_taps, 2, ROWS)
            here = _add_column(right, x, b_taps, 1, ROWS)
            right = _add_column(start, x, b_taps, 0, ROWS)
            # On its way during the GELU.
            x = _column(z + tl.minimum(column + 1, W - 1) * C + o, stride, masks, -1, ROWS + 1)
            _store_gelu(y + (column - 1) * C + o, stride, owned, full, 0, ROWS, EXACT)
        if SPLIT:
            if last < W:
                here = _add_column(here, x, b_taps, 2, ROWS)
        _store_gelu(y + (last - 1) * C + o, stride, owned, here, 0, ROWS, EXACT)


# Reads z and dy, writes dz (and y again, where asked): 3 e (4 e). For each column of the stripe it
# recomputes the convolution, of HALO rows more on either side than it owns, and from it
# d = dy * GELU'. `parts` gets, for each program, the sums over its own tokens of d * z (9 taps), of
# d, and of dz. HALO is 0 where one band has all rows of the grid.
#
# Columns of 2-byte dtypes stay in registers as words of two channels (PAIR). A step takes one row
# after the other, so that few widened values are alive: that leaves room for 16 rows. After every
# GROUP rows it loads the next step's into the registers of those that it is done with.
@triton.jit(do_not_specialize=["B", "H", "W", "P", "stripes", "spans", "span"])
def dwconv_gelu_backward(  # type: ignore[no-untyped-def]
    z,
    dy,
    taps,
    bias,
    dz,
    y,
    parts,
    B,
    H,
    W,
    P,
    stripes,
    spans,
    span,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BANDS: tl.constexpr,
    WHOLE: tl.constexpr,
    SPLIT: tl.constexpr,
    SUMS: tl.constexpr,
    HALO: tl.constexpr,
    PAIR: tl.constexpr,
):
    DTYPE: tl.constexpr = z.dtype.element_ty
    # Of the sizes tried, those with which the rows fit the registers.
    GROUP: tl.constexpr = 4 if ROWS == 16 and DTYPE != tl.float16 else 8
    EXACT: tl.constexpr = DTYPE == tl.float32
    # The caller computes GELU of the same values, too; or the gradients of parameters are float32.
    PRECISE: tl.constexpr = (y is not None) or bias.dtype.element_ty == tl.float32
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    HALVES: tl.constexpr = 2 if PAIR else 1
    WORDS: tl.constexpr = BLOCK // HALVES
    if WIDTH > 0:
        W = WIDTH
    tile = tl.program_id(0) // BLOCKS
    first_channel = (tl.program_id(0) % BLOCKS) * BLOCK
    o_c = first_channel + tl.arange(0, BLOCK)[None, :]
    o_w = first_channel // HALVES + tl.arange(0, WORDS)[None, :]
    if C % BLOCK == 0:
        m_c = tl.full([1, BLOCK], True, tl.int1)
        m_w = tl.full([1, WORDS], True, tl.int1)
    else:
        m_c = o_c < C
        m_w = o_w < C // HALVES
    o_band = tl.arange(0, BANDS)[:, None]
    L = P + H * W
    planes = B * stripes * spans
    if tile >= planes:
        of_prefix = tl.zeros([BANDS, BLOCK], tl.float32)
        for i in tl.range(ROWS):
            token = ((tile - planes) * ROWS + i) * BANDS + o_band
            m_token = (token < B * P) & m_c
            o_token = ((token // P).to(tl.int64) * L + token % P) * C + o_c
            token_z = tl.load(z + o_token, mask=m_token, other=0.0).to(tl.float32)
            token_dz = tl.load(dy + o_token, mask=m_token, other=0.0).to(tl.float32)
            token_dz *= _gelu_slope(token_z, EXACT, PRECISE)
            of_prefix += token_dz
            if dz is not None:
                tl.store(dz + o_token, round_to(token_dz, dz.dtype.element_ty), mask=m_token)
            if y is not None:
                tl.store(
                    y + o_token, round_to(_gelu(token_z, EXACT), y.dtype.element_ty), mask=m_token
                )
        if SUMS == 11:
            prefix_sum = tl.sum(of_prefix, axis=0, keep_dims=True)
            parts += tl.program_id(0).to(tl.int64) * (SUMS * BLOCK) + 10 * BLOCK
            if PAIR:
                even, odd = tl.split(tl.reshape(prefix_sum, [1, WORDS, 2]))
                tl.store(parts + tl.arange(0, WORDS)[None, :], even)
                tl.store(parts + WORDS + tl.arange(0, WORDS)[None, :], odd)
            else:
                tl.store(parts + tl.arange(0, BLOCK)[None, :], prefix_sum)
    else:
        image = tile // (stripes * spans)
        row = tile // spans % stripes * (BANDS * ROWS)
        if SPLIT:
            first = tile % spans * span
            last = tl.minimum(first + span, W)
            begin = tl.maximum(first - 1, 0)
            end = tl.minimum(last + 1, W)
        else:
            first = 0
            last = W
            begin = first
            end = W
        base = ((image.to(tl.int64) * L + P) + row.to(tl.int64) * W) * C
        stride = W * C
        o = o_band * (ROWS * stride) + o_c
        z_w = z + base
        dy_w = dy + base
        if PAIR:
            z_w = z_w.to(tl.pointer_type(tl.int32), bitcast=True)
            dy_w = dy_w.to(tl.pointer_type(tl.int32), bitcast=True)
        c_w: tl.constexpr = C // HALVES
        stride_w = W * c_w
        # Offsets of 32 bits: pointers of every lane would be three pairs of registers.
        at_w = o_band * (ROWS * stride_w) + o_w
        if dz is not None:
            dz += base
        if y is not None:
            y += base
        o_row = row + o_band * ROWS
        wide = _inside(o_row, H, m_w, -2 * HALO, ROWS + 2 * HALO, ROWS, WHOLE)
        masks = _inside(o_row, H, m_w, -HALO, ROWS + HALO, ROWS, WHOLE)
        owned = _inside(o_row, H, m_c, 0, ROWS, ROWS, WHOLE)
        zeros = tl.zeros([BANDS, WORDS], tl.float32)
        b_taps = ()
        b_bias = ()
        for half in tl.static_range(HALVES):
            b_taps = b_taps + _taps(taps + half, o_w * HALVES, m_w, C)
            b_bias = b_bias + (
                zeros + tl.load(bias + half + o_w * HALVES, mask=m_w, other=0.0).to(tl.float32),
            )

        # z0, z1 and z2 are the columns of z left of `column`, at it, and right of it; `left` and
        # `here` are columns of dz, short of what `column` and those after it add.
        FIRST: tl.constexpr = -HALO
        LAST: tl.constexpr = ROWS + HALO
        z1 = _column(z_w + (at_w + begin * c_w), stride_w, wide, 2 * FIRST, ROWS + 2 * HALO)
        z0 = _repeat(tl.zeros([BANDS, WORDS], z_w.dtype.scalar.element_ty), ROWS + 4 * HALO)
        if SPLIT:
            if begin > 0:
                z0 = _column(
                    z_w + (at_w + (begin - 1) * c_w), stride_w, wide, 2 * FIRST, ROWS + 2 * HALO
                )
        z2 = _column(
            z_w + (at_w + (begin + 1) * c_w),
            stride_w,
            _left_of(wide, begin + 1, W, ROWS + 4 * HALO),
            2 * FIRST,
            ROWS + 2 * HALO,
        )
        b_dy = _column(dy_w + (at_w + begin * c_w), stride_w, masks, FIRST, LAST)
        left = _repeat(zeros, ROWS * HALVES)
        here = _repeat(zeros, ROWS * HALVES)
        sums = _repeat(zeros, 10 * HALVES)
        sum_dz = _repeat(zeros, HALVES)
        for column in tl.range(begin, end, num_stages=1):
            # A tensor for the interpreter, too.
            at = tl.full([1, 1], 0, tl.int32) + column
            f0 = ()
            f1 = ()
            f2 = ()
            d = ()
            new_left = ()
            new_here = ()
            next_z = ()
            next_dy = ()
            next_wide = _left_of(wide, column + 2, W, ROWS + 4 * HALO)
            p_z = z_w + (at_w + (column + 2) * c_w - 2 * HALO * stride_w)
            p_dy = dy_w + (at_w + (column + 1) * c_w - HALO * stride_w)
            for j in tl.static_range(0, 1 + HALO):
                f0 = f0 + _halves(z0[j], DTYPE, PAIR)
                f1 = f1 + _halves(z1[j], DTYPE, PAIR)
                f2 = f2 + _halves(z2[j], DTYPE, PAIR)
            for i in tl.static_range(FIRST, ROWS + 1):
                if i < LAST:
                    if i + 1 < ROWS + 2 * HALO:
                        f0 = f0 + _halves(z0[i + 1 + 2 * HALO], DTYPE, PAIR)
                        f1 = f1 + _halves(z1[i + 1 + 2 * HALO], DTYPE, PAIR)
                        f2 = f2 + _halves(z2[i + 1 + 2 * HALO], DTYPE, PAIR)
                    f_dy = _halves(b_dy[i + HALO], DTYPE, PAIR)
                    b_y = ()
                    for half in tl.static_range(HALVES):
                        x = b_bias[half]
                        for ky in tl.static_range(3):
                            if i + ky > -2 * HALO and i + ky <= ROWS + 2 * HALO:
                                x += (
                                    b_taps[9 * half + 3 * ky]
                                    * f0[(i + ky - 1 + 2 * HALO) * HALVES + half]
                                )
                                x += (
                                    b_taps[9 * half + 3 * ky + 1]
                                    * f1[(i + ky - 1 + 2 * HALO) * HALVES + half]
                                )
                                x += (
                                    b_taps[9 * half + 3 * ky + 2]
                                    * f2[(i + ky - 1 + 2 * HALO) * HALVES + half]
                                )
                        b_d = f_dy[half] * _gelu_slope(x, EXACT, PRECISE)
                        d = d + (b_d,)
                        if i >= 0 and i < ROWS:
                            if parts is not None:
                                if SPLIT:
                                    b_d = tl.where((at >= first) & (at < last), b_d, 0.0)
                                sums = _correlate_row(
                                    sums,
                                    b_d,
                                    f0,
                                    f1,
                                    f2,
                                    half,
                                    HALVES,
                                    i - 1 + 2 * HALO,
                                    ROWS + 4 * HALO,
                                )
                            if y is not None:
                                b_y = b_y + (round_to(_gelu(x, EXACT), y.dtype.element_ty),)
                    if y is not None:
                        if i >= 0 and i < ROWS:
                            m = owned[i]
                            if SPLIT:
                                m = m & (at >= first) & (at < last)
                            tl.store(
                                y + (o + column * C) + i * stride, _joined(b_y, 0, PAIR), mask=m
                            )
                # d of rows i - 2, i - 1 and i makes row i - 1 of dz.
                if dz is not None:
                    if i >= 1:
                        b_dz = ()
                        for half in tl.static_range(HALVES):
                            a = left[(i - 1) * HALVES + half]
                            b = here[(i - 1) * HALVES + half]
                            c = zeros
                            for ky in tl.static_range(3):
                                if i - ky >= FIRST and i - ky < LAST:
                                    b_d = d[(i - ky - FIRST) * HALVES + half]
                                    a += b_taps[9 * half + 3 * ky] * b_d
                                    b += b_taps[9 * half + 3 * ky + 1] * b_d
                                    c += b_taps[9 * half + 3 * ky + 2] * b_d
                            b_dz = b_dz + (a,)
                            new_left = new_left + (b,)
                            new_here = new_here + (c,)
                        sum_dz = _store_dz(
                            dz + (o + (column - 1) * C) + (i - 1) * stride,
                            owned[i - 1] & (at > first),
                            masks[i - 1 + HALO] & (at > first),
                            b_dz,
                            sum_dz,
                            SUMS == 11,
                        )
                if i > 0 and i + 1 < ROWS and i % GROUP == GROUP - 1:
                    next_z = _reload(
                        next_z, z0, p_z, stride_w, next_wide, column + 1 < end, i + 2 * HALO
                    )
                    next_dy = _reload(
                        next_dy, b_dy, p_dy, stride_w, masks, column + 1 < end, i + 1 + HALO
                    )
            next_z = _reload(
                next_z, z0, p_z, stride_w, next_wide, column + 1 < end, ROWS + 4 * HALO
            )
            next_dy = _reload(
                next_dy, b_dy, p_dy, stride_w, masks, column + 1 < end, ROWS + 2 * HALO
            )
            if dz is not None:
                left = new_left
                here = new_here
            z0 = z1
            z1 = z2
            z2 = next_z
            b_dy = next_dy
        if dz is not None:
            if not SPLIT or last == W:
                for i in tl.static_range(ROWS):
                    b_dz = ()
                    for half in tl.static_range(HALVES):
                        b_dz = b_dz + (left[i * HALVES + half],)
                    sum_dz = _store_dz(
                        dz + (o + (W - 1) * C) + i * stride,
                        owned[i],
                        masks[i + HALO],
                        b_dz,
                        sum_dz,
                        SUMS == 11,
                    )
        if parts is not None:
            # By programs, not by channels: an address that takes no registers during the loop.
            # The halves one behind the other.
            parts += tl.program_id(0).to(tl.int64) * (SUMS * BLOCK)
            o_part = tl.arange(0, WORDS)[None, :]
            for half in tl.static_range(HALVES):
                for k in tl.static_range(10):
                    total = tl.sum(sums[k * HALVES + half], axis=0, keep_dims=True)
                    tl.store(parts + (k * BLOCK + half * WORDS) + o_part, total)
                if SUMS == 11:
                    total = tl.sum(sum_dz[half], axis=0, keep_dims=True)
                    tl.store(parts + (10 * BLOCK + half * WORDS) + o_part, total)


# A program adds the parts of BLOCK columns of one of the sums, in their order.
@triton.jit(do_not_specialize=["planes", "tiles"])
def dwconv_gelu_sums(  # type: ignore[no-untyped-def]
    parts,
    d_weight,
    d_bias,
    sum_dz,
    planes,
    tiles,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SUMS: tl.constexpr,
    OF: tl.constexpr,
    HALVES: tl.constexpr,
):
    # A part is (channels / OF, SUMS, HALVES, OF / HALVES): of OF channels, first every other one.
    STORED: tl.constexpr = (C + OF - 1) // OF * OF
    BLOCKS: tl.constexpr = (STORED + BLOCK - 1) // BLOCK
    HALF: tl.constexpr = OF // HALVES
    k = tl.program_id(0) // BLOCKS
    o = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    o_c = o // OF * OF + o % HALF * HALVES + o % OF // HALF
    m_c = o_c < C
    # Prefix tokens take no part in the convolution: their tiles wrote the last sum only.
    if k < 10:
        count = planes
    else:
        count = tiles
    b_sum = tl.zeros([PARTS, BLOCK], tl.float32)
    o_sum = o // OF * (SUMS * OF) + k * OF + o % OF
    m_sum = o < STORED
    for start in range(0, count, PARTS):
        o_part = start + tl.arange(0, PARTS)[:, None]
        p_parts = parts + (o_part.to(tl.int64) * (STORED * SUMS) + o_sum[None, :])
        b_sum += tl.load(p_parts, mask=(o_part < count) & m_sum[None, :], other=0.0)
    b_total = tl.sum(b_sum, axis=0)
    if k < 9:
        if d_weight is not None:
            o_tap = o_c.to(tl.int64) * 9 + k
            tl.store(d_weight + o_tap, round_to(b_total, d_weight.dtype.element_ty), mask=m_c)
    elif k == 9:
        if d_bias is not None:
            tl.store(d_bias + o_c, round_to(b_total, d_bias.dtype.element_ty), mask=m_c)
    else:
        if sum_dz is not None:
            tl.store(sum_dz + o_c, round_to(b_total, sum_dz.dtype.element_ty), mask=m_c)


# The usual widths of grids are known to the compiler, which folds them into addresses.
WIDTHS = (7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)

TUNABLE: dict[str, list[_launch.Config]] = {
    "dwconv_gelu_forward": [
        {"BLOCK": block, "ROWS": rows, "BANDS": bands, "num_warps": 4}
        for rows, bands, block in ((4, 4, 256), (4, 4, 128), (4, 4, 64), (2, 4, 256), (2, 8, 128))
    ],
    "dwconv_gelu_backward": [
        {"BLOCK": block, "ROWS": rows, "BANDS": bands, "num_warps": warps}
        for rows, bands, block, warps in (
            *((16, 1, 64, 1), (16, 1, 128, 2), (8, 2, 64, 2), (8, 2, 64, 4), (8, 4, 64, 4)),
            (4, 4, 64, 4),
        )
    ],
    "dwconv_gelu_sums": [
        {"BLOCK": 32, "PARTS": 128},
        {"BLOCK": 32, "PARTS": 64},
        {"BLOCK": 64, "PARTS": 32},
    ],
}


def _span(W: int, warps: int, processors: int) -> int:
    """Columns that a program takes, of W, if so many warps share the stripes of all columns.

    Three rounds of 8 warps a processor; where there are fewer, a plane is cut across its columns,
    at the price of two columns more a cut.
    """
    warps = max(warps, 1)
    shortest = 16 if warps >= 8 * processors else 4
    return max(_launch.cdiv(W * warps, 24 * processors), min(shortest, W))


def _plan(
    kernel: str, z: Tensor, grid: Sequence[int], prefix: int, default: _launch.Config
) -> tuple[int, int, dict[str, Any]]:
    """(tiles of planes, all tiles, arguments of the launch that are no tensors)."""
    (B, _, C), (H, W) = z.shape, grid
    chip = _launch.chip(z.device)
    config = _launch.config(kernel, (H, C, z.element_size()), chip, default)
    rows, blocks = config["BANDS"] * config["ROWS"], _launch.cdiv(C, config["BLOCK"])
    stripes = _launch.cdiv(H, rows)
    span = _span(W, B * stripes * blocks * config["num_warps"], chip.processors)
    spans = _launch.cdiv(W, span) if span else 0
    span = _launch.cdiv(W, spans) if span else 0
    planes = B * stripes * spans
    tiles = planes + _launch.cdiv(B * prefix, rows)
    plan = {
        "grid": (tiles * blocks,),
        "num_stages": 1,
        "B": B,
        "H": H,
        "W": W,
        "P": prefix,
        "stripes": stripes,
        "spans": spans,
        "span": span,
        "C": C,
        "WIDTH": W if W in WIDTHS else 0,
        "WHOLE": H % rows == 0,
        "SPLIT": spans > 1,
    }
    return planes, tiles, config | plan


def forward(
    results: Sequence[Tensor],
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    prefix: int,
) -> None:
    """Fills y, like z, and taps (9, C) in float32: the weight as kernels read it."""
    y, taps = results
    C = z.shape[2]
    taps.copy_(weight.reshape(C, 9).t())
    vector = 16 // z.element_size() if C * z.element_size() % 16 == 0 else 2
    bands = min(4, _launch.power_of_two(_launch.cdiv(grid[0], 4)))
    block = min(32 * vector, _launch.power_of_two(C))
    # With one band a thread's four channels of float32 would spill; on RDNA eight of any type.
    thread = 2 if bands == 1 and z.element_size() == 4 else vector
    if _launch.chip(z.device).rdna:
        thread = min(thread, 4)
    default = {
        "BLOCK": block,
        "ROWS": 4,
        "BANDS": bands,
        "num_warps": max(1, bands * block // (32 * thread)),
    }
    *_, plan = _plan("dwconv_gelu_forward", z, grid, prefix, default)
    z, bias = z.contiguous(), bias.contiguous()
    _launch.launch(dwconv_gelu_forward, z=z, taps=taps, bias=bias, y=y, **plan)


def backward(
    gradients: Sequence[Tensor | None],
    dy: Tensor,
    z: Tensor,
    taps: Tensor,
    bias: Tensor,
    grid: Sequence[int],
    prefix: int,
    y: Tensor | None = None,
    sum_dz: Tensor | None = None,
) -> None:
    """Fills those of (dz, d_weight, d_bias) that are there; y again; and the sum of dz over tokens.

    Args:
        y: to fill, like z and contiguous.
        sum_dz: (C,), to fill; only with dz.
    """
    dz, d_weight, d_bias = gradients
    C = z.shape[2]
    sums = 11 if sum_dz is not None else 10
    z, dy, bias = z.contiguous(), dy.contiguous(), bias.contiguous()
    # Words of two channels, where they lie at multiples of their size.
    pair = z.element_size() == 2 and C % 2 == 0 and not (z.data_ptr() | dy.data_ptr()) % 4
    chip = _launch.chip(z.device)
    # A warp has a band: 32 words, but 64 where its lanes are as many.
    lanes = 64 if chip.family == "gfx942" else 32
    block = min(2 * lanes if z.element_size() == 2 else lanes, max(2, _launch.power_of_two(C)))
    # What fits the registers. 16 rows: of a grid that has as many, in programs that take its whole
    # width, where a thread has words and addresses fold into constants, but not on sm_100. 8 rows
    # of words: where addresses fold. The interpreter takes as long for a row as for a band of them.
    folds = grid[1] in WIDTHS
    tallest = 4 if chip.family == "default" or (pair and not folds) else 8
    if pair and folds and grid[0] == 16 and C % 64 == 0 and chip.family in ("sm_80", "sm_90"):
        whole = _span(grid[1], z.shape[0] * _launch.cdiv(C, block), chip.processors) >= grid[1]
        tallest = 16 if whole else 8
    rows = min(tallest, max(4, _launch.power_of_two(grid[0])))
    # With 8 channels most lanes are idle anyway, and a second band spills by triton 3.9.
    bands = 2 if grid[0] > rows and block > 8 else 1
    default = {"BLOCK": block, "ROWS": rows, "BANDS": bands, "num_warps": bands}
    planes, tiles, plan = _plan("dwconv_gelu_backward", z, grid, prefix, default)
    parts = None
    if d_weight is not None or d_bias is not None or sum_dz is not None:
        parts = z.new_empty((*plan["grid"], sums, plan["BLOCK"]), dtype=torch.float32)
    # What the kernels fill in the stead of tensors that are not contiguous.
    wanted = dz, d_weight, d_bias, sum_dz
    filled = [_contiguous(tensor) for tensor in wanted]
    plan |= {"z": z, "dy": dy, "taps": taps, "bias": bias, "y": y, "parts": parts}
    halo = 0 if plan["BANDS"] == 1 and grid[0] <= plan["ROWS"] else 1
    _launch.launch(dwconv_gelu_backward, dz=filled[0], SUMS=sums, HALO=halo, PAIR=pair, **plan)
    if parts is not None:
        # One load of every thread takes all parts of a usual call, and every processor has some.
        default = {"BLOCK": 32, "PARTS": 16 if tiles <= 16 else 128, "num_warps": 4}
        of = plan["BLOCK"]
        config = _launch.config("dwconv_gelu_sums", (C,), chip, default)
        _launch.launch(
            dwconv_gelu_sums,
            (sums * _launch.cdiv(_launch.cdiv(C, of) * of, config["BLOCK"]),),
            parts=parts,
            d_weight=filled[1],
            d_bias=filled[2],
            sum_dz=filled[3],
            planes=planes,
            tiles=tiles,
            C=C,
            SUMS=sums,
            OF=of,
            HALVES=2 if pair else 1,
            **config,
        )
    for tensor, full in zip(wanted, filled, strict=True):
        if tensor is not None and full is not None and full is not tensor:
            tensor.copy_(full)


def _contiguous(to_fill: Tensor | None) -> Tensor | None:
    """The tensor, or one of its shape that a kernel can fill in its stead."""
    if to_fill is None or to_fill.is_contiguous():
        return to_fill
    return to_fill.new_empty(to_fill.shape)


def supports(
    z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int
) -> str | None:
    """None, or why the kernels cannot run this call of `dwconv_gelu`."""
    return unsupported(z.dtype, z.shape[2], grid)


def unsupported(dtype: torch.dtype, C: int, grid: Sequence[int]) -> str | None:
    """None, or why the kernels cannot run on (B, P + H*W, C)."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype}: the kernels take float32, float16 and bfloat16"
    # Offsets within the rows of one program are of 32 bits.
    if grid[1] * C >= 2**25:
        return f"a row of the grid has {grid[1]} x {C} elements; the kernels take fewer than 2**25"
    return None


def _empty(
    z: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], prefix: int
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty((9, z.shape[2]), dtype=torch.float32)


def _backward(
    gradients: Sequence[Tensor | None],
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    grid: Sequence[int],
    prefix: int,
) -> None:
    backward(gradients, dy, z, taps, bias, grid, prefix)


call = _register.kernel(
    "dwconv_gelu_triton(Tensor z, Tensor weight, Tensor bias, SymInt[] grid, SymInt prefix) -> "
    "(Tensor y, Tensor taps)",
    empty=_empty,
    forward=forward,
    backward=_backward,
    saves=("z", "weight", "bias", "taps"),
)
