"""The rows: which model is trained on which task, at which size, and what the paper found.

Models keep what a row of the paper changes and are narrow otherwise; `--full` takes the presets'
own sizes for Tables 3 and 4. All rows share data, order, noise, steps and optimiser.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdiff.experiments.tasks import TASKS, Task
from fastdiff.models import MODELS, ASCENDConfig, IUViTConfig, UNetConfig
from fastdiff.models.presets import PRESETS
from fastdiff.training.config import (
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    Recipe,
    SampleConfig,
    TextConfig,
    TrainConfig,
    to_dict,
)

Config = IUViTConfig | ASCENDConfig | UNetConfig
TEXT_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The budget of every row.

    Args:
        side: Pixels, in Tables 3 and 4 and for Figure 10.
        steps: Optimiser steps, in Tables 3 and 4.
        figure1_steps: Optimiser steps of each of Figure 1's cells.
        caption_steps: Optimiser steps for Figure 10: captions are learnt after pictures.
        batch_size: Images of one.
        pictures: Of the training set.
        samples: Pictures drawn for FID and agreement.
        held_out: Pictures of the validation loss.
        real: Pictures of FID's reference.
        extractor_steps: Of its feature extractor.
        sampler_steps: DDIM steps.
        guidance: Of labels and captions.
        seeds: Runs of each row.
        sides: Of Figure 1.
        figure1_samples: Pictures drawn for each of its cells.
        snapshots: Steps of Figure 6, the last of which ends its training.
        snapshot_side: Its pixels.
        width: Factor on the widths of the figures' models.
        presets: Tables 3 and 4 with the presets' own sizes.
        lr: Peak rate.
        precision: As in TrainConfig.
        threads: CPU threads, None = torch's choice.
    """

    side: int = 16
    steps: int = 2000
    figure1_steps: int = 500
    caption_steps: int = 2000
    batch_size: int = 32
    pictures: int = 12_000
    samples: int = 1024
    held_out: int = 300
    real: int = 4096
    extractor_steps: int = 300
    sampler_steps: int = 25
    guidance: float = 2.0
    seeds: tuple[int, ...] = (0,)
    sides: tuple[int, ...] = (16, 32, 64)
    figure1_samples: int = 256
    snapshots: tuple[int, ...] = (30, 100, 300, 1000)
    snapshot_side: int = 32
    width: int = 1
    presets: bool = False
    lr: float = 2.2e-3
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = 1


DEFAULT = Scale()
FULL = Scale(
    side=32,
    steps=20_000,
    figure1_steps=20_000,
    caption_steps=40_000,
    batch_size=128,
    pictures=50_000,
    samples=10_000,
    held_out=1000,
    real=20_000,
    extractor_steps=3000,
    sampler_steps=50,
    seeds=(0, 1, 2),
    figure1_samples=2000,
    snapshots=(300, 1000, 3000, 10_000, 30_000),
    snapshot_side=64,
    width=3,
    presets=True,
    lr=2e-4,
    precision="bf16",
    threads=None,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run.

    Args:
        experiment: "table3" | "table4" | "figure1" | "figure6" | "figure10".
        name: Within it.
        title: For people.
        model: The backbone.
        task: What it is asked for.
        seed: Of weights, data order and noise.
        paper: The paper's FID, where it has one.
        steps: Optimiser steps.
        snapshots: Steps at which pictures are drawn; the rate then stays constant.
        samples: Pictures drawn for its numbers.
        patch: Side of the patches that the patch effect is measured on, in pixels.
    """

    experiment: str
    name: str
    title: str
    model: Config
    task: Task = "none"
    seed: int = 0
    paper: float | None = None
    steps: int
    snapshots: tuple[int, ...] = ()
    samples: int
    patch: int = 4

    @property
    def id(self) -> str:
        return f"{self.experiment}/{self.name}-seed{self.seed}"

    @property
    def side(self) -> int:
        side = self.model.image_size
        return side[0] if isinstance(side, tuple) else side


def iuvit(side: int, patch: int, width: int = 1, *, text: bool = False) -> IUViTConfig:
    """A narrow IU-ViT; its initial deviations are those that suit so few channels."""
    return IUViTConfig(
        image_size=side,
        patch_size=patch,
        dim=128 * width,
        layers=5,
        head_dim=32,
        init_std=0.07,
        position_std=1.0,
        context_dim=TEXT_WIDTH if text else None,
    )


def ascend(side: int, width: int = 1, *, text: bool = False) -> ASCENDConfig:
    """A narrow ASCEND of three levels, attention from 16 pixels on, as in the paper."""
    attended = _attended(side)
    return ASCENDConfig(
        image_size=side,
        channels=16 * width,
        depth=1,
        # One level of attention less takes parameters away; a wider one gives them back.
        multipliers=(1, 2 if len(attended) == 2 else 2.5, 4.5 if text else 4),
        attention_resolutions=attended,
        head_dim=8,
        groups=8,
        window=min(8, side // 4),
        context_dim=TEXT_WIDTH if text else None,
    )


def _attended(side: int) -> tuple[int, ...]:
    """Of the lower two levels those of 16 pixels or fewer."""
    return tuple(level for level in (side // 2, side // 4) if level <= 16)


def unet(side: int, width: int = 1, *, text: bool = False) -> UNetConfig:
    """ADM's U-Net with about as many parameters as `ascend`."""
    return UNetConfig(
        image_size=side,
        channels=16 * width,
        depth=1,
        multipliers=(1, 2, 5.5 if text else 5),
        attention_resolutions=_attended(side),
        head_dim=8,
        groups=8,
        context_dim=TEXT_WIDTH if text else None,
    )


def rows(scale: Scale) -> list[Row]:
    """All rows, in the order in which they are run: the tables first."""
    found = []
    for seed in scale.seeds:
        for part in (_table3, _table4, _figure10, _figure6, _figure1):
            found += [dataclasses.replace(row, seed=seed) for row in part(scale)]
    return found


def _table3(scale: Scale) -> list[Row]:
    full = PRESETS["iuvit_cifar10"].config if scale.presets else iuvit(scale.side, 2)
    assert isinstance(full, IUViTConfig)
    changed: dict[str, tuple[dict[str, Any], str, float]] = {
        "uvit": ({"ffn": "mlp", "head": "linear_first", "time_mlp": False}, "U-ViT", 3.11),
        "rearrange": ({"ffn": "mlp"}, "+ Rearrange-first", 2.94),
        "dwconv": ({"head": "linear_first"}, "+ DWConv-FFN", 2.60),
        "iuvit": ({}, "both (IU-ViT)", 2.56),
    }
    return [
        Row(
            experiment="table3",
            name=name,
            title=title,
            model=dataclasses.replace(full, **change),
            paper=paper,
            steps=scale.steps,
            samples=scale.samples,
            patch=full.patch_size,
        )
        for name, (change, title, paper) in changed.items()
    ]


def _table4(scale: Scale) -> list[Row]:
    full = PRESETS["ascend_cifar10"].config if scale.presets else ascend(scale.side)
    assert isinstance(full, ASCENDConfig)
    merging = {"downsample": "patch_merging", "upsample": "patch_expanding"}
    changed: dict[str, tuple[dict[str, Any], str, float]] = {
        "ascend": ({}, "ASCEND", 2.98),
        "patchmerge": (merging, "PatchMerging and PatchExpanding", 12.81),
        "reduced_skips": ({"skips": "reduced"}, "fewer skips", 6.52),
        "swin_swin": ({"decoder": "swin"}, "Swin encoder, Swin decoder", 4.62),
        "conv_swin": (
            {"encoder": "conv", "decoder": "swin"},
            "Conv encoder, Swin decoder",
            5.87,
        ),
    }
    return [
        Row(
            experiment="table4",
            name=name,
            title=title,
            model=dataclasses.replace(full, **change),
            paper=paper,
            steps=scale.steps,
            samples=scale.samples,
        )
        for name, (change, title, paper) in changed.items()
    ]


def _figure10(scale: Scale) -> list[Row]:
    model = iuvit(scale.side, scale.side // 8, scale.width, text=True)
    titles = {"separate": "separate self- and cross-attention", "fused": 'fused "self"-attention'}
    return [
        Row(
            experiment="figure10",
            name=name,
            title=title,
            model=dataclasses.replace(model, text_attention=name),
            task="caption",
            steps=scale.caption_steps,
            samples=scale.samples,
        )
        for name, title in titles.items()
    ]


BACKBONES = ("unet", "iuvit", "ascend")
TITLES = {"unet": "U-Net", "iuvit": "IU-ViT", "ascend": "ASCEND"}


def _backbone(name: str, side: int, scale: Scale, task: Task) -> Config:
    """One of the three; IU-ViT with 64 tokens at every resolution, as in the paper (256 there)."""
    text = task in ("caption", "pair")
    model: Config
    if name == "iuvit":
        model = iuvit(side, side // 8, scale.width, text=text)
    else:
        model = (unet if name == "unet" else ascend)(side, scale.width, text=text)
    return dataclasses.replace(model, num_classes=4) if task == "label" else model


def _figure6(scale: Scale) -> list[Row]:
    side = scale.snapshot_side
    return [
        Row(
            experiment="figure6",
            name=name,
            title=TITLES[name],
            model=_backbone(name, side, scale, "none"),
            steps=scale.snapshots[-1],
            snapshots=scale.snapshots,
            samples=scale.figure1_samples,
            patch=side // 8,
        )
        for name in BACKBONES
    ]


def _figure1(scale: Scale) -> list[Row]:
    return [
        Row(
            experiment="figure1",
            name=f"{name}-{side}-{task}",
            title=TITLES[name],
            model=_backbone(name, side, scale, task),
            task=task,
            steps=scale.figure1_steps,
            samples=scale.figure1_samples,
            patch=side // 8,
        )
        for side in scale.sides
        for task in TASKS
        for name in BACKBONES
    ]


def recipe_of(row: Row, scale: Scale, out: Path) -> Recipe:
    """What the trainer is given.

    Args:
        row: The run.
        scale: The budget.
        out: The grid's folder; data in `data/`, the run in `runs/`.
    """
    text = row.task in ("caption", "pair")
    data = out / "data"
    name = f"{row.task}{row.side}"
    return Recipe(
        model=row.model,
        text=TextConfig(encoder="small", width=TEXT_WIDTH, layers=1, max_length=24)
        if text
        else TextConfig(),
        data=DataConfig(
            path=str(data / f"{name}-train"),
            held_out=str(data / f"{name}-held-out"),
            held_out_images=scale.held_out,
            workers=0,
        ),
        diffusion=DiffusionConfig(schedule="linear", prediction="v"),
        optim=OptimConfig(
            lr=scale.lr,
            betas=(0.9, 0.99),
            warmup=min(50, row.steps // 10),
            decay="constant" if row.snapshots else "cosine",
        ),
        train=TrainConfig(
            out=str(out / "runs" / row.id.replace("/", "-")),
            batch_size=scale.batch_size,
            max_steps=row.steps,
            seed=row.seed,
            precision=scale.precision,
            zero=0,
            ema_decay=0.99 if row.steps < 5000 else 0.9995,
            ema_warmup=True,
            log_every=25,
            sample_every=0,
            checkpoint_every=100,
            threads=scale.threads,
        ),
        sample=SampleConfig(steps=scale.sampler_steps, guidance=scale.guidance),
    )


def settings_of(row: Row, scale: Scale) -> str:
    """All that a row's numbers depend on beside the code, as 16 hex digits."""
    values = to_dict(recipe_of(row, scale, Path("-")))
    measured = [scale.pictures, scale.real, scale.extractor_steps]
    told = json.dumps([values, measured, row.task, row.snapshots, row.samples, row.patch])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def parameters(model: Config) -> int:
    """Of a backbone, without building its weights."""
    import torch

    kind = next(m for m in MODELS.values() if m.Config is type(model))
    with torch.device("meta"):
        return sum(p.numel() for p in kind(model).parameters())
