"""Decoders of the hierarchical backbones: features and skips to a dense prediction's features.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastdiff.models.encoders import res_block, spatial_attention, swin_block
from fastdiff.nn import Checkpointed, PatchExpanding, Text

if TYPE_CHECKING:
    from fastdiff.models.hierarchical import HierarchicalConfig


class OutputBlock(Checkpointed):
    """ADM's output block: ResBlock on cat(h, skip), then attention and up-sampling where asked.

    Args:
        in_channels: Channels of h.
        skip_channels: Channels of the skip, 0 = none.
        channels: C.
        config: The model's.
        attention: Self-attention over all pixels after the ResBlock.
        up: Up-sampling at the end.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        channels: int,
        config: HierarchicalConfig,
        *,
        attention: bool,
        up: bool,
    ) -> None:
        super().__init__()
        self.res = res_block(in_channels, channels, config, skip_channels=skip_channels)
        self.attn: nn.Module | None = None
        if attention:
            self.attn = spatial_attention(channels, config, config.decoder_context_dim)
        self.up = upsampling(channels, config) if up else None

    def forward(
        self, h: Tensor, emb: Tensor, text: Text | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """h (B, C1, H, W), emb (B, E), skip (B, C2, H, W): (B, C, H, W), or twice H and W."""
        h = self.res(h, emb, skip=skip)
        if self.attn is not None:
            h = self.attn(h, text)
        return h if self.up is None else self.up(h, emb)


class SwinOutputBlock(Checkpointed):
    """SwinBlock on cat(h, skip), then up-sampling where asked (Table 4).

    Args:
        in_channels: Channels of h.
        skip_channels: Channels of the skip, 0 = none.
        channels: C.
        config: The model's.
        up: Up-sampling at the end.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        channels: int,
        config: HierarchicalConfig,
        *,
        up: bool,
    ) -> None:
        super().__init__()
        self.swin = swin_block(
            in_channels,
            channels,
            config,
            skip_channels=skip_channels,
            context_dim=config.decoder_context_dim,
        )
        self.up = upsampling(channels, config) if up else None

    def forward(
        self, h: Tensor, emb: Tensor, text: Text | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """h (B, C1, H, W), emb (B, E), skip (B, C2, H, W): (B, C, H, W), or twice H and W."""
        h = self.swin(h, emb, text, skip)
        return h if self.up is None else self.up(h, emb)


def upsampling(channels: int, config: HierarchicalConfig) -> nn.Module:
    """What doubles a map: ADM's residual block, or Swin-Unet's patch expanding."""
    if config.upsample == "residual":
        return res_block(channels, channels, config, resample="up")
    return PatchExpanding(channels)


def swin_output_block(
    in_channels: int,
    skip_channels: int,
    channels: int,
    config: HierarchicalConfig,
    *,
    attention: bool,
    up: bool,
) -> nn.Module:
    """A SwinBlock at the attention levels; at the others ADM's, as in ASCEND's encoder."""
    if attention:
        return SwinOutputBlock(in_channels, skip_channels, channels, config, up=up)
    return OutputBlock(in_channels, skip_channels, channels, config, attention=False, up=up)


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "conv": OutputBlock,
    "swin": swin_output_block,
}


class Decoder(nn.Module):
    """`depth` + 1 output blocks a level, the lowest level first.

    Args:
        skip_channels: Channels of the skips, in the order the encoder made them.
        config: The model's.

    Source: B.2 (which refers to ADM's output block); Figure 3; Table 4 for the variants.
    """

    def __init__(self, skip_channels: list[int], config: HierarchicalConfig) -> None:
        super().__init__()
        left, width = list(skip_channels), config.level_channels[-1]
        dense = config.skips == "dense"
        make = DECODERS[config.decoder]
        self.blocks = nn.ModuleList()
        self.reads_skip: list[bool] = []
        for level in reversed(range(len(config.level_channels))):
            for index in range(config.depth + 1):
                self.reads_skip.append(dense or index == 0)
                self.blocks.append(
                    make(
                        width,
                        left.pop() if self.reads_skip[-1] else 0,
                        config.level_channels[level],
                        config,
                        attention=level in config.attention_levels,
                        up=level > 0 and index == config.depth,
                    )
                )
                width = config.level_channels[level]
        assert not left, "the decoder takes every skip"

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor, text: Text | None) -> Tensor:
        """h (B, C, H', W'), skips as the encoder made them, emb (B, E), to (B, channels, H, W)."""
        left = list(skips)
        for block, reads in zip(self.blocks, self.reads_skip, strict=True):
            h = block(h, emb, text, left.pop() if reads else None)
        return h
