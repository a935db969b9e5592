"""IU-ViT on CelebA at 64x64, 45M parameters (Table 5, second column).

Command:   deepspeed train/unconditional.py --config iuvit_celeba64 --data.path celeba.zip
Hardware:  4 A100 40 GB in the paper (B.1).
Hours:     3.7 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    FID 1.57, Euler-Maruyama with 1000 steps (Table 2).

From Table 5: linear schedule, batch 128, 500K steps, AdamW at 2e-4 with betas (0.99, 0.99), EMA
0.9999.
Readings: weight decay 0.03, no clipping, flips (U-ViT's); time is drawn from the 1000 steps.
"""

from __future__ import annotations

from fastdiff.models import PRESETS
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
)

RECIPE = Recipe(
    model=PRESETS["iuvit_celeba64"].config,
    data=DataConfig(transform="celeba64", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="linear"),
    optim=OptimConfig(lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, clip=None),
    train=TrainConfig(
        out="runs/iuvit_celeba64", batch_size=128, micro_batch=32, max_steps=500_000, sample_every=0
    ),
)
