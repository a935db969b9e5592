"""IU-ViT on CelebA at 128x128, 442M parameters (Table 5, third column; Figure 13).

Command:   deepspeed train/unconditional.py --config iuvit_celeba128 --data.path celeba.zip
Hardware:  4 A100 40 GB in the paper (B.1).
Hours:     46.9 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    not published (the paper shows samples); Euler-Maruyama with 1000 steps.

From Table 5: linear schedule, batch 256, 450K steps, AdamW at 2e-4 with betas (0.99, 0.99), EMA
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
    model=PRESETS["iuvit_celeba128"].config,
    data=DataConfig(transform="celeba128", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="linear"),
    optim=OptimConfig(lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, clip=None),
    train=TrainConfig(
        out="runs/iuvit_celeba128",
        batch_size=256,
        micro_batch=32,
        max_steps=450_000,
        sample_every=0,
    ),
)
