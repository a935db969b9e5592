"""The U-Net of ADM, and of the authors' own text-to-image code: what the paper compares with."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.models.hierarchical import HierarchicalBackbone, HierarchicalConfig


@dataclass(frozen=True, kw_only=True)
class UNetConfig(HierarchicalConfig):
    """Configuration of the U-Net.

    Args:
        image_size: Pixels of a side, or (H, W); it places the attention levels. Other sizes run
            as long as every level halves evenly.
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; None = `in_channels`.
        learn_variance: Predict the variance too: as many channels again, behind the prediction.
        channels: `model_channels`; the embedding is four times as wide.
        depth: Blocks a level in the encoder (`num_res_blocks`); the decoder has one more.
        multipliers: Width of each level over `channels` (`channel_mult`), fractions allowed.
        attention_resolutions: Sides, in pixels of a square `image_size`, at which there is
            attention.
        head_dim: Width of an attention head (`num_head_channels`).
        heads: Number of heads at every level in place of `head_dim` (`num_heads`), None = by it.
        dropout: Rate in ResBlocks.
        groups: Groups of every GroupNorm.
        context_dim: Width of the text encoder, None without text. Every attention then takes keys
            and values of the text beside those of the pixels.
        text_norm: LayerNorm of the text features before anything reads them.
        num_classes: Number of labels, None without labels.
    """

    text_norm: bool = True


class UNet(HierarchicalBackbone):
    """ADM's U-Net: ResBlocks and attention on both sides, scale-shift norms, residual re-sampling.

    Source: Diffusion Models Beat GANs (Dhariwal & Nichol 2021), with `resblock_updown`,
    `use_scale_shift_norm` and `num_head_channels=64`; GLIDE for the text.
    """

    Config = UNetConfig
