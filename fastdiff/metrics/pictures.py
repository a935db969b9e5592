"""Pictures to be judged: in a folder, a zip, tar shards, an `.npz` or CIFAR-10's archive.

Order is that of the sorted names (of an `.npz`, its own), the same in every process.
"""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fastdiff.data.samples import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, BadSample, decode_image
from fastdiff.data.shard_index import load_index
from fastdiff.data.transforms import SquareTransform

EXPECTED = (
    "expected a folder of pictures (.jpg, .png, .webp, at any depth), a folder of *.tar shards, "
    "one such tar, a .zip of pictures, an .npz of uint8 (N, H, W, 3), or cifar-10-binary.tar.gz"
)
_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the planes of red, green and blue
_CIFAR_BATCH = re.compile(r"(.*/)?data_batch_\d+\.bin")


class Source(Protocol):
    """Names of pictures, and each of them encoded or as pixels (H, W, 3) uint8."""

    @property
    def keys(self) -> Sequence[str]: ...

    def read(self, index: int) -> bytes | np.ndarray: ...


class Pictures:
    """Pictures by index, transformed; made by `open_pictures`.

    Args:
        path: where they lie; for messages.
        source: where they come from.
        transform: crop and size, or None for pictures as they are.
        count: the first so many of the source.
    """

    def __init__(
        self, path: Path, source: Source, transform: SquareTransform | None, count: int
    ) -> None:
        self.path, self.transform = path, transform
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    @property
    def total(self) -> int:
        """Pictures of the source, also beyond the count asked for."""
        return len(self._source.keys)

    def key(self, index: int) -> str:
        """The name of picture number `index`."""
        return self._source.keys[index]

    def __getitem__(self, index: int) -> np.ndarray:
        """Picture number `index` as (H, W, 3) uint8.

        Raises:
            BadSample: it cannot be read or does not fit the transform; the error names it.
            IndexError: outside 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Pictures: index {index}; expected 0..{len(self) - 1}")
        try:
            read = self._source.read(index)
            if self.transform is None:
                return read if isinstance(read, np.ndarray) else np.array(decode_image(read))
            image = Image.fromarray(read) if isinstance(read, np.ndarray) else decode_image(read)
            return self.transform(image)
        # A member of a zip that is damaged or encrypted raises one of the last three.
        except (ValueError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            raise BadSample(self.key(index), str(self.path), str(error)) from None


def open_pictures(
    path: str | Path, transform: SquareTransform | None = None, count: int | None = None
) -> Pictures:
    """Open pictures for reading by index; the kind of source is detected.

    Args:
        path: see the first lines of this file. Of an `.npz` the first array of the right shape and
            type is taken (ADM's sample files call it arr_0).
        transform: crop and size, or None.
        count: the first so many only; None for all.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: none of the kinds, empty, damaged, or fewer than `count` pictures.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"open_pictures: {path} does not exist; {EXPECTED}")
    source = _source(path)
    if not source.keys:
        raise ValueError(f"open_pictures: no picture in {path}; {EXPECTED}")
    if count is not None and not 1 <= count <= len(source.keys):
        raise ValueError(
            f"open_pictures: {count} pictures asked for; {path} holds {len(source.keys)}"
        )
    return Pictures(path, source, transform, len(source.keys) if count is None else count)


def _source(path: Path) -> Source:
    name = path.name.lower()
    if path.is_dir():
        tars = sorted(p for p in path.glob("*.tar") if p.is_file())
        return _Shards(tars) if tars else _Folder(path)
    if name.endswith(".tar"):
        return _Shards([path])
    if name.endswith(".zip"):
        return _Zip(path)
    if name.endswith(".npz"):
        return _npz(path)
    if name.endswith((".tar.gz", ".tgz")):
        return _cifar10(path)
    raise ValueError(f"open_pictures: {path} is none of the known kinds; {EXPECTED}")


def _is_picture(name: str) -> bool:
    base = name.rpartition("/")[2]
    # Names with a dot in front are other programs' notes, or files that are being written.
    return base.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not base.startswith(".")


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"picture has {size} bytes; at most {MAX_IMAGE_BYTES} are read")


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.keys: Sequence[str] = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if _is_picture(path.name) and path.is_file()
        )

    def read(self, index: int) -> bytes:
        path = self.root / self.keys[index]
        _check_size(path.stat().st_size)
        return path.read_bytes()


class _Shards:
    def __init__(self, paths: Sequence[Path]) -> None:
        keys: list[str] = []
        self._spans: list[tuple[Path, int, int]] = []
        for path in paths:
            try:
                index = load_index(path)
            except ValueError as error:
                raise ValueError(f"open_pictures: {path}: {error}") from None
            for key, row in zip(index.keys, index.rows, strict=True):
                # A caption without a picture is not one of the pictures.
                if row["image_offset"] >= 0:
                    keys.append(f"{path.name}:{bytes(key).decode('utf-8', 'replace')}")
                    self._spans.append((path, int(row["image_offset"]), int(row["image_size"])))
        self.keys: Sequence[str] = keys

    def read(self, index: int) -> bytes:
        path, offset, size = self._spans[index]
        _check_size(size)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [i for i in archive.infolist() if _is_picture(i.filename)]
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"open_pictures: {path} is damaged: {error}") from None
        self._members = sorted(members, key=lambda member: member.filename)
        self.keys: Sequence[str] = [member.filename for member in self._members]
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def read(self, index: int) -> bytes:
        _check_size(self._members[index].file_size)
        # One handle for each process: a forked one would share its position with the others.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1].read(self._members[index])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}


class _Pixels:
    def __init__(self, keys: Sequence[str], pixels: np.ndarray) -> None:
        self.keys: Sequence[str] = keys
        self.pixels = pixels

    def read(self, index: int) -> np.ndarray:
        pixels: np.ndarray = self.pixels[index]
        return pixels


def _npz(path: Path) -> Source:
    found = []
    try:
        # Opened here, as NumPy leaves the file open when it is no archive.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3:
                    return _Pixels([f"{name}[{i}]" for i in range(len(array))], array)
                found.append(f"{name} {array.dtype} {array.shape}")
    # The last is a bare array under the name of an archive.
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"open_pictures: {path} cannot be read: {error}") from None
    raise ValueError(
        f"open_pictures: {path} holds {', '.join(found) or 'nothing'}; expected uint8 (N, H, W, 3)"
    )


def _cifar10(path: Path) -> Source:
    """The 50,000 training pictures of CIFAR-10's binary version, in the order of its batches."""
    batches: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if _CIFAR_BATCH.fullmatch(member.name) and (file := tar.extractfile(member)):
                    batches[member.name] = np.frombuffer(file.read(), np.uint8)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"open_pictures: {path} is damaged: {error}") from None
    if not batches:
        raise ValueError(
            f"open_pictures: {path} holds no data_batch_N.bin. Of CIFAR-10 take the binary version "
            "(the Python version is pickles, which are never read); unpack other archives first"
        )
    for name, batch in batches.items():
        if len(batch) == 0 or len(batch) % _CIFAR_RECORD:
            raise ValueError(
                f"open_pictures: {name} has {len(batch)} bytes; expected records of {_CIFAR_RECORD}"
            )
    names = sorted(batches)
    keys = [f"{name}[{i}]" for name in names for i in range(len(batches[name]) // _CIFAR_RECORD)]
    records = np.concatenate([batches[name] for name in names]).reshape(-1, _CIFAR_RECORD)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return _Pixels(keys, np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
