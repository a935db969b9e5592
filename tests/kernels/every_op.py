"""Calls of every op, small and odd, for tests that hold for all ops, and for memcheck.py.

Letters: B batch, C channels, D width, H W rows and columns, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff_kernels import (
    dwconv_ffn,
    dwconv_gelu,
    group_norm_silu,
    layer_norm_modulate,
    philox_normal,
    window_attention,
)

Inputs = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        call: takes the tensors.
        make: makes them for a batch size, on the CPU, in float32 (or int64).
        layout: of the first tensor where it is an image.
        exact: whether all of the work is in our kernels: a repeat is bit-identical whatever stream
            or graph it runs in. Matrix products are cuBLAS's.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[int], Inputs]
    layout: torch.memory_format = torch.contiguous_format
    exact: bool = True

    def inputs(
        self, device: torch.device | str, dtype: torch.dtype, batch: int = 2, seed: int = 0
    ) -> Inputs:
        """Fresh tensors; those of floating point require a gradient."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(batch)
        return [None if t is None else self._place(t, device, dtype) for t in made]

    def _place(self, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        if tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=self.layout)
        return tensor.to(device, dtype).requires_grad_()

    @property
    def differentiable(self) -> bool:
        made = self.make(1)
        return any(t is not None and t.is_floating_point() for t in made)


def results_and_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor | None]
) -> list[Tensor]:
    """Results, then the gradients of a sum that weighs every element differently."""
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return list(results)
    dys = [torch.linspace(-1, 2, max(r.numel(), 1), device=r.device).to(r.dtype) for r in results]
    dys = [dy[: r.numel()].view(r.shape) for dy, r in zip(dys, results, strict=True)]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, wanted, dys)]


def attention(
    d: int,
    window: int,
    shift: int,
    *,
    size: tuple[int, int],
    heads: int = 1,
    value: bool = False,
) -> Case:
    """window_attention; `value`: padded positions take part with a vector."""
    C3, options = 3 * heads * d, {"heads": heads, "window_size": window, "shift": shift}

    def call(qkv: Tensor, table: Tensor, pad: Tensor | None = None) -> Tensor:
        mode = "value" if value else "mask"
        return window_attention(qkv, table, pad_qkv=pad, pad_mode=mode, **options)

    def make(batch: int) -> Inputs:
        table = torch.randn((2 * window - 1) ** 2, heads)
        return [torch.randn(batch, *size, C3), table, *([torch.randn(C3)] if value else [])]

    return Case(call, make)


def gelu(grid: tuple[int, int], prefix: int, C: int) -> Case:
    def make(batch: int) -> Inputs:
        z = torch.randn(batch, prefix + grid[0] * grid[1], C)
        return [z, torch.randn(C, 1, 3, 3) / 3, torch.randn(C)]

    return Case(lambda *tensors: dwconv_gelu(*tensors, grid=grid, prefix=prefix), make)


def ffn(grid: tuple[int, int], prefix: int, D: int, C: int) -> Case:
    def make(batch: int) -> Inputs:
        x = torch.randn(batch, prefix + grid[0] * grid[1], D)
        conv = [torch.randn(C, 1, 3, 3) / 3, torch.randn(C)]
        fc1, fc2 = torch.randn(C, D) / D**0.5, torch.randn(D, C) / C**0.5
        return [x, fc1, torch.randn(C), *conv, fc2, torch.randn(D)]

    call = lambda *tensors: dwconv_ffn(*tensors, grid=grid, prefix=prefix)  # noqa: E731
    return Case(call, make, exact=False)


def group_norm(
    C: int,
    groups: int,
    size: tuple[int, int],
    layout: torch.memory_format,
    skip: bool = False,
    film: bool = True,
) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, *more: Tensor) -> Tensor:
        names = [*(["scale", "shift"] if film else []), *(["skip"] if skip else [])]
        options = dict(zip(names, more, strict=True))
        return group_norm_silu(x, weight, bias, num_groups=groups, **options)

    def make(batch: int) -> Inputs:
        width = C * (1 + skip)
        modulation = [torch.randn(batch, width) for _ in range(2 * film)]
        images = [torch.randn(batch, C, *size) for _ in range(1 + skip)]
        parameters = [torch.randn(width), torch.randn(width)]
        return [images[0], *parameters, *modulation, *images[1:]]

    return Case(call, make, layout)


def layer_norm(tokens: int, D: int, residual: bool = True) -> Case:
    def call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *more: Tensor):
        options = dict(zip(("residual", "gate"), more, strict=True)) if residual else {}
        return layer_norm_modulate(x, weight, bias, scale=scale, shift=shift, **options)

    def make(batch: int) -> Inputs:
        x, old = (torch.randn(batch, tokens, D) for _ in range(2))
        scale, shift, gate = (torch.randn(batch, D) for _ in range(3))
        more = [old, gate] if residual else []
        return [x, torch.randn(D), torch.randn(D), scale, shift, *more]

    return Case(call, make)


def noise(shape: tuple[int, ...]) -> Case:
    def make(batch: int) -> Inputs:
        return [torch.randint(-(2**62), 2**62, (batch,)), torch.randint(0, 1000, ())]

    return Case(lambda seeds, step: philox_normal(seeds, step, shape), make)


LAST = torch.channels_last

# One call of each op, for tests of what all ops share.
OPS = {
    "window_attention": attention(16, 4, 2, size=(8, 8), heads=2),
    "window_attention padded": attention(16, 4, 2, size=(5, 6), value=True),
    "dwconv_gelu": gelu((5, 4), 1, 24),
    "dwconv_ffn": ffn((3, 4), 1, 16, 24),
    "group_norm_silu": group_norm(12, 4, (5, 3), torch.contiguous_format),
    "group_norm_silu channels_last skip": group_norm(8, 2, (4, 3), LAST, skip=True),
    "layer_norm_modulate": layer_norm(5, 40),
    "philox_normal": noise((3, 5, 5)),
}
