"""ASCEND, text to image at 128x128, 591.6M parameters (Table 6, last column; Figure 1).

Command:   deepspeed train/t2i.py --config ascend_t2i_128 --data.path /data/shards
Hardware:  the paper does not state it; its IU-ViT runs used 4 A100 40 GB.
Hours:     not published, and not measured here yet.
Number:    not published for this model (the paper shows samples); DDIM with 50 steps.

From Table 6: widths, cosine schedule, 1000 steps, batch 512, AdamW at 1.2e-4 with betas
(0.9, 0.9999), EMA 0.9999. Readings, as the authors' own text-to-image code has them: weight decay
0, warm-up 1,000, clipping at 1.0, guidance 3.0, captions dropped at 0.1.
"""

from __future__ import annotations

from fastdiff.models import PRESETS
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    SampleConfig,
    TextConfig,
    TrainConfig,
)

PROMPTS = (
    "a photo of a red fox in the snow",
    "a bowl of oranges on a wooden table",
    "a small wooden boat on a calm lake at sunset",
    "a portrait of a woman in the style of an oil painting",
    "a steam train crossing a bridge in the mountains",
    "a cat wearing a blue scarf",
    "a lighthouse on a cliff in a storm",
    "a yellow school bus in front of a brick house",
)

RECIPE = Recipe(
    model=PRESETS["ascend_t2i_128"].config,
    text=TextConfig(encoder="t5", name="t5-11b", max_length=256),
    data=DataConfig(workers=8),
    diffusion=DiffusionConfig(schedule="cosine"),
    optim=OptimConfig(lr=1.2e-4, betas=(0.9, 0.9999), warmup=1000, clip=1.0),
    train=TrainConfig(out="runs/ascend_t2i_128", batch_size=512, micro_batch=16, max_steps=500_000),
    sample=SampleConfig(prompts=PROMPTS, steps=50, guidance=3.0),
)
