"""Training batches, exact by construction.

A run sees samples at positions 0, 1, 2, ... without end; the number of images seen is the whole
state of its data. Everything at a position is a pure function of (seed, position):

    epoch = position // N          index = order(seed, epoch)[position % N]
    noise, time, flip, drop = counter-based draws (Philox) keyed by (seed, position)

so the same position meets the same sample, noise and time on any number of ranks, workers and
micro-batches. The global batch at step s is the positions [s G, (s + 1) G); rank r of W takes its
r-th contiguous part, and the micro-batches are consecutive parts of that.

Streams of one key are kept apart by the top word of Philox's counter: 0 order, 1 scalars, 2 noise.
Order and scalars are computed from Philox's raw words and are the same under every NumPy; noise is
NumPy's float32 normal, the same wherever NumPy's normal is (unchanged since 1.17).

Letters: N samples, G global batch, W ranks, B micro-batch.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdiff.data.samples import BadSample, CaptionedImages, Sample
from fastdiff.data.transforms import to_square_tensor

log = logging.getLogger(__name__)

_ORDER, _SCALARS, _NOISE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides the data side of a run.

    seed: of order and draws. image_size: pixels. global_batch: images per optimiser step over all
    ranks. micro_batch: images per forward pass on one rank; None for the rank's whole part.
    num_steps: T, of diffusion time. drop_rate: probability that a sample's condition is dropped.
    flip: mirror half of the pictures (leave off where captions say left and right).
    """

    seed: int
    image_size: int
    global_batch: int
    micro_batch: int | None = None
    num_steps: int = 1000
    drop_rate: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "global_batch", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"StreamConfig: {name}={getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"StreamConfig: seed={self.seed}; expected 0..2^64 - 1")
        if not 0.0 <= self.drop_rate <= 1.0:
            raise ValueError(f"StreamConfig: drop_rate={self.drop_rate}; expected 0..1")

    def layout(self, world: int) -> tuple[int, int]:
        """Images per micro-batch, and micro-batches per step, on each of `world` ranks.

        Raises:
            ValueError: the ranks do not divide the batch, or the micro-batch not a rank's part.
        """
        if world < 1 or self.global_batch % world:
            raise ValueError(
                f"StreamConfig: {world} ranks do not divide global_batch={self.global_batch}"
            )
        part = self.global_batch // world
        micro = part if self.micro_batch is None else self.micro_batch
        if micro < 1 or part % micro:
            raise ValueError(
                f"StreamConfig: micro_batch={micro} does not divide the {part} images of a rank "
                f"(global_batch={self.global_batch}, {world} ranks)"
            )
        return micro, part // micro


def _philox(seed: int, number: int, stream: int) -> np.random.Philox:
    key = np.array([seed, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64))


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: the permutation that sorts `size` random 64-bit words.

    Returns:
        (size,) int64.
    """
    words = _philox(seed, epoch, _ORDER).random_raw(size)
    return np.argsort(words, kind="stable")


class Draws(NamedTuple):
    """The random choices at one position; `t` in 0..T-1, `t_unit` the same draw in [0, 1)."""

    t: int
    t_unit: float
    flip: bool
    drop: bool


def draw_scalars(config: StreamConfig, position: int) -> Draws:
    """Time, flip and dropping of the condition at a position.

    Each uses its own word of the stream, so switching one off leaves the others as they are.
    """
    words = _philox(config.seed, position, _SCALARS).random_raw(3)
    unit = (words >> np.uint64(11)) * 2.0**-53
    return Draws(
        t=int(unit[0] * config.num_steps),
        t_unit=float(unit[0]),
        flip=bool(config.flip and unit[1] < 0.5),
        drop=bool(unit[2] < config.drop_rate),
    )


def draw_noise(seed: int, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise at a position.

    Returns:
        `shape` float32.
    """
    generator = np.random.Generator(_philox(seed, position, _NOISE))
    return torch.from_numpy(generator.standard_normal(shape, np.float32))


class BadRecord(NamedTuple):
    """A sample that could not be used at a position; probe 0 is the sample itself, 1, 2, ... those
    tried in its place."""

    key: str
    shard: str
    reason: str
    position: int
    probe: int


class BadSampleError(RuntimeError):
    """Too many bad samples; the message names the worst shard."""


def probe_offsets(size: int) -> Iterator[int]:
    """How far from a bad sample its substitutes are looked for, in order.

    The next sixteen samples in the data set's order, then 32, 64, ... further, which leaves a
    rotten shard in a few steps and always ends.
    """
    yield from range(1, min(17, size))
    offset = 32
    while offset < size:
        yield offset
        offset *= 2


class PositionDataset(Dataset[dict[str, Any]]):
    """The finished training item at a (position, index), read in the loader's workers.

    A bad sample is replaced by the next one that can be read (`probe_offsets`); the draws stay
    those of the position, and what was bad travels with the item.
    """

    def __init__(self, dataset: CaptionedImages, config: StreamConfig) -> None:
        self.dataset, self.config = dataset, config

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        position, index = place
        sample, bad = self._read(position, index)
        config = self.config
        draws = draw_scalars(config, position)
        image = to_square_tensor(sample.image, config.image_size, draws.flip)
        return {
            "image": image,
            "caption": sample.caption,
            "key": sample.key,
            "position": position,
            "noise": draw_noise(config.seed, position, tuple(image.shape)),
            "t": draws.t,
            "t_unit": draws.t_unit,
            "drop": draws.drop,
            "bad": bad,
        }

    def _read(self, position: int, index: int) -> tuple[Sample, list[BadRecord]]:
        bad: list[BadRecord] = []
        size = len(self.dataset)
        for probe, offset in enumerate((0, *probe_offsets(size))):
            try:
                return self.dataset[(index + offset) % size], bad
            except BadSample as error:
                bad.append(BadRecord(error.key, error.shard, error.reason, position, probe))
        worst, count = Counter(record.shard for record in bad).most_common(1)[0]
        raise BadSampleError(
            f"no sample can be read: {len(bad)} tried at position {position}, none good; "
            f"worst shard {worst} ({count} of them); first: {bad[0].key!r}: {bad[0].reason}"
        )


class PositionSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (position, index) for one rank, from `start` up to `stop` or without end.

    Args:
        size: N, samples in the data set.
        config: the stream.
        rank, world: this process and their number.
        start: images seen before, over all ranks.
        stop: images seen at the end; None for no end.

    Raises:
        ValueError: an empty data set, a rank outside the world, a negative start, a `stop` that is
            not whole batches after `start`, or a layout that does not divide.
    """

    def __init__(
        self,
        size: int,
        config: StreamConfig,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.micro, self.micros = config.layout(world)
        if size < 1:
            raise ValueError(f"PositionSampler: the data set has {size} samples; expected some")
        if not 0 <= rank < world:
            raise ValueError(f"PositionSampler: rank={rank}; expected 0..{world - 1}")
        if start < 0:
            raise ValueError(f"PositionSampler: start={start}; expected at least 0")
        if stop is not None and (stop < start or (stop - start) % config.global_batch):
            raise ValueError(
                f"PositionSampler: stop={stop}; expected start={start} plus a multiple of "
                f"global_batch={config.global_batch}"
            )
        self.size, self.config, self.rank, self.start, self.stop = size, config, rank, start, stop
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start
        while self.stop is None or first < self.stop:
            for k in range(self.micros):
                begin = first + (self.rank * self.micros + k) * self.micro
                yield [(p, self._index(p)) for p in range(begin, begin + self.micro)]
            first += self.config.global_batch

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("PositionSampler: a stream without end has no length")
        return (self.stop - self.start) // self.config.global_batch * self.micros

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.config.seed, epoch, self.size)
        return int(self._order[place])


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items.

    Returns:
        image (B, 3, H, W) float32 in [-1, 1]; noise, the same shape; caption, key: lists of text;
        position, t (B,) int64; t_unit (B,) float64 in [0, 1); drop (B,) bool; bad: BadRecords.
    """
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "key": [item["key"] for item in items],
        "position": torch.tensor([item["position"] for item in items], dtype=torch.int64),
        "noise": torch.stack([item["noise"] for item in items]),
        "t": torch.tensor([item["t"] for item in items], dtype=torch.int64),
        "t_unit": torch.tensor([item["t_unit"] for item in items], dtype=torch.float64),
        "drop": torch.tensor([item["drop"] for item in items], dtype=torch.bool),
        "bad": [record for item in items for record in item["bad"]],
    }


def _ignore_signals(worker: int) -> None:
    # A terminal, a launcher and a scheduler signal every process of a job; the training process
    # decides what it means, and needs its workers to reach the end of the step and save. Workers
    # whose parent is gone end by themselves.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    dataset: CaptionedImages,
    config: StreamConfig,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    stop: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """A loader of this rank's micro-batches (see `collate`), in order, `micros` of them per step.

    Args:
        dataset: what `open_dataset` returns.
        config: the stream.
        rank, world: this process and their number.
        start: images seen before, over all ranks; this resumes the stream.
        stop: images seen at the end; None for a stream without end.
        num_workers: reading processes; 0 reads in this one.
        pin_memory: page-locked batches, for copies to a GPU.

    Raises:
        ValueError: see `PositionSampler`.
    """
    return DataLoader(
        PositionDataset(dataset, config),
        batch_sampler=PositionSampler(
            len(dataset), config, rank=rank, world=world, start=start, stop=stop
        ),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # A worker that hangs (a dead network mount) must not hang the run.
        timeout=600 if num_workers else 0,
        # The loader draws a seed for its workers; without its own generator it would take it from
        # torch's global one and shift the model's dropout.
        generator=torch.Generator(),
    )


class BadSampleLimit:
    """Counts bad samples in the training process, logs them, and stops beyond a limit.

    Args:
        rate: largest share of the samples seen that may be bad.
        minimum: as many bad samples are always allowed, so that a run's first does not stop it.
        logged: bad samples logged one by one; after them only every hundredth.
    """

    def __init__(self, rate: float = 0.01, *, minimum: int = 16, logged: int = 20) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"BadSampleLimit: rate={rate}; expected 0..1")
        self.rate, self.minimum, self.logged = rate, minimum, logged
        self.seen = 0
        self.bad = 0
        self._by_shard: Counter[str] = Counter()

    def update(self, batch: dict[str, Any]) -> None:
        """Count a batch.

        Raises:
            BadSampleError: more than `rate` of the samples seen, and more than `minimum`, are bad.
        """
        self.seen += len(batch["position"])
        last = None
        for record in batch["bad"]:
            # Those tried in place of a bad sample did not come up by themselves: not counted.
            if record.probe == 0:
                self.bad += 1
                self._by_shard[record.shard] += 1
                last = record
                if self.bad <= self.logged or self.bad % 100 == 0:
                    log.warning(
                        "bad sample %r in %s: %s (%d bad of %d seen)",
                        *(record.key, record.shard, record.reason, self.bad, self.seen),
                    )
        if last is not None and self.bad > max(self.minimum, self.rate * self.seen):
            worst, count = self._by_shard.most_common(1)[0]
            raise BadSampleError(
                f"{self.bad} of {self.seen} samples seen are bad, over the limit of "
                f"{self.rate:.2%}; worst shard {worst} ({count} of them); last: {last.key!r} in "
                f"{last.shard}: {last.reason}"
            )
