"""Writing the text features of shards, on any number of processes that need not know each other.

Process r of W takes every W-th shard. A shard whose file is there already, of the same encoder and
the same shard, is passed over; so a job that was killed is started again, on as many processes as
one likes. The format is `embeddings`'.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.cache import Source, file_system, is_remote
from fastdiff.data.embeddings import FORMAT, EmbeddedShard, WrongEncoder, embedded_name
from fastdiff.data.samples import BadSample
from fastdiff.data.shard_index import ShardIndex
from fastdiff.data.shards import ShardDataset

log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What writing features needs of a text encoder."""

    @property
    def label(self) -> str:
        """What the features of a caption depend on, as it is compared by training."""

    @property
    def commit(self) -> str:
        """Commit of the model, where it came from a hub; else empty."""

    @property
    def weights(self) -> str:
        """Digest of the weights."""

    @property
    def width(self) -> int:
        """Last dimension of the features."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions to ids (B, S) and mask (B, S)."""

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Tokens to features (B, S, width)."""


class Written(NamedTuple):
    """What became of one shard. tokens: stored; rotten: samples without features."""

    shard: str
    samples: int
    tokens: int
    rotten: int


class Embedded(NamedTuple):
    """What became of a process's shards. failed: address and reason."""

    written: list[Written]
    kept: int
    failed: list[tuple[str, str]]


def embed_shards(
    dataset: ShardDataset,
    encoder: TextEncoder,
    out: str | Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch_tokens: int = 16_384,
    told: Callable[[Written], None] | None = None,
) -> Embedded:
    """Encode the captions of this process's shards.

    Args:
        dataset: the shards.
        encoder: the text encoder.
        out: folder or address of the files; made if it is a folder.
        rank, world: this process and their number.
        batch_tokens: padded tokens of one call of the encoder; captions of about one length go
            together.
        told: called after each shard.

    Raises:
        WrongEncoder: a file of another encoder is there.
        OSError: the files cannot be written.
    """
    written, failed, kept = [], [], 0
    if not is_remote(out):
        Path(out).mkdir(parents=True, exist_ok=True)
    for number in range(rank, len(dataset.shards), world):
        source = dataset.shards[number]
        if _is_there(out, source, encoder.label):
            kept += 1
            continue
        try:
            index, captions = dataset.captions(number)
        except BadSample as error:
            failed.append((source.url, error.reason))
            log.warning("%s has no text features: %s", source.url, error.reason)
            continue
        done = _write(out, source, index, captions, encoder, batch_tokens)
        written.append(done)
        if told is not None:
            told(done)
    return Embedded(written, kept, failed)


def place_of_process() -> tuple[int, int, torch.device]:
    """Rank, world and device of this process as torchrun and deepspeed tell them."""
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    return rank, world, torch.device("cuda", local % torch.cuda.device_count())


def _is_there(out: str | Path, source: Source, label: str) -> bool:
    target = f"{out}/{embedded_name(source.name)}"
    try:
        header = _header_of(target)
    except FileNotFoundError:
        return False
    except ValueError as error:
        log.warning("%s; it is made anew", error)
        return False
    if header.get("encoder") != label:
        raise WrongEncoder(
            f"{target} holds text features of {header.get('encoder')}, not of {label}; give "
            "another folder"
        )
    return header.get("shard_bytes") == str(source.size)


def _header_of(target: str) -> dict[str, str]:
    if not is_remote(target):
        found = EmbeddedShard(Path(target))
        found.close()
        return found.header
    fs, path = file_system(target)
    with fs.open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, str] = json.loads(file.read(length))["__metadata__"]
    return header


def _write(
    out: str | Path,
    source: Source,
    index: ShardIndex,
    captions: Sequence[str | None],
    encoder: TextEncoder,
    batch_tokens: int,
) -> Written:
    """Encode one shard, caption by caption of about one length, straight into its file."""
    rows = [row for row, caption in enumerate(captions) if caption is not None]
    samples, texts = len(captions), [caption for caption in captions if caption is not None]
    length, text_sum = np.zeros(samples, "<i8"), np.zeros(samples, "<u4")
    start, crc = np.zeros(samples, "<i8"), np.zeros(samples, "<u4")
    ids = mask = torch.zeros(0, 1)
    if texts:
        ids, mask = encoder.tokenize(texts)
        length[rows] = mask.sum(1).numpy()
        text_sum[rows] = [zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts]
    total = int(length.sum())
    about = {
        "format": FORMAT,
        "encoder": encoder.label,
        "commit": encoder.commit,
        "weights": encoder.weights,
        "shard": source.name,
        "shard_bytes": str(source.size),
        "keys": index.digest,
    }
    tables = {"start": start, "length": length, "caption": text_sum, "crc": crc}
    header, tokens_at = _header(about, tables, total, encoder.width)
    with _file_to_be(out, embedded_name(source.name)) as file:
        file.truncate(tokens_at + 2 * total * encoder.width)
        file.write(header)
        file.seek(tokens_at)
        lengths, at = length[rows], 0
        for batch in _batches(lengths, batch_tokens):
            longest = int(lengths[batch[-1]])
            features = _encode(encoder, ids[batch, :longest], mask[batch, :longest])
            for i, feature in zip(batch, features, strict=True):
                row, count = rows[i], int(lengths[i])
                data = feature[:count].contiguous().view(torch.uint8).numpy().tobytes()
                if not torch.isfinite(feature[:count]).all():
                    log.warning("%s: sample %d: features are not finite", source.url, row)
                    length[row] = 0
                start[row], crc[row] = at, zlib.crc32(data)
                at += count
                file.write(data)
        file.seek(len(header))
        for table in tables.values():
            file.write(table.tobytes())
    return Written(source.url, samples, total, int((length == 0).sum()))


@contextmanager
def _file_to_be(out: str | Path, name: str) -> Iterator[BinaryIO]:
    """A file that appears under its name, whole and synced, when the block ends without error."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if is_remote(out) else Path(out)
        partial = folder / f".{name}.partial"
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if is_remote(out):
            # An object store shows a file when all of it came.
            fs, path = file_system(f"{out}/{name}")
            fs.put_file(str(partial), path)
            return
        os.replace(partial, folder / name)
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _header(
    about: dict[str, str], tables: dict[str, np.ndarray], total: int, width: int
) -> tuple[bytes, int]:
    """The header of safetensors, and where the tokens begin."""
    entries: dict[str, Any] = {"__metadata__": about}
    at = 0
    for name, table in tables.items():
        kind = {"<i8": "I64", "<u4": "U32"}[table.dtype.str]
        entries[name] = _entry(kind, [len(table)], at, table.nbytes)
        at += table.nbytes
    entries["tokens"] = _entry("BF16", [total, width], at, 2 * total * width)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + at


def _entry(dtype: str, shape: list[int], first: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, first + size]}


def _batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Captions from short to long, as many at once as their padded tokens allow."""
    batch: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _encode(encoder: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, S, width) bfloat16 on the CPU."""
    with torch.no_grad():
        features = encoder(ids.to(encoder.device), mask.to(encoder.device))
    return features.to("cpu", torch.bfloat16)
