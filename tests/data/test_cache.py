"""Remote shards: whole files, fetched once, in a bounded folder that processes share."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdiff.data import (
    BadSample,
    BadSampleError,
    BadSampleLimit,
    StreamConfig,
    cache,
    make_loader,
    open_dataset,
    scenes,
)
from fastdiff.data.cache import CacheFull, ShardCache, Source, list_shards, locked
from fastdiff.data.shards import ShardDataset

# The server's thread lives while workers are forked; Python 3.12 warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

CONFIG = StreamConfig(seed=5, image_size=8, global_batch=8, window=2, noise=False)


class Server:
    """A web server of a folder that counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked[self.path.lstrip("/")] += 1
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def tars(self) -> dict[str, int]:
        return {name: times for name, times in self.asked.items() if name.endswith(".tar")}

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Six shards of ten samples, with img2dataset's stats."""
    path = scenes.write_shards(tmp_path / "shards", n=60, resolution=8, seed=1, shard_size=10)
    for tar in path.glob("*.tar"):
        tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps({"successes": 10}))
    return path


@pytest.fixture
def server(written: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    found = Server(written)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: None)


def count_all(batches: list[dict[str, Any]], limit: BadSampleLimit) -> None:
    for batch in batches:
        limit.update(batch)


def keys(loader: object) -> list[str]:
    return [key for batch in loader for key in batch["key"]]  # type: ignore[attr-defined]


def copies(folder: Path) -> list[str]:
    return sorted(p.name.split("-", 2)[2] for p in folder.iterdir() if p.suffix == ".tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_on_the_web_are_fetched_whole_and_once(
    written: Path, server: Server, tmp_path: Path, workers: int
) -> None:
    url = server.url + "/{00000..00005}.tar"
    dataset = open_dataset(url, cache=tmp_path / "cache")
    assert len(dataset) == 60
    assert server.tars() == {}  # sizes and counts are known without them
    found = keys(make_loader(dataset, CONFIG, stop=120, num_workers=workers))
    assert found == keys(make_loader(open_dataset(written), CONFIG, stop=120))
    assert server.tars() == {f"{i:05d}.tar": 1 for i in range(6)}
    assert copies(tmp_path / "cache") == [f"{i:05d}.tar" for i in range(6)]
    assert not list((tmp_path / "cache").glob(".*"))
    # Another process finds them, and the counts.
    server.asked.clear()
    again = open_dataset(url, cache=tmp_path / "cache")
    assert again[59].caption == dataset[59].caption
    assert not server.asked


def test_the_folder_stays_within_its_bound(written: Path, server: Server, tmp_path: Path) -> None:
    shard = (written / "00000.tar").stat().st_size
    store = ShardCache(tmp_path / "cache", int(4.5 * shard))
    dataset = ShardDataset(list_shards(server.url + "/{00000..00005}.tar"), cache=store)
    most = 0
    for batch in make_loader(dataset, CONFIG, stop=240):
        assert not batch["bad"]
        most = max(most, len(copies(store.folder)))
    assert most == 4
    # A window's shards stay until it is over: each is fetched at most once an epoch.
    assert all(times <= 4 for times in server.tars().values())


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    sources = []
    for name in "abcd":
        (tmp_path / "far" / name).write_bytes(name.encode() * 100)
        sources.append(Source(f"file://{tmp_path}/far/{name}", 100))
    store = ShardCache(tmp_path / "cache", 350)
    for i, source in enumerate(sources[:3]):
        with store.held(source) as path:
            assert path is not None
            assert path.read_bytes() == source.name.encode() * 100
            os.utime(path, ns=(10**9 * i, 0))
    for source in (sources[0], sources[3]):
        with store.held(source):
            pass
    left = sorted(p.name[-1] for p in store.folder.iterdir() if p.is_file())
    assert left == ["a", "c", "d"]


def test_a_file_in_use_and_a_download_in_progress_keep_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ROOM_TIMEOUT", 0.05)
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(100))
    a, b = (Source(f"file://{tmp_path}/{name}", 100) for name in "ab")
    store = ShardCache(tmp_path / "cache", 150)
    with store.held(a), pytest.raises(CacheFull, match="has no room for"), store.held(b):
        pass
    with store.held(b) as path:
        assert path is not None
    assert not store.path(a).exists()
    store.path(b).unlink()
    # Another process has begun to fetch a.
    with locked(store.folder / "locks" / store.path(a).name):
        (store.folder / f".{store.path(a).name}.partial").touch()
        with pytest.raises(CacheFull), store.held(b):
            pass
    # It died: what it left is removed.
    with store.held(b) as path:
        assert path is not None
    assert [p.name[-1] for p in store.folder.iterdir() if p.is_file()] == ["b"]
    with (
        pytest.raises(CacheFull, match="has 200 bytes; the cache holds 150"),
        store.held(Source(a.url, 200)),
    ):
        pass


def test_a_cut_download_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(60))
    store = ShardCache(tmp_path / "cache", 1000)
    with (
        pytest.raises(OSError, match="7 attempts: 60 of 100 bytes came"),
        store.held(Source(f"file://{tmp_path}/a", 100)),
    ):
        pass
    assert not [p for p in store.folder.iterdir() if p.is_file()]


def test_a_full_disk_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(100))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    store = ShardCache(tmp_path / "cache", 1000)
    with (
        pytest.raises(CacheFull, match=r"disk of .* is full: .*No space left"),
        store.held(Source(f"file://{tmp_path}/a", 100)),
    ):
        pass


def fetch(folder: Path, source: Source) -> None:
    with ShardCache(folder, 10**6).held(source) as path:
        assert path is not None
        os._exit(0 if path.read_bytes() == bytes(1000) else 1)


def test_processes_fetch_a_file_once(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.tar").write_bytes(bytes(1000))
    server = Server(tmp_path / "far")
    try:
        fork = multiprocessing.get_context("fork")
        arguments = (tmp_path / "cache", Source(server.url + "/a.tar", 1000))
        jobs = [fork.Process(target=fetch, args=arguments) for _ in range(4)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        assert [job.exitcode for job in jobs] == [0] * 4
        assert server.tars() == {"a.tar": 1}
    finally:
        server.close()


def churn(folder: Path, sources: list[Source], seed: int) -> None:
    store, chance = ShardCache(folder, 4000), random.Random(seed)
    for _ in range(150):
        source = chance.choice(sources)
        with store.held(source) as path:
            assert path is not None
            if path.read_bytes() != source.name.encode() * 1000:
                os._exit(1)
    os._exit(0)


def test_processes_that_are_killed_leave_nothing_torn(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    sources = []
    for name in "abcdefgh":
        (tmp_path / "far" / name).write_bytes(name.encode() * 1000)
        sources.append(Source(f"file://{tmp_path}/far/{name}", 1000))
    fork = multiprocessing.get_context("fork")
    arguments = [(tmp_path / "cache", sources, seed) for seed in range(6)]
    jobs = [fork.Process(target=churn, args=a) for a in arguments]
    for job in jobs:
        job.start()
    for job in jobs[:3]:
        job.join(0.05)
        job.kill()
    for job in jobs:
        job.join()
    assert all(job.exitcode in (0, -signal.SIGKILL) for job in jobs[:3])
    assert [job.exitcode for job in jobs[3:]] == [0] * 3
    store = ShardCache(tmp_path / "cache", 4000)
    for source in sources:
        with store.held(source):
            pass
    left = [p for p in store.folder.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in left) <= 4000
    assert not any(p.name.startswith(".") for p in left)


def test_shards_in_memory_and_without_stats_are_counted_once(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in sorted(written.glob("*.tar"))[:3]:
        memory.pipe_file(f"/bucket/{tar.name}", tar.read_bytes())
    memory.pipe_file("/bucket/00009.tar", b"no tar")
    try:
        with caplog.at_level(logging.WARNING):
            dataset = open_dataset("memory://bucket", cache=tmp_path / "cache")
        assert isinstance(dataset, ShardDataset)
        assert len(dataset) == 30
        assert "4 of 4 shards have no NAME_stats.json" in caplog.text
        assert [bad.path for bad in dataset.bad_shards] == ["memory:///bucket/00009.tar"]
        assert dataset[29].key == "000020009"
        memory.mkdir("/other")
        with pytest.raises(ValueError, match=r"no \*\.tar shards in memory://other"):
            open_dataset("memory://other", cache=tmp_path / "cache")
    finally:
        memory.store.clear()
        memory.pseudo_dirs[:] = [""]


def test_a_shard_that_vanishes_is_lost_and_replaced(
    written: Path, server: Server, tmp_path: Path
) -> None:
    dataset = open_dataset(server.url + "/{00000..00005}.tar", cache=tmp_path / "cache")
    (written / "00003.tar").unlink()
    batches = list(make_loader(dataset, CONFIG, stop=56))
    records = [r for batch in batches for r in batch["bad"] if r.probe == 0]
    assert records
    assert all(r.lost and r.shard.endswith("00003.tar") for r in records)
    # Ahead of its window, at its start, and when it was read; not for every sample.
    assert server.asked["00003.tar"] <= 3
    limit = BadSampleLimit(0.2, shards=6, minimum=0)
    count_all(batches, limit)
    assert limit.bad == 0
    assert limit.counts.lost.keys() == {server.url + "/00003.tar"}
    strict = BadSampleLimit(0.1, shards=6, minimum=0)
    with pytest.raises(BadSampleError, match=r"1 of 6 shards are lost.*00003\.tar"):
        count_all(batches, strict)


def test_a_shard_that_changes_its_size_or_content_is_told(
    written: Path, server: Server, tmp_path: Path
) -> None:
    (written / "00001_stats.json").write_text(json.dumps({"successes": 12}))
    dataset = open_dataset(server.url + "/{00000..00005}.tar", cache=tmp_path / "cache")
    assert len(dataset) == 62
    with pytest.raises(BadSample, match="shard has 10 samples; 12 expected") as caught:
        dataset[21]
    assert not caught.value.lost
    (written / "00002.tar").write_bytes(bytes(500))
    with pytest.raises(BadSample, match=r"500 of .* bytes came") as caught:
        dataset[22]
    assert caught.value.lost


def test_a_cache_too_small_for_two_windows_is_refused(written: Path, tmp_path: Path) -> None:
    store = ShardCache(tmp_path / "cache", 3 * (written / "00000.tar").stat().st_size)
    dataset = ShardDataset(list_shards(f"file://{written}"), cache=store)
    with pytest.raises(ValueError, match=r"two windows of 2 shards take .* the cache holds"):
        make_loader(dataset, CONFIG)
    make_loader(dataset, StreamConfig(seed=0, image_size=8, global_batch=4, window=1))
    many = ShardDataset([written / "00000.tar"] * 65)
    with pytest.raises(ValueError, match="a window of 65 shards"):
        make_loader(many, StreamConfig(seed=0, image_size=8, global_batch=4, window=65))


def test_next_windows_shards_come_before_they_are_needed(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(f"file://{written}", cache=tmp_path / "cache")
    batches = iter(make_loader(dataset, CONFIG))
    next(batches)
    deadline = time.monotonic() + 10
    while len(copies(tmp_path / "cache")) < 4 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert len(copies(tmp_path / "cache")) == 4  # two windows of two


def test_an_address_without_anything_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"memory://nowhere does not exist"):
        open_dataset("memory://nowhere", cache=tmp_path)


def test_a_client_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def absent(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ImportError, match=r"Install s3fs to access S3; .*fastdiff\[remote\]"):
        open_dataset("s3://bucket/shards")
