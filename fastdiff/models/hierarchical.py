"""What ASCEND and the U-Net share: levels, embedding, encoder, middle, decoder, output.

Letters: B batch, C channels, H W pixels, E width of the embedding, S text positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.models.backbone import (
    Backbone,
    BackboneConfig,
    check_choice,
    check_positive,
)
from fastdiff.models.decoders import DECODERS, Decoder
from fastdiff.models.encoders import ENCODERS, SKIPS, Encoder
from fastdiff.nn import (
    FFN,
    GroupNormSiLU,
    LabelEmbedding,
    Text,
    TextCondition,
    TimeEmbedding,
)


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(BackboneConfig):
    """Configuration of a backbone with levels; `ASCENDConfig` and `UNetConfig` tell the fields."""

    channels: int = 128
    depth: int = 3
    multipliers: tuple[float, ...] = (1, 2, 2, 2)
    attention_resolutions: tuple[int, ...] = (16, 8)
    head_dim: int = 64
    heads: int | None = None
    dropout: float = 0.0
    groups: int = 32
    text_norm: bool = False
    # What only ASCEND lets one choose stands here as the U-Net has it.
    encoder = "conv"
    decoder = "conv"
    downsample = "residual"
    upsample = "residual"
    skips = "dense"
    decoder_text = True
    window = 8
    ffn = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        whole = tuple(int(m) if m == int(m) else m for m in self.multipliers)
        object.__setattr__(self, "multipliers", whole)
        object.__setattr__(self, "attention_resolutions", tuple(self.attention_resolutions))
        check_choice(name, "ffn", self.ffn, FFN)
        check_choice(name, "encoder", self.encoder, ENCODERS)
        check_choice(name, "decoder", self.decoder, DECODERS)
        check_choice(name, "skips", self.skips, SKIPS)
        check_choice(name, "downsample", self.downsample, ("residual", "patch_merging"))
        check_choice(name, "upsample", self.upsample, ("residual", "patch_expanding"))
        check_positive(name, self, ("channels", "depth", "head_dim", "window", "groups"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name}: dropout={self.dropout}, expected a rate in [0, 1)")
        for side in self.sides:
            if side % self.multiple:
                raise ValueError(
                    f"{name}: image side {side} is not a multiple of {self.multiple}, which "
                    f"{len(self.multipliers)} levels need"
                )
        if self.channels % 4:
            raise ValueError(f"{name}: channels={self.channels} is not a multiple of 4")
        resolutions = [min(self.sides) >> level for level in range(len(self.multipliers))]
        for resolution in self.attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"{name}: attention_resolutions has {resolution}, the levels have {resolutions}"
                )
        for channels in self.level_channels:
            if channels < 1 or channels % self.groups:
                raise ValueError(
                    f"{name}: groups={self.groups} does not divide a level's {channels}"
                )
        if self.heads is not None:
            check_positive(name, self, ("heads",))
        what, least = ("heads", self.heads) if self.heads else ("head_dim", self.head_dim)
        for level in (*self.attention_levels, len(self.multipliers) - 1):
            if self.level_channels[level] % least:
                raise ValueError(
                    f"{name}: {what}={least} does not divide the "
                    f"{self.level_channels[level]} channels of an attention level"
                )

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(int(self.channels * multiplier) for multiplier in self.multipliers)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """Levels at which there is attention, the first level being 0."""
        side, levels = min(self.sides), range(len(self.multipliers))
        return tuple(level for level in levels if side >> level in self.attention_resolutions)

    def head_width(self, channels: int) -> int:
        """Width of an attention head among so many channels."""
        return channels // self.heads if self.heads else self.head_dim

    @property
    def emb_dim(self) -> int:
        """E, four times `channels`."""
        return 4 * self.channels

    @property
    def decoder_context_dim(self) -> int | None:
        """Width of the text in the decoder, None where it has none."""
        return self.context_dim if self.decoder_text else None


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


class HierarchicalBackbone(Backbone):
    """Encoder, middle and decoder over levels of halving resolution, joined by skips.

    Pooled text and time, a half each, make the embedding that every block takes; labels add to it.
    """

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__(config)
        emb_dim = config.emb_dim

        self.time = TimeEmbedding(config.channels, emb_dim)
        self.label = None
        if config.num_classes is not None:
            self.label = LabelEmbedding(config.num_classes, emb_dim)
        self.text, self.time_text = None, None
        if config.context_dim is not None:
            self.text = TextCondition(config.context_dim, norm=config.text_norm)
            self.time_text = TimeTextEmbedding(emb_dim, config.context_dim)

        self.encoder = Encoder(config)
        self.middle = ENCODERS[config.encoder].middle(config)
        self.decoder = Decoder(self.encoder.skip_channels, config)
        self.norm_out = GroupNormSiLU(config.level_channels[0], groups=config.groups)
        self.conv_out = nn.Conv2d(config.level_channels[0], config.predicted_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def denoise(self, x: Tensor, emb: Tensor, label: Tensor | None, text: Text | None) -> Tensor:
        """x (B, C, H, W), emb and label (B, E), to (B, out_channels, H, W)."""
        emb = emb if label is None else emb + label
        h = x.contiguous(memory_format=torch.channels_last)
        skips = self.encoder(h, emb, text)
        h = self.middle(skips[-1], emb, text)
        h = self.decoder(h, skips, emb, text)
        return self.conv_out(self.norm_out(h))
