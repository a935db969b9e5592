"""layer_norm_modulate: the back end against the reference."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conformance import BACKEND, DEVICE, DTYPES, check_numerics, check_repeats, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import _launch, backend, layer_norm_modulate

NAMES = ["x", "weight", "bias", "scale", "shift", "residual", "gate"]
COMBINATIONS = [
    ["x"],
    ["x", "weight", "bias"],
    ["x", "scale", "shift"],
    ["x", "bias", "scale"],
    ["x", "weight", "shift"],
    ["x", "weight", "bias", "residual"],
    ["x", "scale", "shift", "residual", "gate"],
    ["x", "weight", "bias", "residual", "gate"],
    NAMES,
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def make(names, B=2, middle=(19,), C=96) -> list[Tensor]:
    shapes = dict.fromkeys(["x", "residual"], (B, *middle, C))
    shapes |= dict.fromkeys(["weight", "bias"], (C,))
    shapes |= dict.fromkeys(["scale", "shift", "gate"], (B, C))
    return [torch.randn(shapes[name]) for name in names]


def call_with(names, **options):
    return lambda *inputs: layer_norm_modulate(**dict(zip(names, inputs, strict=True)), **options)


def compare(names, inputs: list[Tensor], dys: list[Tensor], **tolerance) -> None:
    """Values and gradients against the reference, inputs and dys as they lie in memory."""
    got = run(call_with(names), inputs, dys)
    with backend("reference"):
        expected = run(call_with(names), inputs, dys)
    for mine, true in zip(got, expected, strict=True):
        assert (mine is None) == (true is None)
        torch.testing.assert_close(mine, true, **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


@each_dtype
@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_numerics(names, dtype):
    check_numerics(call_with(names), make(names), dtype)


def check_float32(names, **size) -> None:
    """Not by the rule: where the numbers are few it measures luck, ours and eager's."""
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, **size)]
    compare(names, inputs, [torch.randn_like(inputs[0]) for _ in range(2)])


def check_both_ways(names, **size) -> None:
    check_numerics(call_with(names), make(names, **size), torch.bfloat16)
    check_float32(names, **size)


# One piece, two and three; with a tail, without, odd; several warps a row.
@pytest.mark.parametrize(
    ("names", "C"),
    [
        *((NAMES, C) for C in (3, 8, 64, 65, 128, 129, 384, 575)),
        *((["x", "weight", "bias"], C) for C in (1, 1408, 2048, 3000)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else " ".join(value),
)
def test_widths(names, C):
    check_both_ways(names, middle=(3 if C > 64 else 40,), C=C)


# A tile has 16 or 32 rows of 96 channels, and the interpreter's chip has a few programs only:
# programs with less than a tile, with several, with a ragged one.
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 150])
@pytest.mark.parametrize("names", [["x", "weight", "bias"], NAMES], ids=" ".join)
def test_rows(names, rows):
    check_both_ways(names, middle=(rows,))


def test_sums_over_many_rows():
    """Gradients of vectors are no worse than those of eager, which adds in a tree."""
    check_numerics(call_with(NAMES), make(NAMES, B=1, middle=(1024,), C=32), torch.float32)


@pytest.mark.skipif(BACKEND != "triton", reason="its own way to share the rows out")
def test_a_chip_with_many_processors():
    """More programs than the second kernels add up at once."""
    with _launch.pretend(_launch.Chip("default", 300, 101_376, 1 << 20)):
        check_float32(["x", "weight", "bias"], B=1, middle=(16 * 129,))
        check_float32(["x", "weight", "scale", "shift"], B=2, middle=(16 * 33 + 1,))


def test_more_images_than_programs():
    check_both_ways(NAMES, B=20, middle=(2, 3), C=12)


@pytest.mark.parametrize("middle", [(), (1,), (3, 2)])
def test_leading_dimensions(middle):
    check_both_ways(NAMES, middle=middle, C=12)


def hard(kind: str) -> list[Tensor]:
    inputs = make(NAMES)
    x, residual = inputs[0], inputs[5]
    if kind == "large mean":
        x += 300
        residual += 300
    elif kind == "constant rows":
        x[:, ::2] = 0
        residual[:, ::2] = 0.7
    elif kind == "one huge value":
        residual[:, 3, 5] = 2e4
    elif kind == "tiny":
        x *= 1e-4
        residual *= 1e-4
    return inputs


@each_dtype
@pytest.mark.parametrize("kind", ["large mean", "constant rows", "one huge value", "tiny"])
def test_hard_data(kind, dtype):
    check_numerics(call_with(NAMES, eps=1e-6), hard(kind), dtype)


def test_a_large_mean_costs_nothing_of_float32():
    """Closer than eager, whose mean is rounded once more: the second pass corrects it."""
    inputs = [3000 + torch.randn(2, 19, 96)]
    check_numerics(call_with(["x"]), inputs, torch.float32)
    x = inputs[0].to(DEVICE)
    with backend("reference"):
        truth = layer_norm_modulate(x.double())[0]
    error = (layer_norm_modulate(x)[0].double() - truth).abs().max().item()
    assert error < 3000 * 2**-24 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_beside_low_precision(dtype):
    check_numerics(call_with(NAMES), make(NAMES), dtype, keep=(1, 2))


def test_the_norm_sees_the_rounded_stream():
    x, residual, gate = (t.bfloat16().to(DEVICE) for t in make(["x", "residual", "gate"]))
    y, r = layer_norm_modulate(x, residual=residual, gate=gate)
    assert torch.equal(y, layer_norm_modulate(r)[0])
    exact = residual.double() + gate.double()[:, None] * x.double()
    assert torch.equal(r, exact.bfloat16())  # one rounding


def test_without_residual_the_stream_is_x_itself():
    x = torch.randn(2, 3, 4, device=DEVICE)
    assert layer_norm_modulate(x)[1] is x
    x = torch.randn(2, 4, 3, device=DEVICE).transpose(1, 2)
    y, r = layer_norm_modulate(x)
    assert r is x
    assert y.is_contiguous()


def test_vectors_as_parts_of_one_linear():
    """As in a Swin layer: scale, shift and gate are chunks; their rows lie 3 C apart."""
    x, residual, whole = torch.randn(2, 19, 96), torch.randn(2, 19, 96), torch.randn(2, 288)

    def call(x, residual, whole):
        scale, shift, gate = whole.chunk(3, dim=1)
        return layer_norm_modulate(x, scale=scale, shift=shift, residual=residual, gate=gate)

    check_numerics(call, [x, residual, whole], torch.float32)


@pytest.mark.parametrize("form", ["channels first", "sliced", "expanded", "overlapping"])
def test_non_contiguous_input(form):
    def lay(tensor: Tensor) -> Tensor:
        shape = tensor.shape
        if form == "channels first":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if form == "sliced":
            return tensor.repeat_interleave(2, -1)[..., ::2]
        if form == "expanded":
            return tensor[:1].expand(shape)
        storage = torch.randn(shape[-1] + 7 * shape[0] + tensor.numel(), device=DEVICE)
        return storage.as_strided(shape, [*tensor.stride()[1:], 1][-len(shape) :])

    names = ["x", "weight", "bias", "scale", "shift", "residual", "gate"]
    inputs = [lay(t.to(DEVICE)).requires_grad_() for t in make(names, middle=(5,), C=12)]
    if form != "expanded":
        assert not any(t.is_contiguous() for t in inputs if t.ndim > 1)
    compare(names, inputs, [torch.randn(2, 5, 12, device=DEVICE) for _ in range(2)])


@pytest.mark.parametrize("form", ["transposed", "strided", "expanded rows", "expanded columns"])
def test_vectors_in_any_strides(form):
    def lay(vector: Tensor) -> Tensor:
        if form == "transposed":
            return vector.t().contiguous().t()
        if form == "strided":
            return vector.repeat_interleave(2, -1)[..., ::2]
        rows = form == "expanded rows" and vector.ndim == 2
        return (vector[:1] if rows else vector[..., :1]).expand(vector.shape)

    inputs = [t.to(DEVICE) for t in make(NAMES, middle=(5,), C=12)]
    for i in (3, 4, 6) if form == "transposed" else (1, 2, 3, 4, 6):
        inputs[i] = lay(inputs[i])
    inputs = [t.detach().requires_grad_() for t in inputs]
    compare(NAMES, inputs, [torch.randn(2, 5, 12, device=DEVICE) for _ in range(2)])


def test_channels_last_map():
    """NCHW in channels_last, seen as (B, H, W, C), is read and written where it lies."""
    inputs = [t.to(DEVICE) for t in make(NAMES, middle=(3, 5), C=12)]
    for i in (0, 5):
        tensor = inputs[i].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        inputs[i] = tensor.permute(0, 2, 3, 1)
    inputs = [t.requires_grad_() for t in inputs]
    compare(NAMES, inputs, [torch.randn(2, 3, 5, 12, device=DEVICE) for _ in range(2)])


@pytest.mark.parametrize("names", [["x"], NAMES], ids=" ".join)
def test_strided_gradients(names):
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, middle=(5,), C=12)]
    for dy in (
        torch.randn(2, 1, 1, device=DEVICE).expand(2, 5, 12),
        torch.randn(12, 5, 2, device=DEVICE).transpose(0, 2),
        torch.randn(2, 9, 12, device=DEVICE)[:, 2:7],
    ):
        compare(names, inputs, [dy, dy])


@pytest.mark.parametrize(("B", "middle"), [(0, (5,)), (2, (0,)), (2, (3, 0)), (0, ())])
@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_empty(names, B, middle):
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, B, middle, 12)]
    y, r = call_with(names)(*inputs)
    assert y.shape == r.shape == (B, *middle, 12)
    (y.sum() + r.sum()).backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize("used", [0, 1], ids=["y", "r"])
def test_one_result_is_used(names, used):
    """The other's gradient is None: nothing is read for it, and vectors it alone needs get 0."""
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, C=12)]
    dy = torch.randn(2, 19, 12, device=DEVICE)

    def gradients() -> list[Tensor | None]:
        result = call_with(names)(*inputs)[used]
        return list(torch.autograd.grad(result, inputs, dy, allow_unused=True))

    got = gradients()
    with backend("reference"):
        expected = gradients()
    for mine, true in zip(got, expected, strict=True):
        mine, true = (torch.zeros(()) if t is None else t for t in (mine, true))
        torch.testing.assert_close(mine, true.expand_as(mine).to(mine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", COMBINATIONS, ids=" ".join)
def test_only_what_requires_grad_gets_one(names):
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, C=12)]
    dys = [torch.randn(2, 19, 12, device=DEVICE) for _ in range(2)]
    full = dict(zip(names, run(call_with(names), inputs, dys)[2:], strict=True))
    for alone in names:
        for name, tensor in zip(names, inputs, strict=True):
            tensor.requires_grad_(name == alone)
        got = run(call_with(names), inputs, dys)[2:]
        assert len(got) == 1
        assert torch.equal(got[0], full[alone])


def test_terms_of_a_sum_share_their_gradient():
    """Without a gate the backward writes one activation for x and residual, and saves neither."""
    x, residual = (torch.randn(2, 5, 12, device=DEVICE).requires_grad_() for _ in range(2))
    middle = x * 1
    alive = weakref.ref(middle)
    y, r = layer_norm_modulate(middle, residual=residual)
    del middle
    gc.collect()
    assert alive() is None
    middle = (x * 1).detach().requires_grad_()
    y, r = layer_norm_modulate(middle, residual=residual)
    a, b = torch.autograd.grad(y.square().sum() + r.sum(), [middle, residual])
    assert a.data_ptr() == b.data_ptr()


@each_dtype
@pytest.mark.parametrize("names", [["x", "weight", "bias"], NAMES], ids=" ".join)
def test_repeats_bit_for_bit(names, dtype):
    check_repeats(call_with(names), [t.to(dtype) for t in make(names, middle=(70,))])


@pytest.mark.skipif(BACKEND != "triton", reason="names of the operators are its own")
def test_opcheck():
    x, weight, bias, scale, shift, residual, gate = (
        t.to(DEVICE).requires_grad_() for t in make(NAMES, middle=(5,), C=12)
    )
    ops = torch.ops.fastdiff
    plain, added = ops.layer_norm_modulate_triton, ops.layer_norm_modulate_residual_triton
    torch.library.opcheck(plain.default, (x, weight, bias, scale, shift, 1e-5))
    torch.library.opcheck(plain.default, (x, None, None, None, None, 1e-5))
    torch.library.opcheck(added.default, (x, residual, weight, bias, None, None, 1e-5))
    gated = ops.layer_norm_modulate_gated_triton
    torch.library.opcheck(gated.default, (x, residual, gate, None, None, scale, shift, 1e-5))


def test_compiles_to_one_graph(check_compiled):
    def on_device(names):
        call = call_with(names)
        return lambda *inputs: tuple(t.cpu() for t in call(*(i.to(DEVICE) for i in inputs)))

    names = ["x", "scale", "shift", "residual", "gate", "weight", "bias"]
    check_compiled(on_device(names), lambda B: make(names, B, (5,), 12), batched=5)
    names = ["x", "residual", "weight", "bias"]
    check_compiled(on_device(names), lambda B: make(names, B, (5,), 12), batched=2)
    check_compiled(on_device(["x"]), lambda B: make(["x"], B, (5,), 12), batched=1)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape(data):
    # from 2: eager's rounding of the only channel of a row is 316 times itself, ours is 0
    B, C = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 140))
    middle = tuple(data.draw(st.lists(st.integers(1, 9), max_size=3)))
    names = data.draw(st.sampled_from(COMBINATIONS))
    inputs = [t.to(DEVICE).requires_grad_() for t in make(names, B, middle, C)]
    dys = [torch.randn(B, *middle, C, device=DEVICE) for _ in range(2)]
    compare(names, inputs, dys, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape_and_dtype_at_length(data):
    B, C = data.draw(st.integers(1, 8)), data.draw(st.integers(48, 2100))
    rows, dtype = data.draw(st.integers(8, 60)), data.draw(st.sampled_from(DTYPES))
    names = data.draw(st.sampled_from(COMBINATIONS))
    if dtype is torch.float32:
        check_float32(names, B=B, middle=(rows,), C=C)
    else:
        check_numerics(call_with(names), make(names, B, (rows,), C), dtype)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cuda", reason="16 GB of tensors")
def test_more_elements_than_32_bits_count():
    names = ["x", "scale", "residual", "gate"]
    B, rows, C = 3, 2**20, 768  # 2.4e9 elements
    shapes = {"x": (B, rows, C), "residual": (B, rows, C), "scale": (B, C), "gate": (B, C)}
    inputs = [torch.randn(shapes[n], device=DEVICE, dtype=torch.bfloat16) for n in names]
    inputs = [t.requires_grad_() for t in inputs]
    y, r = call_with(names)(*inputs)
    grads = torch.autograd.grad([y, r], inputs[:1] + inputs[2:3], [torch.ones_like(y)] * 2)
    last = [t.detach()[-1:, -5:] if t.ndim == 3 else t.detach()[-1:] for t in inputs]
    last = [t.requires_grad_() for t in last]
    with backend("reference"):
        y_last, r_last = call_with(names)(*last)
        expected = torch.autograd.grad(
            [y_last, r_last], [last[0], last[2]], [torch.ones_like(y_last)] * 2
        )
    for mine, true in zip((y, r, *grads), (y_last, r_last, *expected), strict=True):
        torch.testing.assert_close(mine[-1:, -5:], true, rtol=2e-2, atol=2e-2)
