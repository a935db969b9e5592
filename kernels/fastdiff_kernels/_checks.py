"""Argument checks that the ops share: each a few comparisons, nothing allocated, traceable."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Named = Mapping[str, Tensor | None]


def dtype_of(
    op: str, activations: Named, parameters: Named, optional: Named | None = None
) -> torch.dtype:
    """Check dtypes and devices of a call, and return the dtype it runs in and returns.

    That is the activations' one dtype; or under autocast the autocast dtype, to which `cast` brings
    them. Parameters stay as they are: in that dtype, or float32 beside it.

    Args:
        op: the op's name, for messages.
        activations: by name; all but the first may be None.
        parameters: by name.
        optional: more parameters, which may be None.

    Raises:
        TypeError: not a tensor; not floating; activations that differ; a parameter of a third
            dtype.
        ValueError: devices that differ.
    """
    first_name, first = next(iter(activations.items()))
    if not isinstance(first, Tensor):
        raise TypeError(f"{op}: {first_name} is {type(first).__name__}; expected a tensor")
    device, dtype = first.device, first.dtype
    kind = device.type
    cast_to = None
    if kind != "meta" and dtype is not torch.float64 and torch.is_autocast_enabled(kind):
        cast_to = torch.get_autocast_dtype(kind)
    for name, tensor in activations.items():
        if tensor is None:
            continue
        _check_tensor(op, name, tensor, first_name, device)
        if tensor.dtype is not dtype and (cast_to is None or tensor.dtype is torch.float64):
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} and {first_name} is {dtype}; "
                "expected one dtype for all activations"
            )
    dtype = dtype if cast_to is None else cast_to
    for name, given in (*parameters.items(), *(optional or {}).items()):
        if given is None and name not in parameters:
            continue
        tensor = _check_tensor(op, name, given, first_name, device)
        if tensor.dtype is not dtype and tensor.dtype is not torch.float32:
            expected = f"{dtype}" if dtype is torch.float32 else f"{dtype} or torch.float32"
            raise TypeError(f"{op}: {name} is {tensor.dtype}; expected {expected}")
    return dtype


def _check_tensor(op: str, name: str, tensor: object, first: str, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in _FLOATING:
        raise TypeError(
            f"{op}: {name} is {tensor.dtype}; expected float32, bfloat16, float16 or float64"
        )
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and {first} on {device}")
    return tensor


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bring an activation to the dtype of the call (autocast); None stays None."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def check_shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` is None or has exactly this shape."""
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {expected}")


def check_rank(op: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raise ValueError unless `tensor` has as many dimensions as `layout` names, "(B, H, W, C)"."""
    rank = layout.count(",") + 1
    if tensor.ndim != rank:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; expected {rank} dimensions {layout}"
        )


def pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """Return (rows, columns) of an int or a pair; ValueError unless both are at least `least`."""
    rows, columns = (value, value) if isinstance(value, int) else _two(op, name, value)
    if rows < least or columns < least:
        raise ValueError(f"{op}: {name}={value}; expected at least {least}")
    return rows, columns


def _two(op: str, name: str, value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{op}: {name}={value!r}; expected an int or a pair (rows, columns)")
    return value[0], value[1]
