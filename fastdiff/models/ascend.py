"""ASCEND: asymmetric encoder-decoder, Swin in, convolutions out (section 3.3, Figure 3, B.2).

Letters: B batch, C channels, H W pixels, E width of the embedding, S text positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.models.backbone import Backbone, check_choice, check_image, check_positive
from fastdiff.models.decoders import ConvDecoder
from fastdiff.models.encoders import SwinEncoder
from fastdiff.nn import (
    FFN,
    GroupNormSiLU,
    LabelEmbedding,
    ResBlock,
    SwinBlock,
    TextCondition,
    TimeEmbedding,
    as_timesteps,
)


@dataclass(frozen=True, kw_only=True)
class ASCENDConfig:
    """Configuration of ASCEND.

    The paper's "~590M" does not pin its structure. The reading taken keeps a Swin encoder and a
    convolutional decoder apart and gives 591.6M for Table 6's text-to-image column: attention
    levels of the encoder are SwinBlocks alone, ADM's attention stays in the decoder, time and text
    enter the Swin layers by adaptive LayerNorm.

    Args:
        image_size: Pixels of a side, or (H, W); it places the attention levels. Other sizes run
            as long as every level halves evenly.
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; None = `in_channels`.
        channels: Width of the first level.
        depth: Blocks a level in the encoder; the decoder has one more.
        multipliers: Width of each level over `channels`.
        attention_resolutions: Sides, in pixels of a square `image_size`, at which there is
            attention.
        head_dim: Width of an attention head.
        window: Window side; the shift is half of it. A reading: the paper does not state it.
        ffn: "dwconv" | "mlp", of the Swin layers.
        dropout: Rate in ResBlocks (ADM's place) and on the branches of Swin layers.
        groups: Groups of every GroupNorm.
        context_dim: Width of the text encoder, None without text.
        num_classes: Number of labels, None without labels.
    """

    image_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 128
    depth: int = 3
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_dim: int = 64
    window: int = 8
    ffn: str = "dwconv"
    dropout: float = 0.0
    groups: int = 32
    context_dim: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        size = self.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        object.__setattr__(self, "image_size", sides)
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        check_choice("ASCENDConfig", "ffn", self.ffn, FFN)
        check_positive(
            "ASCENDConfig",
            self,
            ("in_channels", "channels", "depth", "head_dim", "window", "groups"),
        )
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"ASCENDConfig: image_size={sides}, expected one or two sides >= 1")
        for side in sides:
            if side % self.multiple:
                raise ValueError(
                    f"ASCENDConfig: image side {side} is not a multiple of {self.multiple}, which "
                    f"{len(self.multipliers)} levels need"
                )
        if self.channels % 4:
            raise ValueError(f"ASCENDConfig: channels={self.channels} is not a multiple of 4")
        resolutions = [min(sides) >> level for level in range(len(self.multipliers))]
        for resolution in self.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"ASCENDConfig: attention_resolutions has {resolution}, the levels have "
                    f"{resolutions}"
                )
        for channels in self.level_channels:
            if channels % self.groups:
                raise ValueError(
                    f"ASCENDConfig: groups={self.groups} does not divide a level's {channels}"
                )
        for level in (*self.attention_levels, len(self.multipliers) - 1):
            if self.level_channels[level] % self.head_dim:
                raise ValueError(
                    f"ASCENDConfig: head_dim={self.head_dim} does not divide the "
                    f"{self.level_channels[level]} channels of an attention level"
                )

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels at which there is attention, the first level being 0."""
        assert isinstance(self.image_size, tuple)
        side = min(self.image_size)
        levels = range(len(self.multipliers))
        return tuple(level for level in levels if side >> level in self.attention_resolutions)

    @property
    def emb_dim(self) -> int:
        """E, four times the first level's width."""
        return 4 * self.channels


class Middle(nn.Module):
    """ResBlock, SwinBlock, ResBlock at the lowest resolution.

    Args:
        config: The model's.
    """

    def __init__(self, config: ASCENDConfig) -> None:
        super().__init__()
        channels, emb_dim, dropout = config.level_channels[-1], config.emb_dim, config.dropout
        self.res1 = ResBlock(channels, channels, emb_dim, dropout=dropout, groups=config.groups)
        self.swin = SwinBlock(
            channels,
            channels,
            emb_dim,
            window=config.window,
            head_dim=config.head_dim,
            context_dim=config.context_dim,
            ffn=config.ffn,
            dropout=dropout,
        )
        self.res2 = ResBlock(channels, channels, emb_dim, dropout=dropout, groups=config.groups)

    def forward(
        self, h: Tensor, emb: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        """h (B, C, H, W), emb (B, E), context (B, S, width), mask (B, S): (B, C, H, W)."""
        return self.res2(self.swin(self.res1(h, emb), emb, context, context_mask), emb)


class TimeTextEmbedding(nn.Module):
    """Time and pooled text, half of the embedding each.

    The pooled text goes to E by a Linear; then both go to E/2 by a Linear and are concatenated.

    Args:
        emb_dim: E.
        context_dim: Width of the pooled text.

    Source: B.1 ("concatenated with timestep embedding"), as the authors' text-to-image code does.
    """

    def __init__(self, emb_dim: int, context_dim: int) -> None:
        super().__init__()
        self.text = nn.Linear(context_dim, emb_dim)
        self.time_half = nn.Linear(emb_dim, emb_dim // 2)
        self.text_half = nn.Linear(emb_dim, emb_dim // 2)

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:
        """time (B, E), pooled (B, width), to (B, E)."""
        return torch.cat([self.time_half(time), self.text_half(self.text(pooled))], dim=1)


class ASCEND(Backbone):
    """ASymmetric ENcoder Decoder.

    A Swin encoder that attends to the text and a light convolutional decoder, joined by dense
    skips. Pooled text and time, a half each, make the embedding that every block takes.

    Source: section 3.3; ADM for the decoder and the re-sampling; PAPER.md for the reading.
    """

    Config = ASCENDConfig

    def __init__(self, config: ASCENDConfig) -> None:
        super().__init__()
        self.config = config
        emb_dim = config.emb_dim

        self.time = TimeEmbedding(config.channels, emb_dim)
        self.label = None
        if config.num_classes is not None:
            self.label = LabelEmbedding(config.num_classes, emb_dim)
        self.text, self.time_text = None, None
        if config.context_dim is not None:
            self.text = TextCondition(config.context_dim)
            self.time_text = TimeTextEmbedding(emb_dim, config.context_dim)

        self.encoder = SwinEncoder(config)
        self.middle = Middle(config)
        self.decoder = ConvDecoder(config.level_channels[-1], self.encoder.skip_channels, config)
        self.norm_out = GroupNormSiLU(config.level_channels[0], groups=config.groups)
        self.conv_out = nn.Conv2d(
            config.level_channels[0], config.out_channels or config.in_channels, 3, padding=1
        )
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self,
        x: Tensor,
        t: int | float | Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Predict the process's target (the noise, in the paper) from a noised image.

        Args:
            x: (B, C, H, W), image in [-1, 1] plus noise.
            t: Time in steps 0..999; int, float, or tensor of shape (), (1,) or (B,).
            context: (B, S, context_dim) text features, None = null condition.
            context_mask: (B, S) bool, True = valid; a row of False = null condition.
            pooled: (B, context_dim), None = mean of the valid positions.
            y: (B,) int64 labels; `num_classes` or None = no label.

        Returns:
            (B, out_channels, H, W), dtype of x.

        Raises:
            ValueError: A shape does not fit the configuration; both numbers are in the message.
        """
        check_image("ASCEND", x, self.config.in_channels, self.config.multiple)
        batch = x.shape[0]
        self.check_conditions(batch, context, context_mask, pooled, y)

        emb = self.time(as_timesteps(t, batch, x.device))
        mask = None
        if self.text is not None and self.time_text is not None:
            context, mask, pooled = self.text(context, context_mask, pooled, batch)
            emb = self.time_text(emb, pooled)
        if self.label is not None:
            emb = emb + self.label(y, batch)

        h = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        skips = self.encoder(h, emb, context, mask)
        h = self.middle(skips[-1], emb, context, mask)
        h = self.decoder(h, skips, emb)
        return self.conv_out(self.norm_out(h)).to(x.dtype)
