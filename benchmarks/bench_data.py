"""The loader against a plain webdataset + PIL pipeline, and how fast stored text features come.

    PYTHONPATH=. python -m benchmarks.bench_data [--rounds 7]

Everything runs in one process on one thread, from a warm cache; candidates take turns and times
are lower quartiles. Both pipelines read the same JPEG shards, scale and crop with the same call
and make the same tensors (checked first). *noise* is the same loader drawing its training noise,
too.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdiff.data import StreamConfig, make_loader, open_dataset, to_square_tensor, writers
from fastdiff.data.embed import embed_shards
from fastdiff.data.shards import ShardDataset

from . import harness
from .harness import Refused, Row, Timing

COUNT, SHARD, BATCH = 512, 128, 32
# Side of the stored pictures and of the tensors, as img2dataset's usual 256 is trained on.
CASES = {"256 to 64": (256, 64), "256 to 128": (256, 128), "256 to 256": (256, 256)}
TOKENS, WIDTH = 25, 1024
# webdataset leaves the shards it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def pictures(side: int) -> Iterator[tuple[np.ndarray, str]]:
    """Smooth colours with some noise, 5:4, which compress about as photographs do."""
    random = np.random.default_rng(0)
    for i in range(COUNT):
        small = Image.fromarray(random.integers(0, 256, (16, 20, 3), np.uint8))
        smooth = np.asarray(small.resize((side * 5 // 4, side), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + random.integers(-12, 13, smooth.shape, np.int16)
        yield np.clip(noisy, 0, 255).astype(np.uint8), f"picture {i}: colours that run together"


def write(root: Path, side: int) -> Path:
    """Shards of `pictures`."""
    info = {"side": side}
    return writers.write_shards(
        root / str(side), pictures(side), info, shard_size=SHARD, image_format="jpg"
    )


def ours(folder: Path, size: int, *, noise: bool = False) -> dict[str, Tensor]:
    """One pass of this library's loader: key to tensor."""
    config = StreamConfig(seed=0, image_size=size, global_batch=BATCH, noise=noise)
    found: dict[str, Tensor] = {}
    for batch in make_loader(open_dataset(folder), config, stop=COUNT):
        found |= zip(batch["key"], batch["image"], strict=True)
    return found


def webdataset(folder: Path, size: int) -> dict[str, Tensor]:
    """One pass of the plain pipeline."""
    import webdataset as wds

    stream = (
        wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("__key__", "jpg", "txt")
        .map_tuple(str, lambda image: to_square_tensor(image, size), str)
        .batched(BATCH, collation_fn=None)
    )
    found: dict[str, Tensor] = {}
    for samples in wds.WebLoader(stream, batch_size=None, num_workers=0):
        keys, images, _ = zip(*samples, strict=True)
        found |= zip(keys, torch.stack(images), strict=True)
    return found


def run_case(name: str, folder: Path, rounds: int) -> list[Row]:
    """Check a case and time it: a row without, one with noise.

    Raises:
        Refused: the two pipelines give different tensors.
    """
    size = CASES[name][1]
    candidates: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(folder, size),
        "ours, noise": lambda: ours(folder, size, noise=True),
    }
    absent = {}
    try:
        theirs = webdataset(folder, size)
        mine = ours(folder, size)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k]) for k in mine):
            raise Refused(f"{name}: the pipelines give different tensors")
        candidates["webdataset"] = lambda: webdataset(folder, size)
        del mine, theirs
    except ImportError:
        absent["webdataset"] = "n/a: webdataset is not installed"
    timed = {**_measure(candidates, rounds), **absent}
    return [
        _row(f"loader {name}{note}", timed, mine=one, size=COUNT, unit="images")
        for one, note in (("ours", ""), ("ours, noise", ", noise"))
    ]


def _row(case: str, timed: dict[str, Timing | str], *, mine: str, size: int, unit: str) -> Row:
    row = harness.race_row(case, "loading", timed, mine=mine, dtype="float32", kind="loader")
    row[f"{unit}_per_second"] = 1e6 * size / row["us"]
    return row


class _Features:
    """An encoder whose features cost nothing, of the sizes of a T5's."""

    label, commit, weights, width = "features", "", "", WIDTH
    device = torch.device("cpu")

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        shape = len(captions), TOKENS
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.randn(*ids.shape, WIDTH, dtype=torch.bfloat16)


def run_text(folder: Path, out: Path, rounds: int) -> Row:
    """Stored features of 25 tokens, read at random places, checked and padded to batches.

    Raises:
        Refused: a batch is not what was stored.
    """
    from fastdiff.data.stream import pad_context

    dataset = open_dataset(folder)
    assert isinstance(dataset, ShardDataset)
    embed_shards(dataset, _Features(), out)
    dataset = open_dataset(folder, embeddings=out)
    assert isinstance(dataset, ShardDataset)
    assert dataset.embeddings is not None
    shards, captions = [], []
    for number, source in enumerate(dataset.shards):
        index, texts = dataset.captions(number)
        shards.append(dataset.embeddings.open(source.name, index))
        captions.append([text or "" for text in texts])
    places = np.random.default_rng(0).permutation(COUNT)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, COUNT, BATCH):
            some = (divmod(int(i), SHARD) for i in places[first : first + BATCH])
            yield pad_context([shards[s].read(row, captions[s][row]) for s, row in some])

    context, mask = next(batches())
    shard, place = divmod(int(places[0]), SHARD)
    if not torch.equal(context[0], shards[shard].read(place, captions[shard][place])):
        raise Refused("stored features differ from what a batch has")
    if context.shape != (BATCH, TOKENS, WIDTH) or not bool(mask.all()):
        raise Refused(f"a batch of stored features has the shape {tuple(context.shape)}")
    timed = _measure({"ours": lambda: sum(len(c) for c, _ in batches())}, rounds)
    for one in shards:
        one.close()
    case = f"text features {TOKENS} x {WIDTH}"
    return _row(case, timed, mine="ours", size=COUNT, unit="captions")


def _measure(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing | str]:
    """Interleaved rounds on one thread."""
    gc.collect()
    with harness.threads(1):
        return harness.measure(candidates, torch.device("cpu"), rounds=rounds, seconds=60.0)


def line(row: Row) -> str:
    """A row as text."""
    for unit in ("images", "captions"):
        if rate := row.get(f"{unit}_per_second"):
            beside = f", {row['over_best']:.2f} x {row['best']}" if "best" in row else ""
            return f"{row['case']}: {rate:,.0f} {unit}/s{beside}"
    return row["case"]


@pytest.mark.parametrize("name", CASES)
def test_loader(name: str, tmp_path: Path, benchmark: Any, results: list[Row]) -> None:
    """One case, and ours as pytest-benchmark sees it."""
    side, size = CASES[name]
    folder = write(tmp_path, side)
    rows = run_case(name, folder, rounds=3)
    results += rows
    benchmark.extra_info["rows"] = rows
    benchmark.pedantic(lambda: ours(folder, size), rounds=1)


def test_text(tmp_path: Path, benchmark: Any, results: list[Row]) -> None:
    """Stored features; pytest-benchmark sees their making, without the encoder."""
    folder = write(tmp_path, 64)
    row = run_text(folder, tmp_path / "text", rounds=5)
    results.append(row)
    benchmark.extra_info["row"] = row
    dataset = ShardDataset(list(folder.glob("*.tar")))
    benchmark.pedantic(lambda: embed_shards(dataset, _Features(), tmp_path / "again"), rounds=1)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = {side: write(root, side) for side, _ in CASES.values()}
        for name, (side, _) in CASES.items():
            for row in run_case(name, folders[side], rounds):
                print(line(row), flush=True)
        print(line(run_text(folders[256], root / "text", rounds)))


if __name__ == "__main__":
    main()
