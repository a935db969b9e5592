"""Decoders of the hierarchical backbones: features and skips to a dense prediction's features.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastdiff.nn import ResBlock, SpatialAttention

if TYPE_CHECKING:
    from fastdiff.models.ascend import ASCENDConfig


class OutputBlock(nn.Module):
    """ADM's output block: ResBlock on cat(h, skip), then attention and up-sampling where asked.

    Args:
        in_channels: Channels of h.
        skip_channels: Channels of the skip.
        channels: C.
        config: The model's.
        attention: Self-attention over all pixels after the ResBlock.
        up: Residual up-sampling at the end.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        channels: int,
        config: ASCENDConfig,
        *,
        attention: bool,
        up: bool,
    ) -> None:
        super().__init__()
        dropout, groups = config.dropout, config.groups
        self.res = ResBlock(
            in_channels,
            channels,
            config.emb_dim,
            skip_channels=skip_channels,
            dropout=dropout,
            groups=groups,
        )
        self.attn: nn.Module = nn.Identity()
        if attention:
            self.attn = SpatialAttention(channels, head_dim=config.head_dim, groups=groups)
        self.up: ResBlock | None = None
        if up:
            self.up = ResBlock(
                channels, channels, config.emb_dim, resample="up", dropout=dropout, groups=groups
            )

    def forward(self, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        """h (B, C1, H, W), skip (B, C2, H, W), emb (B, E), to (B, C, H, W) or twice H and W."""
        h = self.attn(self.res(h, emb, skip=skip))
        return h if self.up is None else self.up(h, emb)


class ConvDecoder(nn.Module):
    """ASCEND's decoder: ADM's output blocks, `depth` + 1 a level, with dense skips and no text.

    Args:
        in_channels: Channels of the middle's output.
        skip_channels: Channels of the skips, in the order the encoder made them.
        config: The model's.

    Source: B.2 (which refers to ADM's output block); Figure 3.
    """

    def __init__(self, in_channels: int, skip_channels: list[int], config: ASCENDConfig) -> None:
        super().__init__()
        left, width = list(skip_channels), in_channels
        self.blocks = nn.ModuleList()
        for level in reversed(range(len(config.level_channels))):
            for index in range(config.depth + 1):
                self.blocks.append(
                    OutputBlock(
                        width,
                        left.pop(),
                        config.level_channels[level],
                        config,
                        attention=level in config.attention_levels,
                        up=level > 0 and index == config.depth,
                    )
                )
                width = config.level_channels[level]
        assert not left, "the decoder takes every skip"

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """h (B, C, H', W'), skips as the encoder made them, emb (B, E), to (B, channels, H, W)."""
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            h = block(h, skip, emb)
        return h
