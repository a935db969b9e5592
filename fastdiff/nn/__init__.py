"""Layers that hold parameters and call the fused ops; the backbones are built from them."""

from __future__ import annotations

from fastdiff.nn.attention import MHCA, MHSA, SpatialAttention, set_attention
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
from fastdiff.nn.norms import GroupNormSiLU, LayerNorm
from fastdiff.nn.resblock import ResBlock
from fastdiff.nn.swin import SwinBlock, SwinLayer, WindowAttention

__all__ = [
    "FFN",
    "HEADS",
    "MHCA",
    "MHSA",
    "MLP",
    "DWConvFFN",
    "GroupNormSiLU",
    "LabelEmbedding",
    "LayerNorm",
    "LinearFirstHead",
    "PatchEmbed",
    "PositionEmbedding",
    "RearrangeFirstHead",
    "ResBlock",
    "SinusoidEmbedding",
    "SpatialAttention",
    "SwinBlock",
    "SwinLayer",
    "TextCondition",
    "TimeEmbedding",
    "WindowAttention",
    "as_timesteps",
    "set_attention",
    "timestep_embedding",
]
