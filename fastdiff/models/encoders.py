"""Encoders of the hierarchical backbones: an image to features and skips.

Letters: B batch, C channels, H W pixels, E width of the embedding, S text positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastdiff.nn import ResBlock, SwinBlock

if TYPE_CHECKING:
    from fastdiff.models.ascend import ASCENDConfig


class SwinEncoder(nn.Module):
    """ASCEND's encoder (section 3.3, B.2).

    Conv 3x3, then per level `depth` blocks: SwinBlocks at the attention resolutions, ADM ResBlocks
    at the others, and between levels ADM's residual down-sampling block.

    Args:
        config: The model's.

    Attributes:
        skip_channels: Channels of the skips in the order they are made: the first convolution,
            every block, every down-sampling.
    """

    def __init__(self, config: ASCENDConfig) -> None:
        super().__init__()
        width = config.channels
        emb_dim = config.emb_dim
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.levels = nn.ModuleList()
        self.skip_channels = [width]
        for level, channels in enumerate(config.level_channels):
            blocks = nn.ModuleList()
            for _ in range(config.depth):
                if level in config.attention_levels:
                    blocks.append(
                        SwinBlock(
                            width,
                            channels,
                            emb_dim,
                            window=config.window,
                            head_dim=config.head_dim,
                            context_dim=config.context_dim,
                            ffn=config.ffn,
                            dropout=config.dropout,
                        )
                    )
                else:
                    blocks.append(
                        ResBlock(
                            width, channels, emb_dim, dropout=config.dropout, groups=config.groups
                        )
                    )
                width = channels
                self.skip_channels.append(width)
            if level + 1 < len(config.level_channels):
                blocks.append(
                    ResBlock(
                        width,
                        width,
                        emb_dim,
                        resample="down",
                        dropout=config.dropout,
                        groups=config.groups,
                    )
                )
                self.skip_channels.append(width)
            self.levels.append(blocks)

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> list[Tensor]:
        """All skips, the last of them being the encoder's output.

        Args:
            x: (B, in_channels, H, W), channels_last.
            emb: (B, E).
            context: (B, S, width) or None.
            context_mask: (B, S) or None.

        Returns:
            Tensors (B, C, H', W'), channels_last, as many as `skip_channels`.
        """
        skips = [self.conv_in(x)]
        for blocks in self.levels:
            for block in blocks:  # type: ignore[attr-defined]
                if isinstance(block, SwinBlock):
                    skips.append(block(skips[-1], emb, context, context_mask))
                else:
                    skips.append(block(skips[-1], emb))
        return skips
