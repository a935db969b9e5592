"""Validation loss on held-out pictures with fixed noise: a pure function of the weights.

Letters: N pictures, K times, T steps of diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.readers import open_dataset
from fastdiff.data.samples import BadSample, CaptionedImages
from fastdiff.data.transforms import to_square_tensor
from fastdiff.ops import philox_normal
from fastdiff.training.config import Recipe
from fastdiff.training.learner import Learner
from fastdiff.training.pictures import TrainingPictures

TIMES = 8
NOISE_STREAM = 0x7661_6C00  # of philox_normal: apart from the streams of training and of sampling
MICRO_BATCH = 32


@dataclass(frozen=True)
class HeldOut:
    """Pictures that no step sees.

    Args:
        images: (N, 3, H, W) float32 in [-1, 1].
        captions: N, for a model of text.
        y: (N,) int64, for a model of labels, else None.
        number: (N,) int64, each picture's number, which its noise is drawn by.
    """

    images: Tensor
    captions: list[str]
    y: Tensor | None
    number: Tensor
    _features: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def text(self, learner: Learner, start: int, stop: int) -> dict[str, Tensor]:
        """What the learner takes for captions; a frozen encoder's features are kept."""
        captions = self.captions[start:stop]
        if learner.text is not None:
            ids, mask = learner.encoder.tokenize(captions)
            return {"ids": ids, "mask": mask}
        if start not in self._features:
            context, mask = learner.encoder.encode(captions)
            self._features[start] = context.cpu(), mask.cpu()
        context, mask = self._features[start]
        return {"context": context, "mask": mask}


def open_held_out(recipe: Recipe, labels: Mapping[str, int]) -> HeldOut:
    """Read `data.held_out_images` pictures, spread evenly over `data.held_out`.

    Args:
        recipe: The run's.
        labels: Numbers of the training labels; empty without labels.

    Raises:
        FileNotFoundError, ValueError: Nothing there, a label that training does not know, or not
            one picture that can be read.
    """
    data = recipe.data
    assert data.held_out is not None, "the recipe refuses validation without it"
    dataset: CaptionedImages
    if recipe.model.context_dim is None:
        labelled = recipe.model.num_classes is not None
        dataset = TrainingPictures(data.held_out, transform=data.transform, labelled=labelled)
    else:
        dataset = open_dataset(data.held_out, cache=data.cache, cache_gib=data.cache_gib)
    count = min(data.held_out_images, len(dataset))
    images, captions, numbers = [], [], []
    for number in range(count):
        try:
            sample = dataset[number * len(dataset) // count]
            images.append(to_square_tensor(sample.image, recipe.side))
        except BadSample:
            continue
        captions.append(sample.caption)
        numbers.append(number)
    if not images:
        raise ValueError(f"data.held_out={data.held_out}: none of {count} pictures can be read")
    y = None
    if labels:
        unknown = sorted(set(captions) - labels.keys())
        if unknown:
            raise ValueError(
                f"data.held_out={Path(data.held_out)}: label {unknown[0]!r} is not one of the "
                f"{len(labels)} of data.path"
            )
        y = torch.tensor([labels[name] for name in captions])
    return HeldOut(torch.stack(images), captions, y, torch.tensor(numbers))


def validation_times(steps: int) -> list[int]:
    """The middles of TIMES equal parts of 0..T-1."""
    return [(2 * k + 1) * steps // (2 * TIMES) for k in range(TIMES)]


@torch.no_grad()
def validation_losses(learner: Learner, held_out: HeldOut, recipe: Recipe) -> Tensor:
    """Loss of every held-out picture at each of the K times, condition shown.

    The noise of (picture, time) is drawn by both numbers alone: neither the run's seed nor the
    batch decides anything.

    Args:
        learner: With the weights to judge, on its device.
        held_out: The pictures.
        recipe: The run's; autocast as in its training.

    Returns:
        (N, K) float32 on the CPU, mean squared error of the prediction.
    """
    device = next(learner.backbone.parameters()).device
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.precision]
    was_training = learner.training
    learner.eval()
    rows = []
    for start in range(0, len(held_out.number), MICRO_BATCH):
        part = slice(start, start + MICRO_BATCH)
        x0 = held_out.images[part].to(device)
        seeds = held_out.number[part].to(device)
        inputs: dict[str, Tensor] = {"drop": torch.zeros(len(x0), dtype=torch.bool)}
        if recipe.model.context_dim is not None:
            inputs |= held_out.text(learner, part.start, part.stop)
        if held_out.y is not None:
            inputs["y"] = held_out.y[part]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        row = []
        for k, t in enumerate(validation_times(recipe.diffusion.steps)):
            noise = philox_normal(seeds, k, tuple(x0.shape[1:]), stream=NOISE_STREAM)
            times = torch.full((len(x0),), t, device=device)
            with torch.autocast(device.type, dtype=kind, enabled=kind is not None):
                row.append(learner(x0=x0, noise=noise, t=times, **inputs).float().cpu())
        rows.append(torch.stack(row, dim=1))
    learner.train(was_training)
    return torch.cat(rows)


def as_point(averaged: Tensor, raw: Tensor) -> dict[str, Any]:
    """Fields of the log: `val_loss` and `val_loss_t0`.. of the average, `val_loss_raw`.

    Args:
        averaged: (N, K) losses of the averaged weights.
        raw: (N, K) of the weights that are trained.
    """
    by_time = {f"val_loss_t{k}": float(v) for k, v in enumerate(averaged.mean(dim=0))}
    return {"val_loss": float(averaged.mean()), "val_loss_raw": float(raw.mean()), **by_time}
