"""dwconv_gelu and dwconv_ffn: the back end against the reference."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from conformance import BACKEND, DEVICE, DTYPES, UNIT, check_numerics, check_repeats, only_as, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import _launch, backend, dwconv_ffn, dwconv_gelu, explain

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
only_triton = pytest.mark.skipif(BACKEND != "triton", reason="of Triton's kernels only")


def make(grid, prefix=0, C=8, B=2) -> list[Tensor]:
    tokens = prefix + grid[0] * grid[1]
    return [torch.randn(B, tokens, C), torch.randn(C, 1, 3, 3) / 3, torch.randn(C)]


def make_ffn(grid, prefix=0, D=6, C=12, B=2) -> list[Tensor]:
    z, conv_weight, conv_bias = make(grid, prefix, C, B)
    x = torch.randn(B, z.shape[1], D)
    fc1 = [torch.randn(C, D) / D**0.5, torch.randn(C)]
    return [x, *fc1, conv_weight, conv_bias, torch.randn(D, C) / C**0.5, torch.randn(D)]


def gelu_on(grid, prefix=0):
    return lambda *inputs: dwconv_gelu(*inputs, grid=grid, prefix=prefix)


def ffn_on(grid, prefix=0):
    return lambda *inputs: dwconv_ffn(*inputs, grid=grid, prefix=prefix)


def compare(call, inputs: list[Tensor], dy: Tensor, tolerance=1e-4) -> None:
    """Values and gradients against the reference, inputs and dy as they lie in memory."""
    got = run(call, inputs, [dy])
    with backend("reference"):
        expected = run(call, inputs, [dy])
    for mine, true in zip(got, expected, strict=True):
        assert mine.dtype is true.dtype
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance * _size(true))


def _size(tensor: Tensor) -> float:
    return max(1.0, tensor.abs().max().item()) if tensor.numel() else 1.0


def check_float32(grid, prefix=0, C=8, B=2, call=gelu_on, make=make) -> None:
    """Not by the rule: where the numbers are few it measures luck, ours and eager's."""
    inputs = [t.to(DEVICE).requires_grad_() for t in make(grid, prefix, C=C, B=B)]
    compare(call(grid, prefix), inputs, torch.randn_like(inputs[0]), 1e-5)


@each_dtype
@pytest.mark.parametrize(
    ("grid", "prefix", "C"), [((16, 8), 1, 64), ((9, 4), 2, 70), ((20, 2), 0, 64)]
)
def test_numerics(grid, prefix, C, dtype):
    check_numerics(gelu_on(grid, prefix), make(grid, prefix, C), dtype)


@each_dtype
@pytest.mark.parametrize("prefix", [0, 1])
def test_ffn_numerics(prefix, dtype):
    check_numerics(ffn_on((4, 5), prefix), make_ffn((4, 5), prefix, 16, 64), dtype)


# One band of rows and two, of 4 and of 8, full and ragged; two stripes.
@pytest.mark.parametrize("H", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 33])
def test_rows(H):
    check_float32((H, 3), 1, B=1)


# A plane that is cut across its columns, once and more often, has an edge to a program of its own.
@pytest.mark.parametrize("W", [1, 2, 3, 4, 8, 9, 16, 31])
def test_columns(W):
    check_float32((3, W), 1, B=1)


@pytest.mark.parametrize("C", [1, 3, 31, 33, 63, 65, 128, 255, 257])
def test_channels(C):
    check_float32((3, 2), 1, C, B=1)
    if C > 60:
        check_numerics(gelu_on((3, 1), 1), make((3, 1), 1, C), torch.float16)


# More tokens than one program takes, of which the last takes a part.
@pytest.mark.parametrize(("B", "prefix"), [(1, 1), (3, 5), (5, 4), (1, 37)])
def test_prefix_tokens(B, prefix):
    check_float32((2, 2), prefix, B=B)
    check_float32((2, 2), prefix, 4, B, ffn_on, lambda g, p, C, B: make_ffn(g, p, 4, 8, B))


def test_prefix_tokens_stay_away_from_the_grid():
    z, weight, bias = (t.to(DEVICE) for t in make((3, 4), 2, B=1))
    changed = z.clone()
    changed[:, :2] += 1
    a, b = (dwconv_gelu(t, weight, bias, grid=(3, 4), prefix=2) for t in (z, changed))
    assert torch.equal(a[:, 2:], b[:, 2:])
    torch.testing.assert_close(b[:, :2], F.gelu(changed[:, :2]))


@only_triton
def test_every_configuration_that_tuning_may_choose():
    """In turn with programs that take a whole width, and with many that share one.

    In bfloat16, on a usual width, with full bands: elsewhere the launchers take few rows.
    """
    tunable = importlib.import_module("fastdiff_kernels.dwconv_ffn.triton_kernels").TUNABLE
    for kernel, configs in tunable.items():
        # Unrolling is nothing to the interpreter.
        for i, config in enumerate(configs if DEVICE == "cuda" else configs[::2]):
            H = config.get("ROWS", 1) * config.get("BANDS", 3)
            grid, key = ((H, 7), f"{H},64,2") if "ROWS" in config else ((H, 2), "64")
            # 16 rows take a whole width, as they are launched: so many programs do.
            tall = config.get("ROWS") == 16
            B, processors = (8, 1) if tall else (1, (1, 1000)[i % 2])
            chip = _launch.Chip("default", processors, 101_376, 1 << 20)
            with _launch.pretend(chip), _launch.override(kernel, key, config):
                check_numerics(gelu_on(grid, 1), make(grid, 1, 64, B), torch.bfloat16)


@only_triton
def test_sixteen_rows_in_words_of_two_channels():
    """What Hopper runs on grids of 16 rows where a program takes a whole width; else 8 rows."""
    only_as("sm_90")
    hopper = _launch.CHIPS["sm_90"]
    with _launch.pretend(dataclasses.replace(hopper, processors=1)), _launch.consulting() as whole:
        check_numerics(ffn_on((16, 7), 1), make_ffn((16, 7), 1, 16, 64, 8), torch.bfloat16)
    with _launch.pretend(hopper), _launch.consulting() as cut:
        check_numerics(gelu_on((16, 8), 1), make((16, 8), 1, 64, 1), torch.float16)
    assert whole["dwconv_gelu_backward", "16,64,2"]["ROWS"] == 16
    assert cut["dwconv_gelu_backward", "16,64,2"]["ROWS"] == 8


@only_triton
def test_more_parts_than_are_added_at_once():
    few = _launch.override("dwconv_gelu_sums", "8", {"PARTS": 16})
    with _launch.pretend(_launch.Chip("default", 300, 101_376, 1 << 20)), few:
        check_float32((1, 1), 1, B=17)
        check_float32((1, 1), 2, 4, 17, ffn_on, lambda g, p, C, B: make_ffn(g, p, 4, 8, B))


def hard(kind: str, grid, prefix) -> list[Tensor]:
    z, weight, bias = make(grid, prefix, 64)
    if kind == "large mean":  # under weights that add to zero
        z += 30
        weight -= weight.mean((2, 3), keepdim=True)
    elif kind == "negative tail":
        z, bias = z * 0.3 - 3.5, bias * 0.3 - 3.5
        weight = weight * 0.3
    elif kind == "far negative tail":
        z, bias, weight = z * 0.3 - 7, bias * 0.3 - 7, weight * 0.1
    elif kind == "wide":
        z, weight = z * 8, weight * 2
    elif kind == "one huge value":
        z[1, 5, ::3] = 2e4
    elif kind == "tiny":
        z, bias = z * 1e-4, bias * 1e-4
    elif kind == "constant":
        z = torch.full_like(z, 0.7)
    return [z, weight, bias]


@each_dtype
@pytest.mark.parametrize(
    "kind",
    [
        *("large mean", "negative tail", "far negative tail", "wide", "one huge value"),
        *("tiny", "constant"),
    ],
)
def test_hard_data(kind, dtype):
    check_numerics(gelu_on((4, 4), 1), hard(kind, (4, 4), 1), dtype)


@each_dtype
def test_gelu_itself(dtype):
    """Relative to each value, down to where GELU is a millionth; and its slope."""
    z = torch.linspace(-5.5, 9, 2048).view(1, -1, 64).to(DEVICE, dtype).requires_grad_()
    weight, bias = torch.zeros(64, 1, 3, 3, device=DEVICE), torch.zeros(64, device=DEVICE)
    y = dwconv_gelu(z, weight, bias, grid=(0, 0), prefix=32)
    (dz,) = torch.autograd.grad(y.sum(), z)
    exact = z.detach().double().requires_grad_()
    truth = F.gelu(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    allowed = 4 * UNIT[dtype] + (1e-4 if dtype is not torch.float32 else 0)
    tail = 2e-7  # what 1 + erf loses in float32, and what float16 has below its normal numbers
    assert ((y - truth).abs() <= allowed * truth.abs() + tail).all()
    assert ((dz - slope).abs() <= allowed * slope.abs() + 10 * tail).all()


def test_nan_and_infinity_show():
    z, weight, bias = (t.to(DEVICE) for t in make((5, 5), 2, B=1))
    z[0, 0, 0], z[0, 1, 1] = torch.nan, torch.inf
    z[0, 2 + 12, 2] = torch.nan
    for dtype in DTYPES:
        y = dwconv_gelu(z.to(dtype), weight, bias, grid=(5, 5), prefix=2)
        assert y[0, 0, 0].isnan()
        assert y[0, 1, 1] == torch.inf
        seen = y[0, 2:, 2].isnan().view(5, 5)
        assert seen[1:4, 1:4].all()
        assert seen.sum() == 9
        assert y.isfinite().sum() == y.numel() - 11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_parameters_beside_low_precision(dtype):
    check_numerics(gelu_on((4, 3), 1), make((4, 3), 1, 64, B=6), dtype, keep=(1, 2))
    inputs = make_ffn((4, 3), 1, 16, 64)
    check_numerics(ffn_on((4, 3), 1), inputs, dtype, keep=(1, 2, 3, 4, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(dtype):
    """Where z2 and its slope are exact, y and dz are the nearest numbers to the true ones."""
    z = torch.randint(-3, 4, (2, 21, 8), device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randint(-1, 2, (8, 1, 3, 3), device=DEVICE).float()
    bias = torch.full((8,), 40.0, device=DEVICE)  # GELU is the identity there
    y = dwconv_gelu(z, weight, bias, grid=(5, 4), prefix=1)
    dy = torch.randn_like(y)
    (dz,) = torch.autograd.grad(y, z, dy)
    exact = z.detach().double().requires_grad_()
    with backend("reference"):
        truth = dwconv_gelu(exact, weight.double(), bias.double(), grid=(5, 4), prefix=1)
        (d_exact,) = torch.autograd.grad(truth, exact, dy.double())
    assert torch.equal(y[:, 1:], truth[:, 1:].to(dtype))
    # float32 sums may fall on the other side of a tie; then they are one unit off.
    near = (dz - d_exact).abs() <= (2 + 1e-3) * UNIT[dtype] * d_exact.abs() + 1e-6
    assert near[:, 1:].all()


def test_ffn_without_linear_biases():
    inputs = make_ffn((3, 5))
    inputs[2] = inputs[6] = None
    check_numerics(ffn_on((3, 5)), inputs, torch.bfloat16)


@pytest.mark.parametrize("form", ["channels first", "sliced", "expanded"])
def test_non_contiguous_input(form):
    def lay(tensor: Tensor) -> Tensor:
        if form == "channels first":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if form == "sliced":
            return tensor.repeat_interleave(2, -1)[..., ::2]
        return tensor[:1].expand(tensor.shape)

    for call, inputs in (
        (gelu_on((3, 4), 1), make((3, 4), 1)),
        (ffn_on((3, 4), 1), make_ffn((3, 4), 1)),
    ):
        laid = [lay(t.to(DEVICE)).requires_grad_() for t in inputs]
        assert not any(t.is_contiguous() for t in laid if t.ndim > 1)
        compare(call, laid, torch.randn(laid[0].shape, device=DEVICE))


def test_weight_in_channels_last():
    inputs = [t.to(DEVICE) for t in make((3, 4), 1)]
    inputs[1] = inputs[1].to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in inputs]
    compare(gelu_on((3, 4), 1), inputs, torch.randn_like(inputs[0]))


@pytest.mark.parametrize("call", [gelu_on, ffn_on])
def test_strided_gradients(call):
    inputs = make((3, 4), 1, 6) if call is gelu_on else make_ffn((3, 4), 1)
    inputs = [t.to(DEVICE).requires_grad_() for t in inputs]
    for dy in (
        torch.randn(2, 1, 1, device=DEVICE).expand(2, 13, 6),
        torch.randn(6, 13, 2, device=DEVICE).transpose(0, 2),
        torch.randn(2, 17, 6, device=DEVICE)[:, 2:15],
    ):
        compare(call((3, 4), 1), inputs, dy)


@only_triton
@pytest.mark.skipif("FASTDIFF_RECORD" in os.environ, reason="only launches of ops are recorded")
def test_gradients_are_written_by_their_strides():
    """Whoever calls the launcher may give it any tensors of the right shapes to fill."""
    kernels = importlib.import_module("fastdiff_kernels.dwconv_ffn.triton_kernels")
    grid, prefix, C = (3, 4), 1, 6
    z, weight, bias = (t.to(DEVICE) for t in make(grid, prefix, C))
    dy = torch.randn_like(z)
    taps = weight.reshape(C, 9).t().contiguous()

    def filled(spread: bool) -> list[Tensor]:
        shapes = [z.shape, weight.shape, bias.shape, bias.shape]
        if spread:
            out = [torch.full((*s, 2), torch.nan, device=DEVICE).unbind(-1)[1] for s in shapes]
            assert not any(t.is_contiguous() for t in out)
        else:
            out = [torch.full(s, torch.nan, device=DEVICE) for s in shapes]
        kernels.backward(out[:3], dy, z, taps, bias, grid, prefix, sum_dz=out[3])
        return out

    for mine, plain in zip(filled(True), filled(False), strict=True):
        assert torch.equal(mine, plain)
    turned = torch.full_like(z, torch.nan).transpose(0, 1).contiguous().transpose(0, 1)
    kernels.backward((turned, None, None), dy, z, taps, bias, grid, prefix)
    assert torch.equal(turned, filled(False)[0])


@only_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_words_of_two_channels_need_their_alignment(dtype):
    """A tensor that begins between two words is read by single values, with the same results."""
    grid, prefix, C = (3, 4), 1, 8
    z, weight, bias = (t.to(DEVICE, dtype) for t in make(grid, prefix, C))
    shifted = torch.empty(z.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(z.shape)
    shifted.copy_(z)
    assert shifted.data_ptr() % 4 == 2
    dy = torch.randn_like(z)
    one, other = (
        run(gelu_on(grid, prefix), [t.requires_grad_() for t in (x, weight, bias)], [dy])
        for x in (z, shifted)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * UNIT[dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("B", "grid", "prefix"),
    [(0, (2, 3), 1), (2, (0, 3), 1), (2, (3, 0), 0), (2, (0, 0), 3), (0, (0, 0), 0)],
)
@pytest.mark.parametrize("call", [gelu_on, ffn_on])
def test_empty(call, B, grid, prefix):
    inputs = (make if call is gelu_on else make_ffn)(grid, prefix, B=B)
    inputs = [t.to(DEVICE).requires_grad_() for t in inputs]
    compare(call(grid, prefix), inputs, torch.randn_like(inputs[0]))
    if B == 0:
        grads = torch.autograd.grad(call(grid, prefix)(*inputs).sum(), inputs)
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("call", [gelu_on, ffn_on])
def test_only_what_requires_grad_gets_one(call):
    inputs = make((3, 2), 1) if call is gelu_on else make_ffn((3, 2), 1)
    inputs = [t.to(DEVICE).requires_grad_() for t in inputs]
    dy = torch.randn(2, 7, inputs[0].shape[2], device=DEVICE)
    full = run(call((3, 2), 1), inputs, [dy])[1:]
    pairs = itertools.combinations(range(len(inputs)), 2)
    for wanted in [*((i,) for i in range(len(inputs))), *(pairs if call is gelu_on else ())]:
        for i, tensor in enumerate(inputs):
            tensor.requires_grad_(i in wanted)
        got = run(call((3, 2), 1), inputs, [dy])[1:]
        assert len(got) == len(wanted)
        for grad, i in zip(got, wanted, strict=True):
            # Where dz is not computed, the compiler may order sums otherwise.
            torch.testing.assert_close(grad, full[i], rtol=1e-6, atol=1e-6 * _size(full[i]))


@only_triton
def test_no_work_for_gradients_that_nobody_needs():
    def launched(*wanted: int) -> list[tuple[str, set[str]]]:
        inputs = [t.to("meta").requires_grad_(i in wanted) for i, t in enumerate(FFN)]
        with _launch.recording() as launches:
            dwconv_ffn(*inputs, grid=(3, 4), prefix=1).sum().backward()
        return [
            (launch.kernel.fn.__name__, {k for k, v in launch.arguments.items() if v is not None})
            for launch in launches[1:]
        ]

    FFN = make_ffn((3, 4), 1)
    assert launched(6) == []
    assert [name for name, _ in launched(5)] == ["dwconv_gelu_forward"]
    ((name, tensors),) = launched(0)
    assert name == "dwconv_gelu_backward"
    assert "dz" in tensors
    assert not {"y", "parts"} & tensors
    (name, tensors), (second, _) = launched(3, 4)
    assert (name, second) == ("dwconv_gelu_backward", "dwconv_gelu_sums")
    assert not {"y", "dz"} & tensors
    (_, tensors), _ = launched(*range(7))
    assert tensors >= {"y", "dz", "parts"}


def saved_bytes(call, *inputs: Tensor) -> int:
    """What a call keeps for its backward besides its parameters, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in inputs[1:]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call(*inputs)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("prefix", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (1, torch.float16)]
)
def test_ffn_keeps_half_of_what_separate_ops_keep(prefix, dtype):
    H, W, D, C = 4, 3, 32, 128

    def separate(x, w1, b1, conv_weight, conv_bias, w2, b2):
        z = F.linear(x, w1, b1)
        image = z[:, prefix:].transpose(1, 2).reshape(-1, C, H, W)
        image = F.conv2d(image, conv_weight, conv_bias, padding=1, groups=C)
        y = image.flatten(2).transpose(1, 2)
        y = torch.cat([z[:, :prefix], y], 1) if prefix else y
        return F.linear(F.gelu(y), w2, b2)

    inputs = make_ffn((H, W), prefix, D, C, B=8)
    inputs = [t.to(DEVICE, dtype).requires_grad_() for t in inputs]
    # Tensors stay alive within a call, so no storage is counted for another.
    eager = saved_bytes(separate, *inputs)
    got = saved_bytes(ffn_on((H, W), prefix), *inputs)
    tokens = 8 * (prefix + H * W) * dtype.itemsize
    assert eager >= 0.95 * tokens * (D + 3 * C)
    assert got <= tokens * (D + C) + 40 * C
    assert got <= 0.5 * eager
    # Beside low-precision activations, the casts of the Linears' float32 weights and nothing else:
    # autocast keeps those of any Linear, and backward would make them a second time.
    mixed = [inputs[0], *(t.detach().float().requires_grad_() for t in inputs[1:])]
    casts = 0 if dtype is torch.float32 else 2 * C * D * dtype.itemsize
    assert saved_bytes(ffn_on((H, W), prefix), *mixed) == got + casts


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def mixed_ffn(dtype: torch.dtype, D=16, C=48) -> list[Tensor]:
    x, *weights = (t.to(DEVICE).requires_grad_() for t in make_ffn((4, 3), 1, D, C))
    return [x.detach().to(dtype).requires_grad_(), *weights]


@LOW
def test_float32_weights_are_cast_once_for_both_directions(dtype):
    inputs = mixed_ffn(dtype)
    ffn = importlib.import_module("fastdiff_kernels.dwconv_ffn.ffn")
    with torch.profiler.profile(record_shapes=True) as profile:
        ffn_on((4, 3), 1)(*inputs).sum().backward()
    copies = [e.input_shapes[0] for e in profile.events() if e.name == "aten::copy_"]
    for weight in inputs[1], inputs[5]:
        # A gradient that comes out of the product in low precision is copied, too.
        assert copies.count(list(weight.shape)) == 1 + ffn._rounds(weight.device)


@LOW
def test_gradients_of_float32_parameters_are_not_rounded_to_low_precision(dtype):
    inputs = mixed_ffn(dtype)
    ffn = importlib.import_module("fastdiff_kernels.dwconv_ffn.ffn")
    ffn_on((4, 3), 1)(*inputs).float().square().sum().backward()
    for position, t in enumerate(inputs[1:], start=1):
        if position in (1, 5) and ffn._rounds(t.device):
            continue
        assert t.grad.dtype is torch.float32
        assert (t.grad == t.grad.to(dtype).float()).float().mean() < 0.2, position


@LOW
@pytest.mark.parametrize("rows", [0, 5, 5000])
def test_product_of_low_precision_is_rounded_once(dtype, rows):
    ffn = importlib.import_module("fastdiff_kernels.dwconv_ffn.ffn")
    a, b = (torch.randn(rows, n, device=DEVICE).to(dtype) for n in (24, 40))
    exact = a.double().t() @ b.double()
    for out in (torch.empty(24, 40), torch.empty(40, 24).t()):
        out = out.to(DEVICE).fill_(torch.nan)
        ffn._product(a.t(), b, out)
        unit = UNIT[dtype if ffn._rounds(out.device) else torch.float32]
        error = (out - exact).square().mean().sqrt() if rows else out.abs().max()
        assert error <= 16 * unit * (exact.square().mean().sqrt() if rows else 0)


def test_gelu_keeps_z_alone():
    z, weight, bias = (t.to(DEVICE).requires_grad_() for t in make((6, 5), 1, 32))
    assert saved_bytes(gelu_on((6, 5), 1), z, weight, bias) <= z.nbytes + 40 * 32


@each_dtype
def test_repeats_bit_for_bit(dtype):
    check_repeats(gelu_on((9, 1), 1), [t.to(dtype) for t in make((9, 1), 1, 70, B=1)])
    check_repeats(ffn_on((2, 1), 1), [t.to(dtype) for t in make_ffn((2, 1), 1, B=7)])


@only_triton
def test_opcheck():
    inputs = [t.to(DEVICE).requires_grad_() for t in make((2, 2), 1)]
    dwconv_gelu(*inputs, grid=(2, 2), prefix=1)
    gelu = torch.ops.fastdiff.dwconv_gelu_triton.default
    torch.library.opcheck(gelu, (*inputs, [2, 2], 1))
    swapped = inputs[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    torch.library.opcheck(gelu, (swapped, *inputs[1:], [2, 2], 1))
    inputs = [t.to(DEVICE).requires_grad_() for t in make_ffn((2, 2), 1)]
    dwconv_ffn(*inputs, grid=(2, 2), prefix=1)
    ffn = torch.ops.fastdiff.dwconv_ffn_triton.default
    inputs[2] = None
    torch.library.opcheck(ffn, (*inputs, [2, 2], 1))


@pytest.mark.parametrize("call", [gelu_on, ffn_on])
def test_compiles_to_one_graph(call, check_compiled):
    def on_device(*inputs):
        return call((2, 1), 1)(*(t.to(DEVICE) for t in inputs)).cpu()

    some = make if call is gelu_on else make_ffn
    check_compiled(on_device, lambda B: some((2, 1), 1, B=B), batched=1)


def test_double_backward_raises():
    inputs = [t.to(DEVICE).requires_grad_() for t in make_ffn((3, 4), 1)]
    y = dwconv_ffn(*inputs, grid=(3, 4), prefix=1)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dx.sum().backward()


@only_triton
def test_what_the_kernels_do_not_take():
    z, weight, bias = make((3, 4))
    told = explain(dwconv_gelu, z.double(), weight.double(), bias.double(), grid=(3, 4))
    assert told.backend is None
    assert "float64" in str(
        explain(dwconv_ffn, *(t.double() for t in make_ffn((3, 4))), grid=(3, 4))
    )
    wide = torch.zeros(1, 1, 64).expand(1, 2**19, 64)
    told = explain(dwconv_gelu, wide, torch.zeros(64, 1, 3, 3), torch.zeros(64), grid=(1, 2**19))
    assert told.backend is None
    with pytest.raises(RuntimeError, match="a row of the grid has 524288 x 64 elements"):
        dwconv_gelu(wide, torch.zeros(64, 1, 3, 3), torch.zeros(64), grid=(1, 2**19))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    B=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 18), st.integers(1, 6)),
    prefix=st.integers(0, 3),
    C=st.integers(1, 70),
)
def test_any_shape(B, grid, prefix, C):
    check_float32(grid, prefix, C, B)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape_and_dtype_at_length(data):
    grid = data.draw(st.tuples(st.integers(1, 35), st.integers(1, 20)))
    prefix, C = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 140))
    dtype = data.draw(st.sampled_from(DTYPES))
    if dtype is torch.float32 or grid[0] * grid[1] * C < 400:
        check_float32(grid, prefix, C, data.draw(st.integers(1, 2)))
    else:
        check_numerics(gelu_on(grid, prefix), make(grid, prefix, C), dtype)
