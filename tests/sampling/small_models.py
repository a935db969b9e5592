"""Models that draw in milliseconds."""

from __future__ import annotations

import torch
from torch import nn

from fastdiff.diffusion import DiffusionProcess, schedule
from fastdiff.models import ASCEND, ASCENDConfig, IUViT, IUViTConfig, UNet, UNetConfig

LEVELS = {
    "image_size": 16,
    "channels": 32,
    "depth": 1,
    "multipliers": (1, 2),
    "attention_resolutions": (8,),
    "head_dim": 32,
    "groups": 8,
}
WIDTH = 24


def iuvit(**fields) -> IUViT:
    defaults = {"image_size": 8, "patch_size": 4, "dim": 32, "layers": 3, "head_dim": 16}
    return randomized(IUViT(IUViTConfig(**{**defaults, **fields})))


def ascend(**fields) -> ASCEND:
    return randomized(ASCEND(ASCENDConfig(**{**LEVELS, "window": 4, **fields})))


def unet(**fields) -> UNet:
    return randomized(UNet(UNetConfig(**{**LEVELS, "text_norm": True, **fields})))


def randomized(model: nn.Module) -> nn.Module:
    """Random values in every parameter: what starts at zero would hide mistakes behind it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator) * fan_in**-0.5)
    return model.eval()


def text(batch: int, positions: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and mask of texts of different lengths; the longest ends before the last place."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(batch, positions, WIDTH, generator=generator)
    length = torch.arange(batch) % (positions - 7) + 1
    return context, torch.arange(positions) < length.unsqueeze(1)


def process(prediction: str = "eps", steps: int = 1000) -> DiffusionProcess:
    return DiffusionProcess(schedule("linear", steps), prediction)
