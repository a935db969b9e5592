"""Launching Triton kernels: which chip, which block sizes, and a record of launches.

Block sizes come from a static table per family of GPUs (`_tuning.json`, filled by
`python -m benchmarks.tune`), else from the launcher's own default. Nothing is tuned at a first
call: that looks like a hang, and lets two ranks add in different orders.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Config = dict[str, int]


@dataclass(frozen=True)
class Chip:
    """What a launcher needs to know of a GPU.

    Attributes:
        family: "sm_80", "sm_90", "sm_100"; "default" for others and for the interpreter.
        processors: streaming multiprocessors.
        shared: bytes of shared memory one block may have.
        l2: bytes of second-level cache.
    """

    family: str
    processors: int
    shared: int
    l2: int


# For compiling and planning where there is no GPU.
CHIPS = {
    "sm_80": Chip("sm_80", 108, 166_912, 40 << 20),
    "sm_90": Chip("sm_90", 132, 232_448, 60 << 20),
    "sm_100": Chip("sm_100", 148, 232_448, 126 << 20),
    # Few processors: so the interpreter, too, gives several tiles to a program.
    "interpreter": Chip("default", 3, 101_376, 1 << 20),
}

_pretended: Chip | None = None
_record: list[Launch] | None = None
_overrides: dict[tuple[str, str], Config] = {}
_consulted: dict[tuple[str, str], Config] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    launch_pdl: bool = False


def chip(device: torch.device) -> Chip:
    """The chip behind a device; on a CPU the one of `pretend`, or the interpreter's."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return CHIPS["interpreter"]
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    family = {(8, 0): "sm_80", (9, 0): "sm_90"}.get((found.major, found.minor), "default")
    if found.major == 10:
        family = "sm_100"
    shared = getattr(found, "shared_memory_per_block_optin", 101_376)
    return Chip(family, found.multi_processor_count, shared, found.L2_cache_size)


@contextlib.contextmanager
def pretend(what: Chip) -> Iterator[None]:
    """Plan launches for this chip, whatever the machine has."""
    global _pretended
    before, _pretended = _pretended, what
    try:
        yield
    finally:
        _pretended = before


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of making them: with meta tensors, a plan at no cost."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


@contextlib.contextmanager
def consulting() -> Iterator[dict[tuple[str, str], Config]]:
    """Collect the (kernel, key) pairs that launchers ask `config` for, with what they got."""
    global _consulted
    before, _consulted = _consulted, {}
    try:
        yield _consulted
    finally:
        _consulted = before


@contextlib.contextmanager
def override(kernel: str, key: str, config: Config) -> Iterator[None]:
    """Use this configuration for a kernel and key; what `benchmarks.tune` tries them with."""
    _overrides[kernel, key] = config
    try:
        yield
    finally:
        del _overrides[kernel, key]


def planning() -> bool:
    """True inside `recording`."""
    return _record is not None


def config(kernel: str, key: Sequence[object], on: Chip, default: Config) -> Config:
    """Block sizes, `num_warps` and `num_stages` of a launch.

    Args:
        kernel: the kernel's name in the table.
        key: what they depend on besides the chip (widths, bytes of an element), short: a kernel is
            compiled once for each.
        on: the chip.
        default: for a key that the table does not have.

    Returns:
        The default, with what the table says in place of it.
    """
    text = ",".join(map(str, key))
    if (kernel, text) in _overrides:
        found = default | _overrides[kernel, text]
    else:
        found = default | _table().get(on.family, {}).get(kernel, {}).get(text, {})
    if _consulted is not None:
        _consulted[kernel, text] = found
    return found


TABLE = Path(__file__).with_name("_tuning.json")


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Config]]]:
    """Family of GPUs, kernel, key: what differs from the launcher's default."""
    table: dict[str, dict[str, dict[str, Config]]] = json.loads(TABLE.read_text())
    return table


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    num_warps: int,
    num_stages: int = 2,
    launch_pdl: bool = False,
    **arguments: Any,
) -> None:
    """Launch a kernel on the device of its first tensor; nothing for an empty grid.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
        launch_pdl: programmatic dependent launch; the kernel waits for the one before it itself.
        arguments: the kernel's own, all by name. None is a constant.
    """
    if 0 in grid:
        return
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, num_warps, num_stages, launch_pdl))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        guard: Any = torch.cuda.device(device)
    else:
        guard = contextlib.nullcontext()
    with guard:
        # Fused multiply-add is asked for: Triton is about to change its default.
        options: dict[str, Any] = {"num_stages": num_stages, "enable_fp_fusion": True}
        if launch_pdl and device.type == "cuda":  # neither the interpreter nor AMD has the option
            options["launch_pdl"] = True
        kernel[grid](**arguments, num_warps=num_warps, **options)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
