"""A recipe that trains in seconds."""

from __future__ import annotations

from pathlib import Path

from fastdiff.data import scenes
from fastdiff.models import ASCENDConfig, IUViTConfig
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

IUVIT = IUViTConfig(image_size=16, patch_size=4, dim=32, layers=3, head_dim=16, context_dim=32)
ASCEND = ASCENDConfig(
    image_size=16,
    channels=16,
    depth=1,
    multipliers=(1, 2),
    attention_resolutions=(8,),
    head_dim=16,
    groups=8,
    window=4,
    dropout=0.1,
    context_dim=32,
)


def tiny_recipe(folder: Path, *, model=IUVIT, **train) -> Recipe:
    """A run in `folder` over scenes at 16 pixels; keywords are fields of TrainConfig."""
    data = folder / "data"
    if not data.exists():
        scenes.write_folder(data, n=96, resolution=16)
    defaults = {
        "out": str(folder / "run"),
        "batch_size": 8,
        "max_steps": 8,
        "precision": "fp32",
        "ema_warmup": True,
        "log_every": 1,
        "sample_every": 0,
        "checkpoint_every": 4,
        "threads": 1,
    }
    return Recipe(
        model=model,
        text=TextConfig(encoder="small", width=32, layers=1, max_length=24),
        data=DataConfig(path=str(data), workers=0),
        diffusion=DiffusionConfig(prediction="v"),
        optim=OptimConfig(lr=1e-3, warmup=2),
        train=TrainConfig(**{**defaults, **train}),
        sample=SampleConfig(prompts=scenes.TRAIN_CAPTIONS[:4], steps=2, guidance=2.0),
    )
