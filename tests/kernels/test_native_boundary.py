"""The compiled library's own door: what Python may hand it wrong it refuses, and reads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff_kernels import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason="the compiled library is absent")


def t(*shape: int) -> Tensor:
    return torch.randn(shape)


def image(*shape: int) -> Tensor:
    return t(*shape).contiguous(memory_format=torch.channels_last)


# For each function a call that it takes. Sizes below belong to no other argument by accident.
CALLS: dict[str, list[Any]] = {
    "window_attention_forward": [
        *(t(2, 6, 5, 36), t(35, 3), t(36), 3, 4, 3, 2, 1, 0.5, True, t(2, 6, 5, 12)),
    ],
    "window_attention_backward": [
        *(t(2, 6, 5, 12), t(2, 6, 5, 36), t(35, 3), t(36), 3, 4, 3, 2, 1, 0.5, True),
        *(t(2, 6, 5, 36), t(35, 3), t(36)),
    ],
    "dwconv_gelu_forward": [t(2, 31, 24), t(24), t(9, 24), t(24), 6, 5, 1, t(2, 31, 24)],
    "dwconv_gelu_backward": [
        *(t(2, 31, 24), t(2, 31, 24), t(24), t(9, 24), t(24), 6, 5, 1),
        *(t(2, 31, 24), t(2, 31, 24), t(9, 24), t(24), t(24)),
    ],
    "group_norm_forward": [
        *(t(2, 8, 6, 5), t(2, 4, 6, 5), t(12), t(12), t(2, 12), t(2, 12), 3, 1e-5, True, False),
        *(t(2, 12, 6, 5), t(2, 3, 4)),
    ],
    "group_norm_backward": [
        *(image(2, 12, 6, 5), image(2, 8, 6, 5), image(2, 4, 6, 5), t(12), t(12), t(2, 12)),
        *(t(2, 12), t(2, 3, 4), 3, True, True, image(2, 8, 6, 5), image(2, 4, 6, 5), t(12), t(12)),
        *(t(2, 12), t(2, 12)),
    ],
    "layer_norm_forward": [
        *(t(2, 7, 24), t(24), t(24), t(2, 24), t(2, 24), t(2, 7, 24), t(2, 24), 1e-5),
        *(t(2, 7, 24), t(2, 7, 24), t(14), t(14)),
    ],
    "layer_norm_backward": [
        *(t(2, 7, 24), t(2, 7, 24), t(2, 7, 24), t(2, 7, 24), t(24), t(24), t(2, 24), t(2, 24)),
        *(t(14), t(14), t(2, 7, 24), t(2, 7, 24), t(24), t(24), t(2, 24), t(2, 24), t(2, 24)),
    ],
}
# Integers that no other argument can contradict: a window may shift by anything below its size.
SIZES = {"heads", "h", "w", "rows", "columns", "prefix", "groups"}


def function(name: str) -> Any:
    return getattr(torch.ops.fastdiff_native, name).default


def refused(name: str, call: list[Any]) -> bool:
    try:
        function(name)(*call)
    except RuntimeError:
        return True
    return False


def bad(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "one element less", value.flatten()[1:].clone()
    yield "one row less", value[1:].clone()
    yield "float64", value.double()
    yield "int32", value.int()
    if value.ndim > 1:
        yield "gaps", torch.stack([value, value], -1)[..., 0]
        yield "transposed", value.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        yield "strided", torch.stack([value, value], -1)[:, 0]


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_below_are_right_but_for_what_is_wrong(name: str) -> None:
    function(name)(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_is_checked(name: str) -> None:
    arguments = function(name)._schema.arguments
    assert len(arguments) == len(CALLS[name])
    tensors = [i for i, value in enumerate(CALLS[name]) if isinstance(value, Tensor)]
    for i in tensors:
        for why, value in bad(CALLS[name][i]):
            call = [*CALLS[name]]
            call[i] = value
            assert refused(name, call), f"{name} took {arguments[i].name} with {why}"


@pytest.mark.parametrize("name", CALLS)
def test_every_size_is_checked(name: str) -> None:
    for i, argument in enumerate(function(name)._schema.arguments):
        if argument.name in SIZES:
            for value in (0, -1, -(2**62), 2**62, CALLS[name][i] + 1):
                call = [*CALLS[name]]
                call[i] = value
                assert refused(name, call), f"{name} took {argument.name}={value}"
