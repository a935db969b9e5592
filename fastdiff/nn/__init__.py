"""Layers that hold parameters and call the fused ops; the backbones are built from them."""

from __future__ import annotations

from fastdiff.nn.attention import (
    MHCA,
    MHSA,
    FusedAttention,
    FusedSpatialAttention,
    ProjectedText,
    SpatialAttention,
    Text,
    set_attention,
)
from fastdiff.nn.checkpointed import Checkpointed
from fastdiff.nn.embedding import (
    LabelEmbedding,
    PatchEmbed,
    PositionEmbedding,
    SinusoidEmbedding,
    TextCondition,
    TimeEmbedding,
    as_timesteps,
    timestep_embedding,
)
from fastdiff.nn.feedforward import FFN, MLP, DWConvFFN
from fastdiff.nn.heads import HEADS, LinearFirstHead, RearrangeFirstHead
from fastdiff.nn.layout import channels_last_, contiguous_
from fastdiff.nn.norms import GroupNormSiLU, LayerNorm
from fastdiff.nn.resample import PatchExpanding, PatchMerging
from fastdiff.nn.resblock import ResBlock
from fastdiff.nn.skip import SkipConnection, SkipLinear
from fastdiff.nn.swin import PlainSwinLayer, SwinBlock, SwinLayer, WindowAttention

__all__ = [
    "FFN",
    "HEADS",
    "MHCA",
    "MHSA",
    "MLP",
    "Checkpointed",
    "DWConvFFN",
    "FusedAttention",
    "FusedSpatialAttention",
    "GroupNormSiLU",
    "LabelEmbedding",
    "LayerNorm",
    "LinearFirstHead",
    "PatchEmbed",
    "PatchExpanding",
    "PatchMerging",
    "PlainSwinLayer",
    "PositionEmbedding",
    "ProjectedText",
    "RearrangeFirstHead",
    "ResBlock",
    "SinusoidEmbedding",
    "SkipConnection",
    "SkipLinear",
    "SpatialAttention",
    "SwinBlock",
    "SwinLayer",
    "Text",
    "TextCondition",
    "TimeEmbedding",
    "WindowAttention",
    "as_timesteps",
    "channels_last_",
    "contiguous_",
    "set_attention",
    "timestep_embedding",
]
