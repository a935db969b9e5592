"""Swin transformer layers conditioned on time and text.

Letters: B batch, C channels, H W pixels, S text positions, E width of the embedding, N heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.nn.attention import MHCA, Text, _heads
from fastdiff.nn.checkpointed import Checkpointed
from fastdiff.nn.feedforward import FFN
from fastdiff.nn.norms import LayerNorm
from fastdiff.nn.skip import SkipLinear


class WindowAttention(nn.Module):
    """(Shifted-)window attention with a learned relative position bias.

    Args:
        dim: C.
        window: Window side, in pixels of the map.
        shift: Cyclic shift, in pixels; none takes place on an axis the window covers.
        head_dim: d.

    Raises:
        ValueError: `head_dim` does not divide `dim`.

    Source: Swin Transformer; no public code of ASCEND states its window, 8 is the reading.
    """

    def __init__(self, dim: int, *, window: int = 8, shift: int = 0, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = _heads("WindowAttention", dim, head_dim)
        self.window, self.shift = window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, self.heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C), any H and W."""
        out = ops.window_attention(
            self.qkv(x),
            self.bias_table,
            heads=self.heads,
            window_size=(self.window, self.window),
            shift=(self.shift, self.shift),
        )
        return self.proj(out)


class SwinLayer(nn.Module):
    """One transformer layer: window attention, cross-attention where there is text, FFN.

    Time and pooled text enter by adaptive LayerNorm: six vectors, shift, scale and gate for the
    attention and for the FFN, from SiLU and one Linear of the embedding. That Linear starts at
    zero, so a layer starts as the identity (*reading*: the paper does not say how they enter).

    Args:
        dim: C.
        emb_dim: E.
        window: Window side.
        shift: Cyclic shift.
        head_dim: d.
        context_dim: Width of the text, None without text.
        ffn: "dwconv" | "mlp".
        dropout: Rate on the outputs of attention and FFN (Swin's `drop`).
    """

    def __init__(
        self,
        dim: int,
        emb_dim: int,
        *,
        window: int = 8,
        shift: int = 0,
        head_dim: int = 64,
        context_dim: int | None = None,
        ffn: str = "dwconv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(emb_dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm1 = LayerNorm(dim, affine=False)
        self.attn = WindowAttention(dim, window=window, shift=shift, head_dim=head_dim)
        self.cross: CrossAttention | None = None
        if context_dim is not None:
            self.cross = CrossAttention(dim, context_dim, head_dim=head_dim)
        self.norm2 = LayerNorm(dim, affine=False)
        self.ffn = FFN[ffn](dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        text: Text | None = None,
    ) -> Tensor:
        """x (B, H, W, C), emb (B, E), text = context (B, S, width), mask (B, S): (B, H, W, C)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(emb)).chunk(6, dim=1)
        h, _ = self.norm1(x, scale=scale1, shift=shift1)
        h = self.dropout(self.attn(h))
        gate: Tensor | None = gate1
        if self.cross is not None:
            h, x = self.cross(h, x, gate, text)
            gate = None  # the branch of the cross-attention has none
        h, x = self.norm2(h, residual=x, gate=gate, scale=scale2, shift=shift2)
        h = self.dropout(self.ffn(h.flatten(1, 2), x.shape[1:3]).view_as(x))
        return torch.addcmul(x, gate2[:, None, None, :], h)


class PlainSwinLayer(nn.Module):
    """A transformer layer as Swin has it: window attention, cross-attention to the text, FFN.

    Time does not enter: the ResBlock before the layer's block has it.

    Args:
        dim: C.
        window: Window side.
        shift: Cyclic shift.
        head_dim: d.
        context_dim: Width of the text, None without text.
        ffn: "dwconv" | "mlp".
        dropout: Rate on the outputs of attention and FFN (Swin's `drop`).
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 8,
        shift: int = 0,
        head_dim: int = 64,
        context_dim: int | None = None,
        ffn: str = "dwconv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, window=window, shift=shift, head_dim=head_dim)
        self.cross: CrossAttention | None = None
        if context_dim is not None:
            self.cross = CrossAttention(dim, context_dim, head_dim=head_dim)
        self.norm2 = LayerNorm(dim)
        self.ffn = FFN[ffn](dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """x (B, H, W, C), text = context (B, S, width), mask (B, S): (B, H, W, C)."""
        h, _ = self.norm1(x)
        h = self.dropout(self.attn(h))
        if self.cross is not None:
            h, x = self.cross(h, x, None, text)
        h, x = self.norm2(h, residual=x)
        return x + self.dropout(self.ffn(h.flatten(1, 2), x.shape[1:3]).view_as(x))


class CrossAttention(nn.Module):
    """LayerNorm and cross-attention to the text over a map of pixels.

    Args:
        dim: C.
        context_dim: Width of the text.
        head_dim: d.
    """

    def __init__(self, dim: int, context_dim: int, *, head_dim: int = 64) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.attn = MHCA(dim, context_dim, head_dim=head_dim)

    def forward(
        self,
        branch: Tensor,
        residual: Tensor,
        gate: Tensor | None,
        text: Text | None,
    ) -> tuple[Tensor, Tensor]:
        """Adds the branch before it to the residual; returns its own branch and the residual.

        branch, residual (B, H, W, C), gate (B, C), text = context (B, S, width), mask (B, S).
        """
        if text is None:
            raise ValueError("CrossAttention: text is needed, got None")
        h, residual = self.norm(branch, residual=residual, gate=gate)
        return self.attn(h.flatten(1, 2), *text).view_as(h), residual


class SwinBlock(Checkpointed):
    """Two transformer layers, the first with plain, the second with shifted windows (B.2).

    Args:
        in_channels: Channels of the input; a Linear changes them to `channels` where they differ.
        channels: C.
        emb_dim: E; None for layers without the embedding, behind a ResBlock that has it. The first
            of those alone then attends to the text.
        skip_channels: Channels of a second input, read as if concatenated to the first.
        window: Window side; the shift is half of it.
        head_dim: d.
        context_dim: Width of the text, None without text.
        ffn: "dwconv" | "mlp".
        dropout: Rate on the outputs of attention and FFN.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        emb_dim: int | None,
        *,
        skip_channels: int = 0,
        window: int = 8,
        head_dim: int = 64,
        context_dim: int | None = None,
        ffn: str = "dwconv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = (
            nn.Identity()
            if in_channels == channels and not skip_channels
            else SkipLinear(in_channels + skip_channels, channels)
        )
        self.layers = nn.ModuleList()
        for shift in (0, window // 2):
            fields: dict[str, Any] = {
                "window": window,
                "shift": shift,
                "head_dim": head_dim,
                "context_dim": context_dim,
                "ffn": ffn,
                "dropout": dropout,
            }
            if emb_dim is not None:
                self.layers.append(SwinLayer(channels, emb_dim, **fields))
            else:
                fields["context_dim"] = None if shift else context_dim
                self.layers.append(PlainSwinLayer(channels, **fields))

    def forward(
        self, x: Tensor, emb: Tensor, text: Text | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """One block, without a copy on the way.

        Args:
            x: (B, C1, H, W), channels_last, any H and W.
            emb: (B, E).
            text: Context (B, S, width) and mask (B, S), None without text.
            skip: (B, C2, H, W) read behind x's channels as if concatenated.

        Returns:
            (B, C, H, W), channels_last.
        """
        h = x.permute(0, 2, 3, 1)
        h = self.width(h) if skip is None else self.width(h, skip.permute(0, 2, 3, 1))
        for layer in self.layers:
            h = layer(h, emb, text)
        return h.permute(0, 3, 1, 2)
