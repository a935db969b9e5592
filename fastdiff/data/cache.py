"""Remote shards, fetched whole into a bounded folder on the local disk.

Addresses are fsspec's: `s3://`, `gs://`, `https://`, `file://` (a slow mount), ... Any processes
of one machine may share the folder: each file has a lock (flock, which the kernel frees when a
process dies), a download goes to a hidden name and is renamed when it is whole, and the files that
were used longest ago go when room is needed. A file that is removed while a process reads it stays
readable to that process. fsspec's file systems are made where they are used: they survive no fork.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "~/.cache/fastdiff/shards"
RETRIES = 6  # after 1, 2, 4, ... seconds: a minute in all
ROOM_TIMEOUT = 300.0  # seconds to wait for other processes' files to become removable
_LISTING_THREADS = 32
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
# What may lie beside a file NAME: its download, its index, the writing of that.
_BESIDE = re.compile(r"(\.[0-9a-f]{16})?\.partial$|\.index\.npz$")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Source(NamedTuple):
    """A file by its path or address, and its size in bytes where the store tells it."""

    url: str
    size: int | None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rstrip("/").rpartition("/")[2]


class CacheFull(RuntimeError):
    """The cache has no room for a shard, or its disk has none: the run cannot go on."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address of fsspec's."""
    return "://" in str(path)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, made in this process, and the path in it."""
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        return found
    except ImportError as error:
        raise ImportError(
            f"open_dataset: {url}: {error}; `pip install fastdiff[remote]` has the clients"
        ) from None


def list_shards(url: str, suffix: str = ".tar") -> list[Source]:
    """The tar shards, or other files, at an address.

    Args:
        url: a folder; one tar; or tars by number, `.../{00000..01242}.tar` (a web server lists no
            folder).
        suffix: of the names.

    Returns:
        Sorted by address. A shard that cannot be found by its number has size None.

    Raises:
        FileNotFoundError: nothing there.
        ImportError: the store's client is not installed.
    """
    fs, path = file_system(url)

    def size(address: str) -> Source:
        try:
            told = fs.info(address).get("size")
        except FileNotFoundError:
            told = None
        return Source(address, told)

    numbers = _BRACES.search(url)
    if numbers is not None:
        low, high = numbers.group(1), numbers.group(2)
        urls = [
            url[: numbers.start()] + str(i).zfill(len(low)) + url[numbers.end() :]
            for i in range(int(low), int(high) + 1)
        ]
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            return list(pool.map(size, urls))
    if url.endswith(suffix):
        return [size(url)]
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"open_dataset: {url} does not exist") from None
    tars = [e for e in entries if e["type"] == "file" and e["name"].endswith(suffix)]
    address = fs.unstrip_protocol
    return sorted(Source(address(e["name"]), e.get("size")) for e in tars)


def read_small(urls: Sequence[str]) -> dict[str, bytes]:
    """Contents of those of many small files that can be read, fetched together."""
    if not urls:
        return {}
    fs, _ = file_system(urls[0])
    found = fs.cat(list(urls), on_error="omit")
    if isinstance(found, bytes):  # of a single file
        return {urls[0]: found}
    strip = fs._strip_protocol
    by_path = {strip(key): data for key, data in found.items()}
    return {url: by_path[strip(url)] for url in urls if strip(url) in by_path}


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields whether it is held (always, where it may wait)."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True  # closing the file frees it


class ShardCache:
    """Whole files of remote stores in a local folder of bounded size.

    Args:
        folder: made with its parents; on a local disk, as its locks must work.
        limit: bytes, of all files together.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.limit = limit
        self._locks = self.folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def path(self, source: Source) -> Path:
        """Where a file lies when it has been fetched; address and size decide."""
        digest = hashlib.sha256(f"{source.url} {source.size}".encode()).hexdigest()[:16]
        return self.folder / f"{digest}-{source.size or 0}-{source.name[-100:]}"

    @contextmanager
    def held(self, source: Source, *, wait: bool = True) -> Iterator[Path | None]:
        """The local copy of a file, fetched if it is absent; while it is held nobody removes it.

        Args:
            source: the file.
            wait: for another process that holds it; else None is yielded.

        Raises:
            FileNotFoundError: not in the store.
            OSError: it could not be fetched, also after waiting and trying again.
            CacheFull: no room.
        """
        path = self.path(source)
        with locked(self._locks / path.name, wait) as mine:
            if not mine:
                yield None
                return
            if path.exists():
                # Access times say what was used last; many mounts do not keep them.
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            else:
                self._fetch(source, path)
            yield path

    def _fetch(self, source: Source, path: Path) -> None:
        partial = self.folder / f".{path.name}.partial"
        try:
            self._make_room(source, partial)
            _download(source, partial)
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            if error.errno in _FULL:
                raise CacheFull(f"ShardCache: the disk of {self.folder} is full: {error}") from None
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, source: Source, partial: Path) -> None:
        """Remove what was used longest ago until a file fits, and reserve its place."""
        need = source.size or 0
        if need > self.limit:
            raise CacheFull(
                f"ShardCache: {source.url} has {need} bytes; the cache holds {self.limit}"
            )
        deadline = time.monotonic() + ROOM_TIMEOUT
        while True:
            with locked(self._locks / ".room"):
                if self._evict(self.limit - need):
                    partial.touch()
                    return
            if time.monotonic() > deadline:
                raise CacheFull(
                    f"ShardCache: {self.folder} of {self.limit} bytes has no room for "
                    f"{source.url} ({need} bytes); other processes hold all of it"
                )
            time.sleep(0.2)

    def _evict(self, most: int) -> bool:
        """Whether the files take at most `most` bytes, after removing what may go."""
        files: dict[str, list[tuple[str, int, int]]] = {}
        for entry in os.scandir(self.folder):
            # Another process may remove it meanwhile.
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    owner = _BESIDE.sub("", entry.name.removeprefix("."))
                    size, used = entry.stat().st_size, entry.stat().st_atime_ns
                    if entry.name == f".{owner}.partial":
                        # A download in progress counts with what it will take.
                        size = max(size, int(owner.split("-")[1]))
                    files.setdefault(owner, []).append((entry.name, size, used))
        total = sum(size for group in files.values() for _, size, _ in group)
        for owner, group in sorted(files.items(), key=lambda item: min(f[2] for f in item[1])):
            if total <= most:
                break
            # A partial file whose lock is free was left by a process that died.
            with locked(self._locks / owner, wait=False) as mine:
                for name, size, _ in group if mine else []:
                    (self.folder / name).unlink(missing_ok=True)
                    total -= size
        return total <= most

    def remembered(
        self, sources: Sequence[Source], make: Callable[[dict[str, int]], dict[str, int]]
    ) -> dict[str, int]:
        """A number for each source, made by one process of this machine and kept for the others.

        Args:
            sources: what the numbers belong to; another list is another table.
            make: takes what is known and returns more of it.
        """
        told = "\n".join(f"{source.url} {source.size}" for source in sources)
        tables = self.folder / "tables"
        tables.mkdir(exist_ok=True)
        table = tables / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        with locked(self._locks / table.name):
            known: dict[str, int] = {}
            with suppress(OSError, ValueError, AttributeError):
                known = {str(k): int(v) for k, v in json.loads(table.read_text()).items()}
            if all(source.url in known for source in sources):
                return known
            known = make(known)
            partial = table.with_suffix(".partial")
            partial.write_text(json.dumps(known))
            os.replace(partial, table)
            return known


def _download(source: Source, to: Path) -> None:
    for attempt in range(RETRIES + 1):
        try:
            fs, path = file_system(source.url)
            fs.get_file(path, str(to))
            size = to.stat().st_size
            if source.size is not None and size != source.size:
                raise OSError(f"{size} of {source.size} bytes came")
            return
        except (FileNotFoundError, ImportError):
            raise
        # Every store has errors of its own.
        except Exception as error:
            if getattr(error, "errno", None) in _FULL:
                raise
            if attempt == RETRIES:
                raise OSError(f"not fetched in {RETRIES + 1} attempts: {error}") from None
            log.info("%s: %s; trying again", source.url, error)
            time.sleep(2**attempt)
