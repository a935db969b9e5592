"""IU-ViT on CIFAR-10, 45M parameters (Table 5, first column).

Command:   deepspeed train/unconditional.py --config iuvit_cifar10 --data.path cifar10.tar.gz
Hardware:  4 A100 40 GB in the paper (B.1).
Hours:     3.7 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    FID 2.56, Euler-Maruyama with 1000 steps (Table 3).

From Table 5: linear schedule, batch 128, 500K steps, AdamW at 2e-4 with betas (0.99, 0.999), EMA
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
    model=PRESETS["iuvit_cifar10"].config,
    data=DataConfig(transform="cifar10", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="linear"),
    optim=OptimConfig(lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, warmup=2500, clip=None),
    train=TrainConfig(
        out="runs/iuvit_cifar10", batch_size=128, micro_batch=32, max_steps=500_000, sample_every=0
    ),
)
