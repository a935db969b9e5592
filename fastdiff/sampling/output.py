"""Where drawn pictures go: a folder, a tar or an `.npz`, whole at any moment.

A picture is written beside its place, brought to the disk and renamed, so a file that is there is
whole, and its name is its number, so none is there twice. An archive grows as such a folder beside
its place (NAME.parts) and is packed when all pictures are there. So a drawing that was killed goes
on where it stopped, in whatever number of processes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdiff.data.writers import encode_image

SETTINGS = "settings.json"


class Output:
    """Pictures 0..count-1 of one drawing.

    Args:
        path: A folder, or a file that ends in .tar (KEY.png with KEY.txt, which `open_dataset`
            reads) or .npz (`arr_0`, (N, H, W, 3) uint8).
        settings: What the pictures depend on (JSON values). They are stored as `settings.json`, or
            beside an archive as NAME.json.
        count: Their number.
        captions: A text for each, or None; in a folder they go to `metadata.jsonl`.

    Raises:
        FileExistsError: Something else is there, or pictures of other settings; the message has
            the fields that differ. Nothing was changed.
        ValueError: No pictures, or another number of captions.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        count: int,
        captions: Sequence[str] | None = None,
    ) -> None:
        if count < 1 or (captions is not None and len(captions) != count):
            given = "" if captions is None else f", captions={len(captions)}"
            raise ValueError(f"Output: count={count}{given}; expected at least 1 and as many")
        self.path, self.count, self.captions = Path(path), count, captions
        self.settings = json.loads(json.dumps(settings))
        self.archive = self.path.suffix in (".tar", ".npz") and not self.path.is_dir()
        self.folder = self._beside(".parts") if self.archive else self.path
        if self.archive and self.path.exists():
            self._check(self._beside(".json"))
            self._done = set(range(count))
            return
        there = _listed(self.folder)
        if SETTINGS in there:
            self._check(self.folder / SETTINGS)
        elif there:
            raise FileExistsError(
                f"{self.folder} exists and holds no {SETTINGS} of a drawing; choose another path"
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write([(SETTINGS, self._text(self.settings))])
        self._done = {i for i in range(count) if self._name(i) in there}

    @property
    def complete(self) -> bool:
        """Whether every picture is there."""
        return len(self._done) == self.count

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the pictures that are not there."""
        return [i for i in indices if i not in self._done]

    def write(self, indices: Sequence[int], pictures: np.ndarray) -> None:
        """Add pictures, (B, H, W, 3) uint8, with these numbers; those that are there stay.

        Raises:
            ValueError: Another shape or dtype.
        """
        if pictures.dtype != np.uint8 or pictures.shape[:1] + pictures.shape[3:] != (
            len(indices),
            3,
        ):
            raise ValueError(
                f"Output: pictures are {pictures.dtype} of shape {pictures.shape}; expected uint8 "
                f"({len(indices)}, H, W, 3)"
            )
        new = [(i, p) for i, p in zip(indices, pictures, strict=True) if i not in self._done]
        self._write((self._name(i), encode_image(p)) for i, p in new)
        self._done.update(i for i, _ in new)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Pictures that are there, (B, H, W, 3) uint8.

        Raises:
            FileNotFoundError: One is not there; or the archive is packed.
        """
        pictures = []
        for i in indices:
            with Image.open(self.folder / self._name(i)) as image:
                pictures.append(np.array(image))
        return np.stack(pictures)

    def finish(self) -> Path:
        """Pack the archive, or write the captions; by one process, when all pictures are there.

        Raises:
            ValueError: Pictures are missing; the first is named.
        """
        if not (self.archive and self.path.exists()):
            names = [self._name(i) for i in range(self.count)]
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"Output: {len(missing)} of {self.count} pictures are missing in "
                    f"{self.folder}, {missing[0]} first"
                )
            for path in self.folder.iterdir():
                if _partial(path):
                    path.unlink()
            if self.archive:
                self._pack(names)
            elif self.captions is not None:
                pairs = zip(names, self.captions, strict=True)
                lines = [json.dumps({"file_name": n, "text": c}) + "\n" for n, c in pairs]
                self._write([("metadata.jsonl", "".join(lines).encode())])
        if self.archive:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.path

    def _pack(self, names: Sequence[str]) -> None:
        about = self._beside(".json")
        _write_whole(about, self._text(self.settings))
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "wb") as file:
            (self._pack_tar if self.path.suffix == ".tar" else self._pack_npz)(file, names)
            _to_disk(file)
        os.replace(partial, self.path)
        _folder_to_disk(self.path.parent)

    def _pack_tar(self, file: Any, names: Sequence[str]) -> None:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i, name in enumerate(names):
                members = [(name, (self.folder / name).read_bytes())]
                if self.captions is not None:
                    members.append((name[:-4] + ".txt", self.captions[i].encode()))
                for member, data in members:
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    def _pack_npz(self, file: Any, names: Sequence[str]) -> None:
        shape = (len(names), *self.read([0])[0].shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(file, "w") as npz, npz.open("arr_0.npy", "w", force_zip64=True) as to:
            np.lib.format.write_array_header_1_0(to, header)
            for i in range(self.count):
                to.write(self.read([i]).tobytes())

    def _check(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise FileExistsError(
                f"{self.path} exists, and its settings cannot be read ({error}); choose another "
                "path"
            ) from None
        keys = [k for k in {**found, **self.settings} if found.get(k) != self.settings.get(k)]
        if keys:
            told = "; ".join(f"{k}={found.get(k)!r}, asked {self.settings.get(k)!r}" for k in keys)
            raise FileExistsError(
                f"{self.path} holds pictures of other settings: {told}; choose another path"
            )

    def _write(self, files: Iterable[tuple[str, bytes]]) -> None:
        for name, data in files:
            _write_whole(self.folder / name, data)
        _folder_to_disk(self.folder)

    def _name(self, index: int) -> str:
        return f"{index:06d}.png"

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    @staticmethod
    def _text(settings: dict[str, Any]) -> bytes:
        return (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode()


def _listed(path: Path) -> set[str]:
    """What a folder holds, or the path itself where it is no folder; without what is half-written.

    Listed once: another rank may be writing.
    """
    if not path.is_dir():
        return {path.name} if path.exists() else set()
    return {entry.name for entry in path.iterdir() if not _partial(entry)}


def _partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _write_whole(path: Path, data: bytes) -> None:
    # Several ranks write the settings, each under a name of its own.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        _to_disk(file)
    os.replace(partial, path)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
