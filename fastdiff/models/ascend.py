"""ASCEND: asymmetric encoder-decoder, Swin in, convolutions out (section 3.3, Figure 3, B.2)."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.models.hierarchical import HierarchicalBackbone, HierarchicalConfig


@dataclass(frozen=True, kw_only=True)
class ASCENDConfig(HierarchicalConfig):
    """Configuration of ASCEND.

    The paper's "~590M" does not pin its structure. The reading taken keeps a Swin encoder and a
    convolutional decoder apart and gives 591.6M for Table 6's text-to-image column: attention
    levels of the encoder are SwinBlocks alone, ADM's attention stays in the decoder, time and text
    enter the Swin layers by adaptive LayerNorm. `encoder="res_swin"` with `decoder_text` is another
    reading, of 593.5M.

    Args:
        image_size: Pixels of a side, or (H, W); it places the attention levels. Other sizes run
            as long as every level halves evenly.
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; None = `in_channels`.
        learn_variance: Predict the variance too: as many channels again, behind the prediction.
        channels: Width of the first level.
        depth: Blocks a level in the encoder; the decoder has one more.
        multipliers: Width of each level over `channels`.
        attention_resolutions: Sides, in pixels of a square `image_size`, at which there is
            attention.
        head_dim: Width of an attention head.
        heads: Number of heads at every level in place of `head_dim`, None = by it.
        dropout: Rate in ResBlocks (ADM's place) and on the branches of Swin layers.
        groups: Groups of every GroupNorm.
        context_dim: Width of the text encoder, None without text.
        text_norm: LayerNorm of the text features before anything reads them.
        num_classes: Number of labels, None without labels.
        encoder: Block of the attention levels: "swin", a SwinBlock alone; "conv", ADM's ResBlock
            and attention (Table 4); "res_swin", ResBlock and SwinBlock.
        decoder: Block of the attention levels: "conv", ADM's output block; "swin", a SwinBlock
            (Table 4).
        decoder_text: Text enters the decoder's attention, too.
        downsample: "residual" | "patch_merging" (Table 4).
        upsample: "residual" | "patch_expanding" (Table 4).
        skips: "dense", of every block, | "reduced", one a level (Table 4).
        window: Window side; the shift is half of it. A reading: the paper does not state it.
        ffn: "dwconv" | "mlp", of the Swin layers.
    """

    encoder: str = "swin"
    decoder: str = "conv"
    decoder_text: bool = False
    downsample: str = "residual"
    upsample: str = "residual"
    skips: str = "dense"
    window: int = 8
    ffn: str = "dwconv"


class ASCEND(HierarchicalBackbone):
    """ASymmetric ENcoder Decoder.

    A Swin encoder that attends to the text and a light convolutional decoder, joined by dense
    skips. Pooled text and time, a half each, make the embedding that every block takes.

    Source: section 3.3; ADM for the decoder and the re-sampling; PAPER.md for the reading.
    """

    Config = ASCENDConfig
