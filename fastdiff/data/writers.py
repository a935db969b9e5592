"""Writing captioned pictures in the two layouts that `open_dataset` reads.

A data set is written under a temporary name beside its place and renamed when it is whole, so a
writing that was interrupted is never taken for a complete one. `dataset_info.json` says what was
written; writing the same again is a no-op, writing something else over it is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

INFO_NAME = "dataset_info.json"


def encode_image(pixels: np.ndarray, image_format: str = "png") -> bytes:
    """Encode one picture.

    Args:
        pixels: (H, W, 3) uint8.
        image_format: "png" (lossless) or "jpg" (quality 95, no chroma subsampling).

    Raises:
        ValueError: an unknown format.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif image_format == "jpg":
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        raise ValueError(f"encode_image: image_format={image_format!r}; expected 'png' or 'jpg'")
    return buffer.getvalue()


def _is_written(path: Path, info: dict[str, Any]) -> bool:
    """True if `path` holds this very data set, False if it is free; else raises."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    try:
        found = json.loads((path / INFO_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        raise FileExistsError(
            f"{path} exists and is not a data set written by fastdiff (no {INFO_NAME} that can be "
            "read); remove it or choose another path"
        ) from None
    differing = {k: (found.get(k), info[k]) for k in info if found.get(k) != info[k]}
    if differing:
        told = ", ".join(f"{k}={was!r}, asked {new!r}" for k, (was, new) in differing.items())
        raise FileExistsError(f"{path} holds another data set: {told}; choose another path")
    return True


@contextmanager
def _new_folder(path: Path, info: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"
    partial.mkdir()
    try:
        yield partial
        (partial / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", "utf-8")
        try:
            os.rename(partial, path)
        except OSError:
            # Another process was faster; its data set must be the same one.
            if not _is_written(path, info):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_folder(
    path: str | Path, samples: Iterable[tuple[np.ndarray, str]], info: dict[str, Any]
) -> Path:
    """Write pictures and `metadata.jsonl` (`file_name`, `text`) into a new folder.

    Args:
        path: the folder; made with its parents.
        samples: pairs of pixels (H, W, 3) uint8 and caption. Not consumed if already written.
        info: what identifies this data set (JSON values), stored in `dataset_info.json`.

    Returns:
        The path.

    Raises:
        FileExistsError: something else is at `path`.
    """
    path, info = Path(path), {**info, "layout": "folder"}
    if _is_written(path, info):
        return path
    with _new_folder(path, info) as folder:
        (folder / "images").mkdir()
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for i, (pixels, caption) in enumerate(samples):
                name = f"images/{i:06d}.png"
                (folder / name).write_bytes(encode_image(pixels))
                metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    return path


def write_shards(
    path: str | Path,
    samples: Iterable[tuple[np.ndarray, str]],
    info: dict[str, Any],
    *,
    shard_size: int = 1000,
    image_format: str = "png",
) -> Path:
    """Write tar shards `00000.tar`, ... as img2dataset lays them out.

    Members of a sample are KEY.png (or .jpg), KEY.json (caption, key, status, width, height,
    sha256, ...) and KEY.txt; KEY is the five-digit shard and the four-digit place in it.

    Args:
        path: the folder; made with its parents.
        samples: pairs of pixels (H, W, 3) uint8 and caption. Not consumed if already written.
        info: what identifies this data set (JSON values), stored in `dataset_info.json`.
        shard_size: samples per tar, at most 10,000.
        image_format: "png" or "jpg".

    Returns:
        The path.

    Raises:
        FileExistsError: something else is at `path`.
        ValueError: `shard_size` outside 1..10,000.
    """
    if not 1 <= shard_size <= 10_000:
        raise ValueError(f"write_shards: shard_size={shard_size}; expected 1..10000")
    path = Path(path)
    info = {**info, "layout": "shards", "shard_size": shard_size, "image_format": image_format}
    if _is_written(path, info):
        return path
    stream = iter(samples)
    with _new_folder(path, info) as folder:
        shard = 0
        while chunk := list(islice(stream, shard_size)):
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                for i, (pixels, caption) in enumerate(chunk):
                    key = f"{shard:05d}{i:04d}"
                    for extension, payload in _members(key, pixels, caption, image_format):
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(payload)
                        tar.addfile(member, io.BytesIO(payload))
            shard += 1
    return path


def _members(
    key: str, pixels: np.ndarray, caption: str, image_format: str
) -> list[tuple[str, bytes]]:
    height, width = pixels.shape[:2]
    encoded = encode_image(pixels, image_format)
    fields = {
        "caption": caption,
        "url": "",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }
    return [
        (image_format, encoded),
        ("json", json.dumps(fields, indent=4).encode()),
        ("txt", caption.encode()),
    ]
