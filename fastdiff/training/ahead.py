"""The next items of an iterator, fetched in a thread while the caller works on one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
_DEPTH = 2
_PATIENCE = 0.1  # seconds between looks at whether anybody still wants items


class _End(NamedTuple):
    """After the last item; with the error that ended them, if one did."""

    error: BaseException | None


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items in their order; an error comes where its item would have.

    Args:
        items: Used by the thread alone; closed by it when the caller stops early.
    """
    waiting: queue.Queue[T | _End] = queue.Queue(_DEPTH)
    unwanted = threading.Event()

    def put(item: T | _End) -> None:
        while not unwanted.is_set():
            try:
                return waiting.put(item, timeout=_PATIENCE)
            except queue.Full:
                continue

    def fetch() -> None:
        try:
            for item in items:
                put(item)
                if unwanted.is_set():
                    break
            put(_End(None))
        except BaseException as error:
            put(_End(error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=fetch, name="fastdiff loader", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        unwanted.set()
        thread.join()
