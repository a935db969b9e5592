"""`window_attention`: checks and choice of back end."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fastdiff_kernels import _checks, _register
from fastdiff_kernels.window_attention import reference

_NAME = "window_attention"


def _arguments(
    qkv: Tensor,
    bias_table: Tensor | None,
    heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = (0, 0),
    pad_mode: str = "mask",
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    optional = {"bias_table": bias_table, "pad_qkv": pad_qkv}
    dtype = _checks.dtype_of(_NAME, {"qkv": qkv}, {}, optional)
    _checks.check_rank(_NAME, "qkv", qkv, "(B, H, W, 3*C)")
    _, H, W, C3 = qkv.shape
    if C3 == 0 or C3 % 3:
        raise ValueError(f"{_NAME}: qkv has {C3} channels; expected 3*C, C at least 1")
    if heads < 1 or (C3 // 3) % heads:
        raise ValueError(f"{_NAME}: heads={heads} does not divide C={C3 // 3}")
    h, w = _checks.pair(_NAME, "window_size", window_size, least=1)
    sh, sw = _checks.pair(_NAME, "shift", shift, least=0)
    if sh >= h or sw >= w:
        raise ValueError(f"{_NAME}: shift={shift}; expected less than window_size={window_size}")
    _checks.check_shape(_NAME, "bias_table", bias_table, ((2 * h - 1) * (2 * w - 1), heads))
    if pad_mode not in ("mask", "value"):
        raise ValueError(f"{_NAME}: pad_mode={pad_mode!r}; expected 'mask' or 'value'")
    if pad_qkv is not None and pad_mode != "value":
        raise ValueError(f"{_NAME}: pad_qkv is given with pad_mode='mask'; expected 'value'")
    _checks.check_shape(_NAME, "pad_qkv", pad_qkv, (C3,))
    # A window that covers the map has no neighbour to shift towards.
    shift = (0 if h >= H else sh, 0 if w >= W else sw)
    if scale is None:
        scale = (C3 // 3 // heads) ** -0.5
    qkv = cast(Tensor, _checks.cast(qkv, dtype))
    return qkv, bias_table, heads, (h, w), shift, pad_qkv, float(scale), pad_mode == "value"


_OP = _register.Op(_NAME, _arguments, reference.window_attention)
_OP.add("triton", "fastdiff_kernels.window_attention.triton_kernels")
_OP.add("native", "fastdiff_kernels.window_attention.native_kernels")


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    *,
    heads: int,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = (0, 0),
    pad_mode: str = "mask",
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention inside (shifted) windows of a map, with relative position bias.

    softmax(scale * q k^T + bias[relative position] + mask) v in each window, where the map is
    padded at the bottom and right to whole windows, then rolled by -shift, then cut into windows.
    The mask excludes exactly (-inf) pairs that only the roll brought together (Swin's nine
    regions). Along an axis where the window covers the map, the shift is 0 and the window keeps
    its size: the overhang is padding.

    Args:
        qkv: (B, H, W, 3*C), float32, bfloat16, float16 (float64 on the reference); channels laid
            out [3, heads, C // heads]. Any H, W; may be non-contiguous or empty.
        bias_table: ((2*h-1) * (2*w-1), heads) for a window (h, w), in qkv's dtype or float32; row
            (dy + h - 1) * (2*w - 1) + (dx + w - 1) is the bias of a key that lies (-dy, -dx)
            from its query. None: no bias.
        heads: number of heads; divides C.
        window_size: rows and columns of a window, or one int for both.
        shift: rows and columns of the roll, each less than the window, or one int for both.
        pad_mode: "mask" excludes padded keys. "value" lets padded positions take part, with
            `pad_qkv` as their query, key and value.
        pad_qkv: (3*C,), in qkv's dtype or float32; None is zeros. The bias of the qkv Linear
            reproduces implementations that pad before that Linear.
        scale: of the logits; default (C // heads) ** -0.5.

    Returns:
        (B, H, W, C), contiguous, in qkv's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError: an argument is no tensor, or not of a floating dtype; bias_table or pad_qkv is
            neither of qkv's dtype nor float32.
        ValueError: qkv is not 4-dimensional, or its channels are not 3*C; heads does not divide C;
            window_size below 1; shift below 0 or not less than window_size; a bias_table or
            pad_qkv of another shape; another pad_mode; pad_qkv with pad_mode "mask"; devices
            differ.

    Numerics: logits, softmax and sums in float32; one rounding, at the end. Deterministic.

    Source: Swin Transformer (Liu et al. 2021, 3.2); agrees with transformers' and torchvision's
    Swin; "Exploring Vision Transformers as Diffusion Learners", 3.3.
    """
    return _OP(qkv, bias_table, heads, window_size, shift, pad_mode, pad_qkv, scale)
