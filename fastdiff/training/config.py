"""What a training run is made of, as typed data; every value exists once.

A recipe (`fastdiff.recipes`) is one `Recipe`; the command line overrides any of its fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fastdiff.data.cache import DEFAULT_FOLDER
from fastdiff.data.readers import DEFAULT_CACHE_GIB
from fastdiff.models import MODELS, ASCENDConfig, IUViTConfig, UNetConfig
from fastdiff.models.backbone import nearest


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images and captions come from.

    Args:
        path: For training without captions what `fastdiff stats` reads. Else a folder with
            `metadata.jsonl`, or folder of tar shards as img2dataset writes them, or
            an address of such shards (`s3://`, `gs://`, `https://.../{00000..01242}.tar`).
            None: the embedded captioned scenes, made on first use.
        embeddings: Folder or address of the shards' text features as `fastdiff embed-text` stores
            them; no text encoder then runs in training.
        workers: Loader processes on each rank; 0 loads in the training process.
        transform: Crop by name (`fastdiff.data.transforms`), for training without captions; None
            takes the largest square in the centre.
        flip: Mirror every other image at random. Off where captions speak of left and right.
        bad_limit: Largest share of samples that may be unreadable before the run stops; and of
            shards.
        window: Shards whose samples are mixed with each other; two windows are on disk at a time.
        cache: Local folder for remote shards, shared by the processes of a machine.
        cache_gib: Its largest size.
        held_out: As `path`, of pictures that are not in it, for `train.validate_every`. Captions
            are encoded as they are read, also where those of `path` have stored features.
        held_out_images: So many of them are used, spread evenly.
    """

    path: str | None = None
    embeddings: str | None = None
    transform: str | None = None
    workers: int = 2
    flip: bool = False
    bad_limit: float = 0.01
    window: int = 16
    cache: str = DEFAULT_FOLDER
    cache_gib: float = DEFAULT_CACHE_GIB
    held_out: str | None = None
    held_out_images: int = 256


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder.

    Args:
        encoder: "t5": a pretrained T5 by transformers, frozen. "small": a small T5 encoder with a
            word-level vocabulary of the training captions, trained jointly; needs no download.
        name: Name or folder of the T5.
        revision: Revision of a T5 that is fetched by name.
        dtype: Of the T5; float16 overflows in T5 and is not offered.
        max_length: Tokens of a caption, the rest is cut.
        width: Width of the small encoder (that of a T5 is its own).
        layers: Layers of the small encoder.
        paper_mode: Pad to `max_length` without a mask, as the authors' code did.
    """

    encoder: Literal["t5", "small"] = "t5"
    name: str = "t5-11b"
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_length: int = 256
    width: int = 128
    layers: int = 2
    paper_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion process.

    Args:
        schedule: "linear" | "cosine".
        prediction: What the network predicts; "eps" in the paper.
        steps: T.
    """

    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Literal["eps", "x0", "v"] = "eps"
    steps: int = 1000


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, functions of the optimiser step.

    Args:
        lr: Peak rate.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's, on every parameter.
        warmup: Steps of linear warm-up.
        decay: "constant", or "cosine": to zero at `max_steps`.
        clip: Largest gradient norm, None = no clipping.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 1000
    decay: Literal["constant", "cosine"] = "constant"
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Args:
        out: Run folder; the same command resumes from what it finds there.
        batch_size: Images of one optimiser step, over all devices.
        micro_batch: Images of one forward pass on one device; None = all of a device's share.
        max_steps: Optimiser steps.
        seed: Of weights, data order, noise, time steps, flips and condition dropout.
        precision: "fp32"; or "bf16" or "fp16": autocast in one process and at `zero` 0, weights of
            that type with float32 masters under ZeRO. fp16 scales its loss.
        zero: DeepSpeed's ZeRO stage, under a launcher only. 0: whole copies of weights and
            optimiser on each rank, by DistributedDataParallel.
        offload: The optimiser's state and step on the CPU, ZeRO 1 to 3.
        compile: The backbone by torch.compile.
        checkpointing: Compute the backbone's activations again in the backward, block by block:
            a fifth to a third of the memory, at the price of a second forward.
        ema_decay: Per optimiser step.
        ema_warmup: Decay min(ema_decay, (1 + n) / (10 + n)), for short runs.
        condition_dropout: Share of captions replaced by the null condition.
        min_snr: Weigh the loss by min(SNR, this), 5 in Hang et al. 2023; None: as the paper does.
        log_every: Steps between points in the log.
        sample_every: Steps between sample grids, 0 = none.
        validate_every: Steps between losses of `data.held_out` on fixed noise at 8 times, of the
            averaged weights and of those trained, 0 = none. Rank 0 computes them.
        fid_every: Steps between FIDs of the averaged weights (`sample.fid_statistics`), 0 = none.
        wandb: Log to Weights & Biases too (needs `pip install wandb`).
        checkpoint_every: Steps between checkpoints.
        background: Write them beside the training, from a copy in host memory.
        keep: Newest checkpoints kept.
        keep_every: Checkpoints of steps divisible by it are kept for good; None: no others.
        threads: CPU threads of a rank, None = torch's choice.
    """

    out: str = "runs/run"
    batch_size: int = 256
    micro_batch: int | None = None
    max_steps: int = 500_000
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero: Literal[0, 1, 2, 3] = 1
    offload: bool = False
    compile: bool = False
    checkpointing: bool = False
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    condition_dropout: float = 0.1
    min_snr: float | None = None
    log_every: int = 50
    sample_every: int = 5000
    validate_every: int = 0
    fid_every: int = 0
    wandb: bool = False
    checkpoint_every: int = 1000
    background: bool = True
    keep: int = 2
    keep_every: int | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample grids, during training and after it.

    Args:
        prompts: Captions of the grid.
        steps: DDIM steps.
        guidance: Scale of classifier-free guidance, 1 = none.
        fid_statistics: What `fastdiff stats` wrote of the data, for `train.fid_every`.
        fid_extractor: The TorchScript file that they were made with.
        fid_images: Pictures of such an FID. Captions are the first of `data.held_out`, else of
            `data.path`.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 50
    guidance: float = 3.0
    fid_statistics: str | None = None
    fid_extractor: str | None = None
    fid_images: int = 2048


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment: all that a run is made of.

    Args:
        model: The backbone's configuration; its class says which backbone.
        text: The text encoder.
        data: Images and captions.
        diffusion: The process.
        optim: Optimiser and schedule.
        train: The loop.
        sample: Sample grids.
    """

    model: IUViTConfig | ASCENDConfig | UNetConfig
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        sides = self.model.image_size
        if not isinstance(sides, tuple) or sides[0] != sides[1]:
            raise ValueError(f"Recipe: model.image_size={sides}, training takes square images")
        if self.text.encoder == "small" and self.model.context_dim != self.text.width:
            raise ValueError(
                f"Recipe: model.context_dim={self.model.context_dim} differs from "
                f"text.width={self.text.width}; set both alike"
            )
        if self.model.context_dim is None and self.sample.prompts:
            raise ValueError("Recipe: sample.prompts are given, but the model takes no text")
        if self.model.context_dim is not None and self.data.transform is not None:
            raise ValueError(
                f"Recipe: data.transform={self.data.transform!r} is for training without captions"
            )
        train = self.train
        for name in ("batch_size", "micro_batch", "max_steps", "log_every", "checkpoint_every"):
            _at_least(1, f"train.{name}", getattr(train, name))
        _at_least(1, "train.keep", train.keep)
        _at_least(1, "train.keep_every", train.keep_every)
        _at_least(1, "train.threads", train.threads)
        _at_least(0, "train.sample_every", train.sample_every)
        _at_least(0, "train.validate_every", train.validate_every)
        _at_least(1, "data.held_out_images", self.data.held_out_images)
        if train.validate_every and self.data.held_out is None:
            raise ValueError(
                f"Recipe: train.validate_every={train.validate_every} needs data.held_out, "
                "pictures that are not trained on"
            )
        _at_least(0, "train.fid_every", train.fid_every)
        _at_least(2, "sample.fid_images", self.sample.fid_images)
        if train.fid_every and None in (self.sample.fid_statistics, self.sample.fid_extractor):
            raise ValueError(
                f"Recipe: train.fid_every={train.fid_every} needs sample.fid_statistics, which "
                "`fastdiff stats` writes, and sample.fid_extractor, which it was given"
            )
        if train.offload and train.zero == 0:
            raise ValueError("Recipe: train.offload=True needs train.zero of 1 to 3")
        _at_least(0, "data.workers", self.data.workers)
        _at_least(1, "data.window", self.data.window)
        if self.data.embeddings is not None and self.text.encoder != "t5":
            raise ValueError(
                f"Recipe: data.embeddings={self.data.embeddings!r} with text.encoder='small', "
                "which is trained and has no stored features; set text.encoder='t5'"
            )
        if train.min_snr is not None and not train.min_snr > 0:
            raise ValueError(f"Recipe: train.min_snr={train.min_snr}, expected > 0, or None")
        _at_least(0, "optim.warmup", self.optim.warmup)
        _at_least(0, "sample.guidance", self.sample.guidance)
        if self.optim.clip is not None and not self.optim.clip > 0:
            raise ValueError(f"Recipe: optim.clip={self.optim.clip}, expected > 0, or None")
        if not 1 <= self.sample.steps <= self.diffusion.steps:
            raise ValueError(
                f"Recipe: sample.steps={self.sample.steps}, expected 1 to diffusion.steps="
                f"{self.diffusion.steps}"
            )
        for name, value in (
            ("train.condition_dropout", train.condition_dropout),
            ("data.bad_limit", self.data.bad_limit),
        ):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"Recipe: {name}={value}, expected 0..1")
        if self.model.learn_variance:
            raise ValueError(
                "Recipe: model.learn_variance=True, the loss is that of the mean alone"
            )
        for name in ("in_channels", "out_channels"):
            if getattr(self.model, name) not in (3, None):
                value = getattr(self.model, name)
                raise ValueError(f"Recipe: model.{name}={value}, training takes RGB images: 3")

    @property
    def side(self) -> int:
        """Image side in pixels."""
        assert isinstance(self.model.image_size, tuple)
        return self.model.image_size[0]


def _at_least(least: int, name: str, value: float | None) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"Recipe: {name}={value}, expected >= {least}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data (dicts, lists, numbers, strings), the backbone's class by name."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    values = plain(dataclasses.asdict(recipe))
    kind = next(name for name, model in MODELS.items() if model.Config is type(recipe.model))
    values["model"] = {"model": kind, **values["model"]}
    return values


def from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `to_dict`.

    Raises:
        ValueError: Unknown section, model or field.
    """
    sections: dict[str, type] = {
        "text": TextConfig,
        "data": DataConfig,
        "diffusion": DiffusionConfig,
        "optim": OptimConfig,
        "train": TrainConfig,
        "sample": SampleConfig,
    }
    given = dict(values)
    model = dict(given.pop("model", {}))
    kind = model.pop("model", None)
    if kind not in MODELS:
        raise ValueError(f"Recipe: unknown model {kind!r}, {nearest(str(kind), MODELS)}")
    built: dict[str, Any] = {"model": _build(MODELS[kind].Config, model)}
    for name, section in given.items():
        if name not in sections:
            raise ValueError(f"Recipe: unknown section {name!r}, {nearest(name, sections)}")
        built[name] = _build(sections[name], section)
    return Recipe(**built)


def _build(kind: type, values: dict[str, Any]) -> Any:
    fields = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ValueError(f"{kind.__name__}: unknown field {name!r}, {nearest(name, fields)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def save(recipe: Recipe, file: Path) -> None:
    """Write a recipe as YAML."""
    file.write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False))


def load(file: Path) -> Recipe:
    """Read a recipe that `save` wrote; it can hold data only."""
    return from_dict(yaml.safe_load(file.read_text()))


def model_differences(mine: Recipe, saved: Recipe) -> list[str]:
    """What makes a checkpoint of `saved` unfit for `mine`, a line per field: model and text.

    Rates, data and step counts may change between runs of the same weights.
    """
    lines = []
    for section in ("model", "text", "diffusion"):
        a, b = to_dict(mine)[section], to_dict(saved)[section]
        lines += [
            f"{section}.{name}: {b.get(name)!r} in the checkpoint, {a.get(name)!r} asked for"
            for name in {**a, **b}
            if a.get(name) != b.get(name)
        ]
    return lines
