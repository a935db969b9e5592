"""ASCEND at 256x256, 562.6M parameters (Table 6, third column; Figures 15, 19 and 20).

Command:   deepspeed train/unconditional.py --config ascend_256 --data.path church.zip
Hardware:  the paper does not state it; its IU-ViT runs used 4 A100 40 GB.
Hours:     507.0 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    not published (the paper shows samples); Euler-Maruyama with 1000 steps.

For LSUN; CelebA and CUB are --data.transform celeba256 and cub256. From Table 6: cosine schedule,
batch 256, AdamW at 1e-4 with betas (0.99, 0.99), EMA 0.9999.
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
    model=PRESETS["ascend_256"].config,
    data=DataConfig(transform="lsun256", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="cosine"),
    optim=OptimConfig(lr=1e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, clip=None),
    train=TrainConfig(
        out="runs/ascend_256", batch_size=256, micro_batch=8, max_steps=500_000, sample_every=0
    ),
)
