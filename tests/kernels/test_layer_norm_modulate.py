"""layer_norm_modulate against nn.LayerNorm with the modulation and the residual written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import layer_norm_modulate

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

NAMES = ["x", "weight", "bias", "scale", "shift", "residual", "gate"]
COMBINATIONS = [
    ["x"],
    ["x", "weight", "bias"],
    ["x", "weight"],
    ["x", "scale", "shift"],
    ["x", "scale"],
    ["x", "shift"],
    ["x", "weight", "bias", "residual"],
    ["x", "scale", "shift", "residual", "gate"],
    NAMES,
]


def oracle(
    x, weight=None, bias=None, scale=None, shift=None, residual=None, gate=None, eps=1e-5
) -> tuple[Tensor, Tensor]:
    def wide(vector):
        return vector.reshape(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])

    branch = x if gate is None else wide(gate) * x
    r = branch if residual is None else residual + branch
    mean = r.mean(-1, keepdim=True)
    y = (r - mean) / (((r - mean) ** 2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    y = y if scale is None else y * (1 + wide(scale))
    return (y if shift is None else y + wide(shift)), r


def make(names, B=2, middle=(5,), C=12) -> list[Tensor]:
    shapes = dict.fromkeys(["x", "residual"], (B, *middle, C))
    shapes |= dict.fromkeys(["weight", "bias"], (C,))
    shapes |= dict.fromkeys(["scale", "shift", "gate"], (B, C))
    return [torch.randn(shapes[name]) for name in names]


def call_with(names, op=layer_norm_modulate, **options):
    return lambda *inputs: op(**dict(zip(names, inputs, strict=True)), **options)


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize("middle", [(), (5,), (3, 1)])
def test_matches_definition_in_each_dtype(names, middle, check_dtypes):
    inputs = make(names, middle=middle)
    check_dtypes(call_with(names), call_with(names, oracle), inputs, TOLERANCE)


def test_matches_nn_layer_norm():
    x, residual, gate, scale, shift = make(["x", "residual", "gate", "scale", "shift"])
    norm = torch.nn.LayerNorm(12, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    parameters = (norm.weight, norm.bias)
    y, r = layer_norm_modulate(x, *parameters, residual=residual, gate=gate, eps=1e-3)
    torch.testing.assert_close(r, residual + gate[:, None] * x)
    torch.testing.assert_close(y, norm(r))
    y, _ = layer_norm_modulate(x, *parameters, scale=scale, shift=shift, eps=1e-3)
    torch.testing.assert_close(y, norm(x) * (1 + scale[:, None]) + shift[:, None])


def test_without_residual_the_stream_is_x_itself():
    x = torch.randn(2, 3, 4)
    assert layer_norm_modulate(x)[1] is x


def test_norm_sees_the_rounded_residual():
    """y is the norm of the r that comes back: so a backward needs r only."""
    x, residual, gate = (t.bfloat16() for t in make(["x", "residual", "gate"], C=64))
    y, r = layer_norm_modulate(x, residual=residual, gate=gate)
    assert torch.equal(y, layer_norm_modulate(r)[0])
    exact = residual.double() + gate.double()[:, None] * x.double()
    assert torch.equal(r, exact.bfloat16())  # one rounding


def test_statistics_survive_a_large_mean(check_dtypes):
    inputs = make(["x", "weight", "bias"], C=96)
    inputs[0] = 300 + inputs[0]
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-3}
    check_dtypes(layer_norm_modulate, oracle, inputs, tolerance)


def test_equal_values_give_the_bias():
    weight, bias = make(["weight", "bias"])
    y, _ = layer_norm_modulate(torch.full((2, 5, 12), 0.7), weight, bias)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [["x"], ["x", "scale"], NAMES], ids=" ".join)
def test_gradcheck(names):
    inputs = [t.double().requires_grad_() for t in make(names, middle=(2,), C=4)]
    assert torch.autograd.gradcheck(call_with(names), inputs)


@pytest.mark.parametrize(("B", "middle"), [(0, (5,)), (2, (0,)), (2, (3, 0)), (0, ())])
def test_empty(B, middle):
    inputs = [t.requires_grad_() for t in make(NAMES, B, middle)]
    y, r = call_with(NAMES)(*inputs)
    assert y.shape == r.shape == (B, *middle, 12)
    (y.sum() + r.sum()).backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_noncontiguous_input():
    inputs = make(NAMES)
    expected = call_with(NAMES)(*inputs)
    channels_first = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs]
    channels_first[1:3] = [torch.randn(24)[::2].copy_(t) for t in inputs[1:3]]
    assert not any(t.is_contiguous() for t in channels_first)
    for a, b in zip(call_with(NAMES)(*channels_first), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_float32_parameters_beside_bfloat16():
    x, weight, bias = make(["x", "weight", "bias"])
    y, _ = layer_norm_modulate(x.bfloat16(), weight.requires_grad_(), bias)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype is torch.float32


def test_autocast_runs_in_its_dtype_with_float32_statistics():
    x, weight, bias, *rest = make(NAMES)
    low = [t.bfloat16() for t in rest]
    low_names = dict(zip(NAMES[3:], low, strict=True))
    expected = layer_norm_modulate(x.bfloat16(), weight, bias, **low_names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # As in a model: the Linears hand over bfloat16, the stream starts in float32.
        mixed = low_names | {"residual": rest[2].requires_grad_()}
        got = layer_norm_modulate(x, weight, bias, **mixed)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is torch.bfloat16
        assert torch.equal(a, b)
    got[0].sum().backward()
    assert rest[2].grad.dtype is torch.float32


def test_only_what_requires_grad_gets_one():
    inputs = make(NAMES)
    inputs[6].requires_grad_()
    call_with(NAMES)(*inputs)[0].sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [False] * 6 + [True]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data):
    B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    middle = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    names = data.draw(st.sampled_from(COMBINATIONS))
    inputs = [t.double() for t in make(names, B, middle, C)]
    got = call_with(names)(*inputs)
    for a, b in zip(got, call_with(names, oracle)(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_compiles_to_one_graph(check_compiled):
    names = ["x", "scale", "shift", "residual", "gate", "weight", "bias"]
    check_compiled(call_with(names), lambda B: make(names, B), batched=5)
    check_compiled(call_with(["x"]), lambda B: make(["x"], B), batched=1)


def test_meta():
    y, r = call_with(NAMES)(*(t.to("meta") for t in make(NAMES)))
    assert y.shape == r.shape == (2, 5, 12)


X, WIDE, VECTOR = torch.zeros(2, 5, 12), torch.zeros(12), torch.zeros(2, 12)
BAD = [
    ({"x": WIDE}, ValueError, r"x has shape \(12,\); expected \(B, ..., C\)"),
    ({"x": torch.zeros(2, 5, 0)}, ValueError, r"x has shape \(2, 5, 0\); expected"),
    ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\); expected \(12,\)"),
    ({"bias": VECTOR}, ValueError, r"bias has shape \(2, 12\); expected \(12,\)"),
    ({"scale": WIDE}, ValueError, r"scale has shape \(12,\); expected \(2, 12\)"),
    ({"shift": X}, ValueError, r"shift has shape \(2, 5, 12\); expected \(2, 12\)"),
    ({"residual": VECTOR}, ValueError, r"residual has shape \(2, 12\); expected \(2, 5, 12\)"),
    ({"gate": VECTOR}, ValueError, "gate is given without residual"),
    ({"gate": WIDE, "residual": X}, ValueError, r"gate has shape \(12,\); expected \(2, 12\)"),
    ({"eps": -1.0}, ValueError, "eps=-1.0; expected at least 0"),
    ({"x": "x"}, TypeError, "x is str; expected a tensor"),
    ({"scale": 1.0}, TypeError, "scale is float; expected a tensor"),
    ({"x": X.bool()}, TypeError, "x is torch.bool; expected float32"),
    ({"residual": X.double()}, TypeError, "residual is torch.float64 and x is torch.float32"),
    ({"weight": WIDE.double()}, TypeError, "weight is torch.float64; expected torch.float32"),
    ({"gate": VECTOR.to("meta"), "residual": X}, ValueError, "gate is on meta and x on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_argument(change, error, message):
    with pytest.raises(error, match=f"^layer_norm_modulate: {message}"):
        layer_norm_modulate(**({"x": X} | change))
