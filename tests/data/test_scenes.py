"""The embedded scenes: captions, rendering, both writers, and the judge on real and wrong input."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data import open_dataset, scenes, writers
from fastdiff.data.scenes import CAPTIONS, HELD_OUT_CAPTIONS, TRAIN_CAPTIONS, SceneJudge
from fastdiff.data.transforms import to_tensor


def test_captions() -> None:
    assert len(set(CAPTIONS)) == 4 * 6 * 3 * 5
    assert len(TRAIN_CAPTIONS) == 300
    assert len(HELD_OUT_CAPTIONS) == 60
    assert not set(TRAIN_CAPTIONS) & set(HELD_OUT_CAPTIONS)
    assert "a green cross on a white background at the top left" in TRAIN_CAPTIONS
    # Every shape and every colour but two is held out once, so each is still trained with others.
    assert len(set(scenes.HELD_OUT)) == len({s for s, _ in scenes.HELD_OUT}) == 4
    assert len({c for _, c in scenes.HELD_OUT}) == 4


def test_parse_is_the_inverse_of_caption() -> None:
    for caption in CAPTIONS:
        assert scenes.parse(caption).caption == caption
    told = scenes.parse("a blue ring on a black background in the centre")
    assert told == ("ring", "blue", "black", "in the centre")
    for wrong in ("", "a green dog", "A green cross on a white background at the top left"):
        with pytest.raises(ValueError, match="is not a scene caption"):
            scenes.parse(wrong)


@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
def test_pictures_show_what_the_caption_says(resolution: int) -> None:
    caption = "a red disc on a white background at the bottom right"
    picture = scenes.render([caption], resolution, jitter=False)[0]
    assert picture.shape == (resolution, resolution, 3)
    middle = int(0.74 * resolution)
    assert tuple(picture[middle, middle]) == scenes.COLOURS["red"]
    assert tuple(picture[0, 0]) == (255, 255, 255)
    covered = np.mean((255.0 - picture[..., 1]) / (255 - scenes.COLOURS["red"][1]))
    assert covered == pytest.approx(np.pi * scenes.RADIUS**2, rel=0.02)


def test_edges_are_anti_aliased_and_jitter_is_below_a_pixel() -> None:
    caption = "a red disc on a white background in the centre"
    picture = scenes.render([caption], 16, jitter=False)[0]
    assert len(np.unique(picture[..., 1])) > 4
    many = scenes.render([caption] * 50, 16, seed=1)
    assert len(np.unique(many, axis=0)) == 50
    assert np.abs(many.astype(float) - picture).mean() < 6


def test_one_seed_gives_the_same_scene_at_every_resolution() -> None:
    fine = to_tensor(scenes.render(CAPTIONS[::7], 64, seed=4))
    coarse = to_tensor(scenes.render(CAPTIONS[::7], 16, seed=4))
    rmse = (torch.nn.functional.avg_pool2d(fine, 4) - coarse).square().mean((1, 2, 3)).sqrt()
    assert rmse.max() < 0.06
    assert np.array_equal(scenes.render(CAPTIONS, 16, 4), scenes.render(CAPTIONS, 16, 4))
    assert not np.array_equal(scenes.render(CAPTIONS, 16, 4), scenes.render(CAPTIONS, 16, 5))


def test_render_errors() -> None:
    with pytest.raises(ValueError, match="resolution=4; expected at least 8"):
        scenes.render(CAPTIONS[:1], 4)
    assert scenes.render([], 16).shape == (0, 16, 16, 3)


def test_folder_is_read_back(tmp_path: Path) -> None:
    dataset = open_dataset(scenes.write_folder(tmp_path / "a" / "b", n=620, resolution=16, seed=2))
    assert len(dataset) == 620
    told = Counter(dataset[i].caption for i in range(620))
    assert set(told) == set(TRAIN_CAPTIONS)
    assert set(told.values()) == {2, 3}
    pictures = to_tensor(np.stack([np.asarray(dataset[i].image) for i in range(620)]))
    captions = [dataset[i].caption for i in range(620)]
    assert SceneJudge(16).agreement(pictures, captions).joint == 1.0
    lines = (tmp_path / "a" / "b" / "metadata.jsonl").read_text("utf-8").splitlines()
    assert json.loads(lines[0]) == {"file_name": "images/000000.png", "text": captions[0]}


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_shards_are_laid_out_as_img2dataset_does(tmp_path: Path, image_format: str) -> None:
    path = scenes.write_shards(
        tmp_path / "s", n=25, resolution=32, shard_size=10, image_format=image_format
    )
    assert [p.name for p in sorted(path.glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(path / "00001.tar") as tar:
        names = tar.getnames()
        assert names[:3] == [f"000010000.{image_format}", "000010000.json", "000010000.txt"]
        picture, fields, text = (tar.extractfile(name).read() for name in names[:3])  # type: ignore[union-attr]
    told = json.loads(fields)
    assert told["caption"] == text.decode()
    assert told["key"] == "000010000"
    assert told["sha256"] == hashlib.sha256(picture).hexdigest()
    assert (told["width"], told["height"], told["status"]) == (32, 32, "success")
    dataset = open_dataset(path)
    assert len(dataset) == 25
    pictures = to_tensor(np.stack([np.asarray(dataset[i].image) for i in range(25)]))
    captions = [dataset[i].caption for i in range(25)]
    assert SceneJudge(32).agreement(pictures, captions).joint == 1.0


def test_writing_again_is_a_no_op_and_something_else_an_error(tmp_path: Path) -> None:
    path = scenes.write_folder(tmp_path / "d", n=4, resolution=16)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    scenes.write_folder(path, n=4, resolution=16)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    with pytest.raises(FileExistsError, match="holds another data set: n=4, asked 5"):
        scenes.write_folder(path, n=5, resolution=16)
    with pytest.raises(FileExistsError, match="layout='folder', asked 'shards'"):
        scenes.write_shards(path, n=4, resolution=16)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(FileExistsError, match="not a data set written by fastdiff"):
        scenes.write_folder(tmp_path / "mine", n=4, resolution=16)
    with pytest.raises(ValueError, match="shard_size=0; expected 1"):
        scenes.write_shards(tmp_path / "s", n=4, resolution=16, shard_size=0)
    with pytest.raises(ValueError, match="image_format='gif'"):
        scenes.write_shards(tmp_path / "s", n=4, resolution=16, image_format="gif")
    assert not (tmp_path / "s").exists()


def test_an_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    pixels = scenes.render(CAPTIONS[:1], 16)[0]

    def interrupted() -> object:
        yield from [(pixels, "a")] * 3
        raise KeyboardInterrupt

    for write in (writers.write_folder, writers.write_shards):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "d", interrupted(), {})  # type: ignore[operator]
        assert list(tmp_path.iterdir()) == []


def test_a_writer_that_comes_second_keeps_the_first(tmp_path: Path) -> None:
    pixels = scenes.render(CAPTIONS[:1], 16)[0]

    def overtaken() -> object:
        writers.write_folder(tmp_path / "d", [(pixels, "first")], {"n": 1})
        yield pixels, "second"

    writers.write_folder(tmp_path / "d", overtaken(), {"n": 1})  # type: ignore[arg-type]
    assert open_dataset(tmp_path / "d")[0].caption == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_judge_is_right_on_fresh_renders(resolution: int) -> None:
    captions = CAPTIONS * 3
    pictures = to_tensor(scenes.render(captions, resolution, seed=987))
    told = SceneJudge(resolution).agreement(pictures, captions)
    assert told.n == 1080
    assert told.joint >= 0.99
    assert told.strict >= 0.99
    assert min(told.shape, told.colour, told.background, told.place) >= 0.99
    assert told.interval[0] > 0.98
    assert "of 1080 agree in all four attributes" in str(told)


@pytest.mark.parametrize("resolution", [16, 32])
def test_judge_is_at_chance_on_noise_and_on_other_captions(resolution: int) -> None:
    judge = SceneJudge(resolution)
    captions = CAPTIONS * 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1080, 3, resolution, resolution, generator=generator).clamp(-1, 1)
    told = judge.agreement(noise, captions)
    assert told.joint < 0.012  # chance 0.28 %: 3 of 1080
    assert told.strict == 0
    order = torch.randperm(1080, generator=generator)
    pictures = to_tensor(scenes.render(captions, resolution, seed=987))
    other = judge.agreement(pictures[order], captions)
    assert other.joint < 0.012
    for share, chance in (
        (other.shape, 1 / 4),
        (other.colour, 1 / 6),
        (other.background, 1 / 3),
        (other.place, 1 / 5),
    ):
        assert abs(share - chance) < 0.05


def test_distance_is_the_brute_force_one() -> None:
    # Without jitter the middle template of each caption is its exact rendering.
    judge = SceneJudge(16, steps=1)
    pictures = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    told = judge.distances(pictures)
    assert told.shape == (5, 360)
    radii = scenes.RADIUS * (1 + np.array([-2 / 3, 0, 2 / 3]) * scenes.SIZE_JITTER)
    for index in range(0, 360, 41):
        scene = scenes.SCENES[index]
        x, y = scenes.PLACES[scene.place]
        shift = scenes.PLACE_JITTER  # one step per axis is the lower end
        mask = scenes.coverage(
            scene.shape, np.full(3, x - shift), np.full(3, y - shift), radii, 16
        )[:, None]
        front = np.array(scenes.COLOURS[scene.colour]).reshape(1, 3, 1, 1) / 127.5 - 1
        back = np.array(scenes.BACKGROUNDS[scene.background]).reshape(1, 3, 1, 1) / 127.5 - 1
        template = torch.from_numpy(back + mask * (front - back))
        difference = (pictures[:, None] - template).square().mean((2, 3, 4)).sqrt().amin(1)
        assert torch.allclose(told[:, index].double(), difference, atol=1e-5)


def test_strict_agreement_refuses_smears() -> None:
    judge = SceneJudge(32)
    captions = TRAIN_CAPTIONS
    pictures = to_tensor(scenes.render(captions, 32, seed=3))
    noisy = pictures + 0.12 * torch.randn(
        pictures.shape, generator=torch.Generator().manual_seed(0)
    )
    told = judge.agreement(noisy, captions)
    assert told.joint > 0.99
    assert told.strict == 0
    verdict = judge.judge(pictures[:1])[0]
    assert (verdict.caption, verdict.attributes) == (captions[0], scenes.parse(captions[0]))
    assert verdict.rmse < SceneJudge.RMSE_BOUND


def test_judge_errors() -> None:
    judge = SceneJudge(16)
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\); expected \(B, 3, 16, 16\)"):
        judge.judge(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        judge.agreement(torch.zeros(2, 3, 16, 16), CAPTIONS[:1])
    with pytest.raises(ValueError, match="resolution=48"):
        SceneJudge(48)
    assert judge.judge(torch.zeros(0, 3, 16, 16)) == []


def test_wilson_interval() -> None:
    # Values of the closed form for 8 of 10 and 0 of 20, as tabulated for this interval.
    assert scenes.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert scenes.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=2e-4)
    assert scenes.wilson_interval(0, 0) == (0.0, 1.0)


def test_samples_are_drawn_lazily() -> None:
    first = next(islice(scenes._samples(TRAIN_CAPTIONS, 10**6, 16, 0), 1))
    assert first[0].shape == (16, 16, 3)
