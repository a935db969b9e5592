"""Real data: both families learn to write the digit they are asked for, within 1,500 steps."""

from __future__ import annotations

import pytest

from fastdiff.data import digits
from fastdiff.models import ASCENDConfig, IUViTConfig
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    TrainConfig,
)
from fastdiff.training.loop import load_run, train

MODELS = {
    "iuvit": IUViTConfig(
        image_size=8, patch_size=2, dim=64, layers=3, head_dim=16, context_dim=64, init_std=0.1
    ),
    "ascend": ASCENDConfig(
        image_size=8,
        channels=32,
        depth=1,
        multipliers=(1, 2),
        attention_resolutions=(4,),
        head_dim=16,
        groups=8,
        window=4,
        context_dim=64,
    ),
}
STEPS = {"iuvit": 1000, "ascend": 250}


@pytest.mark.parametrize("family", [pytest.param("iuvit", marks=pytest.mark.slow), "ascend"])
def test_digits(family, tmp_path):
    assert STEPS[family] <= 1500
    recipe = Recipe(
        model=MODELS[family],
        text=TextConfig(encoder="small", width=64, layers=1, max_length=8),
        data=DataConfig(path=str(digits.write_folder(tmp_path / "digits")), workers=0),
        diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
        train=TrainConfig(
            out=str(tmp_path / "run"),
            batch_size=64,
            max_steps=STEPS[family],
            precision="fp32",
            ema_decay=0.99,
            ema_warmup=True,
            sample_every=0,
            checkpoint_every=1000,
        ),
    )
    learner, _ = load_run(train(recipe))
    captions = [caption for caption in digits.CAPTIONS for _ in range(20)]
    pictures = learner.draw(captions, range(200), steps=25, guidance=2.0, batch=200)
    judge = digits.DigitJudge()
    agreement = judge.agreement(pictures, captions)
    hidden = judge.agreement(
        learner.draw(captions, range(200), steps=25, guidance=0.0, batch=200), captions
    )
    print(f"{family}: {agreement:.1%} of 200 agree, {hidden:.1%} with the captions hidden")
    assert agreement >= 0.90
    assert hidden <= 0.25
