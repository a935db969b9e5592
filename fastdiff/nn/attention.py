"""Global self-attention, cross-attention to text, and ADM's attention over pixels.

Letters: B batch, L tokens, S text positions, D width, N heads, d head width, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastdiff.nn.norms import GroupNormSiLU


def _heads(name: str, dim: int, head_dim: int) -> int:
    if dim % head_dim:
        raise ValueError(f"{name}: head_dim={head_dim} does not divide dim={dim}")
    return dim // head_dim


class MHSA(nn.Module):
    """Multi-head self-attention over all tokens.

    Args:
        dim: D.
        head_dim: d.
        qkv_bias: Bias of the q, k, v projection (off in U-ViT and IU-ViT).

    Raises:
        ValueError: `head_dim` does not divide `dim`.
    """

    def __init__(self, dim: int, *, head_dim: int = 64, qkv_bias: bool = False) -> None:
        super().__init__()
        self.heads = _heads("MHSA", dim, head_dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)"))


class MHCA(nn.Module):
    """Multi-head cross-attention: queries from the image, keys and values from the text.

    Args:
        dim: D.
        context_dim: Width of the text, taken as it is.
        head_dim: d.

    Raises:
        ValueError: `head_dim` does not divide `dim`.

    Source: section 3.2 (self- and cross-attention separate), Figure 8.
    """

    def __init__(self, dim: int, context_dim: int, *, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = _heads("MHCA", dim, head_dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), context (B, S, width), mask (B, S) bool with no row all False: (B, L, D)."""
        q = rearrange(self.q(x), "b l (n d) -> b n l d", n=self.heads)
        k, v = rearrange(self.kv(context), "b s (two n d) -> two b n s d", two=2, n=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.proj(rearrange(out, "b n l d -> b l (n d)"))


class SpatialAttention(nn.Module):
    """ADM's attention block: GroupNorm, self-attention over all pixels, zero-initialised output.

    Args:
        channels: C.
        head_dim: d.
        groups: Groups of the norm.

    Raises:
        ValueError: `head_dim` does not divide `channels`.

    Source: ADM's `AttentionBlock` with `num_head_channels=64`.
    """

    def __init__(self, channels: int, *, head_dim: int = 64, groups: int = 32) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(channels, groups=groups, activation="identity")
        self.heads = _heads("SpatialAttention", channels, head_dim)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W), channels_last in and out."""
        _, _, height, width = x.shape
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            self.qkv(tokens), "b l (three n d) -> three b n l d", three=3, n=self.heads
        )
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b n l d -> b l (n d)")
        return x + rearrange(self.proj(out), "b (h w) c -> b c h w", h=height, w=width)
