"""Small models of each family, and random weights for them."""

from __future__ import annotations

import torch
from torch import nn

from fastdiff.models import ASCEND, ASCENDConfig, IUViT, IUViTConfig, UNet, UNetConfig


def make_iuvit(**fields) -> IUViT:
    return IUViT(
        IUViTConfig(**{"image_size": 16, "patch_size": 4, "dim": 64, "layers": 3, **fields})
    )


LEVELS = {
    "image_size": 16,
    "channels": 32,
    "depth": 1,
    "multipliers": (1, 2),
    "attention_resolutions": (8,),
    "head_dim": 32,
    "groups": 8,
}


def make_ascend(**fields) -> ASCEND:
    return ASCEND(ASCENDConfig(**{**LEVELS, "window": 4, **fields}))


def make_unet(**fields) -> UNet:
    return UNet(UNetConfig(**{**LEVELS, "text_norm": False, **fields}))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values: zero-initialised layers hide mistakes behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
    return model
