"""group_norm_silu: the back end against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conformance import BACKEND, DEVICE, DTYPES, check_numerics, check_repeats, only_as, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import _launch, backend, group_norm_silu

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_layout = pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["nchw", "nhwc"])
triton_only = pytest.mark.skipif(BACKEND != "triton", reason="its own names and ways")

# (C1, C2, H, W, groups). Triton keeps the small ones on chip; the others it reads twice.
SMALL = {
    "4 channels a group": (32, 0, 8, 8, 8),
    "6 channels a group": (48, 0, 7, 9, 8),
    "the seam within a group": (20, 16, 5, 8, 3),
    "the seam between groups": (16, 32, 16, 16, 6),
    "one group": (24, 8, 9, 7, 1),
    "one channel a group": (40, 0, 6, 6, 40),
    "one pixel": (64, 8, 1, 1, 6),
    "one row": (24, 0, 1, 37, 4),
    "one channel": (1, 0, 17, 16, 1),
    "many channels": (96, 160, 6, 6, 8),
}
LARGE = {
    "many pixels": (80, 0, 16, 17, 2),
    "the seam at 16 bytes": (24, 56, 16, 17, 2),
    "an odd seam": (20, 13, 15, 19, 1),
    "one wide group": (40, 8, 16, 17, 1),
    "few channels": (2, 4, 65, 66, 1),
    "many channels": (80, 140, 9, 9, 1),
    "wide groups, the seam within": (100, 220, 6, 8, 1),
}


def make(C1, C2, H, W, B=2, *, film=True) -> list[Tensor | None]:
    """x, weight, bias, scale, shift, skip."""
    C = C1 + C2
    x, skip = torch.randn(B, C1, H, W) * 2 + 1, torch.randn(B, C2, H, W)
    films = [torch.randn(B, C), torch.randn(B, C)] if film else [None, None]
    return [x, torch.randn(C), torch.randn(C), *films, skip if C2 else None]


def call_with(groups, layout=None, **options):
    def call(x, weight, bias, scale=None, shift=None, skip=None):
        if layout is not None:
            x = x.contiguous(memory_format=layout)
            skip = None if skip is None else skip.contiguous(memory_format=layout)
        films = {"scale": scale, "shift": shift, "skip": skip}
        return group_norm_silu(x, weight, bias, num_groups=groups, **films, **options)

    return call


def on_device(inputs) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in inputs]


def compare(call, inputs, dy: Tensor) -> None:
    """Values and gradients against the reference in float64; all lie in memory as they come."""
    got = run(call, inputs, [dy])
    exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
    with backend("reference"):
        expected = run(call, exact, [dy])
    for mine, true in zip(got, expected, strict=True):
        allowed = 1e-4 * max(1, true.abs().max()) if true.numel() else 0
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=allowed)


def check(call, inputs, dtype: torch.dtype) -> None:
    """The rule, for values and gradients of which there are enough.

    Of few float32 numbers it measures luck, ours and eager's: these are held to a tolerance.
    """
    if dtype is torch.float32 and min(t.numel() for t in inputs if t is not None) < 200:
        inputs = on_device(inputs)
        compare(call, inputs, torch.randn_like(call(*inputs)))
    else:
        check_numerics(call, inputs, dtype)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((CONTIGUOUS, torch.float32), (CHANNELS_LAST, torch.float32)),
        *((CONTIGUOUS, torch.float16), (CHANNELS_LAST, torch.bfloat16)),
    ],
    ids=["nchw-float32", "nhwc-float32", "nchw-float16", "nhwc-bfloat16"],
)
@pytest.mark.parametrize("case", SMALL)
def test_small_maps(case, layout, dtype):
    *size, groups = SMALL[case]
    check(call_with(groups, layout), make(*size), dtype)


@each_layout
@pytest.mark.parametrize("case", LARGE)
def test_large_maps(case, layout):
    *size, groups = LARGE[case]
    check(call_with(groups, layout), make(*size), torch.float32)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_maps_in_low_precision(layout, dtype):
    *size, groups = LARGE["one wide group"]
    check_numerics(call_with(groups, layout), make(*size), dtype)


BOTH = {"small": SMALL["the seam within a group"], "large": LARGE["one wide group"]}
both = pytest.mark.parametrize("size", BOTH.values(), ids=BOTH)


@both
@pytest.mark.parametrize(
    ("layout", "activation", "without"),
    [
        *((CHANNELS_LAST, "silu", (3,)), (CHANNELS_LAST, "identity", (4,))),
        *((CONTIGUOUS, "silu", (3, 4)), (CHANNELS_LAST, "identity", (3, 4, 5))),
    ],
    ids=str,
)
def test_optional_arguments(size, layout, activation, without):
    """Without scale (3), shift (4), skip (5)."""
    *size, groups = size
    inputs = [None if i in without else t for i, t in enumerate(make(*size))]
    if 5 in without:
        inputs[0] = torch.randn(2, size[0] + size[1], *size[2:])
    call = call_with(groups, layout, activation=activation, eps=1e-2)
    inputs = on_device(inputs)
    compare(call, inputs, torch.randn_like(call(*inputs)))


def hard(kind: str, size) -> list[Tensor | None]:
    inputs = make(*size)
    x = inputs[0]
    if kind == "large mean":
        x[:] = 300 + torch.randn_like(x)
        inputs[5] += 300
    elif kind == "constant groups":
        x[:] = 0.7
        inputs[5][:] = 0.7
    elif kind == "one huge value":
        x[0, 0, 0, 0] = 1e4
    elif kind == "a channel apart":
        x[:, 1] += 1e3
    elif kind == "tiny":
        x *= 1e-4
        inputs[5] *= 1e-4
    return inputs


HARD = ["large mean", "constant groups", "one huge value", "a channel apart", "tiny"]


@each_dtype
@each_layout
@pytest.mark.parametrize("kind", HARD)
def test_hard_data(kind, layout, dtype):
    *size, groups = SMALL["many channels"]
    check_numerics(call_with(groups, layout), hard(kind, size), dtype)


@pytest.mark.parametrize("kind", HARD)
def test_hard_data_of_large_maps(kind):
    *size, groups = LARGE["many channels"]
    layout = CONTIGUOUS if kind in ("constant groups", "tiny") else CHANNELS_LAST
    check_numerics(call_with(groups, layout), hard(kind, size), torch.float32)


@each_layout
def test_hard_data_in_many_tiles(layout):
    """Parts of a group with means far apart, and a first tile unlike the rest."""
    x = torch.randn(1, 240, 12, 13) + 300
    x[:, :, 6:] += 50
    x[:, :, 0, 0] = -1e4
    inputs = [x, torch.randn(240), torch.randn(240)]
    check_numerics(call_with(2, layout), inputs, torch.float32)


@pytest.mark.parametrize(
    ("layout", "dtype"), [(CONTIGUOUS, torch.float16), (CHANNELS_LAST, torch.bfloat16)], ids=str
)
@both
def test_float32_parameters_beside_low_precision(size, layout, dtype):
    *size, groups = size
    check_numerics(call_with(groups, layout), make(*size), dtype, keep=(1, 2))


@pytest.mark.parametrize(
    ("size", "layout"), [*zip(BOTH.values(), [CHANNELS_LAST, CONTIGUOUS], strict=True)], ids=BOTH
)
def test_only_what_requires_grad_gets_one(size, layout):
    *size, groups = size
    inputs = on_device(make(*size, B=1))
    inputs = [t.detach().contiguous(memory_format=layout) if t.ndim == 4 else t for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    call = call_with(groups)
    dy = torch.randn_like(call(*inputs))
    full = run(call, inputs, [dy])[1:]
    for alone in range(6) if size[2] < 16 else (0, 1, 5):
        tensor = inputs[alone]
        for other in inputs:
            other.requires_grad_(other is tensor)
        got = run(call, inputs, [dy])[1:]
        assert len(got) == 1
        assert torch.equal(got[0], full[alone])
    assert not call(*(t.detach() for t in inputs)).requires_grad


def relaid(form: str, x: Tensor) -> Tensor:
    B, C, H, W = x.shape
    if form == "sliced":
        return torch.randn(B, C, H, 2 * W, device=DEVICE)[..., ::2].copy_(x)
    if form == "transposed":
        return torch.randn(B, C, W, H, device=DEVICE).transpose(2, 3).copy_(x)
    if form == "channels of a wider map":
        wide = torch.randn(B, C + 3, H, W, device=DEVICE)
        return wide.to(memory_format=CHANNELS_LAST)[:, 2 : C + 2].copy_(x)
    if form == "expanded":
        return x[:1, :, :, :1].expand(B, C, H, W)
    if form == "not aligned":
        flat = torch.randn(x.numel() + 1, device=DEVICE)[1:]
        return flat.view(B, H, W, C).permute(0, 3, 1, 2).copy_(x)
    return x.contiguous(memory_format=CHANNELS_LAST if form == "channels last" else CONTIGUOUS)


FORMS = [
    *("contiguous", "channels last", "sliced", "transposed"),
    *("channels of a wider map", "expanded", "not aligned"),
]


@pytest.mark.parametrize(
    ("form", "size"),
    [(f, BOTH["small"]) for f in FORMS] + [(f, BOTH["large"]) for f in FORMS[1::2]],
    ids=str,
)
def test_memory_formats(form, size):
    """x as it comes, skip in each format; strides of result and gradients are as promised."""
    C1, C2, H, W, groups = size
    plain = on_device(make(C1, C2, H, W))
    dy = torch.randn(2, C1 + C2, H, W, device=DEVICE)
    # The large map takes the same way to its kernels.
    pairs = [("channels last", "contiguous"), ("contiguous", "channels last"), ("sliced",) * 2]
    for skip_form, dy_form in pairs if H < 16 else pairs[:1]:
        inputs = [relaid(form, plain[0].detach()), *plain[1:5]]
        inputs += [relaid(skip_form, plain[5].detach())]
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = call_with(groups)(*inputs)
        with backend("reference"):
            assert call_with(groups)(*inputs).stride() == y.stride()
        compare(call_with(groups), inputs, relaid(dy_form, dy))
        gradients = torch.autograd.grad(y, [inputs[0], inputs[5]], dy)
        for gradient, tensor in zip(gradients, (inputs[0], inputs[5]), strict=True):
            assert gradient.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("shape", [(2, 12, 1, 1), (2, 1, 5, 7), (1, 12, 5, 1), (2, 12, 1, 9)])
@each_layout
def test_formats_that_are_both(shape, layout):
    """One pixel or one channel is contiguous and channels_last at once: y is contiguous."""
    inputs = on_device(make(shape[1], 11, *shape[2:], B=shape[0]))
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
    for skip in (inputs[5], None):
        C = shape[1] + (0 if skip is None else 11)
        given = [inputs[0], *(t.detach()[..., :C].requires_grad_() for t in inputs[1:5]), skip]
        y = call_with(1)(*given)
        with backend("reference"):
            expected = call_with(1)(*given)
        assert y.is_contiguous() == expected.is_contiguous()
        compare(call_with(1), given, torch.randn_like(y))


@each_layout
@both
def test_strided_gradient_and_vectors(size, layout):
    """The gradient of a mean is expanded; scale and shift are chunks of one Linear's result."""
    C1, C2, H, W, groups = size
    x, weight, bias, _, _, skip = make(C1, C2, H, W)
    emb = torch.randn(2, 2 * (C1 + C2))

    def call(x, weight, bias, emb, skip):
        scale, shift = emb.chunk(2, dim=1)
        return call_with(groups, layout)(x, weight, bias, scale, shift, skip)

    inputs = on_device([x, weight, bias, emb, skip])
    dys = [
        torch.randn(2, C1 + C2, 1, 1, device=DEVICE).expand(-1, -1, H, W),
        torch.randn(W, H, C1 + C2, 2, device=DEVICE).permute(3, 2, 1, 0),
        torch.randn(2, C1 + C2, H + 2, W, device=DEVICE)[:, :, 1:-1],
    ]
    for dy in dys if H < 16 else dys[:1]:
        compare(call, inputs, dy)


def vector_in_memory(form: str, vector: Tensor) -> Tensor:
    """The vector, or one like it, as it lies in memory otherwise."""
    if form == "transposed":
        return vector.t().contiguous().t()
    if form == "strided":
        return vector.repeat_interleave(2, -1)[..., ::2]
    rows = form == "expanded rows" and vector.ndim == 2
    return (vector[:1] if rows else vector[..., :1]).expand(vector.shape)


@both
@pytest.mark.parametrize("form", ["transposed", "strided", "expanded rows", "expanded columns"])
def test_vectors_in_any_strides(size, form):
    *size, groups = size
    inputs = [t.to(DEVICE) for t in make(*size)]
    for i in (3, 4) if form == "transposed" else (1, 2, 3, 4):
        inputs[i] = vector_in_memory(form, inputs[i])
    inputs = [t.detach().requires_grad_() for t in inputs]
    compare(call_with(groups), inputs, torch.randn(2, size[0] + size[1], *size[2:], device=DEVICE))


@each_layout
@pytest.mark.parametrize("shape", [(0, 6, 3, 3), (2, 6, 0, 3), (2, 6, 3, 0)], ids=str)
def test_empty(shape, layout):
    B, *size = shape
    inputs = on_device(make(size[0], 3, *size[1:], B=B))
    y = call_with(3, layout)(*inputs)
    assert y.shape == (B, 9, *size[1:])
    y.sum().backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bit_for_bit(layout, dtype):
    *size, groups = BOTH["small" if dtype is torch.float32 else "large"]
    check_repeats(call_with(groups, layout), [t.to(dtype) for t in make(*size)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_layout
@both
def test_rounds_once(size, layout, dtype):
    *size, groups = size
    inputs = [t.to(DEVICE, dtype) for t in make(*size)]
    got, exact = (call_with(groups, layout)(*i) for i in (inputs, [t.float() for t in inputs]))
    # Tiles, and so the order of sums, may differ between dtypes: one step of the last place.
    differ = got != exact.to(dtype)
    assert differ.float().mean() < 0.01
    torch.testing.assert_close(got, exact.to(dtype))


@triton_only
def test_a_few_images_at_a_time():
    """More than the L2 cache keeps: several rounds of launches, the last of fewer images."""
    *size, groups = BOTH["large"]
    inputs = on_device(make(*size, B=5))
    call = call_with(groups, CHANNELS_LAST)
    with _launch.pretend(dataclasses.replace(_launch.CHIPS["interpreter"], l2=1 << 17)):
        compare(call, inputs, torch.randn(5, 48, 16, 17, device=DEVICE))
        with _launch.recording() as launches:
            call(*(t.detach().to("meta") for t in inputs))
    assert [launch.arguments["first"] for launch in launches] == [0, 0, 2, 2, 4, 4]


@triton_only
@each_layout
@pytest.mark.parametrize("family", ["sm_80", "sm_90"])
def test_kernels_of_a_call_overlap_where_the_chip_can(family, layout):
    """Programmatic dependent launch: of all kernels but the first, which waits for earlier work."""
    only_as(family)
    *size, groups = BOTH["large"]
    inputs = on_device(make(*size, B=5))
    call = call_with(groups, layout)
    with _launch.pretend(dataclasses.replace(_launch.CHIPS[family], l2=1 << 17)):
        compare(call, inputs, torch.randn(5, 48, 16, 17, device=DEVICE))
        with _launch.recording() as launches:
            y = call(*(t.detach().to("meta").requires_grad_() for t in inputs))
            forward = len(launches)
            y.sum().backward()
    assert forward > 2
    assert len(launches) > forward + 2
    later = family == "sm_90"
    expected = [later and i not in (0, forward) for i in range(len(launches))]
    assert [launch.launch_pdl for launch in launches] == expected
    assert all(launch.arguments["PDL"] == later for launch in launches)


@triton_only
def test_a_chip_with_many_processors():
    """Programs of one tile; more parts than a prologue adds up at once."""
    with _launch.pretend(_launch.Chip("default", 300, 101_376, 1 << 30)):
        inputs = on_device(make(16, 24, 33, 33, B=1))
        dy = torch.randn(1, 40, 33, 33, device=DEVICE)
        compare(call_with(1, CHANNELS_LAST), inputs, dy)


@triton_only
@each_layout
@pytest.mark.parametrize("block", [1024, 8192])
def test_other_tiles(layout, block):
    """The tables may choose others than the launcher would."""
    *size, groups = BOTH["large"]
    key = ("nhwc" if layout is CHANNELS_LAST else "nchw", *size[:2], groups, 4)
    kernels = [f"group_norm_silu_{n}" for n in ("statistics", "apply", "sums", "input_gradients")]
    inputs = on_device(make(*size))
    call = call_with(groups, layout)
    with pytest.MonkeyPatch.context() as patch:
        config = {"block": block, "num_warps": 4 if block < 8192 else 8, "num_stages": 1}
        overrides = {(name, ",".join(map(str, key))): config for name in kernels}
        patch.setattr(_launch, "_overrides", overrides)
        compare(call, inputs, torch.randn(2, 48, 16, 17, device=DEVICE))


@triton_only
def test_opcheck():
    operator = torch.ops.fastdiff.group_norm_silu_triton.default
    x, weight, bias, scale, shift, skip = on_device(make(8, 4, 5, 3))
    x = x.detach().contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    torch.library.opcheck(operator, (x, weight, bias, 3, 1e-5, scale, shift, skip, True))
    x, weight, bias, *_ = on_device(make(8, 0, 5, 3, film=False))
    torch.library.opcheck(operator, (x, weight, bias, 4, 1e-5, None, None, None, False))


@each_layout
def test_compiles_to_one_graph(layout, check_compiled):
    def call(x, scale, shift, skip, weight, bias):
        x, scale, shift, skip, weight, bias = (
            t.to(DEVICE) for t in (x, scale, shift, skip, weight, bias)
        )
        return call_with(3, layout)(x, weight, bias, scale, shift, skip).cpu()

    def make_batched(B):
        x, weight, bias, scale, shift, skip = make(4, 2, 5, 3, B=B)
        return [x, scale, shift, skip, weight, bias]

    check_compiled(call, make_batched, batched=4)


def test_refuses_what_it_cannot_run():
    x, weight, bias, *_ = make(4, 0, 3, 3)
    with pytest.raises(RuntimeError, match="float64"):
        call_with(2)(x.double().to(DEVICE), weight.double().to(DEVICE), bias.double().to(DEVICE))


@st.composite
def calls(draw, most: int, pixels: int):
    """(call, inputs, dy)."""
    torch.manual_seed(0)
    groups, width = draw(st.integers(1, 6)), draw(st.integers(1, most))
    C = groups * width
    C2 = draw(st.integers(0, C - 1))
    B, H, W = draw(st.integers(1, 4)), draw(st.integers(1, pixels)), draw(st.integers(1, pixels))
    inputs = make(C - C2, C2, H, W, B)
    for i in (3, 4):
        inputs[i] = inputs[i] if draw(st.booleans()) else None
    layout = draw(st.sampled_from([CONTIGUOUS, CHANNELS_LAST]))
    return call_with(groups, layout), on_device(inputs), torch.randn(B, C, H, W, device=DEVICE)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(most=24, pixels=9))
def test_any_shape(example):
    compare(*example)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(most=400, pixels=20))
def test_any_shape_at_length(example):
    compare(*example)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("pixels", [(64, 64), (90, 70), (33, 129)], ids=str)
@each_layout
def test_large_maps_at_length(pixels, groups, layout):
    inputs = make(32, 16, *pixels, B=2)
    for dtype in DTYPES:
        check_numerics(call_with(groups, layout), inputs, dtype, draws=3)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cuda", reason="30 GB of tensors")
@each_layout
def test_more_elements_than_32_bits_count(layout):
    B, C, H, W = 3, 16, 8192, 8192  # 3.2e9 elements
    x = torch.randn(B, C, H, W, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(C, device=DEVICE) for _ in range(2))
    y = call_with(4)(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    last = x.detach()[-1:].clone(memory_format=layout).requires_grad_()
    y_last = call_with(4)(last, weight, bias)
    (dx_last,) = torch.autograd.grad(y_last, last, y_last.detach())
    torch.testing.assert_close(y[-1:], y_last)
    torch.testing.assert_close(dx[-1:], dx_last, rtol=2e-2, atol=1e-3)
