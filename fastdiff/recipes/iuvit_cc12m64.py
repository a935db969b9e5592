"""IU-ViT, text to image on CC12M at 64x64, 307M parameters (Table 5, last column; Figure 16).

Command:   deepspeed train/t2i.py --config iuvit_cc12m64 --data.path /data/cc12m
Hardware:  4 A100 40 GB in the paper (B.1).
Hours:     not published, and not measured here yet.
Number:    not published for this model (the paper shows samples); DDIM with 250 steps.

From Table 5: widths, linear schedule, 1000 steps, batch 1024, 150K steps (stopped early), AdamW at
1e-4 with betas (0.99, 0.99), EMA 0.9999. Readings: weight decay 0, warm-up 1,000, clipping at 1.0,
guidance 3.0, captions dropped at 0.1 (the authors' own text-to-image code).
"""

from __future__ import annotations

from fastdiff.models import PRESETS
from fastdiff.recipes.ascend_t2i_128 import PROMPTS
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

RECIPE = Recipe(
    model=PRESETS["iuvit_cc12m64"].config,
    text=TextConfig(encoder="t5", name="t5-11b", max_length=256),
    data=DataConfig(workers=8),
    diffusion=DiffusionConfig(schedule="linear"),
    optim=OptimConfig(lr=1e-4, betas=(0.99, 0.99), warmup=1000, clip=1.0),
    train=TrainConfig(out="runs/iuvit_cc12m64", batch_size=1024, micro_batch=64, max_steps=150_000),
    sample=SampleConfig(prompts=PROMPTS, steps=250, guidance=3.0),
)
