"""group_norm_silu against nn.GroupNorm on the concatenated image, FiLM and SiLU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import backend, group_norm_silu

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def oracle(
    x, weight, bias, scale=None, shift=None, skip=None, *, groups, eps=1e-5, silu=True
) -> Tensor:
    """nn.GroupNorm's arithmetic from its formula, FiLM, and x * sigmoid(x)."""
    x = x if skip is None else torch.cat([x, skip], 1)
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(-1, keepdim=True)
    y = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    y = y * weight[:, None, None] + bias[:, None, None]
    y = y if scale is None else y * (1 + scale[:, :, None, None])
    y = y if shift is None else y + shift[:, :, None, None]
    return y * torch.sigmoid(y) if silu else y


def make(B, C1, C2, H, W) -> list[Tensor]:
    C = C1 + C2
    x, skip = torch.randn(B, C1, H, W) * 2 + 1, torch.randn(B, C2, H, W)
    return [x, torch.randn(C), torch.randn(C), torch.randn(B, C), torch.randn(B, C), skip]


def call_with(groups, **options):
    def call(x, weight, bias, scale=None, shift=None, skip=None):
        films = {"scale": scale, "shift": shift, "skip": skip}
        return group_norm_silu(x, weight, bias, num_groups=groups, **films, **options)

    return call


def oracle_with(groups, **options):
    return lambda *inputs: oracle(*inputs, groups=groups, **options)


@pytest.mark.parametrize("parts", ["norm", "film", "film and skip"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("H", "W", "groups"), [(5, 3, 4), (2, 2, 6), (8, 8, 1), (1, 1, 2)])
def test_matches_definition_in_each_dtype(parts, channels_last, H, W, groups, check_dtypes):
    # With skip, four groups of three channels straddle the seam between 8 and 4 channels.
    inputs = make(2, 8, 4, H, W) if parts == "film and skip" else make(2, 12, 0, H, W)
    inputs = inputs[: {"norm": 3, "film": 5, "film and skip": 6}[parts]]
    if channels_last:
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    check_dtypes(call_with(groups), oracle_with(groups), inputs, TOLERANCE)


def test_matches_nn_group_norm():
    x, weight, bias, scale, shift, skip = make(2, 8, 4, 5, 7)
    norm = torch.nn.GroupNorm(6, 12, eps=1e-3)
    norm.weight.data, norm.bias.data = weight, bias
    y = norm(torch.cat([x, skip], 1))
    identity = call_with(6, eps=1e-3, activation="identity")
    torch.testing.assert_close(identity(x, weight, bias, skip=skip), y)
    got = call_with(6, eps=1e-3)(x, weight, bias, scale=scale, skip=skip)
    film = y * (1 + scale[:, :, None, None])
    torch.testing.assert_close(got, torch.nn.functional.silu(film))
    got = call_with(6, eps=1e-3)(x, weight, bias, shift=shift, skip=skip)
    film = y + shift[:, :, None, None]
    torch.testing.assert_close(got, torch.nn.functional.silu(film))


def test_statistics_survive_a_large_mean(check_dtypes):
    """Mean 300 times the deviation: squares in the low dtype, or E[x^2] - E[x]^2, would fail."""
    inputs = make(2, 12, 0, 9, 7)[:3]
    inputs[0] = 300 + torch.randn(2, 12, 9, 7)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
    check_dtypes(call_with(4), oracle_with(4), inputs, tolerance)


def test_group_of_equal_values_gives_its_bias():
    weight, bias = torch.randn(6), torch.randn(6)
    x = torch.full((1, 6, 4, 4), 0.7)
    y = group_norm_silu(x, weight, bias, num_groups=2, activation="identity")
    torch.testing.assert_close(y, bias[None, :, None, None].expand_as(y), rtol=1e-4, atol=1e-4)


def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in make(2, 4, 2, 2, 3)]
    assert torch.autograd.gradcheck(call_with(3), inputs)
    assert torch.autograd.gradcheck(call_with(2, activation="identity"), inputs)


@pytest.mark.parametrize("shape", [(0, 6, 3, 3), (2, 6, 0, 3), (2, 6, 3, 0)])
def test_empty(shape):
    B, C, H, W = shape
    inputs = [t.requires_grad_() for t in make(B, C, 0, H, W)[:5]]
    y = call_with(3)(*inputs)
    assert y.shape == shape
    y.sum().backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_keeps_the_memory_format():
    inputs = make(2, 8, 4, 5, 7)
    expected = call_with(4)(*inputs)
    assert expected.is_contiguous()
    x = inputs[0].to(memory_format=torch.channels_last)
    # The layout of skip does not matter: the result follows x.
    for skip in (inputs[5], inputs[5].to(memory_format=torch.channels_last)):
        y = call_with(4)(x, *inputs[1:5], skip)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected)
        y = call_with(4)(inputs[0], *inputs[1:5], skip)
        assert y.is_contiguous()
    strided = torch.zeros(2, 8, 5, 14)[..., ::2].copy_(inputs[0])
    y = call_with(4)(strided, *inputs[1:])
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


def test_float32_parameters_beside_bfloat16():
    x, weight, bias, *_ = make(2, 6, 0, 3, 4)
    y = group_norm_silu(x.bfloat16(), weight.requires_grad_(), bias, num_groups=3)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype is torch.float32


def test_autocast_runs_in_its_dtype_with_float32_statistics():
    x, weight, bias, scale, shift, skip = make(2, 8, 4, 5, 7)
    low = [t.bfloat16() for t in (scale, shift, skip)]
    expected = call_with(4)(x.bfloat16(), weight, bias, *low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # As in a model: convolutions hand over bfloat16, the embedding float32.
        got = call_with(4)(x.requires_grad_(), weight, bias, low[0], shift, skip)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, expected)
    got.sum().backward()
    assert x.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype):
    inputs = [t.to(dtype) for t in make(2, 8, 4, 5, 7)]
    exact = call_with(4)(*(t.float() for t in inputs))
    assert torch.equal(call_with(4)(*inputs), exact.to(dtype))


def test_only_what_requires_grad_gets_one():
    inputs = make(1, 4, 2, 3, 3)
    inputs[3].requires_grad_()
    call_with(2)(*inputs).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [False] * 3 + [True, False, False]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    groups, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    C2 = data.draw(st.integers(0, groups * width - 1))
    B, H, W = (data.draw(st.integers(1, n)) for n in (3, 6, 6))
    inputs = [t.double() for t in make(B, groups * width - C2, C2, H, W)]
    if data.draw(st.booleans()):
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    inputs[5] = inputs[5] if C2 else None
    for i in (3, 4):
        inputs[i] = inputs[i] if data.draw(st.booleans()) else None
    got = call_with(groups)(*inputs)
    torch.testing.assert_close(got, oracle(*inputs, groups=groups), rtol=1e-7, atol=1e-7)


def test_compiles_to_one_graph(check_compiled):
    def batched_first(x, scale, shift, skip, weight, bias):
        return call_with(3)(x, weight, bias, scale, shift, skip)

    def make_batched(B):
        x, weight, bias, scale, shift, skip = make(B, 4, 2, 5, 3)
        return [x, scale, shift, skip, weight, bias]

    check_compiled(batched_first, make_batched, batched=4)


def test_meta():
    inputs = [t.to("meta") for t in make(2, 8, 4, 5, 7)]
    assert call_with(4)(*inputs).shape == (2, 12, 5, 7)


X, WIDE = torch.zeros(2, 384, 4, 4), torch.zeros(384)
BAD = [
    ({"x": torch.zeros(2, 384, 4)}, ValueError, r"x has shape \(2, 384, 4\); expected 4 dim"),
    ({"num_groups": 5}, ValueError, "num_groups=5 does not divide C=384"),
    ({"num_groups": 0}, ValueError, "num_groups=0 does not divide C=384"),
    ({"weight": torch.zeros(383)}, ValueError, r"weight has shape \(383,\); expected \(384,\)"),
    ({"bias": torch.zeros(1)}, ValueError, r"bias has shape \(1,\); expected \(384,\)"),
    ({"scale": torch.zeros(384)}, ValueError, r"scale has shape \(384,\); expected \(2, 384\)"),
    ({"shift": torch.zeros(3, 384)}, ValueError, r"shift has shape .*; expected \(2, 384\)"),
    ({"skip": torch.zeros(2, 32, 4)}, ValueError, r"skip has shape .*; expected 4 dimensions"),
    (
        {"skip": torch.zeros(2, 32, 4, 5)},
        ValueError,
        r"skip has shape .*; expected \(2, 32, 4, 4\)",
    ),
    ({"skip": torch.zeros(2, 7, 4, 4)}, ValueError, "num_groups=32 does not divide C=391"),
    ({"eps": -1e-5}, ValueError, "eps=-1e-05; expected at least 0"),
    ({"eps": float("nan")}, ValueError, "eps=nan"),
    ({"activation": "relu"}, ValueError, "activation='relu'; expected 'silu' or 'identity'"),
    ({"x": 1}, TypeError, "x is int; expected a tensor"),
    ({"weight": None}, TypeError, "weight is NoneType; expected a tensor"),
    ({"x": X.int()}, TypeError, "x is torch.int32; expected float32"),
    ({"skip": X.half()}, TypeError, "skip is torch.float16 and x is torch.float32; expected one"),
    ({"weight": WIDE.half()}, TypeError, "weight is torch.float16; expected torch.float32"),
    ({"shift": torch.zeros(2, 384, device="meta")}, ValueError, "shift is on meta and x on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_argument(change, error, message):
    arguments = {"x": X, "weight": WIDE, "bias": WIDE, "num_groups": 32} | change
    with pytest.raises(error, match=f"^group_norm_silu: .*{message}"):
        group_norm_silu(**arguments)


def test_parameters_alone_may_need_gradients():
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    got = []
    for image in (x, x.contiguous()):
        with backend("reference"):
            y = group_norm_silu(image, weight, bias, num_groups=2)
        assert y.stride() == image.stride()
        got.append(torch.autograd.grad(y.square().sum(), (weight, bias)))
    torch.testing.assert_close(*got)
