"""The same pictures out of every kind of source, and what is told of damaged ones."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import BadSample, scenes
from fastdiff.data.transforms import named_transform
from fastdiff.data.writers import encode_image
from fastdiff.metrics import Pictures, open_pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 12, 10, 3), np.uint8)


def write_folder(path: Path) -> Path:
    for i, pixels in enumerate(PIXELS):
        file = path / f"class{i % 2}" / f"{i}.PNG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_image(pixels))
    (path / "class0" / ".half.png").write_bytes(b"being written")
    (path / "notes.txt").write_text("no picture")
    return path


def everything(pictures: Pictures) -> np.ndarray:
    return np.stack([pictures[i] for i in range(len(pictures))])


def test_a_folder_at_any_depth_in_the_order_of_its_names(tmp_path: Path) -> None:
    pictures = open_pictures(write_folder(tmp_path))
    assert pictures.key(3) == "class0/6.PNG"
    assert np.array_equal(everything(pictures), PIXELS[[0, 2, 4, 6, 1, 3, 5]])


def test_a_zip(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(tmp_path))
    pictures = open_pictures(tmp_path / "a.zip")
    assert np.array_equal(everything(pictures), PIXELS[[0, 2, 4, 6, 1, 3, 5]])
    copy = pickle.loads(pickle.dumps(pictures))  # as processes that read are started
    assert np.array_equal(copy[1], PIXELS[2])


def test_tar_shards_with_and_without_captions(tmp_path: Path) -> None:
    scenes.write_shards(tmp_path / "shards", n=5, resolution=16, shard_size=3)
    scenes.write_folder(tmp_path / "folder", n=5, resolution=16)
    pictures = open_pictures(tmp_path / "shards")
    assert np.array_equal(everything(pictures), everything(open_pictures(tmp_path / "folder")))
    assert pictures.key(3) == "00001.tar:000010000"
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for i, pixels in enumerate(PIXELS):
            data = encode_image(pixels)
            member = tarfile.TarInfo(f"{i:05d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert np.array_equal(everything(open_pictures(tmp_path / "one.tar")), PIXELS)


def test_an_npz_as_adm_writes_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.arange(7), arr_0=PIXELS)
    pictures = open_pictures(tmp_path / "a.npz", count=4)
    assert len(pictures) == 4
    assert np.array_equal(everything(pictures), PIXELS[:4])
    with pytest.raises(IndexError, match="index 4"):
        pictures[4]


def write_cifar(path: Path, pixels: np.ndarray, name: str = "data_batch") -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for i, rows in reversed(list(enumerate(np.split(pixels, 2), 1))):
            planes = rows.transpose(0, 3, 1, 2).reshape(len(rows), -1)
            data = np.concatenate([np.full((len(rows), 1), 9, np.uint8), planes], 1).tobytes()
            for member_name in (f"cifar/{name}_{i}.bin", "cifar/test_batch.bin"):
                member = tarfile.TarInfo(member_name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_cifar10_out_of_its_archive(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), np.uint8)
    path = write_cifar(tmp_path / "cifar-10-binary.tar.gz", pixels)
    pictures = open_pictures(path, named_transform("cifar10"))
    assert np.array_equal(everything(pictures), pixels)
    with pytest.raises(ValueError, match="binary version"):
        open_pictures(write_cifar(tmp_path / "cifar-10-python.tar.gz", pixels, "other"))
    (tmp_path / "cut.tar.gz").write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"cut\.tar\.gz is damaged"):
        open_pictures(tmp_path / "cut.tar.gz")


def test_the_transform_is_applied_and_a_misfit_is_named(tmp_path: Path) -> None:
    pictures = open_pictures(write_folder(tmp_path), named_transform("square8"))
    assert pictures[0].shape == (8, 8, 3)
    with pytest.raises(BadSample, match=r"class0/0\.PNG.*10x12 pixels; expected 178x218"):
        open_pictures(tmp_path, named_transform("celeba64"))[0]


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    (write_folder(tmp_path / "folder") / "class1" / "1.PNG").write_bytes(b"\x89PNG\r\n\x1a\nrotten")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "folder" / "class0" / "0.PNG", "good.png")
        archive.write(tmp_path / "folder" / "class0" / "2.PNG", "z.png", zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    start = data.index(b"z.png") + 5
    data[start : start + 60] = bytes(60)
    (tmp_path / "a.zip").write_bytes(data)
    for path, index, key in (("folder", 4, "class1/1.PNG"), ("a.zip", 1, "z.png")):
        pictures = open_pictures(tmp_path / path)
        pictures[0]
        with pytest.raises(BadSample, match=key) as caught:
            pictures[index]
        assert str(tmp_path / path) in str(caught.value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_source_of_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder"):
        open_pictures(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture in"):
        open_pictures(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"8 pictures asked for; .* holds 7"):
        open_pictures(write_folder(tmp_path / "folder"), count=8)
    for name in ("a.zip", "a.npz", "a.tar", "a.tgz", "a.png"):
        (tmp_path / name).write_bytes(b"something else altogether")
        with pytest.raises(ValueError, match=rf"open_pictures: .*{name}"):
            open_pictures(tmp_path / name)
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds mu float64 \(3,\)"):
        open_pictures(tmp_path / "other.npz")
    with open(tmp_path / "bare.npz", "wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(ValueError, match="cannot be read"):
        open_pictures(tmp_path / "bare.npz")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.array([Bomb(tmp_path / "ran")], object))
    with pytest.raises(ValueError, match="pickle"):
        open_pictures(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ValueError, match="cannot be read"):
        open_pictures(tmp_path / "b.npz")
    assert not (tmp_path / "ran").exists()


def test_pictures_with_alpha_or_grey_come_as_rgb(tmp_path: Path) -> None:
    Image.new("LA", (4, 4), (0, 255)).save(tmp_path / "grey.png")
    assert open_pictures(tmp_path)[0].tolist() == np.zeros((4, 4, 3)).tolist()
