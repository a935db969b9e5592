"""Loads the compiled CPU library, once, or says why there is none and how to get it.

Nothing is loaded at import: the first of `available`, `why_absent` and `load` does it. The
library's functions are then `torch.ops.fastdiff_native.*`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

# The variable names another build, such as that of `make sanitize`.
LIBRARY = Path(
    os.environ.get("FASTDIFF_NATIVE_LIBRARY") or Path(__file__).with_name("libfastdiff_cpu.so")
)
LEVELS = ("portable", "x86-64-v3", "avx512", "avx512_bf16")
"""Instruction sets, in the order of `Level` in native/isa.h; a CPU of one runs all before it."""

_REASON_FILE = "native_absent.txt"  # left beside the library's place by setup.py
_OLDEST_TORCH = (2, 10)
_CURE = (
    "To build it: with a C++20 compiler and torch >= 2.10 installed, run "
    "`pip install --force-reinstall --no-deps .` (or `-e .`) in the checkout of fastdiff; "
    "`-v` shows the compiler's messages."
)

_lock = threading.Lock()
_tried = False
_reason: str | None = None


def available() -> bool:
    """Whether the compiled library is loaded; loads it at the first call."""
    return why_absent() is None


def why_absent() -> str | None:
    """Why the compiled library cannot be used and what to do about it, or None where it is loaded.

    Raises:
        RuntimeError: FASTDIFF_CPU_LEVEL names no level, or one above this CPU's.
    """
    global _tried, _reason
    if not _tried:
        with _lock:
            if not _tried:
                _reason = _load(LIBRARY)
                _tried = True
    return _reason


def load() -> None:
    """Makes `torch.ops.fastdiff_native` callable.

    Raises:
        RuntimeError: The library is absent or does not load; the message is `why_absent()`.
    """
    reason = why_absent()
    if reason is not None:
        raise RuntimeError(reason)


def cpu_level() -> str:
    """The instruction set whose kernels run, one of `LEVELS`.

    It is the highest that this CPU has, or the lower one that the environment variable
    FASTDIFF_CPU_LEVEL named when the library was loaded.

    Raises:
        RuntimeError: The library is absent.
    """
    load()
    return LEVELS[torch.ops.fastdiff_native.cpu_level()]


def float32(tensor: Tensor | None) -> Tensor | None:
    """A small argument (a weight, a vector) as the kernels read it: float32 and contiguous."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a new tensor that something else will fill; of 32 MiB and more."""
    if tensor.nbytes >= 32 << 20:
        torch.ops.fastdiff_native.huge_pages.default(tensor)


@contextlib.contextmanager
def float32_buffers(targets: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """What kernels write small gradients to: the tensors themselves where they are float32.

    The others get a buffer, and its rounded content at the end.
    """
    buffers = [
        t
        if t is None or (t.dtype is torch.float32 and t.is_contiguous())
        else torch.empty(t.shape, dtype=torch.float32)
        for t in targets
    ]
    yield buffers
    for target, buffer in zip(targets, buffers, strict=True):
        if target is not None and buffer is not None and buffer is not target:
            target.copy_(buffer)


def _load(library: Path) -> str | None:
    if not library.is_file():
        note = library.with_name(_REASON_FILE)
        why = note.read_text().strip() if note.is_file() else f"{library.name} is not there"
        return f"the compiled CPU kernels were not built: {why}. {_CURE}"
    # Checked first: against an older torch the linker would only name the first symbol it misses.
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        wanted = ".".join(map(str, _OLDEST_TORCH))
        return f"the compiled CPU kernels need torch >= {wanted}, this is {torch.__version__}."
    try:
        torch.ops.load_library(os.fspath(library))
    except OSError as error:
        cause = error.__cause__ or error  # torch's own message names only the file
        return (
            f"the compiled CPU kernels do not load with torch {torch.__version__}: {cause}. {_CURE}"
        )
    torch.ops.fastdiff_native.cpu_level()  # settles the level now, so that a bad override is told
    return None
