"""Work in batches over the ranks of torch.distributed, results in the order of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_batches(batches: int) -> range:
    """The numbers of this rank's batches: batch k is computed by rank k mod world."""
    rank, world = _rank_and_world()
    return range(rank, batches, world)


def in_order(batches: int, own: Iterator[T | Exception]) -> Iterator[T]:
    """The results of batches 0, 1, ..., each on every rank.

    Args:
        batches: their number, over all ranks.
        own: results of `own_batches`; an exception is raised on every rank in its place, since
            one that a single rank raised would leave the others waiting.
    """
    _, world = _rank_and_world()
    for first in range(0, batches, world):
        mine = next(own, None)
        everyone: list[Any] = [mine]
        if world > 1:
            everyone = [None] * world
            dist.all_gather_object(everyone, mine)
        for result in everyone[: batches - first]:
            if isinstance(result, Exception):
                raise result
            yield result
