"""dwconv_gelu and dwconv_ffn against conv2d on NCHW images, and against a sum over the stencil."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import dwconv_ffn, dwconv_gelu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# The Linears of the FFN run in the activations' dtype, with their outputs rounded to it.
FFN_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def oracle(z: Tensor, weight: Tensor, bias: Tensor, *, grid, prefix=0) -> Tensor:
    """An NCHW image, nn.Conv2d's function, and GELU from its formula."""
    B, _, C = z.shape
    image = z[:, prefix:].transpose(1, 2).reshape(B, C, *grid).contiguous()
    y = F.conv2d(image, weight, bias, padding=1, groups=C).flatten(2).transpose(1, 2)
    y = torch.cat([z[:, :prefix], y], 1)
    return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))


def make(B, grid, prefix, C) -> list[Tensor]:
    tokens = prefix + grid[0] * grid[1]
    return [torch.randn(B, tokens, C), torch.randn(C, 1, 3, 3) / 3, torch.randn(C)]


def make_ffn(B, grid, prefix, D, C) -> list[Tensor]:
    z, conv_weight, conv_bias = make(B, grid, prefix, C)
    x = torch.randn(B, z.shape[1], D)
    fc1 = [torch.randn(C, D) / D**0.5, torch.randn(C)]
    return [x, *fc1, conv_weight, conv_bias, torch.randn(D, C) / C**0.5, torch.randn(D)]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("grid", [(16, 16), (3, 5), (1, 1), (1, 6), (7, 2), (17, 15)])
def test_matches_conv2d_in_each_dtype(grid, prefix, check_dtypes):
    check_dtypes(
        lambda z, w, b: dwconv_gelu(z, w, b, grid=grid, prefix=prefix),
        lambda z, w, b: oracle(z, w, b, grid=grid, prefix=prefix),
        make(2, grid, prefix, 6),
        TOLERANCE,
    )


def test_stencil_by_hand():
    """Each grid token is the weighted sum of its neighbours; outside the grid is zero."""
    z, weight, bias = (t.double() for t in make(1, (3, 4), 1, 2))
    got = dwconv_gelu(z, weight, bias, grid=(3, 4), prefix=1)
    for y in range(3):
        for x in range(4):
            total = bias.clone()
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < 3 and 0 <= x + dx < 4:
                        tap = weight[:, 0, dy + 1, dx + 1]
                        total += tap * z[0, 1 + (y + dy) * 4 + x + dx]
            torch.testing.assert_close(got[0, 1 + y * 4 + x], F.gelu(total))
    torch.testing.assert_close(got[:, 0], F.gelu(z[:, 0]))


def test_ffn_matches_its_parts_in_each_dtype(check_dtypes):
    def exact(x, w1, b1, cw, cb, w2, b2):
        return oracle(x @ w1.T + b1, cw, cb, grid=(3, 5), prefix=1) @ w2.T + b2

    check_dtypes(
        lambda *inputs: dwconv_ffn(*inputs, grid=(3, 5), prefix=1),
        exact,
        make_ffn(2, (3, 5), 1, 4, 8),
        FFN_TOLERANCE,
    )


def test_ffn_without_linear_biases():
    x, w1, _, cw, cb, w2, _ = make_ffn(2, (3, 5), 0, 4, 8)
    got = dwconv_ffn(x, w1, None, cw, cb, w2, None, grid=(3, 5))
    torch.testing.assert_close(got, oracle(x @ w1.T, cw, cb, grid=(3, 5)) @ w2.T)


def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in make(2, (2, 3), 1, 3)]
    assert torch.autograd.gradcheck(
        lambda *inputs: dwconv_gelu(*inputs, grid=(2, 3), prefix=1), inputs
    )
    inputs = [t.double().requires_grad_() for t in make_ffn(1, (2, 2), 1, 2, 4)]
    assert torch.autograd.gradcheck(
        lambda *inputs: dwconv_ffn(*inputs, grid=(2, 2), prefix=1), inputs
    )


@pytest.mark.parametrize(
    ("B", "grid", "prefix"), [(0, (2, 3), 1), (2, (0, 3), 1), (2, (3, 0), 0), (0, (0, 0), 0)]
)
def test_empty(B, grid, prefix):
    z, weight, bias = (t.requires_grad_() for t in make(B, grid, prefix, 4))
    y = dwconv_gelu(z, weight, bias, grid=grid, prefix=prefix)
    assert y.shape == z.shape
    y.sum().backward()
    assert (weight.grad == 0).all()
    assert (bias.grad == 0).all()
    expected = torch.autograd.functional.jacobian(lambda z: F.gelu(z).sum(), z.detach())
    torch.testing.assert_close(z.grad, expected)  # prefix tokens of an empty map still count


def test_noncontiguous_input():
    z, weight, bias = make(2, (3, 4), 1, 6)
    expected = dwconv_gelu(z, weight, bias, grid=(3, 4), prefix=1)
    channels_first = z.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.randn(2, 13, 12)[..., ::2].copy_(z)
    for variant in (channels_first, every_other):
        got = dwconv_gelu(variant, weight, bias, grid=(3, 4), prefix=1)
        torch.testing.assert_close(got, expected)
    strided = torch.zeros(6, 1, 3, 3).to(memory_format=torch.channels_last).copy_(weight)
    got = dwconv_gelu(z, strided, bias, grid=(3, 4), prefix=1)
    torch.testing.assert_close(got, expected)


def test_float32_weights_beside_bfloat16():
    z, weight, bias = make(2, (3, 4), 1, 6)
    y = dwconv_gelu(z.bfloat16(), weight.requires_grad_(), bias, grid=(3, 4), prefix=1)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype is torch.float32
    ffn = make_ffn(2, (3, 4), 1, 4, 8)
    assert dwconv_ffn(ffn[0].half(), *ffn[1:], grid=(3, 4), prefix=1).dtype is torch.float16


def test_autocast_runs_in_its_dtype():
    z, weight, bias = make(2, (3, 4), 1, 6)
    expected = dwconv_gelu(z.bfloat16(), weight, bias, grid=(3, 4), prefix=1)
    ffn = make_ffn(2, (3, 4), 1, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dwconv_gelu(z.requires_grad_(), weight, bias, grid=(3, 4), prefix=1)
        assert dwconv_ffn(*ffn, grid=(3, 4), prefix=1).dtype is torch.bfloat16
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, expected)
    got.sum().backward()
    assert z.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype):
    inputs = [t.to(dtype) for t in make(2, (5, 4), 1, 6)]
    exact = dwconv_gelu(*(t.float() for t in inputs), grid=(5, 4), prefix=1)
    assert torch.equal(dwconv_gelu(*inputs, grid=(5, 4), prefix=1), exact.to(dtype))


def test_only_what_requires_grad_gets_one():
    z, weight, bias = make(1, (3, 4), 1, 6)
    dwconv_gelu(z, weight, bias.requires_grad_(), grid=(3, 4), prefix=1).sum().backward()
    assert z.grad is None
    assert weight.grad is None
    assert bias.grad is not None


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    prefix=st.integers(0, 3),
    C=st.integers(1, 5),
)
def test_any_shape(B, H, W, prefix, C):
    inputs = [t.double() for t in make(B, (H, W), prefix, C)]
    got = dwconv_gelu(*inputs, grid=(H, W), prefix=prefix)
    torch.testing.assert_close(got, oracle(*inputs, grid=(H, W), prefix=prefix))


def test_compiles_to_one_graph(check_compiled):
    def call(*inputs):
        return dwconv_ffn(*inputs, grid=(3, 4), prefix=1)

    check_compiled(call, lambda B: make_ffn(B, (3, 4), 1, 4, 8), batched=1)


def test_meta():
    inputs = [t.to("meta") for t in make_ffn(2, (3, 4), 1, 4, 8)]
    assert dwconv_ffn(*inputs, grid=(3, 4), prefix=1).shape == (2, 13, 4)


BAD = [
    ({"z": torch.zeros(13, 6)}, ValueError, r"z has shape \(13, 6\); expected 3 dimensions"),
    ({"grid": (3, 3)}, ValueError, "z has 13 tokens; expected 10 = prefix 1 [+] grid 3 x 3"),
    ({"prefix": 0}, ValueError, "z has 13 tokens; expected 12 = prefix 0 [+] grid 3 x 4"),
    ({"prefix": -1}, ValueError, "prefix=-1; expected at least 0"),
    ({"grid": (-3, -4)}, ValueError, r"grid=\(-3, -4\); expected at least 0"),
    ({"grid": (3, 4, 1)}, ValueError, r"grid=\(3, 4, 1\); expected an int or a pair"),
    ({"weight": torch.zeros(6, 1, 5, 5)}, ValueError, r"weight has shape \(6, 1, 5, 5\); expected"),
    ({"weight": torch.zeros(6, 6, 3, 3)}, ValueError, r"expected \(6, 1, 3, 3\)"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias has shape \(5,\); expected \(6,\)"),
    ({"z": None}, TypeError, "z is NoneType; expected a tensor"),
    ({"bias": 1.0}, TypeError, "bias is float; expected a tensor"),
    ({"weight": None}, TypeError, "weight is NoneType; expected a tensor"),
    (
        {"z": torch.zeros(1, 13, 6, dtype=torch.int32)},
        TypeError,
        "z is torch.int32; expected float",
    ),
    ({"weight": torch.zeros(6, 1, 3, 3).bfloat16()}, TypeError, "weight is torch.bfloat16"),
    ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias is on meta and z on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_argument(change, error, message):
    z, weight, bias = make(1, (3, 4), 1, 6)
    arguments = {"z": z, "weight": weight, "bias": bias, "grid": (3, 4), "prefix": 1} | change
    with pytest.raises(error, match=f"^dwconv_gelu: .*{message}"):
        dwconv_gelu(**arguments)


BAD_FFN = [
    (0, torch.zeros(13, 4), "x has shape .* expected 3 dimensions"),
    (0, torch.zeros(1, 12, 4), "x has 12 tokens; expected 13"),
    (1, torch.zeros(8, 5), r"fc1_weight has shape \(8, 5\); expected \(8, 4\)"),
    (1, torch.zeros(8), r"fc1_weight has shape \(8,\); expected 2 dimensions"),
    (2, torch.zeros(4), r"fc1_bias has shape \(4,\); expected \(8,\)"),
    (3, torch.zeros(4, 1, 3, 3), r"conv_weight has shape .*; expected \(8, 1, 3, 3\)"),
    (4, torch.zeros(4), r"conv_bias has shape \(4,\); expected \(8,\)"),
    (5, torch.zeros(8, 4), r"fc2_weight has shape \(8, 4\); expected \(4, 8\)"),
    (6, torch.zeros(8), r"fc2_bias has shape \(8,\); expected \(4,\)"),
]


@pytest.mark.parametrize(("position", "tensor", "message"), BAD_FFN)
def test_bad_ffn_argument(position, tensor, message):
    inputs = make_ffn(1, (3, 4), 1, 4, 8)
    inputs[position] = tensor
    with pytest.raises(ValueError, match=f"^dwconv_ffn: {message}"):
        dwconv_ffn(*inputs, grid=(3, 4), prefix=1)
