"""FID while a run trains: the number that `fastdiff.metrics` gives for the same pictures."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import ranks
import torch
from tiny import tiny_recipe
from torch import Tensor, nn

from fastdiff.grid import to_uint8
from fastdiff.metrics import frechet_distance, load_torchscript, measure, open_pictures
from fastdiff.training.config import Recipe
from fastdiff.training.loop import load_run, train


class Network(nn.Module):
    """A random convolution, pooled to 4 features."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 5, 5, generator=generator) / 50)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x / 64, self.weight, stride=3).relu().mean((2, 3))


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    recipe = tiny_recipe(tmp_path, max_steps=4)
    extractor, statistics = tmp_path / "net.pt", tmp_path / "data.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Network()).save(str(extractor))
    measure(open_pictures(tmp_path / "data"), load_torchscript(extractor)).save(statistics)
    fid = {"fid_statistics": str(statistics), "fid_extractor": str(extractor), "fid_images": 70}
    return dataclasses.replace(
        recipe,
        sample=dataclasses.replace(recipe.sample, **fid),
        train=dataclasses.replace(recipe.train, fid_every=3),
    )


def logged(run: Path) -> dict[int, float]:
    points = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {point["step"]: point["fid"] for point in points if "fid" in point}


def test_a_run_logs_the_fid_of_its_averaged_weights(tmp_path, recipe):
    run = train(recipe)
    found = logged(run)
    assert list(found) == [3, 4]
    learner, _ = load_run(run)
    lines = (tmp_path / "data" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in lines[:70]]
    pictures = learner.draw(captions, range(70), steps=2, guidance=2.0, batch=64)
    features = load_torchscript(tmp_path / "net.pt")(to_uint8(pictures)).features.double()
    data = measure(open_pictures(tmp_path / "data"), load_torchscript(tmp_path / "net.pt"))
    expected = frechet_distance(features.mean(0), features.T.cov(), data.mean, data.covariance)
    assert found[4] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_ranks_find_the_same(tmp_path, recipe):
    two = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, out=f"{tmp_path}/two")
    )
    (run,) = ranks.train_on(tmp_path, two)
    assert logged(run) == pytest.approx(logged(train(recipe)), rel=1e-3)


def test_what_is_missing_is_said(tmp_path, recipe):
    with pytest.raises(ValueError, match=r"train\.fid_every=3 needs sample\.fid_statistics"):
        tiny_recipe(tmp_path, fid_every=3)

    def other(**changes) -> Recipe:
        return dataclasses.replace(recipe, sample=dataclasses.replace(recipe.sample, **changes))

    with pytest.raises(ValueError, match=r"fid_images=200, but the data set has 96 captions"):
        train(other(fid_images=200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(nn.Flatten()).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"made with the extractor net\.pt .* is another"):
        train(other(fid_extractor=str(tmp_path / "other.pt")))
