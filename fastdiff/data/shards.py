"""Tar shards as img2dataset writes them, indexed once and read by global sample index.

A shard holds KEY.jpg (.jpeg, .png, .webp) with KEY.txt and/or KEY.json ("caption"); KEY is the
name up to its first dot, as in WebDataset. The index keeps offset and size of each member, beside
the shard as `SHARD.tar.index.npz`; it is used while the shard's size and time of change are the
same. Other members are never read, nothing is ever extracted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import tarfile
import zipfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.data.samples import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    BadSample,
    Sample,
    caption_of,
    decode_caption,
    decode_image,
    parse_json,
)

log = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.npz"
INDEX_VERSION = 1
MAX_OPEN_SHARDS = 64
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


class BadShard(NamedTuple):
    """A shard that is left out as a whole, and why."""

    path: str
    reason: str


class ShardIndex(NamedTuple):
    """Keys (bytes, UTF-8) and member positions of the samples of one shard, in file order."""

    keys: np.ndarray
    rows: np.ndarray


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
    """
    stored = path.with_name(path.name + INDEX_SUFFIX)
    stamp = _stamp(path)
    try:
        # Opened here, as NumPy leaves the file open when it is no archive.
        with open(stored, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            if np.array_equal(file["stamp"], stamp) and file["rows"].dtype == _ROW:
                return ShardIndex(file["keys"], file["rows"])
    # Absent, or not an index: made anew.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    index = index_shard(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, stamp=stamp, keys=index.keys, rows=index.rows)
        os.replace(partial, stored)
    # A folder that cannot be written: the index stays in memory.
    except OSError as error:
        log.info("index of %s is not stored: %s", path, error)
        with suppress(OSError):
            partial.unlink()
    return index


class ShardDataset:
    """Captioned pictures of tar shards by global sample index, in the order of the sorted names.

    Shards that cannot be read are left out, logged and listed in `bad_shards`. The object may be
    pickled and forked: positions are arrays, files are opened by the process that reads.

    Args:
        shards: paths of tar files.

    Raises:
        ValueError: no shard can be read.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.shards: list[Path] = []
        self.bad_shards: list[BadShard] = []
        self._indices: list[ShardIndex] = []
        for path in sorted(Path(shard) for shard in shards):
            try:
                self._indices.append(load_index(path))
                self.shards.append(path)
            except (ValueError, OSError) as error:
                self.bad_shards.append(BadShard(str(path), str(error)))
                log.warning("shard %s is left out: %s", path, error)
        if not self.shards:
            told = "; ".join(f"{bad.path}: {bad.reason}" for bad in self.bad_shards[:3])
            raise ValueError(f"open_dataset: none of {len(shards)} tar shards can be read: {told}")
        if self.bad_shards:
            log.warning("%d of %d shards are left out", len(self.bad_shards), len(shards))
        self._ends = list(accumulate(len(index.rows) for index in self._indices))
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Names, sizes and sample counts of the shards as 16 hex digits: equal on all ranks, and
        when a run is resumed, or index i does not mean the same sample."""
        told = [
            f"{path.name} {path.stat().st_size} {len(index.rows)}"
            for path, index in zip(self.shards, self._indices, strict=True)
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index` over all shards.

        Raises:
            BadSample: picture or caption cannot be used.
            IndexError: outside 0..len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"ShardDataset: index {index}; expected 0..{len(self) - 1}")
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        key = bytes(self._indices[shard].keys[place]).decode("utf-8", "replace")
        try:
            caption, image = self._read(shard, self._indices[shard].rows[place])
            return Sample(decode_image(image), caption, key)
        except (ValueError, OSError) as error:
            raise BadSample(key, str(self.shards[shard]), str(error)) from None

    def _read(self, shard: int, row: np.void) -> tuple[str, bytes]:
        if row["repeated"]:
            raise ValueError("a member of this key occurs twice")
        if row["image_offset"] < 0:
            raise ValueError("picture is missing")
        if row["txt_offset"] >= 0:
            caption = decode_caption(self._member(shard, row, "txt", MAX_CAPTION_BYTES))
        elif row["json_offset"] >= 0:
            fields = parse_json(self._member(shard, row, "json", MAX_CAPTION_BYTES))
            caption = caption_of(fields, "caption")
        else:
            raise ValueError("caption is missing (no .txt, no .json)")
        return caption, self._member(shard, row, "image", MAX_IMAGE_BYTES)

    def _member(self, shard: int, row: np.void, name: str, limit: int) -> bytes:
        offset, size = int(row[f"{name}_offset"]), int(row[f"{name}_size"])
        if size > limit:
            raise ValueError(f"{name} has {size} bytes; at most {limit} are read")
        data = os.pread(self._file(shard), size, offset)
        if len(data) != size:
            raise ValueError(f"{name} is cut: {len(data)} of {size} bytes")
        return data

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():
            # After a fork the descriptors are the parent's to close.
            self._files, self._pid = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close this process's files; they are opened again when needed."""
        if self._pid == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}
