"""Training from shards with stored text features, and its count of bad samples."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_recipe

from fastdiff.data import BadSampleError, StreamConfig, make_loader, open_dataset, scenes
from fastdiff.data.embed import embed_shards
from fastdiff.data.embeddings import WrongEncoder
from fastdiff.data.shards import ShardDataset
from fastdiff.data.writers import encode_image
from fastdiff.text import T5TextEncoder
from fastdiff.training.checkpoint import latest_checkpoint, progress_of
from fastdiff.training.config import DataConfig, Recipe, TextConfig
from fastdiff.training.loop import make_trainer, noise_seeds, train


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ByT5 of the tiny backbone's width."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5") / "byt5"
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=3)
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, t5_folder: Path) -> Recipe:
    """A run on four shards with the text encoder in the loop."""
    shards = scenes.write_shards(tmp_path / "shards", n=96, resolution=16, seed=0, shard_size=24)
    base = tiny_recipe(tmp_path, max_steps=4, checkpoint_every=2)
    return replace(
        base,
        data=replace(base.data, path=str(shards)),
        text=TextConfig(encoder="t5", name=str(t5_folder), max_length=100),
    )


def stored(recipe: Recipe, tmp_path: Path, **text: Any) -> Recipe:
    """The same run from stored features."""
    assert recipe.data.path is not None
    dataset = open_dataset(recipe.data.path)
    assert isinstance(dataset, ShardDataset)
    encoder = T5TextEncoder(recipe.text.name, max_length=recipe.text.max_length)
    embed_shards(dataset, encoder, tmp_path / "text")
    return replace(
        recipe,
        data=replace(recipe.data, embeddings=str(tmp_path / "text")),
        text=replace(recipe.text, **text),
        train=replace(recipe.train, out=str(tmp_path / "stored")),
    )


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("paper", [False, True])
def test_stored_features_train_as_the_encoder_itself(
    recipe: Recipe, tmp_path: Path, paper: bool
) -> None:
    recipe = replace(recipe, text=replace(recipe.text, paper_mode=paper))
    online = losses(train(recipe))
    from_store = stored(recipe, tmp_path)
    assert losses(train(from_store)) == pytest.approx(online, rel=2e-3)
    # Without the encoder in the process.
    assert make_trainer(from_store).text is None


def test_a_grid_is_drawn_by_the_encoder_of_the_features(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = stored(recipe, tmp_path)
    recipe = replace(recipe, train=replace(recipe.train, sample_every=4))
    run = train(recipe)
    assert (run / "samples" / "step-00000004.png").is_file()
    text = next((tmp_path / "text").glob("*.safetensors"))
    weights = T5TextEncoder(recipe.text.name).weights.encode()
    for file in text.parent.glob("*.safetensors"):
        data = file.read_bytes()
        assert weights in data
        file.write_bytes(data.replace(weights, b"0" * len(weights)))
    other = replace(recipe, train=replace(recipe.train, out=str(tmp_path / "other")))
    run = train(other)
    assert not list((run / "samples").iterdir())
    assert "the stored text features are of 0000" in caplog.text


def test_features_of_another_encoder_or_width_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(WrongEncoder, match=r"of t5:byt5@main:bfloat16:100; this run has .*:99"):
        train(stored(recipe, tmp_path, max_length=99))
    wide = stored(recipe, tmp_path)
    wide = replace(wide, model=replace(wide.model, context_dim=48))
    with pytest.raises(ValueError, match=r"width 32, the model takes model\.context_dim=48"):
        train(wide)
    with pytest.raises(ValueError, match="is trained and has no stored features"):
        replace(wide, text=TextConfig(encoder="small", width=48))


def rot(recipe: Recipe, numbers: range) -> None:
    """Spoil the pictures of some samples."""
    assert recipe.data.path is not None
    dataset = open_dataset(recipe.data.path)
    assert isinstance(dataset, ShardDataset)
    for i in numbers:
        shard, place = divmod(i, 24)
        path = Path(dataset.shards[shard].url)
        offset = int(dataset.captions(shard)[0].rows[place]["image_offset"])
        data = bytearray(path.read_bytes())
        data[offset : offset + 8] = b"rotten!!"
        path.write_bytes(data)


def test_bad_samples_are_counted_over_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, max_steps=6, checkpoint_every=6)
    shards = scenes.write_shards(tmp_path / "shards", n=96, resolution=16, seed=0, shard_size=24)
    recipe = replace(recipe, data=replace(recipe.data, path=str(shards)))
    rot(recipe, range(0, 96, 8))
    train(recipe)
    run = Path(recipe.train.out)
    first = progress_of(run).bad
    assert first["seen"] == 48
    assert 0 < first["bad"] <= 12
    train(replace(recipe, train=replace(recipe.train, max_steps=12)))
    whole = progress_of(run).bad
    assert (whole["seen"], whole["bad"]) == (96, 12)
    assert sum(whole["by_shard"].values()) == 12
    told = [json.loads(line) for line in (run / "bad_samples-0.jsonl").read_text().splitlines()]
    assert len({record["key"] for record in told}) == 12
    assert all("not JPEG, PNG or WebP" in record["reason"] for record in told)


def test_noise_of_the_device_is_a_function_of_the_position(tmp_path: Path) -> None:
    found: dict[int, torch.Tensor] = {}
    for micro in (8, 2):
        recipe = tiny_recipe(tmp_path, seed=2**63 + 5, micro_batch=micro)
        trainer = make_trainer(recipe)
        # As on a GPU, where the loader draws none.
        trainer.stream = replace(trainer.stream, noise=False)
        first = 0
        for batch in islice(trainer._batches(), 16 // micro):
            noise = batch.inputs["noise"]
            assert noise.shape == batch.inputs["x0"].shape
            for i, one in enumerate(noise):
                assert torch.equal(found.setdefault(first + i, one), one)
            first += micro
    assert sorted(found) == list(range(16))
    whole = torch.stack(list(found.values()))
    assert abs(float(whole.mean())) < 4 / whole.numel() ** 0.5
    assert abs(float(whole.std()) - 1) < 0.02
    other = noise_seeds(6, torch.arange(16))
    assert not set(other.tolist()) & set(noise_seeds(5, torch.arange(16)).tolist())


GOOD = encode_image(np.full((16, 16, 3), 200, np.uint8))


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotten_kinds(evil: bytes) -> dict[str, tuple[str, list[tuple[str, bytes]]]]:
    """Kind of rot: what is told of it, and the members of such a sample after its key."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    huge = encoded(Image.new("1", (8000, 7000)), "PNG")
    txt = (".txt", b"a caption")
    return {
        "corrupt": ("not JPEG, PNG or WebP", [(".jpg", b"no picture"), txt]),
        "truncated": ("does not decode", [(".png", GOOD[: len(GOOD) // 2]), txt]),
        "huge": (
            "at most 50 million",
            [(".png", huge), txt],
        ),
        "animated": ("is animated", [(".png", moving), txt]),
        "pickle": ("not JPEG, PNG or WebP", [(".png", evil), txt]),
        "../../leads/out": ("leads out of the shard", [(".png", GOOD), txt]),
        "not UTF-8": ("caption is not UTF-8", [(".png", GOOD), (".txt", b"caf\xe9")]),
        "empty": ("caption is empty", [(".png", GOOD), (".txt", b"  ")]),
        "no caption": ("caption is missing", [(".png", GOOD)]),
        "no picture": ("picture is missing", [txt]),
    }


def strange_pictures() -> list[tuple[str, bytes]]:
    """Pictures in modes that are not RGB, which are good all the same."""
    return [
        (".jpg", encoded(Image.new("CMYK", (16, 16)), "JPEG")),
        (".png", encoded(Image.new("P", (16, 16)), "PNG")),
        (".png", encoded(Image.new("LA", (16, 16)), "PNG")),
        (".png", encoded(Image.new("I;16", (16, 16)), "PNG")),
        (".webp", encoded(Image.new("RGBA", (16, 16)), "WEBP")),
    ]


def write_rotten(folder: Path, every: int) -> tuple[set[str], dict[str, str]]:
    """1,000 samples in four shards, each `every`-th rotten, the ways in turn: good keys, and what
    is told of each bad one."""
    good, bad = set(), {}
    evil = pickle.dumps(Evil(folder.with_name("ran")))
    kinds, strange = list(rotten_kinds(evil).items()), strange_pictures()
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(250 * shard, 250 * shard + 250):
                if i % every == every - 1:
                    name, (told, members) = kinds[i // every % len(kinds)]
                    key = f"{name}-{i}"
                    bad[key] = told
                else:
                    key, members = f"good-{i}", [(".png", GOOD), (".txt", b"a caption")]
                    if i % 100 < len(strange):
                        members[0] = strange[i % 100]
                    good.add(key)
                for suffix, data in [*members, (".pkl", evil)]:
                    member = tarfile.TarInfo(key + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return good, bad


def test_a_thousand_samples_of_which_twenty_are_rotten(tmp_path: Path) -> None:
    good, bad = write_rotten(tmp_path / "shards", 50)
    assert len(good) == 980
    assert len(bad) == 20
    stream = StreamConfig(seed=3, image_size=16, global_batch=50, noise=False)
    loader = make_loader(open_dataset(tmp_path / "shards"), stream, stop=1000)
    assert {key for batch in loader for key in batch["key"]} == good

    recipe = tiny_recipe(tmp_path, max_steps=20, batch_size=50, checkpoint_every=20)
    data = DataConfig(path=str(tmp_path / "shards"), workers=2, bad_limit=0.03)
    run = train(replace(recipe, data=data))
    told = [json.loads(line) for line in (run / "bad_samples-0.jsonl").read_text().splitlines()]
    assert len(told) == 20
    assert {record["key"] for record in told} == bad.keys()
    for record in told:
        assert bad[record["key"]] in record["reason"]
        assert record["shard"].endswith(".tar")
    counted = progress_of(run).bad
    assert (counted["seen"], counted["bad"], counted["lost"]) == (1000, 20, {})
    assert not (tmp_path / "ran").exists()


def test_three_in_ten_rotten_stop_the_run(tmp_path: Path) -> None:
    _, bad = write_rotten(tmp_path / "shards", 3)
    assert len(bad) > 300
    recipe = tiny_recipe(tmp_path, max_steps=20, batch_size=50)
    recipe = replace(recipe, data=DataConfig(path=str(tmp_path / "shards"), workers=2))
    with pytest.raises(BadSampleError, match=r"of \d+ samples seen are bad, over the limit of 1"):
        train(recipe)


def test_a_dead_worker_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    command = [
        *(sys.executable, "train/t2i.py", "--config", "demo", "--data.path", recipe.data.path),
        *("--train.out", str(tmp_path / "run"), "--train.max-steps", "100000"),
        *("--train.batch-size", "4", "--train.threads", "1", "--train.sample-every", "0"),
        *("--train.checkpoint-every", "100000", "--train.log-every", "1", "--data.workers", "8"),
    ]
    root = Path(__file__).resolve().parents[2]
    job = subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not metrics.is_file() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        children = f"/proc/{job.pid}/task/{job.pid}/children"
        workers = [int(pid) for pid in Path(children).read_text().split()]
        assert len(workers) >= 8
        killed = time.monotonic()
        os.kill(workers[-1], signal.SIGKILL)
        _, told = job.communicate(timeout=60)
        assert time.monotonic() - killed < 30
    finally:
        job.kill()
        job.wait()
    assert job.returncode not in (0, -signal.SIGKILL)
    assert "DataLoader worker" in told
    assert "killed by signal" in told
    assert latest_checkpoint(tmp_path / "run") is None
