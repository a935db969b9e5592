"""ASCEND on CIFAR-10, 69.1M parameters (Table 6, first column; Figure 17).

Command:   deepspeed train/unconditional.py --config ascend_cifar10 --data.path cifar10.tar.gz
Hardware:  the paper does not state it; its IU-ViT runs used 4 A100 40 GB.
Hours:     3.8 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    FID 2.98, Euler-Maruyama with 1000 steps.

From Table 6: cosine schedule, dropout 0.1, batch 128, AdamW at 1e-4 with betas (0.99, 0.999), EMA
0.9999.
Readings: 500K steps (the paper gives none), weight decay 0.03, warm-up and no clipping as for
IU-ViT, flips; time is drawn from the 1000 steps.
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
    model=PRESETS["ascend_cifar10"].config,
    data=DataConfig(transform="cifar10", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="cosine"),
    optim=OptimConfig(lr=1e-4, betas=(0.99, 0.999), weight_decay=0.03, warmup=2500, clip=None),
    train=TrainConfig(
        out="runs/ascend_cifar10", batch_size=128, micro_batch=32, max_steps=500_000, sample_every=0
    ),
)
