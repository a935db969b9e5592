"""Gradients have the layout of their inputs, whatever it is: every dense order of dimensions."""

from __future__ import annotations

import itertools

import pytest
import torch
from conformance import DEVICE
from every_op import OPS, results_and_gradients
from torch import Tensor

from fastdiff_kernels import backend

NAMES = ["window_attention", "window_attention padded", "dwconv_gelu", "dwconv_ffn"]


def orders(ndim: int) -> list[tuple[int, ...]]:
    """Orders of dimensions in memory: all of three, and of four those that swap or rotate."""
    every = list(itertools.permutations(range(ndim)))
    if ndim < 4:
        return every[1:]
    return [(0, 3, 1, 2), (0, 2, 1, 3), (3, 0, 1, 2), (1, 2, 3, 0), (3, 2, 1, 0)]


def laid(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values, with this order of dimensions in memory, outermost first."""
    back = [order.index(i) for i in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_of_permuted_inputs(name):
    case = OPS[name]
    plain = [t.detach() for t in case.inputs(DEVICE, torch.float32)]
    with backend("reference"):
        expected = results_and_gradients(case.call, [t.clone().requires_grad_() for t in plain])
    for index, tensor in enumerate(plain):
        for order in orders(tensor.ndim):
            inputs = [laid(t, order) if i == index else t.clone() for i, t in enumerate(plain)]
            assert torch.equal(inputs[index], tensor)
            inputs = [t.requires_grad_() for t in inputs]
            got = results_and_gradients(case.call, inputs)
            for at, (mine, true) in enumerate(zip(got, expected, strict=True)):
                size = max(1.0, true.abs().max().item())
                torch.testing.assert_close(
                    mine,
                    true,
                    rtol=1e-4,
                    atol=1e-4 * size,
                    msg=lambda text, at=at: f"input {index} laid {order}, tensor {at}: {text}",  # noqa: B023
                )


@pytest.mark.parametrize("name", NAMES)
def test_all_inputs_permuted_at_once(name):
    case = OPS[name]
    plain = [t.detach() for t in case.inputs(DEVICE, torch.float32)]
    with backend("reference"):
        expected = results_and_gradients(case.call, [t.clone().requires_grad_() for t in plain])
    inputs = [laid(t, tuple(reversed(range(t.ndim)))).requires_grad_() for t in plain]
    for mine, true in zip(results_and_gradients(case.call, inputs), expected, strict=True):
        size = max(1.0, true.abs().max().item())
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4 * size)
