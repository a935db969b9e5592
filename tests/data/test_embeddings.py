"""Stored text features: writing on several processes, reading with checks, refusing others'."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.data import BadSample, StreamConfig, make_loader, open_dataset, scenes
from fastdiff.data.embed import embed_shards
from fastdiff.data.embeddings import EmbeddedShard, WrongEncoder, embedded_name
from fastdiff.data.shards import ShardDataset

WIDTH = 6


class LetterEncoder:
    """A text encoder whose features say what it was given: token ids are bytes."""

    label, commit, weights, width = "letters@1", "", "00", WIDTH
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(list(c.encode())) for c in captions]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, ids != 0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        return ids.unsqueeze(-1).float() * torch.arange(1, WIDTH + 1)

    def expected(self, caption: str) -> Tensor:
        ids, mask = self.tokenize([caption])
        return self(ids, mask)[0].to(torch.bfloat16)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of ten samples; of one the caption is empty."""
    path = scenes.write_shards(tmp_path / "shards", n=40, resolution=8, seed=1, shard_size=10)
    with tarfile.open(path / "00001.tar") as tar:
        member = tar.getmember("000010004.txt")
    data = bytearray((path / "00001.tar").read_bytes())
    data[member.offset_data : member.offset_data + member.size] = b" " * member.size
    (path / "00001.tar").write_bytes(data)
    return path


def opened(path: Path) -> ShardDataset:
    dataset = open_dataset(path)
    assert isinstance(dataset, ShardDataset)
    return dataset


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_every_caption_has_its_features_and_nothing_else(shards: Path, tmp_path: Path) -> None:
    encoder = LetterEncoder()
    done = embed_shards(opened(shards), encoder, tmp_path / "text", batch_tokens=400)
    assert [(w.samples, w.rotten) for w in done.written] == [(10, 0), (10, 1), (10, 0), (10, 0)]
    assert (done.kept, done.failed) == (0, [])
    # Short captions first, many at once; never over the budget.
    assert all(rows * length <= 400 for rows, length in encoder.calls)
    assert max(rows for rows, _ in encoder.calls) > min(rows for rows, _ in encoder.calls) > 0
    dataset = open_dataset(shards, embeddings=tmp_path / "text", encoder="letters@1")
    for i in range(40):
        if i == 14:
            with pytest.raises(BadSample, match="caption is empty"):
                dataset[i]
            continue
        sample = dataset[i]
        assert sample.context is not None
        assert torch.equal(sample.context, encoder.expected(sample.caption))


def test_files_are_plain_safetensors_without_padding(shards: Path, tmp_path: Path) -> None:
    embed_shards(opened(shards), LetterEncoder(), tmp_path)
    tables = load_file(tmp_path / "00001.text.safetensors")
    assert tables["tokens"].dtype == torch.bfloat16
    assert tables["tokens"].shape == (int(tables["length"].sum()), WIDTH)
    assert tables["length"][4] == 0
    header = EmbeddedShard(tmp_path / "00001.text.safetensors").header
    assert header["encoder"] == "letters@1"
    assert header["shard"] == "00001.tar"
    size = (tmp_path / "00001.text.safetensors").stat().st_size
    assert size < tables["tokens"].numel() * 2 + 10 * 24 + 2000


def test_any_number_of_processes_writes_the_same_files(shards: Path, tmp_path: Path) -> None:
    embed_shards(opened(shards), LetterEncoder(), tmp_path / "one")
    for rank in (2, 0, 1):
        embed_shards(opened(shards), LetterEncoder(), tmp_path / "three", rank=rank, world=3)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert len(files(tmp_path / "one")) == 4


def test_a_job_goes_on_where_it_was_killed(shards: Path, tmp_path: Path) -> None:
    embed_shards(opened(shards), LetterEncoder(), tmp_path / "whole")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_embeddings import LetterEncoder, opened
from fastdiff.data.embed import embed_shards
from pathlib import Path
class Dying(LetterEncoder):
    def __call__(self, ids, mask):
        if len(self.calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(ids, mask)
embed_shards(opened(Path({str(shards)!r})), Dying(), {str(tmp_path / "text")!r}, batch_tokens=150)
"""
    job = subprocess.run([sys.executable, "-c", code], check=False)
    assert job.returncode == -signal.SIGKILL
    left = files(tmp_path / "text")
    assert any(name.endswith(".partial") for name in left)
    whole = [name for name in left if not name.startswith(".")]
    assert 0 < len(whole) < 4
    dataset = opened(shards)
    for rank in range(2):  # on another number of processes
        embed_shards(dataset, LetterEncoder(), tmp_path / "text", rank=rank, world=2)
    assert files(tmp_path / "text").keys() == files(tmp_path / "whole").keys()
    for name in whole:
        assert files(tmp_path / "text")[name] == left[name]
    again = embed_shards(dataset, LetterEncoder(), tmp_path / "text")
    assert (again.written, again.kept) == ([], 4)


def test_another_encoder_is_refused(shards: Path, tmp_path: Path) -> None:
    encoder = LetterEncoder()
    embed_shards(opened(shards), encoder, tmp_path / "text")
    with pytest.raises(WrongEncoder, match=r"features of letters@1; this run has t5:x@main"):
        open_dataset(shards, embeddings=tmp_path / "text", encoder="t5:x@main")
    encoder.label = "letters@2"
    with pytest.raises(WrongEncoder, match=r"of letters@1, not of letters@2; give another folder"):
        embed_shards(opened(shards), encoder, tmp_path / "text")
    # One shard of another encoder among the right ones stops a run, it does not thin it out.
    (tmp_path / "text" / embedded_name("00003.tar")).unlink()
    embed_shards(opened(shards), encoder, tmp_path / "other")
    shutil.copy(tmp_path / "other" / embedded_name("00003.tar"), tmp_path / "text")
    dataset = open_dataset(shards, embeddings=tmp_path / "text", encoder="letters@1")
    assert dataset[0].context is not None
    with pytest.raises(WrongEncoder):
        dataset[35]


def test_features_that_do_not_belong_are_bad_samples(shards: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    embed_shards(opened(shards), LetterEncoder(), text)
    # Of another shard; cut; absent.
    shutil.copy(text / embedded_name("00000.tar"), text / embedded_name("00001.tar"))
    cut = text / embedded_name("00002.tar")
    cut.write_bytes(cut.read_bytes()[:-1])
    (text / embedded_name("00003.tar")).unlink()
    dataset = open_dataset(shards, embeddings=text)
    for index, reason in ((10, "another 00001.tar"), (20, "expected"), (30, "No such file")):
        with pytest.raises(BadSample, match=reason) as caught:
            dataset[index]
        assert caught.value.lost
    # A sample whose caption is no longer the one that was encoded.
    with tarfile.open(shards / "00000.tar") as tar:
        member = tar.getmember("000000002.txt")
    data = bytearray((shards / "00000.tar").read_bytes())
    data[member.offset_data] ^= 1
    (shards / "00000.tar").write_bytes(data)
    dataset = open_dataset(shards, embeddings=text)
    with pytest.raises(BadSample, match="caption is not the one"):
        dataset[2]
    assert dataset[3].context is not None


def test_a_flipped_byte_is_found(shards: Path, tmp_path: Path) -> None:
    embed_shards(opened(shards), LetterEncoder(), tmp_path)
    file = tmp_path / embedded_name("00000.tar")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    captions = opened(shards).captions(0)[1]
    encoder = LetterEncoder()
    for place in range(0, len(whole), 61):
        data = bytearray(whole)
        data[place] ^= 0x10
        file.write_bytes(data)
        try:
            found = EmbeddedShard(file)
        except ValueError:
            assert place < header
            continue
        for row, caption in enumerate(captions):
            assert caption is not None
            # What is read is right, or it is not read.
            try:
                features = found.read(row, caption)
            except ValueError:
                continue
            assert torch.equal(features, encoder.expected(caption)) or place < header
        found.close()
    far = whole.replace(
        b'"length": {"dtype": "I64", "shape": [10], "data_offsets": [80, 160]}',
        b'"length": {"dtype": "I64", "shape":[9], "data_offsets":[80, 9152]} ',
    )
    assert far != whole
    for data in (b"", b"\xff" * 100, (5).to_bytes(8, "little") + b"[[[[[", far):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"00000\.text\.safetensors"):
            EmbeddedShard(file)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_padded_features_and_a_mask(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    embed_shards(opened(shards), LetterEncoder(), tmp_path / "text")
    dataset = open_dataset(shards, embeddings=tmp_path / "text")
    config = StreamConfig(seed=0, image_size=8, global_batch=8)
    encoder = LetterEncoder()
    for batch in make_loader(dataset, config, stop=40, num_workers=workers):
        context, mask = batch["context"], batch["mask"]
        assert context.dtype == torch.bfloat16
        assert context.shape == (*mask.shape, WIDTH)
        assert mask.any(0)[-1]  # no longer than the longest
        assert bool((context[~mask] == 0).all())
        for i, caption in enumerate(batch["caption"]):
            assert torch.equal(context[i, mask[i]], encoder.expected(caption))


def test_remote_shards_and_remote_features(shards: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in sorted(shards.glob("*.tar")):
        memory.pipe_file(f"/bucket/{tar.name}", tar.read_bytes())
    cache = tmp_path / "cache"
    try:
        far = open_dataset("memory://bucket", cache=cache)
        assert isinstance(far, ShardDataset)
        for _ in range(2):
            done = embed_shards(far, LetterEncoder(), "memory://text")
        assert (done.written, done.kept) == ([], 4)
        dataset = open_dataset("memory://bucket", embeddings="memory://text", cache=cache)
        batch = next(iter(make_loader(dataset, StreamConfig(seed=0, image_size=8, global_batch=8))))
        assert batch["context"].shape[2] == WIDTH
        near = open_dataset(shards, embeddings="memory://text", cache=cache)
        assert torch.equal(near[3].context, dataset[3].context)  # type: ignore[arg-type]
    finally:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]


def test_missing_features_say_what_makes_them(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text features in .*fastdiff embed-text"):
        open_dataset(shards, embeddings=tmp_path)
    folder = scenes.write_folder(tmp_path / "folder", n=2, resolution=8, seed=1)
    with pytest.raises(ValueError, match="text features belong to tar shards"):
        open_dataset(folder, embeddings=tmp_path)


def test_features_that_are_not_finite_are_not_stored(shards: Path, tmp_path: Path) -> None:
    class Overflowing(LetterEncoder):
        def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
            features = super().__call__(ids, mask)
            features[0, 0, 0] = torch.nan
            return features

    done = embed_shards(opened(shards), Overflowing(), tmp_path / "text", batch_tokens=10**6)
    assert [w.rotten for w in done.written] == [1, 2, 1, 1]
    dataset = open_dataset(shards, embeddings=tmp_path / "text")
    bad = []
    for i in range(10):
        try:
            dataset[i]
        except BadSample as error:
            bad.append(error.reason)
    assert bad == ["no stored text features"]
