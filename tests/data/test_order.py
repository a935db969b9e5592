"""The order of shards and samples: a permutation, in windows, the same for ever."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from fastdiff.data.order import SampleOrder, permutation

SIZES = [5, 0, 7, 3, 9, 1, 4, 6, 2, 8]  # 45 samples


def shard_of(index: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), index, side="right"))


@pytest.mark.parametrize("window", [1, 3, 4, 10, 99])
def test_every_epoch_sees_every_sample_once(window: int) -> None:
    order = SampleOrder(7, SIZES, window)
    epochs = [[order.index(45 * e + i) for i in range(45)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(45))
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_are_mixed_within_a_window_and_not_beyond() -> None:
    order = SampleOrder(7, SIZES, 4)
    position, seen = 45, []
    while position < 90:
        window = order.window(position)
        assert window.first == position
        assert 1 <= len(window.shards) <= 4
        shards = [shard_of(order.index(p)) for p in range(window.first, window.end)]
        filled = {s for s in window.shards.tolist() if SIZES[s]}
        assert set(shards) == filled
        # Mixed: more changes of shard than there are shards.
        assert sum(a != b for a, b in pairwise(shards)) > len(filled)
        seen += window.shards.tolist()
        position = window.end
    assert position == 90
    assert sorted(seen) == list(range(10))
    assert seen != sorted(seen)


def test_a_position_has_one_sample_from_wherever_it_is_asked() -> None:
    order = SampleOrder(3, SIZES, 3)
    forwards = [order.index(p) for p in range(135)]
    for p in (134, 0, 71, 44, 45, 90):
        assert SampleOrder(3, SIZES, 3).index(p) == forwards[p]
        assert order.index(p) == forwards[p]


def test_few_shards_are_one_window_and_permuted_as_a_whole() -> None:
    order = SampleOrder(5, SIZES, 10)
    assert [order.index(45 + p) for p in range(45)] == permutation(5, 1, 45).tolist()
    assert order.windows == 1


def test_the_order_does_not_change() -> None:
    # A run that is resumed under another version needs it.
    order = SampleOrder(7, SIZES, 3)
    assert [order.index(p) for p in range(12)] == [8, 33, 4, 1, 6, 3, 2, 29, 34, 11, 7, 31]
    assert SampleOrder(7, SIZES, 3).window(0).shards.tolist() == [0, 2, 7]


def test_windows_of_one_size_are_mixed_differently() -> None:
    order = SampleOrder(0, [10] * 4, 2)
    assert order.windows == 2
    ranks = []
    for first in (0, 20):
        window = [order.index(p) for p in range(first, first + 20)]
        ranks.append([sorted(window).index(i) for i in window])
    assert ranks[0] != ranks[1]


def test_windows_are_even() -> None:
    order = SampleOrder(0, [10] * 17, 16)
    # Not sixteen and a rest of one, which would be read in its own order.
    assert [len(order.window(p).shards) for p in (0, 169)] == [9, 8]


def test_order_at_120_million_pairs_is_quick_and_small() -> None:
    order = SampleOrder(0, [10_000] * 12_000, 16)
    position = 987_654_321
    window = order.window(position)
    assert window.end - window.first == 160_000
    assert shard_count(order, window.first, window.end) == 16


def shard_count(order: SampleOrder, first: int, end: int) -> int:
    return len({order.index(p) // 10_000 for p in range(first, end, 997)})


def test_errors() -> None:
    with pytest.raises(ValueError, match="has 0 samples"):
        SampleOrder(0, [0, 0], 4)
    with pytest.raises(ValueError, match="window=0"):
        SampleOrder(0, [4], 0)
