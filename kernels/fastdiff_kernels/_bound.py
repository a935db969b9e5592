"""Launches of Triton kernels with nothing left to look up.

`kernel[grid](...)` binds names to parameters, specialises on every argument and asks a cache for
the compiled kernel: about 50 us of Python. What it finds is kept here, so that a later launch
with other tensors of the same kind is one call of Triton's launcher in C, of 1 to 2 us.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

# Takes a stream's handle and the kernel's arguments in their order, pointers as integers.
Bound = Callable[[int, Sequence[Any]], None]


def hooks() -> tuple[list[Any], list[Any]]:
    """Two lists, empty unless somebody (a profiler) wants to see each launch."""
    return knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls


def current_stream() -> Callable[[int], int]:
    """The function that takes a device's index and returns the handle of its current stream."""
    found: Callable[[int], int] = driver.active.get_current_stream
    return found


def bind(compiled: Any, grid: tuple[int, ...]) -> Bound:
    """A launch of a compiled kernel.

    Args:
        compiled: what `kernel[grid](...)` returned.
        grid: programs along up to three axes.
    """
    # A kernel that nobody holds is unloaded, so each of the functions does.
    x, y, z = (*grid, 1, 1)[:3]
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if not _plain(launcher):

        def by_triton(stream: int, args: Sequence[Any], kernel: Any = compiled) -> None:
            launcher(x, y, z, stream, function, metadata, None, None, None, *args)

        return by_triton
    # Past CudaLauncher.__call__: 3 us of Python for scratch memory, which these kernels lack.
    launch, cooperative, pdl = (
        launcher.launch,
        launcher.launch_cooperative_grid,
        launcher.launch_pdl,
    )
    if hasattr(launcher, "kernel_signature"):  # triton 3.7 and later
        types, signature = launcher.arg_annotations, launcher.kernel_signature

        def bound(stream: int, args: Sequence[Any], kernel: Any = compiled) -> None:
            launch(
                *(x, y, z, stream, function, cooperative, pdl, metadata, None, None, None, None),
                *(None, types, signature, args),
            )

    else:

        def bound(stream: int, args: Sequence[Any], kernel: Any = compiled) -> None:
            launch(
                *(x, y, z, stream, function, cooperative, pdl, None, None, metadata),
                *(None, None, None, *args),
            )

    return bound


def _plain(launcher: Any) -> bool:
    """Whether this is the NVIDIA launcher of a triton we know, with nothing to do but launch."""
    needed = ("launch", "launch_cooperative_grid", "launch_pdl")
    return (
        type(launcher).__name__ == "CudaLauncher"
        and all(hasattr(launcher, name) for name in needed)
        and getattr(launcher, "global_scratch_size", 1) == 0
        and getattr(launcher, "profile_scratch_size", 1) == 0
        and not getattr(launcher, "gsan_enabled", False)
    )


def interpreted(
    kernel: Any, grid: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]
) -> Bound:
    """The same for Triton's interpreter, which needs tensors: they are made of the addresses.

    Args:
        kernel: the interpreted function.
        grid: programs along up to three axes.
        options: of the launch.
        arguments: those of the launch that was traced, by name; tensors are examples.
    """
    names = list(arguments)
    examples = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, Tensor)
        else a
        for a in arguments.values()
    ]

    def launch(stream: int, args: Sequence[Any]) -> None:
        given = {
            name: _tensor_at(value, example) if isinstance(example, Tensor) else value
            for name, value, example in zip(names, args, examples, strict=True)
        }
        kernel[grid](**given, **options)

    return launch


def _tensor_at(address: int, like: Tensor) -> Tensor:
    sizes = zip(like.shape, like.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in sizes) if like.numel() else 0
    if extent == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    memory = (ctypes.c_char * (extent * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())
