"""Training batches, exact by construction.

A run sees samples at positions 0, 1, 2, ... without end; the number of images seen is the whole
state of its data. Everything at a position is a pure function of (seed, position):

    index = the seeded order of shards and samples (`order`)
    noise, time, flip, drop = counter-based draws (Philox) keyed by (seed, position)

so the same position meets the same sample, noise and time on any number of ranks, workers and
micro-batches. The global batch at step s is the positions [s G, (s + 1) G); rank r of W takes its
r-th contiguous part, and the micro-batches are consecutive parts of that.

Order and scalars are computed from Philox's raw words and are the same under every NumPy; noise is
NumPy's float32 normal, the same wherever NumPy's normal is (unchanged since 1.17).

Letters: N samples, G global batch, W ranks, B micro-batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdiff.data.faults import BadRecord, BadSampleError
from fastdiff.data.order import NOISE, SCALARS, SampleOrder, philox
from fastdiff.data.samples import BadSample, CaptionedImages, Sample, ShardedImages
from fastdiff.data.transforms import to_square_tensor


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What decides the data side of a run.

    seed: of order and draws. image_size: pixels. global_batch: images per optimiser step over all
    ranks. micro_batch: images per forward pass on one rank; None for the rank's whole part.
    num_steps: T, of diffusion time. drop_rate: probability that a sample's condition is dropped.
    flip: mirror half of the pictures (leave off where captions say left and right).
    window: shards whose samples are mixed; fewer are read at a time, more are mixed better.
    noise: draw the noise in the loader; without it a batch has none, and who trains draws it.
    """

    seed: int
    image_size: int
    global_batch: int
    micro_batch: int | None = None
    num_steps: int = 1000
    drop_rate: float = 0.1
    flip: bool = False
    window: int = 16
    noise: bool = True

    def __post_init__(self) -> None:
        for name in ("image_size", "global_batch", "num_steps", "window"):
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
    words = philox(config.seed, position, SCALARS).random_raw(3)
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
    generator = np.random.Generator(philox(seed, position, NOISE))
    return torch.from_numpy(generator.standard_normal(shape, np.float32))


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


def make_order(dataset: CaptionedImages, config: StreamConfig) -> SampleOrder:
    """The order in which a stream sees a data set."""
    sizes = dataset.shard_sizes if isinstance(dataset, ShardedImages) else [len(dataset)]
    return SampleOrder(config.seed, sizes, config.window)


class PositionDataset(Dataset[dict[str, Any]]):
    """The finished training item at a (position, index), read in the loader's workers.

    A bad sample is replaced by the next one that can be read (`probe_offsets`); the draws stay
    those of the position, and what was bad travels with the item.
    """

    def __init__(self, dataset: CaptionedImages, config: StreamConfig) -> None:
        self.dataset, self.config = dataset, config
        self._order = make_order(dataset, config)
        self._next_window = -1  # the position up to which shards have been asked for

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        position, index = place
        self._fetch_ahead(position)
        sample, bad = self._read(position, index)
        config = self.config
        draws = draw_scalars(config, position)
        image = to_square_tensor(sample.image, config.image_size, draws.flip)
        item = {
            "image": image,
            "caption": sample.caption,
            "key": sample.key,
            "position": position,
            "t": draws.t,
            "t_unit": draws.t_unit,
            "drop": draws.drop,
            "bad": bad,
        }
        if config.noise:
            item["noise"] = draw_noise(config.seed, position, tuple(image.shape))
        if sample.context is not None:
            item["context"] = sample.context
        return item

    def _fetch_ahead(self, position: int) -> None:
        """At the first position of a window, ask for its shards and for those of the next."""
        if position < self._next_window or not isinstance(self.dataset, ShardedImages):
            return
        now = self._order.window(position)
        after = self._order.window(now.end)
        self._next_window = now.end
        self.dataset.prefetch([*now.shards.tolist(), *after.shards.tolist()])

    def _read(self, position: int, index: int) -> tuple[Sample, list[BadRecord]]:
        bad: list[BadRecord] = []
        size = len(self.dataset)
        for probe, offset in enumerate((0, *probe_offsets(size))):
            try:
                return self.dataset[(index + offset) % size], bad
            except BadSample as error:
                bad.append(
                    BadRecord(error.key, error.shard, error.reason, position, probe, error.lost)
                )
        worst, count = Counter(record.shard for record in bad).most_common(1)[0]
        raise BadSampleError(
            f"no sample can be read: {len(bad)} tried at position {position}, none good; "
            f"worst shard {worst} ({count} of them); first: {bad[0].key!r}: {bad[0].reason}"
        )


class PositionSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (position, index) for one rank, from `start` up to `stop` or without end.

    Args:
        order: of the data set's samples.
        config: the stream.
        rank, world: this process and their number.
        start: images seen before, over all ranks.
        stop: images seen at the end; None for no end.

    Raises:
        ValueError: a rank outside the world, a negative start, a `stop` that is
            not whole batches after `start`, or a layout that does not divide.
    """

    def __init__(
        self,
        order: SampleOrder,
        config: StreamConfig,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.micro, self.micros = config.layout(world)
        if not 0 <= rank < world:
            raise ValueError(f"PositionSampler: rank={rank}; expected 0..{world - 1}")
        if start < 0:
            raise ValueError(f"PositionSampler: start={start}; expected at least 0")
        if stop is not None and (stop < start or (stop - start) % config.global_batch):
            raise ValueError(
                f"PositionSampler: stop={stop}; expected start={start} plus a multiple of "
                f"global_batch={config.global_batch}"
            )
        self.order, self.config, self.rank = order, config, rank
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start
        while self.stop is None or first < self.stop:
            for k in range(self.micros):
                begin = first + (self.rank * self.micros + k) * self.micro
                yield [(p, self.order.index(p)) for p in range(begin, begin + self.micro)]
            first += self.config.global_batch

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("PositionSampler: a stream without end has no length")
        return (self.stop - self.start) // self.config.global_batch * self.micros


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items.

    Returns:
        image (B, 3, H, W) float32 in [-1, 1]; noise, the same shape, where the stream has it;
        caption, key: lists of text; position, t (B,) int64; t_unit (B,) float64 in [0, 1);
        drop (B,) bool; bad: BadRecords; with stored text features context (B, S, width) bfloat16,
        S the longest caption's, and mask (B, S) bool, True = valid.
    """
    batch: dict[str, Any] = {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "key": [item["key"] for item in items],
        "position": torch.tensor([item["position"] for item in items], dtype=torch.int64),
        "t": torch.tensor([item["t"] for item in items], dtype=torch.int64),
        "t_unit": torch.tensor([item["t_unit"] for item in items], dtype=torch.float64),
        "drop": torch.tensor([item["drop"] for item in items], dtype=torch.bool),
        "bad": [record for item in items for record in item["bad"]],
    }
    if "noise" in items[0]:
        batch["noise"] = torch.stack([item["noise"] for item in items])
    if "context" in items[0]:
        batch["context"], batch["mask"] = pad_context([item["context"] for item in items])
    return batch


def pad_context(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of captions of several lengths, padded with zeros to the longest.

    Args:
        rows: B of (S_i, width).

    Returns:
        (B, S, width) and the mask (B, S) bool, True = valid.
    """
    lengths = [len(row) for row in rows]
    context = rows[0].new_zeros(len(rows), max(lengths), rows[0].shape[1])
    for i, row in enumerate(rows):
        context[i, : lengths[i]] = row
    return context, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def _mind_signals(worker: int) -> None:
    # A terminal, a launcher and a scheduler signal every process of a job; the training process
    # decides what it means, and needs its workers to reach the end of the step and save. Workers
    # whose parent is gone end by themselves.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    # By the training process alone: it waits for its workers when it fails, and would for ever.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
        ValueError: see `PositionSampler`; or a window that the data set cannot hold.
    """
    if isinstance(dataset, ShardedImages):
        dataset.check_window(config.window)
    return DataLoader(
        PositionDataset(dataset, config),
        batch_sampler=PositionSampler(
            make_order(dataset, config),
            config,
            rank=rank,
            world=world,
            start=start,
            stop=stop,
        ),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_mind_signals,
        # A worker that hangs (a dead network mount) must not hang the run.
        timeout=600 if num_workers else 0,
        # The loader draws a seed for its workers; without its own generator it would take it from
        # torch's global one and shift the model's dropout.
        generator=torch.Generator(),
    )
