"""The compiled CPU kernels give the same bits whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastdiff_kernels import (
    _native,
    backend,
    dwconv_gelu,
    group_norm_silu,
    layer_norm_modulate,
    window_attention,
)

pytestmark = pytest.mark.skipif(not _native.available(), reason="the compiled library is absent")


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def window() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(qkv: Tensor, table: Tensor, pad: Tensor) -> Tensor:
        return window_attention(
            qkv, table, heads=3, window_size=(5, 4), shift=(2, 1), pad_mode="value", pad_qkv=pad
        )

    return call, [leaf(2, 23, 18, 144), leaf(63, 3), leaf(144)]


def convolution() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dwconv_gelu(z, weight, bias, grid=(9, 7), prefix=2)

    return call, [leaf(3, 65, 300), leaf(300, 1, 3, 3), leaf(300)]


def group_norm(layout: torch.memory_format) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, skip: Tensor) -> Tensor:
        return group_norm_silu(x, weight, bias, num_groups=8, eps=1e-5, scale=scale, skip=skip)

    images = [
        torch.randn(2, C, 40, 33).contiguous(memory_format=layout).requires_grad_()
        for C in (40, 24)
    ]
    return call, [images[0], leaf(64), leaf(64), leaf(2, 64), images[1]]


def layer_norm() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor, gate: Tensor) -> Tensor:
        y, r = layer_norm_modulate(
            x, weight, None, scale=scale, residual=residual, gate=gate, eps=1e-5
        )
        return y * r

    return call, [leaf(2, 900, 200), leaf(200), leaf(2, 200), leaf(2, 900, 200), leaf(2, 200)]


CASES = {
    "window_attention": window,
    "dwconv_gelu": convolution,
    "group_norm_silu nchw": lambda: group_norm(torch.contiguous_format),
    "group_norm_silu channels_last": lambda: group_norm(torch.channels_last),
    "layer_norm_modulate": layer_norm,
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    call, inputs = CASES[name]()
    found = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        with backend("native"):
            y = call(*inputs)
            found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
