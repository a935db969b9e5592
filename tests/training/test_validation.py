"""Validation loss: a function of the weights alone, logged, drawn, the same after a resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ranks import train_on
from tiny import ASCEND, IUVIT, tiny_recipe

from fastdiff import _plot
from fastdiff.data import scenes
from fastdiff.training import validation
from fastdiff.training.config import Recipe, SampleConfig, TextConfig
from fastdiff.training.loop import load_run, train
from fastdiff.training.validation import open_held_out, validation_losses, validation_times

FIELDS = ("val_loss", "val_loss_raw", *(f"val_loss_t{k}" for k in range(8)))


def validated(folder: Path, *, images: int = 12, every: int = 4, **changes) -> Recipe:
    recipe = tiny_recipe(folder, **changes)
    held_out = folder / "held_out"
    if not held_out.exists():
        captions = scenes.HELD_OUT_CAPTIONS
        scenes.write_folder(held_out, n=24, resolution=16, seed=1, captions=captions)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, held_out=str(held_out), held_out_images=images),
        train=dataclasses.replace(recipe.train, validate_every=every),
    )


def logged(run: Path) -> dict[int, dict[str, float]]:
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {p["step"]: {name: p[name] for name in FIELDS} for p in points if "val_loss" in p}


def test_times_are_the_middles_of_eight_parts() -> None:
    assert validation_times(1000) == [62, 187, 312, 437, 562, 687, 812, 937]


def test_a_run_logs_the_loss_of_its_average_and_draws_it(tmp_path, monkeypatch) -> None:
    recipe = validated(tmp_path, model=ASCEND, log_every=3)  # it has dropout
    run = train(recipe)
    found = logged(run)
    assert sorted(found) == [4, 8]  # between the points of the log, and at the end
    last = found[8]
    assert last["val_loss"] == pytest.approx(
        sum(last[f"val_loss_t{k}"] for k in range(8)) / 8, rel=1e-6
    )
    assert last["val_loss_raw"] != last["val_loss"]

    learner, _ = load_run(run)
    held_out = open_held_out(recipe, {})
    losses = validation_losses(learner, held_out, recipe)
    assert losses.shape == (12, 8)
    assert float(losses.mean()) == last["val_loss"]

    # neither the batch nor torch's random state decides anything
    monkeypatch.setattr(validation, "MICRO_BATCH", 5)
    torch.manual_seed(99)
    again = validation_losses(learner.train(), held_out, recipe)
    assert learner.training
    torch.testing.assert_close(again, losses, rtol=1e-4, atol=1e-5)
    png, page = _plot.plot([run])
    assert png.stat().st_size > 10_000
    assert "val_loss_t7" in page.read_text()


def test_losses_are_those_worked_out_one_by_one(tmp_path) -> None:
    recipe = validated(tmp_path, max_steps=1)
    learner, _ = load_run(train(recipe))
    held_out = open_held_out(recipe, {})
    losses = validation_losses(learner, held_out, recipe)
    assert (losses[:, 0] - losses[:, 7]).abs().min() > 0  # times differ
    process = learner.process
    context, mask = learner.encoder.encode([held_out.captions[3]])
    noise = validation.philox_normal(
        torch.tensor([3]), 5, (3, 16, 16), stream=validation.NOISE_STREAM
    )
    x0, t = held_out.images[3:4], torch.tensor([687])
    with torch.no_grad():
        out = learner.backbone(process.q_sample(x0, t, noise), t, context, context_mask=mask)
    expected = process.loss(out, x0, t, noise)
    torch.testing.assert_close(losses[3:4, 5], expected, rtol=1e-4, atol=1e-5)


def test_validation_changes_no_step_and_a_resumed_run_repeats_it(tmp_path) -> None:
    recipe = validated(tmp_path, out=str(tmp_path / "a"), max_steps=6, every=2)
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=3)))
    found = logged(train(recipe))

    other = validated(tmp_path, out=str(tmp_path / "b"), max_steps=6, every=2)
    assert {k: v for k, v in found.items() if k != 3} == logged(train(other))
    without = tiny_recipe(tmp_path, out=str(tmp_path / "c"), max_steps=6)
    a, c = load_run(tmp_path / "a")[0], load_run(train(without))[0]
    for name, value in c.state_dict().items():
        assert torch.equal(value, a.state_dict()[name]), name


def test_pictures_without_captions_and_with_labels(tmp_path) -> None:
    for part, seed in (("data", 0), ("held_out", 1)):
        for label, shape in enumerate(("disc", "bar")):
            captions = [c for c in scenes.TRAIN_CAPTIONS if f" {shape} " in c]
            folder = tmp_path / part / shape
            scenes.write_folder(folder, n=8, resolution=16, seed=seed + label, captions=captions)
    recipe = dataclasses.replace(
        validated(tmp_path, max_steps=2, every=2),
        model=dataclasses.replace(IUVIT, context_dim=None, num_classes=2),
        text=TextConfig(),
        sample=SampleConfig(steps=2),
    )
    train(recipe)
    assert sorted(logged(tmp_path / "run")) == [2]
    learner, _ = load_run(tmp_path / "run")
    right = open_held_out(recipe, {"disc": 0, "bar": 1})
    wrong = open_held_out(recipe, {"disc": 1, "bar": 0})
    a, b = (validation_losses(learner, held_out, recipe) for held_out in (right, wrong))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="label 'bar' is not one of the 1"):
        open_held_out(recipe, {"disc": 0})


def test_bad_settings_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"validate_every=4 needs data\.held_out"):
        tiny_recipe(tmp_path, validate_every=4)
    recipe = validated(tmp_path)
    gone = dataclasses.replace(recipe.data, held_out=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        train(dataclasses.replace(recipe, data=gone))


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path) -> None:
    pytest.importorskip("deepspeed")
    one = logged(train(validated(tmp_path, out=str(tmp_path / "one"))))
    recipes = [validated(tmp_path, out=str(tmp_path / f"zero{z}"), zero=z) for z in (0, 1, 3)]
    for run in train_on(tmp_path, *recipes):
        many = logged(run)
        assert many.keys() == one.keys()
        for step, fields in one.items():
            assert many[step] == pytest.approx(fields, rel=1e-5)
