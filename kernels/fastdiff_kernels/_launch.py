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
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff_kernels import _replay

Config = dict[str, int]


@dataclass(frozen=True)
class Chip:
    """What a launcher needs to know of a GPU.

    Attributes:
        family: "sm_80", "sm_90", "sm_100", "gfx942", "gfx1100", "gfx1201"; "default" for others and
            for the interpreter.
        processors: streaming multiprocessors (AMD: what it counts as such).
        shared: bytes of shared memory one block may have.
        l2: bytes of the last cache that all processors share (AMD: the Infinity Cache).
    """

    family: str
    processors: int
    shared: int
    l2: int

    @property
    def rdna(self) -> bool:
        """AMD's chips for displays: 256 registers a lane at most, of which no loop loads ahead."""
        return self.family in ("gfx1100", "gfx1201")


# For compiling and planning where there is no GPU.
CHIPS = {
    "sm_80": Chip("sm_80", 108, 166_912, 40 << 20),
    "sm_90": Chip("sm_90", 132, 232_448, 60 << 20),
    "sm_100": Chip("sm_100", 148, 232_448, 126 << 20),
    # MI300X, RX 7900 XTX, RX 9070 XT: the data centre's chips of AMD, and two generations of RDNA.
    "gfx942": Chip("gfx942", 304, 65_536, 256 << 20),
    "gfx1100": Chip("gfx1100", 48, 65_536, 96 << 20),
    "gfx1201": Chip("gfx1201", 32, 65_536, 64 << 20),
    # Few processors: so the interpreter, too, gives several tiles to a program.
    "interpreter": Chip("default", 3, 101_376, 1 << 20),
}

_pretended: Chip | None = None
_record: list[Launch] | None = None
_stubbed = False
_generation = 0
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

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler besides warps and stages."""
        return {"launch_pdl": True} if self.launch_pdl else {}


def watched() -> bool:
    """True where each launcher must run: launches are recorded, or questions to the table are."""
    return _record is not None or _consulted is not None


def generation() -> int:
    """Grows whenever the plans of launches change, so that what was kept of them is not used."""
    return _generation


def _forget() -> None:
    global _generation
    _generation += 1


def chip(device: torch.device) -> Chip:
    """The chip behind a device; on a CPU the one of `pretend`, or the interpreter's."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return CHIPS["interpreter"]
    return _cuda_chip(torch.cuda.current_device() if device.index is None else device.index)


def amd() -> bool:
    """True where the chips are AMD's: the pretended one, or those of this build of PyTorch."""
    if _pretended is not None:
        return _pretended.family.startswith("gfx")
    return torch.version.hip is not None


@functools.cache
def _cuda_chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return _amd_chip(found.gcnArchName, found.multi_processor_count, found.L2_cache_size)
    family = {(8, 0): "sm_80", (9, 0): "sm_90"}.get((found.major, found.minor), "default")
    if found.major == 10:
        family = "sm_100"
    shared = getattr(found, "shared_memory_per_block_optin", 101_376)
    return Chip(family, found.multi_processor_count, shared, found.L2_cache_size)


def _amd_chip(architecture: str, processors: int, l2: int) -> Chip:
    """The chip of a ROCm device, whose architecture reads "gfx942:sramecc+:xnack-"."""
    kin = {"gfx9": "gfx942", "gfx11": "gfx1100", "gfx12": "gfx1201"}
    name = architecture.partition(":")[0]
    family = next((f for start, f in kin.items() if name[:-2] == start), "default")
    known = CHIPS.get(name)
    return Chip(family, processors, 65_536, l2 if known is None else known.l2)


@contextlib.contextmanager
def pretend(what: Chip) -> Iterator[None]:
    """Plan launches for this chip, whatever the machine has."""
    global _pretended
    before, _pretended = _pretended, what
    _forget()
    try:
        yield
    finally:
        _pretended = before
        _forget()


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
    _forget()
    try:
        yield
    finally:
        del _overrides[kernel, key]
        _forget()


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Take CPU tensors: the driver in place launches nothing (`benchmarks.stub_driver`)."""
    global _stubbed
    before, _stubbed = _stubbed, True
    _forget()
    try:
        yield
    finally:
        _stubbed = before
        _forget()


def takes_cpu() -> bool:
    """True inside `stubbed`."""
    return _stubbed


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
    launch_pdl: bool | int = False,
    **arguments: Any,
) -> None:
    """Launch a kernel on the device of its first tensor; nothing for an empty grid.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along up to three axes.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
        launch_pdl: programmatic dependent launch: the kernel may start before the one in front of
            it has ended, and waits for that by `gdc_wait`. On sm_90 and later.
        arguments: the kernel's own, all by name. None is a constant.
    """
    if 0 in grid:
        return
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, num_warps, num_stages, bool(launch_pdl)))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    # Fused multiply-add is asked for: Triton is about to change its default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if launch_pdl and type(kernel).__name__ != "InterpretedFunction":  # it has no such option
        options["launch_pdl"] = True
    trace = _replay.recorder()
    with contextlib.ExitStack() as around:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            around.enter_context(torch.cuda.device(device))
        if trace is not None:
            around.enter_context(_disable_current_modes())
        compiled = kernel[grid](**arguments, **options)
        if trace is not None:
            ordered = {name: arguments[name] for name in kernel.arg_names}
            trace.launched(_bind(kernel, compiled, grid, options, ordered), ordered.values())


def _bind(
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> Any:
    from fastdiff_kernels import _bound  # it imports triton

    if compiled is None:
        return _bound.interpreted(kernel, grid, options, arguments)
    return _bound.bind(compiled, grid)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
