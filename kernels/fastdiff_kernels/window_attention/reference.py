"""Definition of window attention in plain PyTorch.

B batch, H W pixels, C channels, N heads, d head width, h w window rows and columns,
m n windows down and across.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    qkv: Tensor,
    bias_table: Tensor | None,
    heads: int,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
    pad_is_value: bool,
) -> Tensor:
    (B, H, W, C3), (h, w), (sh, sw) = qkv.shape, window_size, shift
    m, n, d = -(-H // h), -(-W // w), C3 // 3 // heads
    rows = torch.arange(m * h, device=qkv.device)
    columns = torch.arange(n * w, device=qkv.device)
    padded = (rows >= H)[:, None] | (columns >= W)

    x = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if (m * h, n * w) != (H, W):
        x = F.pad(x, (0, 0, 0, n * w - W, 0, m * h - H))
        if pad_is_value and pad_qkv is not None:
            x = torch.where(padded[..., None], pad_qkv.to(x.dtype), x)
    if sh or sw:
        x = x.roll((-sh, -sw), (1, 2))
    x = x.reshape(B, m, h, n, w, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = x.reshape(3, B, m * n, heads, h * w, d).unbind(0)
    scores = (q * scale) @ k.transpose(-1, -2)

    # Bias and mask first become one small tensor, (m*n or 1, N, h*w, h*w): one add to the scores.
    added = None
    if bias_table is not None:
        index = _relative_index(h, w, qkv.device)
        added = F.embedding(index, bias_table.to(x.dtype)).permute(2, 0, 1)
    if sh or sw or (not pad_is_value and (m * h, n * w) != (H, W)):
        # Swin's nine regions: pixels that the roll brought together do not see each other.
        region = 3 * _regions(rows, h, sh)[:, None] + _regions(columns, w, sw)
        if not pad_is_value:
            # Padding is one more region: so a padded query has keys, and its softmax no NaN.
            region = region.masked_fill(padded.roll((-sh, -sw), (0, 1)), 9)
        region = region.reshape(m, h, n, w).transpose(1, 2).reshape(m * n, 1, 1, h * w)
        apart = region.transpose(2, 3) != region
        mask = x.new_zeros(apart.shape).masked_fill(apart, float("-inf"))
        added = mask if added is None else added + mask
    if added is not None:
        scores = scores + added

    out = scores.softmax(-1) @ v
    out = out.reshape(B, m, n, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(B, m * h, n * w, C3 // 3)
    if sh or sw:
        out = out.roll((sh, sw), (1, 2))
    return out[:, :H, :W].to(qkv.dtype).contiguous()


def _relative_index(h: int, w: int, device: torch.device) -> Tensor:
    """Row of the bias table for each (query, key) pair of a window: (h*w, h*w)."""
    i, j = torch.arange(h, device=device), torch.arange(w, device=device)
    down = (i[:, None] - i + h - 1) * (2 * w - 1)
    across = j[:, None] - j + w - 1
    return (down[:, None, :, None] + across[:, None, :]).reshape(h * w, h * w)


def _regions(position: Tensor, window: int, shift: int) -> Tensor:
    """Region 0, 1 or 2 of each rolled position: whole windows, then the torn window's two parts."""
    size = position.shape[0]
    return (position >= size - window).long() + (position >= size - shift).long()
