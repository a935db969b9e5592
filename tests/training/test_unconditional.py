"""Training on pictures without captions, with and without labels; the paper's recipes."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import IUVIT, tiny_recipe

import fastdiff
from fastdiff.models import PRESETS
from fastdiff.plan import plan
from fastdiff.recipes import get_recipe, list_recipes
from fastdiff.training.config import DataConfig, Recipe, SampleConfig, TextConfig
from fastdiff.training.learner import Learner
from fastdiff.training.loop import Trainer, load_run, train
from fastdiff.training.pictures import TrainingPictures

ROOT = Path(__file__).parents[2]
UNCONDITIONAL = {
    # batch, steps, rate, betas, schedule: Tables 5 and 6 (steps of ASCEND are a reading)
    "iuvit_cifar10": (128, 500_000, 2e-4, (0.99, 0.999), "linear"),
    "iuvit_celeba64": (128, 500_000, 2e-4, (0.99, 0.99), "linear"),
    "iuvit_celeba128": (256, 450_000, 2e-4, (0.99, 0.99), "linear"),
    "iuvit_church256": (256, 150_000, 1e-4, (0.99, 0.99), "linear"),
    "ascend_cifar10": (128, 500_000, 1e-4, (0.99, 0.999), "cosine"),
    "ascend_celeba64": (128, 500_000, 2e-4, (0.99, 0.99), "cosine"),
    "ascend_256": (256, 500_000, 1e-4, (0.99, 0.99), "cosine"),
}


def write_pictures(folder: Path, count: int = 8) -> Path:
    for label, colour in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 16), (colour + i, 0, i)).save(folder / label / f"{i}.png")
    return folder


def small(tmp_path: Path, *, classes: int | None = None, **train_fields) -> Recipe:
    recipe = tiny_recipe(tmp_path, max_steps=3, **train_fields)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(IUVIT, context_dim=None, num_classes=classes),
        text=TextConfig(),
        data=DataConfig(path=str(tmp_path / "pictures"), workers=0),
        sample=SampleConfig(steps=2),
    )


@pytest.mark.parametrize("classes", [None, 2])
def test_a_run_trains_resumes_and_is_read_again(tmp_path, classes: int | None) -> None:
    write_pictures(tmp_path / "pictures")
    whole = train(small(tmp_path, classes=classes, sample_every=2))
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 3
    out = str(tmp_path / "broken")
    recipe = small(tmp_path, classes=classes, out=out)
    shorter = dataclasses.replace(recipe.train, max_steps=2)
    train(dataclasses.replace(recipe, train=shorter))
    broken = train(recipe)
    mine, other = (load_file(run / "model" / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(mine[name], other[name]) for name in mine)

    with Image.open(whole / "samples" / "step-00000002.png") as grid:
        assert grid.size[0] > 4 * 128
    learner, recipe = load_run(whole)
    assert recipe.model.num_classes == classes
    labels = None if classes is None else [0, 1, 1]
    drawn = learner.draw_labels(labels, [5, 6, 6], steps=2, guidance=2.0)
    assert drawn.shape == (3, 3, 16, 16)
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    y = None if classes is None else torch.tensor([0, 1])
    model = fastdiff.from_pretrained(whole / "model").eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 999])
    assert torch.equal(model(x, t, y=y), learner.backbone(x, t, y=y))
    if classes is not None:
        assert json.loads((whole / "model" / "labels.json").read_text()) == ["dark", "light"]


def test_the_labels_of_a_batch_are_those_of_its_pictures(tmp_path) -> None:
    write_pictures(tmp_path / "pictures")
    Image.new("RGB", (16, 16), (120, 0, 0)).save(tmp_path / "pictures" / "stray.png")
    trainer = Trainer(small(tmp_path, classes=2, batch_size=17), 0, 1, torch.device("cpu"))
    batch = next(trainer._batches()).inputs
    red = (batch["x0"][:, 0, 8, 8] + 1) * 127.5
    wanted = torch.where(red < 100, 0, torch.where(red > 150, 1, 2))  # 2 is no label
    assert torch.equal(batch["y"], wanted)
    assert set(wanted.tolist()) == {0, 1, 2}  # a whole epoch
    assert "mask" not in batch


def test_a_dropped_label_is_the_null_label(tmp_path) -> None:
    torch.manual_seed(0)
    learner = Learner(small(tmp_path, classes=2), None).eval()
    images = torch.randn(2, 2, 3, 16, 16)
    given = {"x0": images[0], "noise": images[1], "t": torch.tensor([10, 500])}
    keep, drop = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    null = learner(**given, drop=keep, y=torch.tensor([2, 2]))
    assert torch.equal(learner(**given, drop=drop, y=torch.tensor([0, 1])), null)
    assert not torch.equal(learner(**given, drop=keep, y=torch.tensor([0, 1])), null)


def test_pictures_tell_what_does_not_fit(tmp_path) -> None:
    folder = write_pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match="1 labels in"):
        TrainingPictures(tmp_path, labelled=True)
    with pytest.raises(ValueError, match=r"2 labels, the model takes model\.num_classes=3"):
        Trainer(small(tmp_path, classes=3), 0, 1, torch.device("cpu"))
    before = TrainingPictures(folder).fingerprint
    (folder / "dark" / "0.png").rename(folder / "dark" / "a.png")
    assert TrainingPictures(folder).fingerprint != before
    with pytest.raises(ValueError, match="the model takes no text"):
        dataclasses.replace(small(tmp_path), sample=SampleConfig(prompts=("a",)))


def test_the_script_says_what_it_needs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = str(ROOT / "train" / "unconditional.py")
    for arguments, words in (
        ([], "needs data: --data.path FOLDER"),
        (["--config", "demo"], "takes captions; use train/t2i.py"),
        (["--data.path", "nowhere"], "nowhere does not exist"),
    ):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match=words):
            runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_recipes_are_those_of_the_tables(name: str) -> None:
    recipe = get_recipe(name)
    optim, train = recipe.optim, recipe.train
    found = (train.batch_size, train.max_steps, optim.lr, optim.betas, recipe.diffusion.schedule)
    assert found == UNCONDITIONAL[name]
    assert recipe.model == PRESETS[name].config
    assert train.ema_decay == 0.9999
    assert recipe.model.context_dim is None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "iuvit_cifar10" else pytest.mark.slow)
        for n in UNCONDITIONAL
    ],
)
def test_the_hours_of_a_recipe_are_those_of_its_plan(name: str) -> None:
    told = importlib.import_module(f"fastdiff.recipes.{name}").__doc__
    assert told is not None
    hours = re.search(r"^Hours: +([\d.]+) on 4 A100 40 GB", told, re.MULTILINE)
    assert hours is not None
    step = plan(get_recipe(name), "a100-40g", 4).step
    assert step is not None
    assert step.hours == pytest.approx(float(hours[1]), rel=0.02)


def test_every_unconditional_recipe_is_in_the_table_above() -> None:
    bare = {name for name in list_recipes() if get_recipe(name).model.context_dim is None}
    assert bare == set(UNCONDITIONAL)
