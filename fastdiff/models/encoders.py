"""Encoders of the hierarchical backbones: an image to features and skips.

Every block of an encoder or decoder is called `block(h, emb, text, skip)` on channels_last maps,
where text is (context, mask) or None.

Letters: B batch, C channels, H W pixels, E width of the embedding, S text positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastdiff.nn import (
    Checkpointed,
    FusedSpatialAttention,
    PatchMerging,
    ResBlock,
    SpatialAttention,
    SwinBlock,
    Text,
)

if TYPE_CHECKING:
    from fastdiff.models.hierarchical import HierarchicalConfig


def res_block(
    in_channels: int,
    channels: int,
    config: HierarchicalConfig,
    *,
    skip_channels: int = 0,
    resample: str = "none",
) -> ResBlock:
    """ADM's ResBlock, as a model's configuration has it."""
    return ResBlock(
        in_channels,
        channels,
        config.emb_dim,
        skip_channels=skip_channels,
        resample=resample,
        dropout=config.dropout,
        groups=config.groups,
    )


def swin_block(
    in_channels: int,
    channels: int,
    config: HierarchicalConfig,
    *,
    context_dim: int | None,
    skip_channels: int = 0,
    timed: bool = True,
) -> SwinBlock:
    """A SwinBlock, as a model's configuration has it; not `timed`: without the embedding."""
    return SwinBlock(
        in_channels,
        channels,
        config.emb_dim if timed else None,
        skip_channels=skip_channels,
        window=config.window,
        head_dim=config.head_width(channels),
        context_dim=context_dim,
        ffn=config.ffn,
        dropout=config.dropout,
    )


def spatial_attention(
    channels: int, config: HierarchicalConfig, context_dim: int | None
) -> SpatialAttention:
    """ADM's attention, with the text's keys and values beside where there is text."""
    head_dim, groups = config.head_width(channels), config.groups
    if context_dim is None:
        return SpatialAttention(channels, head_dim=head_dim, groups=groups)
    return FusedSpatialAttention(channels, context_dim, head_dim=head_dim, groups=groups)


def encoder_swin_block(in_channels: int, channels: int, config: HierarchicalConfig) -> SwinBlock:
    """ASCEND's: a SwinBlock alone."""
    return swin_block(in_channels, channels, config, context_dim=config.context_dim)


class ResAttentionBlock(Checkpointed):
    """ADM's: a ResBlock, then self-attention over all pixels.

    Args:
        in_channels: Channels of the input.
        channels: C.
        config: The model's.
    """

    def __init__(self, in_channels: int, channels: int, config: HierarchicalConfig) -> None:
        super().__init__()
        self.res = res_block(in_channels, channels, config)
        self.attn = spatial_attention(channels, config, config.context_dim)

    def forward(self, h: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """h (B, C1, H, W), emb (B, E), to (B, C, H, W)."""
        return self.attn(self.res(h, emb), text)


class ResSwinBlock(Checkpointed):
    """A ResBlock, which takes the time, then a plain SwinBlock in the place of ADM's attention.

    Args:
        in_channels: Channels of the input.
        channels: C.
        config: The model's.
    """

    def __init__(self, in_channels: int, channels: int, config: HierarchicalConfig) -> None:
        super().__init__()
        self.res = res_block(in_channels, channels, config)
        self.swin = swin_block(
            channels, channels, config, context_dim=config.context_dim, timed=False
        )

    def forward(self, h: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """h (B, C1, H, W), emb (B, E), to (B, C, H, W)."""
        return self.swin(self.res(h, emb), emb, text)


class SwinMiddle(nn.Module):
    """ResBlock, SwinBlock, ResBlock at the lowest resolution.

    Args:
        config: The model's.
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        channels = config.level_channels[-1]
        self.res1 = res_block(channels, channels, config)
        self.swin = encoder_swin_block(channels, channels, config)
        self.res2 = res_block(channels, channels, config)

    def forward(self, h: Tensor, emb: Tensor, text: Text | None) -> Tensor:
        """h (B, C, H, W), emb (B, E), to (B, C, H, W)."""
        return self.res2(self.swin(self.res1(h, emb), emb, text), emb)


class AttentionMiddle(nn.Module):
    """ResBlock, self-attention, ResBlock at the lowest resolution, as in ADM.

    Args:
        config: The model's.
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        channels = config.level_channels[-1]
        self.res1 = res_block(channels, channels, config)
        self.attn = spatial_attention(channels, config, config.context_dim)
        self.res2 = res_block(channels, channels, config)

    def forward(self, h: Tensor, emb: Tensor, text: Text | None) -> Tensor:
        """h (B, C, H, W), emb (B, E), to (B, C, H, W)."""
        return self.res2(self.attn(self.res1(h, emb), text), emb)


@dataclass(frozen=True)
class EncoderKind:
    """What tells encoders apart.

    Attributes:
        block: Makes the block of an attention level; at other levels it is a ResBlock.
        middle: What follows the encoder.
    """

    block: Callable[[int, int, HierarchicalConfig], nn.Module]
    middle: type[SwinMiddle] | type[AttentionMiddle]


ENCODERS = {
    "swin": EncoderKind(encoder_swin_block, SwinMiddle),
    "conv": EncoderKind(ResAttentionBlock, AttentionMiddle),
    "res_swin": EncoderKind(ResSwinBlock, AttentionMiddle),
}
SKIPS = ("dense", "reduced")


class Encoder(nn.Module):
    """Conv 3x3, then per level `depth` blocks, and between levels a down-sampling block.

    Args:
        config: The model's.

    Attributes:
        skip_channels: Channels of the skips in the order they are made. Dense: the first
            convolution, every block, every down-sampling. Reduced: the last block of each level.

    Source: section 3.3, B.2, ADM; Table 4 for the variants.
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        width = config.level_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.levels = nn.ModuleList()
        made, last_of_level = [width], []
        attention_block = ENCODERS[config.encoder].block
        for level, channels in enumerate(config.level_channels):
            make = attention_block if level in config.attention_levels else res_block
            blocks = nn.ModuleList()
            for _ in range(config.depth):
                blocks.append(make(width, channels, config))
                width = channels
                made.append(width)
            last_of_level.append(len(made) - 1)
            if level + 1 < len(config.level_channels):
                residual = config.downsample == "residual"
                blocks.append(
                    res_block(width, width, config, resample="down")
                    if residual
                    else PatchMerging(width)
                )
                made.append(width)
            self.levels.append(blocks)
        self.kept = list(range(len(made))) if config.skips == "dense" else last_of_level
        self.skip_channels = [made[index] for index in self.kept]

    def forward(self, x: Tensor, emb: Tensor, text: Text | None) -> list[Tensor]:
        """All skips, the last of them being the encoder's output.

        Args:
            x: (B, in_channels, H, W), channels_last.
            emb: (B, E).
            text: Context (B, S, width) and mask (B, S), or None.

        Returns:
            Tensors (B, C, H', W'), channels_last, as many as `skip_channels`.
        """
        made = [self.conv_in(x)]
        for blocks in self.levels:
            for block in blocks:  # type: ignore[attr-defined]
                made.append(block(made[-1], emb, text))
        return [made[index] for index in self.kept]
