"""Stored text features: one safetensors file beside (or apart from) each tar shard.

    00012.tar  ->  00012.text.safetensors

        header    format, encoder, commit, weights, shard, shard_bytes, keys
        start     (N,) int64    first token of sample i
        length    (N,) int64    its tokens; 0 where the caption is rotten
        caption   (N,) uint32   CRC-32 of the caption that was encoded
        crc       (N,) uint32   CRC-32 of the features
        tokens    (T, width) bfloat16, valid tokens only

A file is written under another name, synced and renamed, so it is whole or absent; every sample
is checked against its sum when it is read. `encoder` is the label of what made the features and
training refuses any other; `keys` and `caption` tell when the shard is no longer the one that was
encoded.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.cache import ShardCache, Source, is_remote, list_shards
from fastdiff.data.shard_index import ShardIndex

FORMAT = "fastdiff.text.1"
SUFFIX = ".text.safetensors"
MAX_HEADER_BYTES = 1 << 20
_TABLES = {"start": "I64", "length": "I64", "caption": "U32", "crc": "U32"}
_NUMPY: dict[str, Any] = {"I64": np.dtype("<i8"), "U32": np.dtype("<u4")}


class WrongEncoder(RuntimeError):
    """The stored features are of another encoder than the one that was asked for."""


def embedded_name(shard: str) -> str:
    """Name of the file of a shard: `00012.tar` -> `00012.text.safetensors`."""
    return shard.removesuffix(".tar") + SUFFIX


class EmbeddedShard:
    """The text features of one shard, by sample number.

    Args:
        path: the file.

    Raises:
        ValueError: it is not such a file, or not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file).st_size
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, size):
            raise ValueError(f"{self.path.name}: not a file of text features")
        try:
            header = json.loads(os.pread(self._file, length, 8))
            self.header: dict[str, str] = header["__metadata__"]
            if self.header["format"] != FORMAT:
                raise ValueError(f"format {self.header['format']!r}; expected {FORMAT!r}")
            tokens = header["tokens"]
            self.total, self.width = (int(n) for n in tokens["shape"])
            first, last = tokens["data_offsets"]
            whole = 0 <= first <= last and last - first == 2 * self.total * self.width
            if tokens["dtype"] != "BF16" or not whole:
                raise ValueError("tokens are not bfloat16")
            if size != 8 + length + last:
                raise ValueError(f"{size} bytes; {8 + length + last} expected")
            self._tokens = 8 + length + first
            tables = {name: self._table(header[name], 8 + length, size) for name in _TABLES}
            if len({len(table) for table in tables.values()}) != 1:
                raise ValueError("tables of different lengths")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path.name}: rotten features: {error!s}") from None
        self._start, self._length = tables["start"], tables["length"]
        self._caption, self._crc = tables["caption"], tables["crc"]

    def _table(self, entry: dict[str, Any], base: int, size: int) -> np.ndarray:
        first, last = entry["data_offsets"]
        if not 0 <= first <= last <= size:
            raise ValueError(f"a table from {first} to {last} of {size} bytes")
        data = os.pread(self._file, last - first, base + first)
        return np.frombuffer(data, _NUMPY[entry["dtype"]]).reshape(entry["shape"])

    def __len__(self) -> int:
        return len(self._start)

    def read(self, row: int, caption: str) -> Tensor:
        """Features of a sample.

        Args:
            row: its number in the shard.
            caption: as it is now; it must be the one that was encoded.

        Returns:
            (tokens, width) bfloat16.

        Raises:
            ValueError: there are none, or they are not those that were written.
        """
        start, length = int(self._start[row]), int(self._length[row])
        if length == 0:
            raise ValueError("no stored text features")
        if zlib.crc32(caption.encode("utf-8", "surrogatepass")) != self._caption[row]:
            raise ValueError("the caption is not the one whose text features are stored")
        if start < 0 or length < 0 or start + length > self.total:
            raise ValueError("stored text features lie outside their file")
        data = bytearray(2 * length * self.width)
        got = os.preadv(self._file, [data], self._tokens + 2 * start * self.width)
        if got != len(data) or zlib.crc32(data) != self._crc[row]:
            raise ValueError("stored text features are damaged (checksum)")
        return torch.frombuffer(data, dtype=torch.bfloat16).view(length, self.width)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Embeddings:
    """The stored text features of a data set, local or remote.

    Args:
        root: folder or address of the files.
        encoder: label that they must have; None accepts any.
        cache: where remote files go.

    Raises:
        ValueError: remote, and no cache.
    """

    def __init__(
        self, root: str | Path, encoder: str | None = None, cache: ShardCache | None = None
    ) -> None:
        self.root, self.encoder = str(root).rstrip("/"), encoder
        self.cache = cache if is_remote(root) else None
        if is_remote(root) and cache is None:
            raise ValueError(f"Embeddings: {root} is remote and needs a cache")
        self.width = 0
        self.header: dict[str, str] = {}
        self._sizes: dict[str, int | None] = {}
        if self.cache is not None:
            # A web server lists nothing; its files are fetched without knowing their sizes.
            with suppress(OSError, NotImplementedError):
                self._sizes = {s.name: s.size for s in list_shards(self.root, SUFFIX)}

    @property
    def largest(self) -> int:
        """Bytes of the largest remote file."""
        return max((size or 0 for size in self._sizes.values()), default=0)

    def source(self, shard: str) -> Source:
        """The file of a shard."""
        name = embedded_name(shard)
        return Source(f"{self.root}/{name}", self._sizes.get(name))

    def check(self, shards: Sequence[str]) -> None:
        """Open the first file there is, to know the encoder before training begins.

        Raises:
            FileNotFoundError: no shard has one.
            WrongEncoder: of another encoder.
        """
        reasons = []
        for shard in shards[:16]:
            try:
                first = self._open(shard)
            except (OSError, ValueError) as error:
                reasons.append(str(error))
                continue
            self.width, self.header = first.width, first.header
            first.close()
            return
        raise FileNotFoundError(
            f"no text features in {self.root} ({reasons[0]}); `fastdiff embed-text` makes them"
        )

    def open(self, shard: str, index: ShardIndex) -> EmbeddedShard:
        """The features of a shard.

        Raises:
            OSError, ValueError: there are none, or of another shard.
            WrongEncoder: of another encoder.
        """
        found = self._open(shard)
        try:
            if self.width and found.width != self.width:
                raise WrongEncoder(f"{found.path}: width {found.width}; expected {self.width}")
            if found.header["keys"] != index.digest or len(found) != len(index.rows):
                raise ValueError(f"text features are of another {shard} than this one")
        except BaseException:
            found.close()
            raise
        return found

    def _open(self, shard: str) -> EmbeddedShard:
        source = self.source(shard)
        if self.cache is None:
            found = EmbeddedShard(Path(source.url))
        else:
            with self.cache.held(source) as path:
                assert path is not None, "it may wait"
                found = EmbeddedShard(path)
        label = found.header.get("encoder")
        if self.encoder is not None and label != self.encoder:
            found.close()
            raise WrongEncoder(
                f"{source.url} holds text features of {label}; this run has {self.encoder}. Give "
                "the same text encoder, or make the features anew (`fastdiff embed-text`)"
            )
        return found
