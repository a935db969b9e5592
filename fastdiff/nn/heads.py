"""Prediction heads of the ViT backbones (Figure 4).

Letters: B batch, P prefix tokens, h w grid of patches, p patch size, D width, C channels.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fastdiff.nn.norms import LayerNorm


def to_image(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h w, p p C) to (B, C, h p, w p), channels_last: one copy, a pixel's channels together."""
    h, w = grid
    x = rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=patch, q=patch)
    return x.permute(0, 3, 1, 2)


class RearrangeFirstHead(nn.Module):
    """LayerNorm, rearrange D -> (D/p^2, H, W), conv 3x3 to the output channels.

    Args:
        dim: D, divisible by p^2.
        patch_size: p.
        out_channels: C.

    Raises:
        ValueError: p^2 does not divide D.

    Source: section 3.2, Figure 4 right.
    """

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        if dim % patch_size**2:
            raise ValueError(
                f"RearrangeFirstHead: patch_size^2={patch_size**2} does not divide dim={dim}"
            )
        self.patch_size = patch_size
        self.norm = LayerNorm(dim)
        self.conv = nn.Conv2d(dim // patch_size**2, out_channels, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
        """(B, P + h w, D) to (B, C, h p, w p)."""
        x, _ = self.norm(x)  # of all tokens: a slice of them would be copied first
        return self.conv(to_image(x[:, prefix:], grid, self.patch_size))


class LinearFirstHead(nn.Module):
    """U-ViT's head: LayerNorm, Linear D -> p p C, rearrange, conv 3x3 C -> C.

    Args:
        dim: D.
        patch_size: p.
        out_channels: C.

    Source: Figure 4 left.
    """

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = LayerNorm(dim)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
        """(B, P + h w, D) to (B, C, h p, w p)."""
        x, _ = self.norm(x)
        return self.conv(to_image(self.linear(x)[:, prefix:], grid, self.patch_size))


HEADS = {"rearrange_first": RearrangeFirstHead, "linear_first": LinearFirstHead}
