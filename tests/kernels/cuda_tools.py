"""Graphs, streams and memory of a GPU; on a CPU stand-ins, so that the same tests run there.

A stand-in makes the same calls in the same order, which is what can go wrong without a GPU: the
tests' own code. What CUDA makes of them is seen on a GPU only.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def capture(job: Callable[[], Sequence[Tensor]], device: torch.device) -> _Replay:
    """Capture a call into a CUDA graph; on a CPU, a replay calls it again.

    Args:
        job: reads static tensors, and returns tensors.

    Returns:
        `replay()` gives the results, each time in the same memory.
    """
    return _Graph(job, device) if device.type == "cuda" else _Replay(job)


class _Replay:
    def __init__(self, job: Callable[[], Sequence[Tensor]]) -> None:
        self.job, self.results = job, [t.clone() for t in job()]

    def __call__(self) -> Sequence[Tensor]:
        for static, new in zip(self.results, self.job(), strict=True):
            static.copy_(new)
        return self.results


class _Graph(_Replay):
    def __init__(self, job: Callable[[], Sequence[Tensor]], device: torch.device) -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets cuBLAS and cuDNN choose
                job()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        gc.collect()  # a tensor that is freed by chance breaks a capture
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.results = list(job())

    def __call__(self) -> Sequence[Tensor]:
        self.graph.replay()
        return self.results


class Lane:
    """A side stream that is busy for a while when a block begins; on a CPU, nothing."""

    def __init__(self, device: torch.device, cycles: int = 20_000_000) -> None:
        self.device, self.cycles = device, cycles
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def __call__(self, busy: bool = True) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            if busy:  # work that does not wait for its inputs now runs before they are there
                torch.cuda._sleep(self.cycles)
            yield

    def join(self) -> None:
        """Let the current stream wait for this one."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def follow(self) -> None:
        """Let this stream wait for the current one."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_bytes(job: Callable[[], Tensor], own: Sequence[Tensor], device: torch.device) -> int:
    """Memory that a forward holds for its backward, besides its result and its inputs.

    On a GPU what the allocator counts; on a CPU the saved tensors, each memory once.
    """
    if device.type == "cuda":
        job()  # compiles; cuBLAS allocates its workspace
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        result = job()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) - before - result.nbytes
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = job()
    known.add(result.untyped_storage().data_ptr())
    return sum(size for pointer, size in kept.items() if pointer not in known)


def refill(static: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> None:
    """New data in the same memory."""
    with torch.no_grad():
        for old, fresh in zip(static, new, strict=True):
            if old is not None and fresh is not None:
                old.copy_(fresh)


def same(got: Sequence[Any], expected: Sequence[Any], *, exact: bool, what: str = "") -> None:
    """Bit for bit, or to a few units in the last place where cuBLAS may choose otherwise."""
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if exact:
            assert torch.equal(a, b), f"{what}tensor {index} differs"
        else:
            unit = torch.finfo(a.dtype).eps
            size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=8 * unit, atol=8 * unit * size)
