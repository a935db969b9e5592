"""IU-ViT on LSUN Church at 256x256, 527M parameters (Table 5, fourth column; Figure 15).

Command:   deepspeed train/unconditional.py --config iuvit_church256 --data.path church.zip
Hardware:  4 A100 40 GB in the paper (B.1).
Hours:     18.3 on 4 A100 40 GB, as `fastdiff plan` estimates; not measured.
Number:    not published (the paper shows samples); Euler-Maruyama with 1000 steps.

From Table 5: linear schedule, batch 256, 150K steps (stopped early), AdamW at 1e-4 with betas
(0.99, 0.99), EMA 0.9999.
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
    model=PRESETS["iuvit_church256"].config,
    data=DataConfig(transform="lsun256", flip=True, workers=8),
    diffusion=DiffusionConfig(schedule="linear"),
    optim=OptimConfig(lr=1e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, clip=None),
    train=TrainConfig(
        out="runs/iuvit_church256",
        batch_size=256,
        micro_batch=32,
        max_steps=150_000,
        sample_every=0,
    ),
)
