"""What a user would run instead of the fused ops, and the floor: models without what the ops do.

Plain compositions take an op's normal form (`fastdiff_kernels._register.Op`), so that they serve
both the benchmarks of single ops and, through `stand_in`, whole models. They compute in the dtype
of the call, as eager code in bfloat16 does, not in float32 as the definitions do.

Letters: B batch, C channels, H W pixels, N heads, d head width, h w window, m n windows down and
across, P prefix tokens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff_kernels._register import stand_in
from fastdiff_kernels.window_attention import reference as swin

# Tensors that depend on sizes only, kept as implementations of Swin keep them. A plain dict:
# torch.compile reads those, and would trace through functools.cache.
_MADE: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor | None]] = {}


def _made(
    qkv: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Relative positions, regions and mask of a map and its windows.

    The bias table's row for each pair (h*w, h*w); the region of each rolled pixel (m*n, h*w), where
    pairs of different regions do not see each other; the mask (m*n, 1, h*w, h*w), None where no
    pair is masked.
    """
    key = (*qkv.shape[1:3], window, shift, qkv.device.type, qkv.dtype)
    if key not in _MADE:
        _MADE[key] = _make(qkv, window, shift)
    return _MADE[key]


def _make(
    qkv: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    (_, H, W, _), (h, w), (sh, sw), device = qkv.shape, window, shift, qkv.device
    m, n = -(-H // h), -(-W // w)
    rows, columns = torch.arange(m * h, device=device), torch.arange(n * w, device=device)
    region = 3 * swin._regions(rows, h, sh)[:, None] + swin._regions(columns, w, sw)
    padded = (rows >= H)[:, None] | (columns >= W)
    region = region.masked_fill(padded.roll((-sh, -sw), (0, 1)), 9)
    region = region.reshape(m, h, n, w).transpose(1, 2).reshape(m * n, h * w)
    mask = None
    if sh or sw or (m * h, n * w) != (H, W):
        apart = region[:, None, :, None] != region[:, None, None, :]
        mask = torch.zeros(apart.shape, device=device, dtype=qkv.dtype)
        mask = mask.masked_fill(apart, float("-inf"))
    return swin._relative_index(h, w, device), region, mask


def _windows(qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Pad, roll and cut: (B, H, W, 3*C) to (3, B, m*n, N, h*w, d)."""
    (B, H, W, C3), (h, w), (sh, sw) = qkv.shape, window, shift
    m, n = -(-H // h), -(-W // w)
    if (m * h, n * w) != (H, W):
        qkv = F.pad(qkv, (0, 0, 0, n * w - W, 0, m * h - H))
    if sh or sw:
        qkv = qkv.roll((-sh, -sw), (1, 2))
    parts = qkv.reshape(B, m, h, n, w, 3, heads, C3 // 3 // heads)
    return parts.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, m * n, heads, h * w, -1)


def _merge(
    out: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """(B, m*n, N, h*w, d) to (B, H, W, C)."""
    (H, W), (h, w), (sh, sw) = size, window, shift
    m, n = -(-H // h), -(-W // w)
    B, _, heads, _, d = out.shape
    out = out.reshape(B, m, n, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, m * h, n * w, heads * d)
    if sh or sw:
        out = out.roll((sh, sw), (1, 2))
    return out[:, :H, :W].contiguous()


def window_sdpa(
    qkv: Tensor,
    table: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> Tensor:
    """Roll, cut, `scaled_dot_product_attention` with bias and mask as one tensor, glue, roll."""
    if pad_is_value:
        raise ValueError("only padding that is masked")
    B, H, W, _ = qkv.shape
    index, _, mask = _made(qkv, window, shift)
    added = None
    if table is not None:
        added = F.embedding(index, table.to(qkv.dtype)).permute(2, 0, 1)[None]
    if mask is not None:
        added = mask if added is None else added + mask
    q, k, v = _windows(qkv, heads, window, shift)
    windows, pairs = q.shape[1], q.shape[3]
    if mask is None:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    else:
        # A mask per window: windows count as heads, so that it is not repeated for each image.
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))
        assert added is not None
        added = added.expand(windows, heads, pairs, pairs).reshape(1, -1, pairs, pairs)
    if added is not None:
        added = added.expand(q.shape[0], -1, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
    return _merge(out.reshape(B, windows, heads, pairs, -1), (H, W), window, shift)


def window_flex(
    qkv: Tensor,
    table: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> Tensor:
    """The same by FlexAttention, bias and mask in its score function; to be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if pad_is_value:
        raise ValueError("only padding that is masked")
    B, H, W, _ = qkv.shape
    index, region, mask = _made(qkv, window, shift)
    # In bfloat16 its gradient, a sum over all windows by atomics, would come out wrong.
    table = None if table is None else table.float()
    q, k, v = _windows(qkv, heads, window, shift)
    windows = q.shape[1]

    def score(s: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if table is not None:
            s = s + table[index[i, j], head]
        if mask is not None:
            r = b % windows
            s = torch.where(region[r, i] == region[r, j], s, float("-inf"))
        return s

    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = flex_attention(q, k, v, score_mod=score, scale=scale)
    assert isinstance(out, Tensor)
    return _merge(out.unflatten(0, (B, windows)), (H, W), window, shift)


def window_xformers(
    qkv: Tensor,
    table: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> Tensor:
    """The same by xformers' memory-efficient attention with a bias for each window."""
    from xformers.ops import memory_efficient_attention

    if pad_is_value:
        raise ValueError("only padding that is masked")
    B, H, W, _ = qkv.shape
    index, _, mask = _made(qkv, window, shift)
    q, k, v = _windows(qkv, heads, window, shift)
    windows, pairs = q.shape[1], q.shape[3]
    added = None
    if table is not None:
        added = F.embedding(index, table.to(qkv.dtype)).permute(2, 0, 1)[None]
    if mask is not None:
        added = mask if added is None else added + mask
    if added is not None:
        added = added.expand(windows, heads, pairs, pairs).repeat(B, 1, 1, 1)
    q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=added, scale=scale)
    out = out.transpose(1, 2).unflatten(0, (B, windows))
    return _merge(out, (H, W), window, shift)


def dwconv_gelu(
    z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int
) -> Tensor:
    """By way of an NCHW image: two transposes that copy."""
    pixels = z[:, prefix:].transpose(1, 2).unflatten(2, grid).contiguous()
    return _convolve(z, pixels, weight, bias, prefix)


def dwconv_gelu_channels_last(
    z: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int
) -> Tensor:
    """The tokens seen as a channels_last image: nothing is copied for the layout."""
    pixels = z[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _convolve(z, pixels, weight, bias, prefix)


def _convolve(z: Tensor, pixels: Tensor, weight: Tensor, bias: Tensor, prefix: int) -> Tensor:
    weight, bias = weight.to(z.dtype), bias.to(z.dtype)
    y = F.conv2d(pixels, weight, bias, padding=1, groups=z.shape[2]).flatten(2).transpose(1, 2)
    return F.gelu(torch.cat([z[:, :prefix], y], 1) if prefix else y)


def _dwconv_ffn(
    gelu: Callable[..., Tensor],
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w_conv: Tensor,
    b_conv: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    grid: tuple[int, int],
    prefix: int,
) -> Tensor:
    z = F.linear(x, w1.to(x.dtype), None if b1 is None else b1.to(x.dtype))
    y = gelu(z, w_conv, b_conv, grid, prefix)
    return F.linear(y, w2.to(x.dtype), None if b2 is None else b2.to(x.dtype))


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    silu: bool,
) -> Tensor:
    """Concatenation, `group_norm`, FiLM and SiLU, in the layout that x has."""
    h = x if skip is None else torch.cat([x, skip], 1)
    y = _film(F.group_norm(h, groups, weight.to(x.dtype), bias.to(x.dtype), eps), scale, shift)
    return F.silu(y) if silu else y


def _film(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * (1 + scale)[:, :, None, None]
    return y if shift is None else y + shift[:, :, None, None]


@functools.cache
def _apex_norm(groups: int, channels: int, eps: float, act: str) -> Any:
    apex = importlib.import_module("apex.contrib.group_norm")
    return apex.GroupNorm(groups, channels, eps=eps, act=act)


def group_norm_apex(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    silu: bool,
) -> Tensor:
    """By apex's group norm, NHWC; its SiLU is fused where no FiLM stands between."""
    h = x if skip is None else torch.cat([x, skip], 1)
    film = scale is not None or shift is not None
    module = _apex_norm(groups, h.shape[1], eps, "silu" if silu and not film else "")
    parameters = {"weight": weight, "bias": bias}
    y = _film(torch.func.functional_call(module, parameters, (h,)), scale, shift)
    return F.silu(y) if silu and film else y


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Residual add, `layer_norm` and modulation."""
    wide = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    r = x
    if residual is not None:
        r = residual + (x if gate is None else gate.reshape(wide) * x)
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    y = F.layer_norm(r, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.reshape(wide))
    if shift is not None:
        y = y + shift.reshape(wide)
    return y, r


PLAIN: dict[str, Callable[..., Any]] = {
    "window_attention": window_sdpa,
    "dwconv_gelu": dwconv_gelu_channels_last,
    "dwconv_ffn": functools.partial(_dwconv_ffn, dwconv_gelu_channels_last),
    "group_norm_silu": group_norm_silu,
    "layer_norm_modulate": layer_norm_modulate,
}
PLAIN_NCHW = PLAIN | {
    "dwconv_gelu": dwconv_gelu,
    "dwconv_ffn": functools.partial(_dwconv_ffn, dwconv_gelu),
}


def _plain(op: str, form: tuple[Any, ...]) -> Any:
    return PLAIN[op](*form)


def _plain_nchw(op: str, form: tuple[Any, ...]) -> Any:
    return PLAIN_NCHW[op](*form)


@contextlib.contextmanager
def plain(*, nchw: bool = False) -> Iterator[None]:
    """Every op as a user would write it."""
    with stand_in(_plain_nchw if nchw else _plain):
        yield


@contextlib.contextmanager
def floor() -> Iterator[None]:
    """Models with nothing left but products, convolutions, attention, residual adds and reshapes.

    Norms and activations become identities. Where a result has another shape than its input (the
    concatenation inside a norm, re-sampling), it is a tensor that was there before.
    """
    with stand_in(_floor), _FloorFunctions():
        yield


def _floor(op: str, form: tuple[Any, ...]) -> Any:
    x: Tensor = form[0]
    if op == "window_attention":
        return _attend_in_place(x, form[2], form[3], form[6])
    if op == "dwconv_gelu":
        return x
    if op == "dwconv_ffn":
        return _dwconv_ffn(lambda z, *_: z, *form)
    if op == "group_norm_silu":
        skip = form[7]
        if skip is None:
            return x
        B, C, H, W = x.shape
        return _Blank.apply((B, C + skip.shape[1], H, W), x, skip)
    residual = form[5]
    r = x if residual is None else residual + x
    return r, r


def _attend_in_place(qkv: Tensor, heads: int, window: tuple[int, int], scale: float) -> Tensor:
    """Attention among h*w neighbours in memory: the products of window attention, no copy."""
    B, H, W, C3 = qkv.shape
    pairs = window[0] * window[1]
    while H * W % pairs:  # no whole windows: fewer products rather than a copy
        pairs -= 1
    parts = qkv.reshape(B * H * W // pairs, pairs, 3, heads, C3 // 3 // heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(B, H, W, C3 // 3)


@functools.cache
def _kept(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> Tensor:
    """A random tensor, made once: zeros would make products run faster than they do."""
    generator = torch.Generator(device).manual_seed(0)
    made = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    return made.contiguous(memory_format=torch.channels_last) if channels_last else made


def _blank(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    last = len(shape) == 4 and not like.is_contiguous()
    return _kept(tuple(shape), like.dtype, like.device, last).detach()


class _Blank(torch.autograd.Function):
    """A result, and gradients, of given shapes that cost nothing."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.blanks = [_blank(t, tuple(t.shape)) for t in inputs]
        return _blank(inputs[0], shape)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return (None, *ctx.blanks)


class _FloorFunctions(TorchFunctionMode):
    """What the models do outside the ops and the floor leaves out: re-sampling, gates, dropout."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.avg_pool2d:
            B, C, H, W = args[0].shape
            return _Blank.apply((B, C, H // 2, W // 2), args[0])
        if func is F.interpolate:
            B, C, H, W = args[0].shape
            return _Blank.apply((B, C, 2 * H, 2 * W), args[0])
        if func is torch.addcmul:
            return args[0] + args[2]
        if func is F.dropout:
            return args[0]
        return func(*args, **kwargs)
