"""Window attention in Triton: roll, partition, bias, mask and their reverses are addresses.

A program takes one head and every `groups`-th window. Programs of one window's heads are
neighbours, and at any time those running work on a run of neighbouring windows, so whole DRAM pages
are read. Tokens of a window form tiles of T rows: one tile (N <= 64; scores and probabilities stay
in registers), or BLOCKS tiles of T tokens with an online softmax.

e = bytes of one activation tensor. Forward: reads q, k, v, writes the result, 4 e. Backward: reads
q, k, v and the result's gradient, computes the probabilities again, writes dq, dk, dv: 7 e. Nothing
is saved but inputs. With several tiles a window (N > 64) the re-reads come from L2.

N tokens of a window of h x w, D head width, DP its power of two, C = HEADS * D.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff_kernels import _launch, _register
from fastdiff_kernels._jit import dot, round_to

LOG2_E = tl.constexpr(1.4426950408889634)


def _candidates(*triples: tuple[int, int, int]) -> list[dict[str, int]]:
    return [dict(zip(("num_warps", "num_stages", "programs"), t, strict=True)) for t in triples]


# `programs` is how many a multiprocessor gets: each keeps its head's bias over its windows.
TUNABLE = {
    "window_attention_forward": _candidates(
        *((4, 1, 4), (4, 1, 5), (4, 2, 2), (4, 2, 3), (4, 2, 4), (4, 3, 2), (8, 2, 2), (8, 3, 2)),
        *((2, 2, 4), (2, 2, 8), (1, 2, 8), (1, 2, 16)),
    ),
    "window_attention_backward": _candidates(
        *((4, 1, 2), (4, 2, 2), (4, 3, 2), (4, 3, 1), (8, 1, 1), (8, 2, 1), (8, 3, 1), (8, 2, 2)),
        *((2, 2, 4), (1, 2, 8)),
    ),
    **{
        f"window_attention_backward_{part}": _candidates(
            *((4, 1, 2), (4, 2, 2), (4, 2, 3), (4, 3, 2), (8, 1, 2), (8, 2, 1), (8, 2, 2))
        )
        for part in ("queries", "keys", "bias")
    },
}

# Arguments that change from call to call, and must not compile a kernel anew.
_VARYING = ["windows", "H", "W", "shift_h", "shift_w", "groups"]


@triton.jit
def _tokens(
    i_window, o_t, H, W, shift_h, shift_w,
    h: tl.constexpr, w: tl.constexpr, ROLLED: tl.constexpr, PADDED: tl.constexpr,
    VALUE: tl.constexpr,
):  # fmt: skip
    """Of tokens o_t of a window: the pixel, whether there is one, the region.

    Tokens see each other where their regions are equal, so each sees at least itself: the four
    parts of a window that the roll put together, and padding that is masked. The tile's overhang
    has the place and the region of the last token, but is not inside; `_bias` excludes its keys.
    """
    down, across = tl.cdiv(H, h), tl.cdiv(W, w)
    inside = o_t < h * w
    o_t = tl.minimum(o_t, h * w - 1)
    i_image, i_in = i_window // (down * across), i_window % (down * across)
    i_down, i_across = i_in // across, i_in % across
    y, x = i_down * h + o_t // w, i_across * w + o_t % w
    region = tl.zeros_like(o_t)
    if ROLLED:
        y, x = y + shift_h, x + shift_w
        y = tl.where(y >= down * h, y - down * h, y)
        x = tl.where(x >= across * w, x - across * w, x)
        # Only windows on the far edges are torn. A threshold of the window takes no registers
        # through the loop over windows, as a mask of the tokens would.
        torn_y = tl.where(i_down == down - 1, h - shift_h, h)
        torn_x = tl.where(i_across == across - 1, w - shift_w, w)
        region = 2 * (o_t >= torn_y * w).to(tl.int32) + (o_t % w >= torn_x).to(tl.int32)
    if PADDED:
        # Rows and columns of the window that lie beyond the map, counted from its first: again
        # thresholds of the window, because each thread has many tokens among its keys.
        first_y, first_x = H - i_down * h, W - i_across * w
        if ROLLED:
            first_y, first_x = first_y - shift_h, first_x - shift_w
            beyond = (o_t >= first_y * w) & (o_t < (first_y + down * h - H) * w)
            beyond |= (o_t % w >= first_x) & (o_t % w < first_x + across * w - W)
        else:
            beyond = (o_t >= first_y * w) | (o_t % w >= first_x)
        on_map = ~beyond
        inside = inside & on_map
        if not VALUE:
            region = tl.where(on_map, region, 4)
    pixel = (i_image * H + y).to(tl.int64) * W + x
    return pixel, inside, region


@triton.jit
def _load(p_tile, inside, o_d, D: tl.constexpr, WHOLE: tl.constexpr):
    """A tile (T, DP) at the rows' addresses; zeros for rows that are not inside."""
    p_tile = p_tile[:, None] + o_d[None, :]
    if WHOLE and o_d.shape[0] == D:
        tile = tl.load(p_tile)
    else:
        tile = tl.load(p_tile, mask=inside[:, None] & (o_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _store(p_tile, tile, inside, o_d, D: tl.constexpr, WHOLE: tl.constexpr):
    p_tile = p_tile[:, None] + o_d[None, :]
    tile = round_to(tile, p_tile.dtype.element_ty)
    if WHOLE and o_d.shape[0] == D:
        tl.store(p_tile, tile)
    else:
        tl.store(p_tile, tile, mask=inside[:, None] & (o_d < D)[None, :])


@triton.jit
def _vector(pad, i_channel, o_d, D: tl.constexpr):
    """A head's part of the vector of padded positions, float32."""
    return tl.load(pad + i_channel + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def _times(rows, pad, i_channel, o_d, D: tl.constexpr, APART: tl.constexpr):
    """rows @ that vector, float32; None where the tile of keys has it, or there is none."""
    if not APART:
        product = None
    else:
        product = tl.sum(rows.to(tl.float32) * _vector(pad, i_channel, o_d, D)[None, :], 1)
    return product


@triton.jit
def _keys(
    qkv, pad, i_window, o_k, i_head, H, W, shift_h, shift_w,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr, WHOLE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Keys and values of tokens o_k of a window; the mask of padding; the regions.

    Padding has zeros, or the vector where rounding to the tile's dtype does not change it.
    """
    C: tl.constexpr = HEADS * D
    o_d = tl.arange(0, DP)
    pixel, inside, region = _tokens(
        i_window, o_k, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
    )
    p_k = qkv + pixel * (3 * C) + (C + i_head * D)
    k = _load(p_k, inside, o_d, D, WHOLE)
    v = _load(p_k + C, inside, o_d, D, WHOLE)
    padding = ~inside & (o_k < h * w)
    if pad is not None:
        if not APART:
            i_k = C + i_head * D
            k = tl.where(padding[:, None], _vector(pad, i_k, o_d, D).to(k.dtype)[None, :], k)
            v = tl.where(padding[:, None], _vector(pad, i_k + C, o_d, D).to(v.dtype)[None, :], v)
    return k, v, padding, region


@triton.jit
def _bias(
    table, o_q, o_k, i_head,
    h: tl.constexpr, w: tl.constexpr, HEADS: tl.constexpr, OVERHANG: tl.constexpr,
):  # fmt: skip
    """log2(e) times the bias of queries o_q and keys o_k, which broadcast; -inf for keys of the
    tiles' overhang, which takes no instruction in the loop over windows. None if it is 0."""
    if table is not None:
        last: tl.constexpr = h * w - 1
        t_q, t_k = tl.minimum(o_q, last), tl.minimum(o_k, last)
        row_q = t_q // w * (2 * w - 1) + t_q % w + (h - 1) * (2 * w - 1) + w - 1
        row_k = t_k // w * (2 * w - 1) + t_k % w
        p_bias = table + (row_q - row_k) * HEADS + i_head
        bias = tl.load(p_bias).to(tl.float32) * LOG2_E
        if OVERHANG:
            bias = tl.where(o_k < h * w, bias, float("-inf"))
    elif OVERHANG:
        bias = tl.where(o_k < h * w, 0.0, float("-inf"))
    else:
        bias = None
    return bias


@triton.jit
def _scores(q, k, bias, q_pad, padding, region_q, region_k, scale, TORN: tl.constexpr):
    """log2(e) times the scores, -inf for pairs that do not see each other: for exp2."""
    s = _products(q, k, q_pad, padding) * (scale * LOG2_E)
    if bias is not None:
        s += bias
    if TORN:
        s = tl.where(region_q[:, None] == region_k[None, :], s, float("-inf"))
    return s


@triton.jit
def _products(rows, keys, rows_pad, padding):
    """rows @ keys^T; rows_pad in the columns of padding. So that vector is not rounded."""
    products = dot(rows, tl.trans(keys))
    if rows_pad is not None:
        products = tl.where(padding[None, :], rows_pad[:, None], products)
    return products


@triton.jit
def _on_padding(p, padding):
    """Of each row the sum over the columns of padding."""
    return tl.sum(tl.where(padding[None, :], p, 0.0), 1)


@triton.jit
def _weighted(weights, rows):
    """The sum of rows by their weights, float32."""
    return tl.sum(weights[:, None] * rows.to(tl.float32), 0)


@triton.jit
def _of_padding(tile, padding):
    """The sum over rows of padding: of few windows, and it needs other threads."""
    total = tl.zeros([tile.shape[1]], tl.float32)
    if tl.max(padding.to(tl.int32), 0) > 0:
        total = tl.sum(tl.where(padding[:, None], tile, 0.0), 0)
    return total


@triton.jit(do_not_specialize=_VARYING)
def window_attention_forward(
    qkv, table, pad, out, scale, windows, H, W, shift_h, shift_w, groups,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr, BLOCKS: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Reads q, k, v once, writes the result: 4 e. A program: one head, one tile of queries."""
    C: tl.constexpr = HEADS * D
    WHOLE: tl.constexpr = not PADDED and T * BLOCKS == h * w
    TORN: tl.constexpr = ROLLED or (PADDED and not VALUE)
    OVERHANG: tl.constexpr = T * BLOCKS != h * w
    APART: tl.constexpr = False if pad is None else pad.dtype.element_ty != qkv.dtype.element_ty
    i_head = tl.program_id(0) % HEADS
    o_q = tl.program_id(0) // HEADS % BLOCKS * T + tl.arange(0, T)
    o_d = tl.arange(0, DP)
    i_k, i_v = C + i_head * D, 2 * C + i_head * D
    if BLOCKS == 1:
        whole_bias = _bias(table, o_q[:, None], o_q[None, :], i_head, h, w, HEADS, OVERHANG)
    for i_window in range(tl.program_id(0) // (HEADS * BLOCKS), windows, groups):
        pixel, inside, region = _tokens(
            i_window, o_q, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
        )
        q = _load(qkv + pixel * (3 * C) + i_head * D, inside, o_d, D, WHOLE)
        q_pad = _times(q, pad, i_k, o_d, D, APART)
        # Not -inf: a tile of keys that a query does not see leaves 0 = exp(-inf - top), no NaN.
        top = tl.full([T], -3.0e38, tl.float32)
        total = tl.zeros([T], tl.float32)
        acc = tl.zeros([T, DP], tl.float32)
        for i_block in range(BLOCKS):
            o_k = i_block * T + tl.arange(0, T)
            k, v, padding, region_k = _keys(
                qkv, pad, i_window, o_k, i_head, H, W, shift_h, shift_w,
                HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, APART,
            )  # fmt: skip
            if BLOCKS == 1:
                bias = whole_bias
            else:
                bias = _bias(table, o_q[:, None], o_k[None, :], i_head, h, w, HEADS, OVERHANG)
            s = _scores(q, k, bias, q_pad, padding, region, region_k, scale, TORN)
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = dot(round_to(p, v.dtype), v, acc * shrink[:, None])
            if APART:
                acc += _on_padding(p, padding)[:, None] * _vector(pad, i_v, o_d, D)[None, :]
            top = higher
        p_out = out + pixel * C + i_head * D
        _store(p_out, acc * (1.0 / total)[:, None], inside, o_d, D, WHOLE)


@triton.jit(do_not_specialize=_VARYING)
def window_attention_backward(
    qkv, table, pad, dy, dqkv, d_bias, d_pad, scale, windows, H, W, shift_h, shift_w, groups,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Windows of one tile: reads q, k, v, dy, writes dq, dk, dv: 7 e.

    A program adds up what its windows give to the bias (in registers) and to the padding's key and
    value, and writes it once: a row of d_bias (programs, T, T) and of d_pad (programs, 2, DP).
    """
    C: tl.constexpr = HEADS * D
    WHOLE: tl.constexpr = not PADDED and T == h * w
    TORN: tl.constexpr = ROLLED or (PADDED and not VALUE)
    OVERHANG: tl.constexpr = T != h * w
    APART: tl.constexpr = False if pad is None else pad.dtype.element_ty != qkv.dtype.element_ty
    i_head = tl.program_id(0) % HEADS
    o_t, o_d = tl.arange(0, T), tl.arange(0, DP)
    i_k, i_v = C + i_head * D, 2 * C + i_head * D
    bias = _bias(table, o_t[:, None], o_t[None, :], i_head, h, w, HEADS, OVERHANG)
    sum_bias = tl.zeros([T, T], tl.float32)
    sum_dk, sum_dv = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    # Addresses are worked out again for each window: there are no registers to keep them in.
    for i_window in tl.range(tl.program_id(0) // HEADS, windows, groups, disable_licm=True):
        pixel, inside, region = _tokens(
            i_window, o_t, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
        )
        at = pixel * (3 * C) + i_head * D
        q = _load(qkv + at, inside, o_d, D, WHOLE)
        dout = _load(dy + pixel * C + i_head * D, inside, o_d, D, WHOLE)
        k, v, padding, _ = _keys(
            qkv, pad, i_window, o_t, i_head, H, W, shift_h, shift_w,
            HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, APART,
        )  # fmt: skip
        q_pad = _times(q, pad, i_k, o_d, D, APART)
        dout_pad = _times(dout, pad, i_v, o_d, D, APART)
        s = _scores(q, k, bias, q_pad, padding, region, region, scale, TORN)
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p = p * (1.0 / tl.sum(p, 1))[:, None]
        dp = _products(dout, v, dout_pad, padding)
        p_dp = p * dp
        ds = p_dp - p * tl.sum(p_dp, 1)[:, None]
        # One product at a time, stored before the next: registers.
        if dqkv is not None or d_pad is not None:
            dv = dot(tl.trans(round_to(p, q.dtype)), dout)
            if dqkv is not None:
                _store(dqkv + at + 2 * C, dv, inside, o_d, D, WHOLE)
            if d_pad is not None:
                if APART:
                    sum_dv += _weighted(_on_padding(p, padding), dout)
                else:
                    sum_dv += _of_padding(dv, padding)
            low = round_to(ds, q.dtype)
            dk = dot(tl.trans(low), q)
            if dqkv is not None:
                _store(dqkv + at + C, dk * scale, inside, o_d, D, WHOLE)
            if d_pad is not None:
                if APART:
                    sum_dk += _weighted(_on_padding(ds, padding), q)
                else:
                    sum_dk += _of_padding(dk, padding)
        if dqkv is not None:
            dq = dot(low, k)
            if APART:
                ds_pad = _on_padding(ds, padding)
                dq += ds_pad[:, None] * _vector(pad, i_k, o_d, D)[None, :]
            _store(dqkv + at, dq * scale, inside, o_d, D, WHOLE)
        if d_bias is not None:  # last: else sm_80 spills
            sum_bias += ds
    i_program = tl.program_id(0)
    if d_bias is not None:
        p_bias = d_bias + i_program.to(tl.int64) * (T * T)
        tl.store(p_bias + o_t[:, None] * T + o_t[None, :], sum_bias)
    if d_pad is not None:
        tl.store(d_pad + i_program * (2 * DP) + o_d, sum_dk * scale)
        tl.store(d_pad + i_program * (2 * DP) + DP + o_d, sum_dv)


@triton.jit(do_not_specialize=_VARYING)
def window_attention_backward_queries(
    qkv, table, pad, dy, dqkv, d_pad, rows_top, rows_share, rows_delta,
    scale, windows, H, W, shift_h, shift_w, groups,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr, BLOCKS: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Windows of several tiles, one tile of queries: dq, a row of d_pad (programs, 2, DP), and what
    the kernels below need of a row of scores.

    That is the highest score, 1 / sum of exp2(score - highest), and delta = sum of p * dp; each
    (windows, HEADS, BLOCKS * T) float32.
    """
    C: tl.constexpr = HEADS * D
    WHOLE: tl.constexpr = not PADDED and T * BLOCKS == h * w
    TORN: tl.constexpr = ROLLED or (PADDED and not VALUE)
    OVERHANG: tl.constexpr = T * BLOCKS != h * w
    APART: tl.constexpr = False if pad is None else pad.dtype.element_ty != qkv.dtype.element_ty
    i_head = tl.program_id(0) % HEADS
    o_q = tl.program_id(0) // HEADS % BLOCKS * T + tl.arange(0, T)
    o_d = tl.arange(0, DP)
    i_k, i_v = C + i_head * D, 2 * C + i_head * D
    sum_dk, sum_dv = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
    for i_window in range(tl.program_id(0) // (HEADS * BLOCKS), windows, groups):
        pixel, inside, region = _tokens(
            i_window, o_q, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
        )
        at = pixel * (3 * C) + i_head * D
        q = _load(qkv + at, inside, o_d, D, WHOLE)
        dout = _load(dy + pixel * C + i_head * D, inside, o_d, D, WHOLE)
        q_pad = _times(q, pad, i_k, o_d, D, APART)
        dout_pad = _times(dout, pad, i_v, o_d, D, APART)
        top = tl.full([T], -3.0e38, tl.float32)
        total = tl.zeros([T], tl.float32)
        delta = tl.zeros([T], tl.float32)
        for i_block in range(BLOCKS):
            o_k = i_block * T + tl.arange(0, T)
            k, v, padding, region_k = _keys(
                qkv, pad, i_window, o_k, i_head, H, W, shift_h, shift_w,
                HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, APART,
            )  # fmt: skip
            bias = _bias(table, o_q[:, None], o_k[None, :], i_head, h, w, HEADS, OVERHANG)
            s = _scores(q, k, bias, q_pad, padding, region, region_k, scale, TORN)
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            dp = _products(dout, v, dout_pad, padding)
            delta = delta * shrink + tl.sum(p * dp, 1)
            top = higher
        share = 1.0 / total
        delta = delta * share
        o_row = (tl.cast(i_window, tl.int64) * HEADS + i_head) * (BLOCKS * T) + o_q
        tl.store(rows_top + o_row, top)
        tl.store(rows_share + o_row, share)
        tl.store(rows_delta + o_row, delta)
        if dqkv is not None or d_pad is not None:
            dq = tl.zeros([T, DP], tl.float32)
            ds_pad, p_pad = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
            for i_block in range(BLOCKS):
                o_k = i_block * T + tl.arange(0, T)
                k, v, padding, region_k = _keys(
                    qkv, pad, i_window, o_k, i_head, H, W, shift_h, shift_w,
                    HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, APART,
                )  # fmt: skip
                bias = _bias(table, o_q[:, None], o_k[None, :], i_head, h, w, HEADS, OVERHANG)
                s = _scores(q, k, bias, q_pad, padding, region, region_k, scale, TORN)
                p = tl.exp2(s - top[:, None]) * share[:, None]
                ds = p * (_products(dout, v, dout_pad, padding) - delta[:, None])
                dq = dot(round_to(ds, q.dtype), k, dq)
                if pad is not None:
                    ds_pad += _on_padding(ds, padding)
                    p_pad += _on_padding(p, padding)
            if APART:
                dq += ds_pad[:, None] * _vector(pad, i_k, o_d, D)[None, :]
            if dqkv is not None:
                _store(dqkv + at, dq * scale, inside, o_d, D, WHOLE)
            if d_pad is not None:
                sum_dk += _weighted(ds_pad, q)
                sum_dv += _weighted(p_pad, dout)
    if d_pad is not None:
        p_row = d_pad + tl.program_id(0) * (2 * DP) + o_d
        tl.store(p_row, sum_dk * scale)
        tl.store(p_row + DP, sum_dv)


@triton.jit(do_not_specialize=_VARYING)
def window_attention_backward_keys(
    qkv, table, dy, dqkv, rows_top, rows_share, rows_delta,
    scale, windows, H, W, shift_h, shift_w, groups,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr, BLOCKS: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Windows of several tiles, one tile of keys: dk, dv. Those of padding go nowhere."""
    C: tl.constexpr = HEADS * D
    WHOLE: tl.constexpr = not PADDED and T * BLOCKS == h * w
    TORN: tl.constexpr = ROLLED or (PADDED and not VALUE)
    OVERHANG: tl.constexpr = T * BLOCKS != h * w
    i_head = tl.program_id(0) % HEADS
    o_k = tl.program_id(0) // HEADS % BLOCKS * T + tl.arange(0, T)
    o_d = tl.arange(0, DP)
    for i_window in range(tl.program_id(0) // (HEADS * BLOCKS), windows, groups):
        pixel_k, inside_k, region_k = _tokens(
            i_window, o_k, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
        )
        k, v, _, region_k = _keys(
            qkv, None, i_window, o_k, i_head, H, W, shift_h, shift_w,
            HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, False,
        )  # fmt: skip
        dk, dv = tl.zeros([T, DP], tl.float32), tl.zeros([T, DP], tl.float32)
        for i_block in range(BLOCKS):
            o_q = i_block * T + tl.arange(0, T)
            pixel, inside, region = _tokens(
                i_window, o_q, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
            )
            q = _load(qkv + pixel * (3 * C) + i_head * D, inside, o_d, D, WHOLE)
            dout = _load(dy + pixel * C + i_head * D, inside, o_d, D, WHOLE)
            o_row = (tl.cast(i_window, tl.int64) * HEADS + i_head) * (BLOCKS * T) + o_q
            # Keys down, queries across: p and ds are the left operands of dv and dk as they stand.
            bias = _bias(table, o_q[None, :], o_k[:, None], i_head, h, w, HEADS, OVERHANG)
            s = _scores(k, q, bias, None, None, region_k, region, scale, TORN)
            p = tl.exp2(s - tl.load(rows_top + o_row)[None, :])
            p = p * tl.load(rows_share + o_row)[None, :]
            dv = dot(round_to(p, q.dtype), dout, dv)
            ds = p * (dot(v, tl.trans(dout)) - tl.load(rows_delta + o_row)[None, :])
            dk = dot(round_to(ds, q.dtype), q, dk)
        p_k = dqkv + pixel_k * (3 * C) + (C + i_head * D)
        _store(p_k, dk * scale, inside_k, o_d, D, WHOLE)
        _store(p_k + C, dv, inside_k, o_d, D, WHOLE)


@triton.jit(do_not_specialize=_VARYING)
def window_attention_backward_bias(
    qkv, table, pad, dy, d_bias, rows_top, rows_share, rows_delta,
    scale, windows, H, W, shift_h, shift_w, groups,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr, BLOCKS: tl.constexpr,
    ROLLED: tl.constexpr, PADDED: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Windows of several tiles, one tile of (query, key) pairs, one part of d_bias."""
    C: tl.constexpr = HEADS * D
    WHOLE: tl.constexpr = not PADDED and T * BLOCKS == h * w
    TORN: tl.constexpr = ROLLED or (PADDED and not VALUE)
    OVERHANG: tl.constexpr = T * BLOCKS != h * w
    APART: tl.constexpr = False if pad is None else pad.dtype.element_ty != qkv.dtype.element_ty
    i_head = tl.program_id(0) % HEADS
    i_tile = tl.program_id(0) // HEADS % (BLOCKS * BLOCKS)
    i_group = tl.program_id(0) // (HEADS * BLOCKS * BLOCKS)
    o_q = i_tile // BLOCKS * T + tl.arange(0, T)
    o_k = i_tile % BLOCKS * T + tl.arange(0, T)
    o_d = tl.arange(0, DP)
    i_k, i_v = C + i_head * D, 2 * C + i_head * D
    bias = _bias(table, o_q[:, None], o_k[None, :], i_head, h, w, HEADS, OVERHANG)
    total = tl.zeros([T, T], tl.float32)
    for i_window in range(i_group, windows, groups):
        pixel, inside, region = _tokens(
            i_window, o_q, H, W, shift_h, shift_w, h, w, ROLLED, PADDED, VALUE
        )
        q = _load(qkv + pixel * (3 * C) + i_head * D, inside, o_d, D, WHOLE)
        dout = _load(dy + pixel * C + i_head * D, inside, o_d, D, WHOLE)
        k, v, padding, region_k = _keys(
            qkv, pad, i_window, o_k, i_head, H, W, shift_h, shift_w,
            HEADS, D, DP, h, w, ROLLED, PADDED, VALUE, WHOLE, APART,
        )  # fmt: skip
        q_pad = _times(q, pad, i_k, o_d, D, APART)
        dout_pad = _times(dout, pad, i_v, o_d, D, APART)
        o_row = (tl.cast(i_window, tl.int64) * HEADS + i_head) * (BLOCKS * T) + o_q
        s = _scores(q, k, bias, q_pad, padding, region, region_k, scale, TORN)
        p = tl.exp2(s - tl.load(rows_top + o_row)[:, None])
        p = p * tl.load(rows_share + o_row)[:, None]
        dp = _products(dout, v, dout_pad, padding)
        total += p * (dp - tl.load(rows_delta + o_row)[:, None])
    N: tl.constexpr = BLOCKS * T
    p_bias = d_bias + (i_group * HEADS + i_head).to(tl.int64) * (N * N)
    tl.store(p_bias + o_q[:, None] * N + o_k[None, :], total)


@triton.jit(do_not_specialize=["groups"])
def window_attention_reduce_bias(
    d_bias, d_table, groups,
    HEADS: tl.constexpr, h: tl.constexpr, w: tl.constexpr, wP: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A row of the table, of one head: adds d_bias (groups, HEADS, N, N) up over groups and pairs.

    The row has one difference dy of query and key rows. A step takes R pairs (group, query row),
    each w x w. The sum over the R places, and of the diagonals that make the row's 2w - 1
    differences of columns, is taken behind the loop: it needs other threads.
    """
    i_head, dy = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS - (h - 1)
    o_r, o_q, o_k = tl.arange(0, R), tl.arange(0, wP), tl.arange(0, wP)
    within = (o_q[:, None] < w) & (o_k[None, :] < w)
    pair = o_q[:, None] * N + o_k[None, :]
    rows, first = h - tl.abs(dy), tl.maximum(dy, 0)  # query rows whose key row is in the window
    totals = tl.zeros([R, wP, wP], tl.float32)
    for start in range(0, groups * rows, R):
        i_group, row_q = (start + o_r) // rows, (start + o_r) % rows + first
        at = (i_group * HEADS + i_head).to(tl.int64) * (N * N) + row_q * w * N + (row_q - dy) * w
        mask = (i_group < groups)[:, None, None] & within[None]
        totals += tl.load(d_bias + at[:, None, None] + pair[None], mask=mask, other=0.0)
    total = tl.sum(totals, 0)
    o_x = tl.arange(0, 2 * wP)
    same = o_q[:, None] - o_k[None, :] + (w - 1)
    picked = tl.where(same[None] == o_x[:, None, None], total[None], 0.0)
    row = tl.sum(tl.sum(picked, 2), 1)
    p_row = d_table + ((dy + h - 1) * (2 * w - 1) + o_x) * HEADS + i_head
    tl.store(p_row, round_to(row, d_table.dtype.element_ty), mask=o_x < 2 * w - 1)


@triton.jit(do_not_specialize=["rows"])
def window_attention_reduce_pad(
    d_pad, d_pad_qkv, rows,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A head's part of query, key or value: adds d_pad (rows, HEADS, 2, DP) up over rows.

    The query's part is 0: a padded query has no result.
    """
    i_head, i_part = tl.program_id(0) // 3, tl.program_id(0) % 3
    o_r, o_d = tl.arange(0, R), tl.arange(0, DP)
    totals = tl.zeros([R, DP], tl.float32)
    if i_part > 0:
        for start in range(0, rows, R):
            row = (start + o_r)[:, None]
            at = ((row * HEADS + i_head) * 2 + i_part - 1) * DP + o_d[None, :]
            totals += tl.load(d_pad + at, mask=row < rows, other=0.0)
    p_part = d_pad_qkv + i_part * (HEADS * D) + i_head * D + o_d
    tl.store(p_part, round_to(tl.sum(totals, 0), d_pad_qkv.dtype.element_ty), mask=o_d < D)


def supports(
    qkv: Tensor,
    bias_table: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> str | None:
    """None, or why these kernels cannot run the call."""
    width = qkv.shape[3] // 3 // heads
    if qkv.dtype is torch.float64:
        return "its kernels accumulate in float32, and qkv is float64"
    if not 16 <= width <= 128:
        return f"its head widths are 16 to 128, and this one is {width}"
    if not (2 <= window[0] <= 16 and 2 <= window[1] <= 16):
        return f"its windows are 2 to 16 rows and columns, and this one is {window}"
    if _launch.amd() and _launch.chip(qkv.device).family != "gfx942":
        return "its kernels need more than the 256 registers a lane that AMD's RDNA has"
    return None


def _problem(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], pad_is_value: bool
) -> dict[str, Any]:
    """The arguments that all kernels share but tensors, `scale` and `groups`."""
    (B, H, W, C3), (h, w) = qkv.shape, window
    D, N = C3 // 3 // heads, h * w
    # Taller tiles do not fit the registers: of float32, which takes no tensor cores; and with the
    # tensor-core instructions before Hopper's, or wide heads, unless one tile is a window.
    hopper = _launch.chip(qkv.device).family in ("sm_90", "sm_100")
    tall = qkv.element_size() == 2 and (N <= 64 or (hopper and D <= 64))
    T = min(64 if tall else 32, max(16, _launch.power_of_two(N)))
    return {
        "windows": B * _launch.cdiv(H, h) * _launch.cdiv(W, w),
        **{"H": H, "W": W, "shift_h": shift[0], "shift_w": shift[1]},
        **{"HEADS": heads, "D": D, "DP": _launch.power_of_two(D), "h": h, "w": w},
        **{"T": T, "BLOCKS": _launch.cdiv(N, T), "ROLLED": any(shift)},
        **{"PADDED": bool(H % h or W % w), "VALUE": pad_is_value},
    }


def _plan(
    kernel: str, qkv: Tensor, problem: dict[str, Any], tiles: int, vector: bool = False
) -> tuple[int, Any]:
    """How many programs share the windows of one head and tile; warps and stages.

    Args:
        kernel: its name without "window_attention_".
        qkv: the call's.
        problem: what `_problem` gives.
        tiles: programs of one head and one share of the windows.
        vector: whether padded positions have one.
    """
    T, BLOCKS, DP, size = problem["T"], problem["BLOCKS"], problem["DP"], qkv.element_size()
    masked = problem["PADDED"] or T * BLOCKS != problem["h"] * problem["w"]
    chip = _launch.chip(qkv.device)
    warps, stages = T // 16, 2
    if size == 4:
        # What each chip's compiler takes without spilling.
        tight = problem["PADDED"] or kernel == "forward"
        warps, stages = T // 4, 1 if chip.family == "sm_80" else 2
        if chip.family == "sm_100" and not problem["ROLLED"]:
            warps, stages = T // 8, 3
        elif chip.family == "sm_100" and kernel == "backward_queries":
            warps = T // 8
        elif chip.family == "sm_80" and kernel == "backward_keys":
            warps, stages = T // 8 if DP == 16 else warps, 2
        elif tight and BLOCKS > 1 and DP == 16 and chip.family in ("sm_90", "default"):
            warps = T // 4 if kernel == "backward_queries" else T // 8
        elif chip.family == "sm_90" and kernel == "backward_queries" and DP <= 64:
            warps, stages = T // 8, 2 if problem["PADDED"] and DP == 32 else 1
        elif chip.family == "sm_90" and vector and BLOCKS == 1 and DP >= 64:
            stages = 1
        elif chip.family == "gfx942":
            warps, stages = 4, 1
    elif BLOCKS > 1:
        warps, stages = (8, 1) if T == 64 and chip.family == "sm_100" else (4, 2)
        if T == 64 and chip.family == "sm_90":
            if problem["PADDED"]:
                warps, stages = 8, 1 if problem["ROLLED"] else 2
            elif kernel == "backward_keys":
                warps = 8
    elif kernel == "backward" and (T == 16 or (T == 32 and vector)) and chip.family == "sm_90":
        warps = T // 8
    elif kernel == "backward" and T == 64:
        # Scores, gradients and two T x T tiles of the bias fill four warps' registers.
        hopper = chip.family in ("sm_90", "sm_100")
        # Four of AMD's have twice the lanes, and 512 registers each.
        warps, stages = (4, 1) if chip.family == "gfx942" else (8, 1)
        if hopper and DP <= 64 and not vector and (chip.family == "sm_90" or not masked):
            warps, stages = 4, 2 if problem["PADDED"] or chip.family == "sm_100" else 3
    resident = 16 if kernel == "forward" else 8  # warps of a multiprocessor
    default = {"num_warps": warps, "num_stages": stages, "programs": resident // warps}
    key = (T, BLOCKS, DP, size, int(masked) + int(vector))
    config = dict(_launch.config(f"window_attention_{kernel}", key, chip, default))
    groups = config.pop("programs") * chip.processors // (problem["HEADS"] * tiles)
    return max(1, min(problem["windows"], groups)), config


def _run_forward(
    results: tuple[Tensor],
    qkv: Tensor,
    bias_table: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> None:
    problem = _problem(qkv, heads, window, shift, pad_is_value)
    if problem["windows"] == 0:
        return
    blocks = problem["BLOCKS"]
    groups, config = _plan("forward", qkv, problem, blocks)
    _launch.launch(
        window_attention_forward,
        (groups * heads * blocks,),
        qkv=qkv.contiguous(),
        table=None if bias_table is None else bias_table.contiguous(),
        pad=pad_qkv.contiguous() if pad_qkv is not None and problem["PADDED"] else None,
        out=results[0],
        scale=scale,
        groups=groups,
        **problem,
        **config,
    )


def _run_backward(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    dy: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    pad_qkv: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    pad_is_value: bool,
) -> None:
    problem = _problem(qkv, heads, window, shift, pad_is_value)
    h, w, blocks, padded = *window, problem["BLOCKS"], problem["PADDED"]
    if problem["windows"] == 0:
        for gradient in gradients[1:]:
            if gradient is not None:
                gradient.zero_()
        return
    # The kernels write rows of channels; a gradient may be laid out otherwise, as its tensor is.
    d_qkv, d_table, d_pad_qkv = (
        None if g is None else g if g.is_contiguous() else g.new_empty(g.shape) for g in gradients
    )
    if d_pad_qkv is not None and not padded:
        d_pad_qkv.zero_()
        d_pad_qkv = None
    shared: dict[str, Any] = {
        "qkv": qkv.contiguous(),
        "table": None if bias_table is None else bias_table.contiguous(),
        "dy": dy.contiguous(),
        "scale": scale,
        **problem,
    }

    def parts(needed: object, *shape: int) -> Tensor | None:
        if needed is None:
            return None
        return torch.empty(shape, dtype=torch.float32, device=qkv.device)

    N, DP = blocks * problem["T"], problem["DP"]
    pad = pad_qkv.contiguous() if pad_qkv is not None and padded else None
    d_bias = d_pad = None
    if blocks == 1:
        del shared["BLOCKS"]
        groups, config = _plan("backward", qkv, problem, 1, pad is not None)
        d_bias = parts(d_table, groups, heads, N, N)
        d_pad = parts(d_pad_qkv, groups, heads, 2, DP)
        out: dict[str, Any] = {"pad": pad, "dqkv": d_qkv, "d_bias": d_bias, "d_pad": d_pad}
        _launch.launch(
            window_attention_backward, (groups * heads,), **shared, **out, groups=groups, **config
        )
    else:
        for name in ("rows_top", "rows_share", "rows_delta"):
            shared[name] = parts(qkv, problem["windows"], heads, N)
        groups, config = _plan("backward_queries", qkv, problem, blocks)
        d_pad = parts(d_pad_qkv, groups * blocks, heads, 2, DP)
        out = {"pad": pad, "dqkv": d_qkv, "d_pad": d_pad, "groups": groups}
        _launch.launch(
            window_attention_backward_queries, (groups * heads * blocks,), **shared, **out, **config
        )
        if d_qkv is not None:
            groups, config = _plan("backward_keys", qkv, problem, blocks)
            out = {"dqkv": d_qkv, "groups": groups}
            _launch.launch(
                window_attention_backward_keys,
                (groups * heads * blocks,),
                **shared,
                **out,
                **config,
            )
        if d_table is not None:
            groups, config = _plan("backward_bias", qkv, problem, blocks**2)
            d_bias = parts(d_table, groups, heads, N, N)
            out = {"pad": pad, "d_bias": d_bias, "groups": groups}
            _launch.launch(
                window_attention_backward_bias,
                (groups * heads * blocks**2,),
                **shared,
                **out,
                **config,
            )
    if d_bias is not None:
        wP = _launch.power_of_two(w)
        # Few steps with many loads each: a step waits for memory.
        sizes = {"HEADS": heads, "h": h, "w": w, "wP": wP, "N": N, "R": 8192 // wP**2}
        out = {"d_bias": d_bias, "d_table": d_table, "groups": d_bias.shape[0]}
        _launch.launch(
            window_attention_reduce_bias, (heads * (2 * h - 1),), **out, **sizes, num_warps=16
        )
    if d_pad is not None:
        sizes = {"HEADS": heads, "D": problem["D"], "DP": DP, "R": 64}
        out = {"d_pad": d_pad, "d_pad_qkv": d_pad_qkv, "rows": d_pad.shape[0]}
        _launch.launch(window_attention_reduce_pad, (heads * 3,), **out, **sizes, num_warps=4)
    for gradient, filled in zip(gradients, (d_qkv, d_table, d_pad_qkv), strict=True):
        if gradient is not None and filled is not None and filled is not gradient:
            gradient.copy_(filled)


call = _register.kernel(
    "window_attention_triton(Tensor qkv, Tensor? bias_table, int heads, int[] window, "
    "int[] shift, Tensor? pad_qkv, float scale, bool pad_is_value) -> (Tensor out)",
    empty=lambda qkv, *_: qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3)),
    forward=_run_forward,
    backward=_run_backward,
    saves=("qkv", "bias_table", "pad_qkv"),
)
