"""Where the samples of a tar shard lie: one entry a sample, made once from the tar's headers.

A shard holds KEY.jpg (.jpeg, .png, .webp) with KEY.txt and/or KEY.json ("caption"); KEY is the
name up to its first dot, as in WebDataset. The index keeps offset and size of each member, beside
the shard as `SHARD.tar.index.npz`; it is used while the shard's size and time of change are the
same. Other members are never read, nothing is ever extracted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.data.samples import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.npz"
INDEX_VERSION = 2
_BLOCK = 512

_ROW = np.dtype(
    [
        ("image_offset", np.int64),  # -1: the member is absent
        ("image_size", np.int64),
        ("txt_offset", np.int64),
        ("txt_size", np.int64),
        ("json_offset", np.int64),
        ("json_size", np.int64),
        ("repeated", np.bool_),  # a member of this key occurs twice
    ]
)
_EMPTY = (-1, 0, -1, 0, -1, 0, False)
# What zipfile and NumPy raise for a file that is no index, or half of one.
_NO_INDEX = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class ShardIndex(NamedTuple):
    """Keys (bytes, UTF-8) and member positions of the samples of one shard, in file order."""

    keys: np.ndarray
    rows: np.ndarray

    @property
    def digest(self) -> str:
        """Of the keys in their order, 16 hex digits: what belongs to one shard and no other."""
        told = b"\0".join(self.keys.tolist())
        return hashlib.sha256(told).hexdigest()[:16]


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of a tar file.

    Raises:
        ValueError: not a tar, empty, no sample in it, or cut (also at a member's boundary, where
            a plain reader would silently find fewer samples).
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError("file is empty")
    samples: dict[str, list[Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:
                    raise ValueError(f"member {member.name!r} has a negative size")
                if member.offset_data + member.size > size:
                    raise ValueError(f"truncated inside member {member.name!r}")
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    _add_member(samples, member)
            end = tar.offset
    except tarfile.TarError as error:
        reason = "truncated" if samples else "not a tar file"
        raise ValueError(f"{reason}: {error}") from None
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"truncated or damaged at byte {end} after {len(samples)} samples")
    if not samples:
        raise ValueError("no picture or caption in it")
    rows = np.array([tuple(row) for row in samples.values()], _ROW)
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in samples], np.bytes_)
    return ShardIndex(keys, rows)


def _add_member(samples: dict[str, list[Any]], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    if extension in IMAGE_EXTENSIONS:
        column = 0
    elif extension in ("txt", "json"):
        column = 2 if extension == "txt" else 4
    else:
        return
    row = samples.setdefault(f"{folder}/{stem}" if folder else stem, list(_EMPTY))
    if row[column] >= 0:
        row[6] = True
    else:
        row[column], row[column + 1] = member.offset_data, member.size


def _stamp(path: Path) -> np.ndarray:
    stat = path.stat()
    return np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def load_index(path: Path) -> ShardIndex:
    """The index of a shard: the stored one while it is valid, else a new one, then stored.

    Raises:
        ValueError: the shard is rotten (see `index_shard`).
        FileNotFoundError: there is no such shard.
    """
    stored = path.with_name(path.name + INDEX_SUFFIX)
    stamp = _stamp(path)
    # Opened here, as NumPy leaves the file open when it is no archive.
    with (
        suppress(*_NO_INDEX),
        open(stored, "rb") as raw,
        np.load(raw, allow_pickle=False) as file,
    ):
        if np.array_equal(file["stamp"], stamp) and file["rows"].dtype == _ROW:
            return ShardIndex(file["keys"], file["rows"])
    index = index_shard(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "wb") as file:
            count = np.int64(len(index.rows))
            np.savez(file, stamp=stamp, count=count, keys=index.keys, rows=index.rows)
        os.replace(partial, stored)
    # A folder that cannot be written: the index stays in memory.
    except OSError as error:
        log.info("index of %s is not stored: %s", path, error)
        with suppress(OSError):
            partial.unlink()
    return index


def count_samples(path: Path) -> int:
    """Samples of a local shard: by img2dataset's `SHARD_stats.json`, else by the shard's index.

    Raises:
        ValueError: the shard is rotten (see `index_shard`).
        OSError: there is none.
    """
    path.stat()
    with suppress(OSError):
        told = stats_count(path.with_name(f"{path.stem}_stats.json").read_bytes())
        if told is not None:
            return told
    with (
        suppress(*_NO_INDEX),
        open(path.with_name(path.name + INDEX_SUFFIX), "rb") as raw,
        np.load(raw, allow_pickle=False) as file,
    ):
        if np.array_equal(file["stamp"], _stamp(path)):
            return int(file["count"])
    return len(load_index(path).rows)


def stats_count(data: bytes) -> int | None:
    """Samples that img2dataset wrote into a shard, by its stats file; None where it is rotten."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        told = json.loads(data).get("successes")
        if isinstance(told, int) and told >= 0:
            return told
    return None
