"""Tar shards as img2dataset writes them, read by global sample index.

What a shard holds and how it is indexed is `shard_index`'s; remote shards come through `cache`. At
opening only the number of samples of each shard is read; its index and its file are opened when
one of its samples is asked for, and few of them are open at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdiff.data.cache import ShardCache, Source, read_small
from fastdiff.data.embeddings import EmbeddedShard, Embeddings
from fastdiff.data.samples import (
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    BadSample,
    Sample,
    caption_of,
    decode_caption,
    decode_image,
    parse_json,
)
from fastdiff.data.shard_index import ShardIndex, count_samples, load_index, stats_count

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 64
# Seconds for which a shard that could not be opened is not tried again.
LOST_FOR = 600.0


class BadShard(NamedTuple):
    """A shard that is left out as a whole, and why."""

    path: str
    reason: str


class _Open:
    """An open shard: its index, its file, and the stored text features of its captions."""

    def __init__(self, path: Path, text: EmbeddedShard | None = None) -> None:
        self.index, self.text = load_index(path), text
        self.file = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.file)
        if self.text is not None:
            self.text.close()


class ShardDataset:
    """Captioned pictures of tar shards by global sample index, in the order of the sorted names.

    Shards that cannot be read at opening are left out, logged and listed in `bad_shards`; of one
    that cannot be read later every sample is a BadSample. The object may be pickled and forked:
    files are opened by the process that reads.

    Args:
        shards: paths of tar files, or addresses with their sizes (`cache.list_shards`).
        cache: where remote shards go; needed if there are any.
        embeddings: stored text features of the captions; each sample then has its `context`.

    Raises:
        ValueError: no shard can be read, or the embeddings are not those asked for.
    """

    def __init__(
        self,
        shards: Sequence[str | Path | Source],
        *,
        cache: ShardCache | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        self.cache, self.embeddings = cache, embeddings
        sources = sorted(s if isinstance(s, Source) else Source(str(s), None) for s in shards)
        self.bad_shards: list[BadShard] = []
        found = _count_remote(cache, sources) if cache is not None else _count_local(sources)
        self.shards: list[Source] = []
        sizes = []
        for source, size, reason in found:
            if reason is not None:
                self.bad_shards.append(BadShard(source.url, reason))
                log.warning("shard %s is left out: %s", source.url, reason)
            elif size:
                self.shards.append(source)
                sizes.append(size)
        if not self.shards:
            told = "; ".join(f"{bad.path}: {bad.reason}" for bad in self.bad_shards[:3])
            raise ValueError(f"open_dataset: none of {len(shards)} tar shards can be read: {told}")
        if self.bad_shards:
            log.warning("%d of %d shards are left out", len(self.bad_shards), len(shards))
        self.shard_sizes: Sequence[int] = sizes
        self._ends = list(accumulate(sizes))
        self._opened: OrderedDict[int, _Open] = OrderedDict()
        self._lost: dict[int, tuple[float, str]] = {}
        self._wanted: list[int] = []
        self._pid = os.getpid()
        if embeddings is not None:
            embeddings.check([source.name for source in self.shards])

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """Names, sizes and sample counts of the shards as 16 hex digits: equal on all ranks, and
        when a run is resumed, or index i does not mean the same sample."""
        told = [
            f"{source.name} {source.size} {count}"
            for source, count in zip(self.shards, self.shard_sizes, strict=True)
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index` over all shards.

        Raises:
            BadSample: picture, caption or stored features cannot be used.
            IndexError: outside 0..len - 1.
            CacheFull: a remote shard has no room on this machine.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"ShardDataset: index {index}; expected 0..{len(self) - 1}")
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        opened = self._open(shard, place)
        if place >= len(opened.index.rows):
            told = f"shard has {len(opened.index.rows)} samples; {self.shard_sizes[shard]} expected"
            raise BadSample(f"#{place}", self.shards[shard].url, told)
        key = bytes(opened.index.keys[place]).decode("utf-8", "replace")
        try:
            row = opened.index.rows[place]
            caption = _caption(opened, row, key)
            image = decode_image(_member(opened, row, "image", MAX_IMAGE_BYTES))
            text = None if opened.text is None else opened.text.read(place, caption)
            return Sample(image, caption, key, text)
        except (ValueError, OSError) as error:
            raise BadSample(key, self.shards[shard].url, str(error)) from None

    def captions(self, shard: int) -> tuple[ShardIndex, list[str | None]]:
        """Index of a shard, and the captions of its samples in order; None for a rotten one.

        Raises:
            BadSample: the shard cannot be read.
        """
        opened = self._open(shard, 0)
        found: list[str | None] = []
        for key, row in zip(opened.index.keys, opened.index.rows, strict=True):
            try:
                found.append(_caption(opened, row, bytes(key).decode("utf-8", "replace")))
            except (ValueError, OSError):
                found.append(None)
        return opened.index, found

    def check_window(self, shards: int) -> None:
        """Raise ValueError where so many shards cannot be read at the same time.

        Two such windows must fit into the cache: the one that is read, and the next.
        """
        if min(shards, len(self.shards)) > MAX_OPEN_SHARDS:
            raise ValueError(
                f"ShardDataset: a window of {shards} shards; at most {MAX_OPEN_SHARDS} are open"
            )
        largest, limit = 0, None
        if self.cache is not None:
            largest, limit = max(source.size or 0 for source in self.shards), self.cache.limit
        if self.embeddings is not None and self.embeddings.cache is not None:
            largest, limit = largest + self.embeddings.largest, self.embeddings.cache.limit
        need = min(2 * shards, len(self.shards)) * largest
        if limit is not None and need > limit:
            raise ValueError(
                f"ShardDataset: two windows of {shards} shards take {need / 2**30:.2f} GiB, the "
                f"cache holds {limit / 2**30:.2f}; enlarge it, or mix fewer shards"
            )

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch remote files in the background, in this order; earlier requests are forgotten."""
        features = None if self.embeddings is None else self.embeddings.cache
        if self.cache is None and features is None:
            return
        self._wanted = wanted = list(shards)
        threading.Thread(target=self._fetch_ahead, args=(wanted,), daemon=True).start()

    def _fetch_ahead(self, wanted: list[int]) -> None:
        for shard in wanted:
            files = [(self.cache, self.shards[shard])]
            if self.embeddings is not None:
                features = self.embeddings.source(self.shards[shard].name)
                files.append((self.embeddings.cache, features))
            for cache, source in files:
                if self._wanted is not wanted:  # something else was asked for
                    return
                if cache is None:
                    continue
                # What fails here fails again, and is told, when the shard is read.
                try:
                    # Another process is fetching it: this one goes on with the next.
                    with cache.held(source, wait=False):
                        pass
                except (OSError, RuntimeError, ImportError) as error:
                    log.info("%s is not fetched ahead: %s", source.url, error)

    def _open(self, shard: int, place: int) -> _Open:
        self._in_this_process()
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        source = self.shards[shard]
        until, reason = self._lost.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise BadSample(f"#{place}", source.url, reason, lost=True)
        try:
            opened = self._open_files(source)
        except (ValueError, OSError) as error:
            reason = f"shard cannot be read: {error}"
            self._lost[shard] = (time.monotonic() + LOST_FOR, reason)
            raise BadSample(f"#{place}", source.url, reason, lost=True) from None
        if len(self._opened) >= MAX_OPEN_SHARDS:
            self._opened.popitem(last=False)[1].close()
        self._opened[shard] = opened
        return opened

    def _open_files(self, source: Source) -> _Open:
        if self.cache is None:
            opened = _Open(Path(source.url))
        else:
            with self.cache.held(source) as path:
                assert path is not None, "it may wait"
                opened = _Open(path)
        if self.embeddings is not None:
            try:
                opened.text = self.embeddings.open(source.name, opened.index)
            except BaseException:
                opened.close()
                raise
        return opened

    def _in_this_process(self) -> None:
        if self._pid != os.getpid():
            # After a fork the descriptors are the parent's to close.
            self._opened, self._pid = OrderedDict(), os.getpid()

    def close(self) -> None:
        """Close this process's files; they are opened again when needed."""
        if self._pid == os.getpid():
            while self._opened:
                self._opened.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_opened"):
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": OrderedDict(), "_wanted": []}


Counted = list[tuple[Source, int, str | None]]


def _count_local(sources: Sequence[Source]) -> Counted:
    """Each shard with its size, its samples, and why it cannot be read."""
    found: Counted = []
    for source in sources:
        try:
            path = Path(source.url)
            count = count_samples(path)
            found.append((Source(source.url, path.stat().st_size), count, None))
        except (ValueError, OSError) as error:
            found.append((source, 0, str(error)))
    return found


def _count_remote(cache: ShardCache, sources: Sequence[Source]) -> Counted:
    """The same for remote shards: by img2dataset's stats; one without them is fetched, once."""
    reasons: dict[str, str] = {}

    def make(known: dict[str, int]) -> dict[str, int]:
        missing = [source.url for source in sources if source.url not in known]
        stats = {url.removesuffix(".tar") + "_stats.json": url for url in missing}
        for address, data in read_small(list(stats)).items():
            count = stats_count(data)
            if count is not None:
                known[stats[address]] = count
        uncounted = [source for source in sources if source.url not in known]
        if uncounted:
            log.warning(
                "%d of %d shards have no NAME_stats.json: each is fetched to count its samples",
                *(len(uncounted), len(sources)),
            )
        for source in uncounted:
            try:
                with cache.held(source) as path:
                    assert path is not None, "it may wait"
                    known[source.url] = len(load_index(path).rows)
            except (ValueError, OSError) as error:
                reasons[source.url] = str(error)
        return known

    counts = cache.remembered(sources, make)
    return [(s, counts.get(s.url, 0), reasons.get(s.url)) for s in sources]


def _caption(opened: _Open, row: np.void, key: str) -> str:
    if row["repeated"]:
        raise ValueError("a member of this key occurs twice")
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError("key leads out of the shard")
    if row["image_offset"] < 0:
        raise ValueError("picture is missing")
    if row["txt_offset"] >= 0:
        return decode_caption(_member(opened, row, "txt", MAX_CAPTION_BYTES))
    if row["json_offset"] >= 0:
        fields = parse_json(_member(opened, row, "json", MAX_CAPTION_BYTES))
        return caption_of(fields, "caption")
    raise ValueError("caption is missing (no .txt, no .json)")


def _member(opened: _Open, row: np.void, name: str, limit: int) -> bytes:
    offset, size = int(row[f"{name}_offset"]), int(row[f"{name}_size"])
    if size > limit:
        raise ValueError(f"{name} has {size} bytes; at most {limit} are read")
    data = os.pread(opened.file, size, offset)
    if len(data) != size:
        raise ValueError(f"{name} is cut: {len(data)} of {size} bytes")
    return data
