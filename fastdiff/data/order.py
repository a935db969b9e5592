"""Which sample comes at which position: shards in a seeded order, samples mixed within windows.

An epoch visits every sample once. The shards are permuted, the permutation is cut into windows of
at most K shards, and the samples of a window are permuted among themselves:

    position -> epoch, window, place -> order(seed, epoch, window)[place] -> sample index

so a reader needs the K shards of one window at a time, whatever the number of ranks. A data set of
at most K shards is one window: its samples are permuted as a whole.

All of it is computed from Philox's raw words and is the same under every NumPy. Streams of one key
are kept apart by the top word of Philox's counter: 0 samples, 1 scalars, 2 noise, 3 shards.

Letters: N samples, S shards, K shards of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SAMPLES, SCALARS, NOISE, SHARDS = 0, 1, 2, 3


def philox(seed: int, number: int, stream: int, part: int = 0) -> np.random.Philox:
    """Philox keyed by (seed, number), at the start of a stream and of a part of it."""
    key = np.array([seed, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, part, stream], np.uint64))


def permutation(
    seed: int, epoch: int, size: int, stream: int = SAMPLES, part: int = 0
) -> np.ndarray:
    """The permutation that sorts `size` random 64-bit words.

    Returns:
        (size,) int64.
    """
    words = philox(seed, epoch, stream, part).random_raw(size)
    return np.argsort(words, kind="stable")


class Window(NamedTuple):
    """Shards that are read together.

    first, end: the positions that it covers. shards: their numbers, ascending. number: in its
    epoch. epoch: counted from 0.
    """

    first: int
    end: int
    shards: np.ndarray
    number: int
    epoch: int


class SampleOrder:
    """The order of a data set's samples over all epochs.

    Args:
        seed: of the permutations.
        sizes: (S,) samples of each shard; samples are numbered through them. One entry is a data
            set without shards.
        window: K.

    Raises:
        ValueError: no sample, or a window below 1.
    """

    def __init__(self, seed: int, sizes: Sequence[int] | np.ndarray, window: int) -> None:
        self.seed = seed
        self.sizes = np.asarray(sizes, np.int64)
        self.size = int(self.sizes.sum())
        if self.size < 1:
            raise ValueError(f"SampleOrder: the data set has {self.size} samples; expected some")
        if window < 1:
            raise ValueError(f"SampleOrder: window={window}; expected at least 1")
        self.windows = -(-len(self.sizes) // window)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epoch = -1
        self._parts: list[np.ndarray] = []
        self._ends = np.empty(0, np.int64)
        self._window = Window(0, 0, np.empty(0, np.int64), -1, -1)
        self._order = self._offsets = np.empty(0, np.int64)

    def index(self, position: int) -> int:
        """Sample index at a position, 0..N-1."""
        window = self._window
        if not window.first <= position < window.end:
            window = self._enter(self.window(position))
        if self.windows == 1:
            return int(self._order[position - window.first])
        place = self._order[position - window.first]
        part = np.searchsorted(self._offsets, place, side="right") - 1
        return int(self._starts[window.shards[part]] + place - self._offsets[part])

    def window(self, position: int) -> Window:
        """The window in which a position lies."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            shards = permutation(self.seed, epoch, len(self.sizes), SHARDS)
            self._parts = [np.sort(part) for part in np.array_split(shards, self.windows)]
            self._ends = np.cumsum([self.sizes[part].sum() for part in self._parts])
        number = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        first = epoch * self.size
        end = first + int(self._ends[number])
        return Window(first + start, end, self._parts[number], number, epoch)

    def _enter(self, window: Window) -> Window:
        self._window = window
        count = window.end - window.first
        self._order = permutation(self.seed, window.epoch, count, SAMPLES, window.number)
        sizes = self.sizes[window.shards]
        self._offsets = np.cumsum(sizes) - sizes
        return window
