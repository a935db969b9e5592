"""One row: trained by the trainer, drawn by the sampler, measured.

Letters: N pictures, K times, R side in pixels.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import classifier_free, initial_noise, sample_ddim
from fastdiff.experiments import measure, tasks
from fastdiff.experiments.grid import Row, Scale, recipe_of, settings_of
from fastdiff.grid import picture_grid
from fastdiff.metrics.extractors import file_sha256
from fastdiff.training.config import Recipe
from fastdiff.training.learner import Learner
from fastdiff.training.loop import load_run, train
from fastdiff.training.validation import open_held_out, validation_losses

TRAIN_SEED, HELD_OUT_SEED, REAL_SEED = 0, 1, 2
FIRST_SEED = 10_000  # of the drawn pictures
SHOWN = 8
BATCH = 64


def train_and_measure(row: Row, scale: Scale, out: Path) -> dict[str, Any]:
    """Train a row, from its last checkpoint if there is one, and measure it.

    Args:
        row: The run.
        scale: The budget.
        out: The grid's folder.

    Returns:
        Numbers (value, low, high, n), hashes and seconds, as JSON values.
    """
    recipe = recipe_of(row, scale, out)
    assert recipe.data.path is not None
    assert recipe.data.held_out is not None
    sizes = {
        recipe.data.path: (scale.pictures, TRAIN_SEED),
        recipe.data.held_out: (scale.held_out, HELD_OUT_SEED),
    }
    for folder, (n, seed) in sizes.items():
        tasks.write_data(row.task, Path(folder), n=n, side=row.side, seed=seed)
    _forget_other_settings(Path(recipe.train.out), settings_of(row, scale))
    started = time.perf_counter()
    snapshots = [_snapshot(row, recipe, step, out) for step in row.snapshots]
    if not row.snapshots:
        train(recipe)
    trained = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner, _ = load_run(Path(recipe.train.out), device)
    labels = tasks.LABELS if row.task == "label" else ()
    held_out = open_held_out(recipe, {name: y for y, name in enumerate(labels)})
    losses = validation_losses(learner, held_out, recipe)
    drawn = draw(learner, row, recipe, row.samples)
    side = row.side
    extractor, accuracy = measure.scene_extractor(
        side, scale.extractor_steps, out / "features" / f"scenes{min(side, 32)}.safetensors"
    )
    extractor.to(device)
    real = tasks.real_pictures(row.task, n=scale.real, side=side, seed=REAL_SEED)
    fresh = tasks.real_pictures(row.task, n=row.samples, side=side, seed=REAL_SEED + 1)
    judged = tasks.judge(row.task, drawn, side)
    numbers = {
        "val_loss": measure.mean(losses.mean(1)),
        **{f"val_band_{i}": measure.mean(losses[:, 2 * i : 2 * i + 2].mean(1)) for i in range(4)},
        "fid": measure.fid(extractor, real, drawn),
        "fid_of_real": measure.fid(extractor, real, fresh),
        "distance": measure.mean(tasks.distances(row.task, drawn, side)),
        "patch_effect": measure.patch_effect(drawn, row.patch),
        "patch_effect_of_real": measure.patch_effect(fresh, row.patch),
        **{name: measure.share(right) for name, right in judged.items()},
    }
    found = {
        "numbers": numbers,
        "val_losses": losses.mean(1).tolist(),
        "snapshots": snapshots,
        "picture": _show(drawn[:SHOWN], out, row.id.replace("/", "-")),
        "extractor": extractor.sha256,
        "extractor_accuracy": accuracy,
        "weights": file_sha256(Path(recipe.train.out) / "model" / "model.safetensors"),
        "train_s": round(trained - started, 1),
        "measure_s": round(time.perf_counter() - trained, 1),
    }
    return measure.as_json(found)


def _forget_other_settings(run: Path, settings: str) -> None:
    """Put aside a run of the same name that was made with other settings."""
    note = run / "settings.txt"
    if run.is_dir() and (not note.is_file() or note.read_text() != settings):
        other = run.with_name(f"{run.name}.old-{time.time_ns()}")
        run.rename(other)
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(settings)


def draw(learner: Learner, row: Row, recipe: Recipe, n: int) -> Tensor:
    """Pictures for `conditions(row.task, n)`, each of its own seed: (n, 3, R, R) in [-1, 1]."""
    seeds = range(FIRST_SEED, FIRST_SEED + n)
    sample = recipe.sample
    asked = tasks.conditions(row.task, n)
    if row.task in ("caption", "pair"):
        return learner.draw(asked, seeds, steps=sample.steps, guidance=sample.guidance, batch=BATCH)
    backbone = learner.backbone
    device = next(backbone.parameters()).device
    pictures = []
    for start in range(0, n, BATCH):
        model: Any = backbone
        if row.task == "label":
            y = torch.tensor([tasks.LABELS.index(a) for a in asked[start : start + BATCH]])
            null = backbone.config.num_classes
            model = classifier_free(backbone, sample.guidance, y=y.to(device), null_y=null)
        x_T = initial_noise(seeds[start : start + BATCH], (3, row.side, row.side), device)
        with torch.no_grad():
            x = sample_ddim(model, x_T, learner.process, steps=sample.steps)
        pictures.append(x.float().cpu())
    return torch.cat(pictures).clamp(-1, 1)


def _snapshot(row: Row, recipe: Recipe, step: int, out: Path) -> dict[str, Any]:
    """Train to a step, draw from the noise of all snapshots, keep what was found."""
    run = Path(recipe.train.out)
    file = run / f"snapshot-{step:06d}.json"
    if file.is_file():
        return json.loads(file.read_text())
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=step)))
    learner, _ = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    drawn = draw(learner, row, recipe, row.samples)
    found = {
        "step": step,
        "patch_effect": measure.patch_effect(drawn, row.patch),
        "distance": measure.mean(tasks.distances(row.task, drawn, row.side)),
        "strict": measure.share(tasks.judge(row.task, drawn, row.side)["strict"]),
        "picture": _show(drawn[:SHOWN], out, f"{row.id.replace('/', '-')}-{step:06d}"),
    }
    beside = file.with_suffix(".partial")
    beside.write_text(json.dumps(found))
    beside.replace(file)
    return found


def _show(pictures: Tensor, out: Path, name: str) -> str:
    """Write a strip of pictures; its path within the grid's folder."""
    file = out / "pictures" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(pictures, columns=len(pictures), min_side=64).save(file)
    return str(file.relative_to(out))
