"""Items fetched in a thread: their order, their errors, and an end that leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from fastdiff.training.ahead import ahead


def counted(n: int, taken: list[int], closed: threading.Event) -> Iterator[int]:
    try:
        for i in range(n):
            taken.append(i)
            yield i
    finally:
        closed.set()


def test_order_and_end() -> None:
    taken, closed = [], threading.Event()
    assert list(ahead(counted(100, taken, closed))) == list(range(100))
    assert closed.is_set()
    assert list(ahead(iter(()))) == []


def test_the_next_are_fetched_before_they_are_asked_for() -> None:
    taken, closed = [], threading.Event()
    items = ahead(counted(100, taken, closed))
    assert next(items) == 0
    deadline = threading.Event()
    for _ in range(200):
        if len(taken) == 4:  # one is worked on, two wait, one is in hand
            break
        deadline.wait(0.01)
    assert taken == [0, 1, 2, 3]
    items.close()
    assert closed.wait(10)
    assert len(taken) < 6
    assert not any(t.name == "fastdiff loader" for t in threading.enumerate())


def test_an_error_comes_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        yield 2
        raise RuntimeError("a worker died")

    items = ahead(failing())
    assert (next(items), next(items)) == (1, 2)
    with pytest.raises(RuntimeError, match="a worker died"):
        next(items)
