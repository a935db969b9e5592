"""`philox_bits` and `philox_normal`: checks and choice of back end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastdiff_kernels import _calls, _kernel, _register, _replay
from fastdiff_kernels.philox_normal import reference

_WORD = 1 << 32
_LARGEST = 1 << 34  # four elements for each value of the counter's first word


def _checks(op: str) -> Any:
    def arguments(
        seeds: Tensor, step: int | Tensor, shape: tuple[int, ...], stream: int = 0
    ) -> tuple[Any, ...]:
        if not isinstance(seeds, Tensor):
            raise TypeError(f"{op}: seeds is {type(seeds).__name__}; expected a tensor")
        if seeds.dtype is not torch.int64:
            raise TypeError(f"{op}: seeds is {seeds.dtype}; expected torch.int64")
        if seeds.ndim != 1:
            raise ValueError(f"{op}: seeds has shape {tuple(seeds.shape)}; expected (B,)")
        if isinstance(step, Tensor):
            if step.dtype is not torch.int64 or step.ndim or step.device != seeds.device:
                raise ValueError(
                    f"{op}: step is {step.dtype} of shape {tuple(step.shape)} on {step.device}; "
                    f"expected torch.int64, 0-d, on {seeds.device}"
                )
        elif not 0 <= step < _WORD:
            raise ValueError(f"{op}: step={step}; expected 0..2^32-1")
        else:
            step = torch.full((), step, dtype=torch.int64, device=seeds.device)
        if not 0 <= stream < _WORD:
            raise ValueError(f"{op}: stream={stream}; expected 0..2^32-1")
        shape = tuple(shape)
        if any(side < 0 for side in shape) or math.prod(shape) > _LARGEST:
            raise ValueError(f"{op}: shape={shape}; expected 0 to 2^34 elements")
        return seeds, step, shape, stream

    return arguments


_BITS = _register.Op("philox_bits", _checks("philox_bits"), reference.philox_bits)
_BITS.add("triton", "fastdiff_kernels.philox_normal.triton_kernels:bits")
_BITS.add("native", "fastdiff_kernels.philox_normal.native_kernels:bits")
_NORMAL = _register.Op("philox_normal", _checks("philox_normal"), reference.philox_normal)
_NORMAL.add("triton", "fastdiff_kernels.philox_normal.triton_kernels:normal")
_NORMAL.add("native", "fastdiff_kernels.philox_normal.native_kernels:normal")


def operator(name: str, dtype: torch.dtype, fill: Callable[..., None]) -> Any:
    """Make a callable of a kernel: `fastdiff::NAME` wherever PyTorch traces, else a plain call.

    Args:
        name: of the operator.
        dtype: of the result.
        fill: takes (result, contiguous seeds, step, stream).
    """

    def empty(seeds: Tensor, step: Tensor, shape: Sequence[int], stream: int) -> Tensor:
        return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)

    def call(seeds: Tensor, step: Tensor, shape: Sequence[int], stream: int) -> Tensor:
        result = empty(seeds, step, shape, stream)
        fill(result, seeds.contiguous(), step, stream)
        return result

    schema = f"{name}(Tensor seeds, Tensor step, SymInt[] shape, int stream) -> (Tensor y)"
    traced = _kernel._define(schema, name, _kernel.Replayed(call), empty)

    def again(differentiable: bool, args: Any, names: dict[str, Any]) -> None:
        names["run"] = _replay.Replay(call)

    def choose(seeds: Tensor, step: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
        compiling = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if compiling or type(seeds) is not Tensor:
            return cast(Tensor, traced(seeds, step, list(shape), stream))
        result = call(seeds, step, shape, stream)
        _calls.note(again, False, (seeds, step, shape, stream), result)
        return result

    return choose


def philox_bits(
    seeds: Tensor, step: int | Tensor, shape: tuple[int, ...], *, stream: int = 0
) -> Tensor:
    """32 random bits for every element of every picture, by Philox4x32-10.

    Elements 4 i .. 4 i + 3 of picture b are the four words of counter (i, step, stream, 0) under
    the key (low, high word of seeds[b]). So an element is a function of its seed, its place, step
    and stream alone, whatever the batch. Arguments and errors as `philox_normal`.

    Returns:
        (B, *shape) int32, contiguous; no gradient.

    Numerics: the same bits on every back end.

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
    """
    return cast(Tensor, _BITS(seeds, step, shape, stream))


def philox_normal(
    seeds: Tensor, step: int | Tensor, shape: tuple[int, ...], *, stream: int = 0
) -> Tensor:
    """Standard normal noise in which every picture follows its own seed.

    Box-Muller on neighbouring words w, v of `philox_bits`, read as unsigned:
    r = sqrt(-2 ln((w + 1/2) / 2^32)), a = 2 pi (v + 1/2) / 2^32; the two elements are r cos a and
    r sin a, of magnitude up to 6.76.

    Args:
        seeds: (B,) int64; all 64 bits count, so a seed of 2^63 or more is given as its negative.
        step: 0..2^32-1; or a 0-d int64 tensor on the device of seeds, which CUDA graphs read anew
            at each replay; of that, the lowest 32 bits count. Different steps are independent.
        shape: of one picture, of at most 2^34 elements.
        stream: 0..2^32-1; numbers for another use of the same seeds and steps.

    Returns:
        (B, *shape) float32, contiguous; no gradient.

    Raises:
        TypeError: seeds is no tensor, or not int64.
        ValueError: seeds is not 1-dimensional; step, stream or shape out of range; a step tensor of
            another dtype, rank or device.

    Numerics: computed in float64 and rounded once, so back ends agree to the last place and almost
    always to the bit; within one, the bits of a picture do not depend on the batch.

    Source: Salmon et al. 2011; Box and Muller 1958.
    """
    return cast(Tensor, _NORMAL(seeds, step, shape, stream))
