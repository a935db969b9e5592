"""The training stream: exactness over ranks, workers and micro-batches; bad samples; statistics."""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import (
    BadSample,
    BadSampleError,
    BadSampleLimit,
    Sample,
    StreamConfig,
    make_loader,
    open_dataset,
    scenes,
)
from fastdiff.data.order import SampleOrder, permutation
from fastdiff.data.stream import (
    PositionSampler,
    draw_noise,
    draw_scalars,
    probe_offsets,
)

CONFIG = StreamConfig(seed=5, image_size=8, global_batch=16, drop_rate=0.3, flip=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "shards"
    return scenes.write_shards(path, n=40, resolution=8, seed=1, shard_size=15)


class Rotten:
    """N samples, of which some are bad; ten samples a shard."""

    def __init__(self, size: int, bad: set[int]) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample(f"k{index}", f"{index // 10}.tar", "rotten")
        return Sample(Image.new("RGB", (8, 8)), "a caption", f"k{index}")


def by_position(batches: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    items: dict[int, dict[str, Any]] = {}
    for batch in batches:
        for i, position in enumerate(batch["position"].tolist()):
            assert position not in items
            items[position] = {k: v[i] for k, v in batch.items() if k not in ("bad", "position")}
    return items


def assert_same(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> None:
    assert a.keys() == b.keys()
    for position, item in a.items():
        for name, value in item.items():
            other = b[position][name]
            same = torch.equal(value, other) if torch.is_tensor(value) else value == other
            assert same, (position, name)


def first_error(loader: Iterable[dict[str, Any]]) -> str:
    try:
        next(iter(loader))
    except BadSampleError as error:
        # Its traceback and the loader hold each other; collected as a cycle, torch would wait five
        # seconds for each worker.
        return str(error.with_traceback(None))
    pytest.fail("no error was raised")


def count_all(batches: Iterable[dict[str, Any]], limit: BadSampleLimit) -> None:
    for batch in batches:
        limit.update(batch)


@pytest.mark.parametrize(
    ("world", "workers", "micro"), [(1, 2, 4), (2, 0, None), (2, 2, 2), (4, 0, 1), (4, 2, 4)]
)
def test_ranks_workers_and_micro_batches_change_nothing(
    shards: Path, world: int, workers: int, micro: int | None
) -> None:
    dataset = open_dataset(shards)
    dataset[0]  # a file is open before the workers are forked
    stop = 6 * 16  # past two ends of an epoch of 40
    expected = by_position(list(make_loader(dataset, CONFIG, stop=stop)))
    assert sorted(expected) == list(range(stop))

    config = replace(CONFIG, micro_batch=micro)
    batches: list[dict[str, Any]] = []
    for rank in range(world):
        loader = make_loader(
            dataset, config, rank=rank, world=world, stop=stop, num_workers=workers
        )
        mine = list(loader)
        size, count = config.layout(world)
        assert len(mine) == len(loader.batch_sampler) == 6 * count
        for i, batch in enumerate(mine):
            step, k = divmod(i, count)
            first = step * 16 + rank * (16 // world) + k * size
            assert batch["position"].tolist() == list(range(first, first + size))
        batches += mine
    assert_same(by_position(batches), expected)


def test_a_run_resumes_at_the_images_seen(shards: Path) -> None:
    dataset = open_dataset(shards)
    whole = by_position(list(make_loader(dataset, CONFIG, stop=96)))
    rest = by_position(list(make_loader(dataset, CONFIG, start=48, stop=96)))
    assert_same(rest, {p: item for p, item in whole.items() if p >= 48})
    smaller = replace(CONFIG, global_batch=4)
    other = by_position(list(make_loader(dataset, smaller, start=20, stop=96)))
    assert_same(other, {p: item for p, item in whole.items() if p >= 20})


def test_batches_have_the_documented_types(shards: Path) -> None:
    batch = next(iter(make_loader(open_dataset(shards), CONFIG)))
    assert {k: (v.shape, v.dtype) for k, v in batch.items() if torch.is_tensor(v)} == {
        "image": ((16, 3, 8, 8), torch.float32),
        "noise": ((16, 3, 8, 8), torch.float32),
        "position": ((16,), torch.int64),
        "t": ((16,), torch.int64),
        "t_unit": ((16,), torch.float64),
        "drop": ((16,), torch.bool),
    }
    assert set(batch["caption"]) <= set(scenes.CAPTIONS)
    assert len(set(batch["key"])) == 16
    assert batch["bad"] == []
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1


def test_every_epoch_sees_every_sample_once_in_another_order(shards: Path) -> None:
    config = replace(CONFIG, global_batch=8)
    keys = [k for b in make_loader(open_dataset(shards), config, stop=80) for k in b["key"]]
    assert len(set(keys[:40])) == len(set(keys[40:])) == 40
    assert keys[:40] != keys[40:]


def test_order_is_a_permutation_that_does_not_change() -> None:
    for size in (1, 2, 1000):
        assert sorted(permutation(0, 0, size).tolist()) == list(range(size))
    # Philox's raw words are promised for ever; a run resumed under another NumPy needs them.
    assert permutation(7, 3, 8).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]
    orders = [tuple(permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_order_is_uniform() -> None:
    first = Counter(int(permutation(1, epoch, 10)[0]) for epoch in range(5000))
    chi_square = sum((first[i] - 500) ** 2 / 500 for i in range(10))
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_draws_do_not_change() -> None:
    draws = draw_scalars(CONFIG, 123)
    assert (draws.t, draws.flip, draws.drop) == (372, False, False)
    assert 0 <= draws.t_unit * 1000 - draws.t < 1


def test_statistics_of_the_draws() -> None:
    n = 20_000
    draws = [draw_scalars(CONFIG, position) for position in range(n)]
    units = np.array([d.t_unit for d in draws])
    # Kolmogorov-Smirnov against the uniform distribution, p = 0.001.
    gap = np.abs(np.sort(units) - (np.arange(n) + 0.5) / n).max()
    assert gap < 1.95 / math.sqrt(n)
    times = np.array([d.t for d in draws])
    assert times.min() == 0
    assert times.max() == 999
    for share, rate in (
        (np.mean([d.flip for d in draws]), 0.5),
        (np.mean([d.drop for d in draws]), 0.3),
    ):
        assert abs(share - rate) < 3.3 * math.sqrt(rate * (1 - rate) / n)
    table = np.array([[d.t_unit, d.flip, d.drop] for d in draws])
    lagged = np.corrcoef(np.hstack([table[:-1], table[1:]]), rowvar=False)
    assert np.abs(lagged - np.eye(6)).max() < 4 / math.sqrt(n)


def test_statistics_of_the_noise() -> None:
    noise = torch.stack([draw_noise(5, position, (3, 8, 8)) for position in range(1000)]).double()
    n = noise.numel()
    assert abs(noise.mean()) < 3.3 / math.sqrt(n)
    assert abs(noise.var() - 1) < 3.3 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 3.3 * math.sqrt(96 / n)
    neighbours = (noise[:-1] * noise[1:]).mean()
    assert abs(neighbours) < 3.3 / math.sqrt(n)


def test_rates_do_not_shift_other_draws() -> None:
    off = replace(CONFIG, flip=False, drop_rate=0.0)
    for position in range(50):
        a, b = draw_scalars(CONFIG, position), draw_scalars(off, position)
        assert (a.t, a.t_unit) == (b.t, b.t_unit)
        assert not b.flip
        assert not b.drop
    assert all(draw_scalars(replace(CONFIG, drop_rate=1.0), p).drop for p in range(50))


def test_flip_mirrors_the_picture(shards: Path) -> None:
    dataset = open_dataset(shards)
    plain = by_position(list(make_loader(dataset, replace(CONFIG, flip=False), stop=32)))
    flipped = by_position(list(make_loader(dataset, CONFIG, stop=32)))
    flips = [draw_scalars(CONFIG, p).flip for p in range(32)]
    assert 0 < sum(flips) < 32
    for p in range(32):
        image = plain[p]["image"]
        assert torch.equal(flipped[p]["image"], image.flip(2) if flips[p] else image)


def test_loading_leaves_torchs_random_state_alone(shards: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(open_dataset(shards), CONFIG, stop=16, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_workers_outlive_what_a_launcher_sends(shards: Path, number: int) -> None:
    loader = make_loader(open_dataset(shards), CONFIG, num_workers=2)
    batches = iter(loader)
    next(batches)
    workers = [child.pid for child in multiprocessing.active_children()]
    # From another process than the one that reads.
    subprocess.run(["kill", f"-{number}", *map(str, workers)], check=True)
    assert [int(b["position"][0]) for b in islice(batches, 8)] == list(range(16, 144, 16))


def test_workers_end_when_the_reader_says_so(shards: Path) -> None:
    loader = make_loader(open_dataset(shards), CONFIG, num_workers=2)
    batches = iter(loader)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=4)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_bad_sample_is_replaced_by_the_next_in_the_data_set() -> None:
    bad = {3, 4, 39}
    batches = list(make_loader(Rotten(40, bad), CONFIG, stop=80))
    items = by_position(batches)
    clean = by_position(list(make_loader(Rotten(40, set()), CONFIG, stop=80)))
    replaced = {"k3": "k5", "k4": "k5", "k39": "k0"}
    for position, item in items.items():
        wanted = clean[position]["key"]
        assert item["key"] == replaced.get(wanted, wanted)
        assert item["t"] == clean[position]["t"]
        assert torch.equal(item["noise"], clean[position]["noise"])
    records = [record for batch in batches for record in batch["bad"]]
    told = Counter((r.key, r.shard, r.reason, r.probe) for r in records)
    assert told == {
        ("k3", "0.tar", "rotten", 0): 2,
        ("k4", "0.tar", "rotten", 1): 2,
        ("k4", "0.tar", "rotten", 0): 2,
        ("k39", "3.tar", "rotten", 0): 2,
    }
    again = list(make_loader(Rotten(40, bad), CONFIG, stop=80, num_workers=2))
    assert_same(by_position(again), items)
    assert [record for batch in again for record in batch["bad"]] == records


def test_substitutes_are_looked_for_near_then_far_and_not_for_ever() -> None:
    assert list(probe_offsets(1)) == []
    assert list(probe_offsets(10)) == list(range(1, 10))
    assert list(probe_offsets(200)) == [*range(1, 17), 32, 64, 128]
    assert len(list(probe_offsets(10**9))) < 60
    rotten_shard = Rotten(10**6, set(range(1000, 2000)))
    batch = next(iter(make_loader(rotten_shard, replace(CONFIG, seed=1))))
    assert len(batch["key"]) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_is_an_error_not_a_loop(workers: int) -> None:
    loader = make_loader(Rotten(30, set(range(30))), CONFIG, num_workers=workers)
    assert re.search(r"no sample can be read(?s:.*)worst shard \d\.tar", first_error(loader))


def test_the_limit_names_the_worst_shard(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Rotten(100, {5, *range(20, 29)})  # 10 %, nine of ten in 2.tar
    limit = BadSampleLimit(0.01, minimum=16, logged=3)
    told = r"1\d of \d+ samples seen .* 1\.00%; worst shard 2\.tar"
    with caplog.at_level(logging.WARNING), pytest.raises(BadSampleError, match=told):
        count_all(make_loader(dataset, CONFIG), limit)
    assert limit.bad > 16
    assert 100 < limit.seen <= 300
    assert caplog.text.count("bad sample 'k") == 3
    assert "rotten" in caplog.text


def test_the_limit_lets_few_bad_samples_pass() -> None:
    limit = BadSampleLimit(0.05, minimum=0)
    # 2 % of each epoch.
    config = replace(CONFIG, global_batch=100)
    count_all(make_loader(Rotten(100, {7, 50}), config, stop=1000), limit)
    assert (limit.seen, limit.bad) == (1000, 20)
    first = BadSampleLimit(0.01)
    # Sixteen are allowed, whatever their share.
    config = replace(CONFIG, global_batch=4)
    count_all(make_loader(Rotten(4, {2}), config, stop=16 * 4), first)
    assert first.bad == 16


def test_real_rotten_samples_are_counted(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(32):
            data = picture.getvalue() if i % 8 else b"rotten"
            for extension, payload in (("png", data), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{i:02d}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    limit = BadSampleLimit(minimum=4)
    loader = iter(make_loader(open_dataset(tmp_path), CONFIG, num_workers=1))
    count_all(islice(loader, 2), limit)
    assert limit.bad == 4
    with pytest.raises(BadSampleError, match=r"worst shard .*0\.tar .*not JPEG, PNG or WebP"):
        count_all(loader, limit)


def test_errors_give_both_numbers() -> None:
    for fields, told in (
        ({"image_size": 0}, "image_size=0; expected at least 1"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"drop_rate": 1.5}, "drop_rate=1.5; expected 0..1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ValueError, match=told):
            replace(CONFIG, **fields)
    with pytest.raises(ValueError, match="3 ranks do not divide global_batch=16"):
        CONFIG.layout(3)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide the 8 images .* 2 ranks"):
        replace(CONFIG, micro_batch=3).layout(2)
    for arguments, told in (
        ({"rank": 2, "world": 2}, r"rank=2; expected 0\.\.1"),
        ({"start": -1}, "start=-1"),
        ({"start": 16, "stop": 40}, "stop=40; expected start=16 plus a multiple"),
    ):
        with pytest.raises(ValueError, match=told):
            PositionSampler(SampleOrder(0, [9], 16), CONFIG, **arguments)
    with pytest.raises(TypeError, match="no length"):
        len(PositionSampler(SampleOrder(0, [9], 16), CONFIG))
    with pytest.raises(ValueError, match="rate=2"):
        BadSampleLimit(2)


def test_import_reads_no_model_code() -> None:
    code = (
        "import sys, fastdiff.data\n"
        "heavy = {'triton', 'transformers', 'deepspeed', 'sklearn', 'tokenizers'}\n"
        "heavy |= {'fastdiff.models', 'fastdiff.nn', 'fastdiff.ops'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
