"""window_attention: the back end against the reference."""

from __future__ import annotations

import pytest
import torch
from conformance import BACKEND, DEVICE, DTYPES, check_numerics, check_repeats, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import _launch, backend, window_attention

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
needs_triton = pytest.mark.skipif(BACKEND != "triton", reason="how the triton back end launches")


def make(B, H, W, heads, d, window, pad=False) -> list[Tensor | None]:
    """qkv, bias table, and the vector of padded positions or None."""
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    C3 = 3 * heads * d
    return [torch.randn(B, H, W, C3), table, torch.randn(C3) if pad else None]


def call_with(heads, window, shift=(0, 0), value=False, **options):
    def call(qkv, table, pad=None):
        mode = "value" if value else "mask"
        kw = {"heads": heads, "window_size": window, "shift": shift, "pad_mode": mode} | options
        return window_attention(qkv, table, pad_qkv=pad, **kw)

    return call


def compare(call, inputs: list[Tensor | None], dy: Tensor, tolerance=1e-4) -> None:
    """Values and gradients against the reference, inputs and dy as they lie in memory."""
    got = run(call, inputs, [dy])
    with backend("reference"):
        expected = run(call, inputs, [dy])
    for mine, true in zip(got, expected, strict=True):
        true = torch.zeros_like(mine) if true is None else true  # nothing is padded
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)


def on_device(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE).requires_grad_() for t in inputs]


CASES = {
    # B, H, W, heads, d, window, shift, what padded positions are
    "rolled": (1, 8, 8, 2, 24, (4, 4), (2, 1), "mask"),
    "torn and masked": (1, 7, 9, 1, 16, (4, 4), (2, 2), "mask"),
    "value": (1, 5, 6, 2, 16, (4, 4), (2, 2), "vector"),
    # More than 32 tokens in float32, more than 64 in the others.
    "several tiles": (1, 10, 8, 1, 16, (9, 8), (5, 4), "vector"),
    "35 tokens": (1, 6, 7, 1, 16, (5, 7), (2, 0), "vector"),
    "plain": (2, 4, 8, 2, 16, (4, 4), (0, 0), "mask"),
    "rolled along rows": (1, 8, 8, 1, 16, (4, 4), (0, 3), "mask"),
    "padding and wrapped rows only": (1, 5, 9, 1, 16, (4, 4), (3, 1), "mask"),
    "zeros": (1, 6, 7, 1, 16, (4, 4), (1, 2), "zeros"),
    "32 rows for 20 tokens": (1, 8, 10, 1, 32, (4, 5), (2, 2), "mask"),
    "window covers rows": (1, 3, 8, 1, 16, (4, 4), (2, 2), "mask"),
    "window is the map": (1, 8, 8, 1, 64, (8, 8), (4, 4), "mask"),
    "window overhangs the map": (1, 5, 5, 1, 16, (8, 8), (4, 4), "mask"),
    "window 7 of values": (1, 10, 10, 1, 16, (7, 7), (3, 3), "vector"),
    "several tiles, last one ragged": (1, 9, 12, 1, 16, (9, 9), (0, 4), "mask"),
    "several tiles of zeros": (1, 7, 12, 1, 16, (8, 9), (0, 0), "zeros"),
}


def case(name: str):
    """(call, inputs)"""
    B, H, W, heads, d, window, shift, padding = CASES[name]
    inputs = make(B, H, W, heads, d, window, padding == "vector")
    return call_with(heads, window, shift, padding != "mask"), inputs


@each_dtype
@pytest.mark.parametrize("name", list(CASES)[:4])
def test_numerics(name, dtype):
    call, inputs = case(name)
    # The table's gradient has 49 numbers: of one draw the largest error is a matter of luck.
    check_numerics(call, inputs, dtype, draws=2)


@pytest.mark.parametrize("name", list(CASES)[5:])
def test_numerics_of_other_shapes(name):
    call, inputs = case(name)
    check_numerics(call, inputs, torch.bfloat16)


def test_several_tiles_of_float32():
    call, inputs = case("35 tokens")
    check_numerics(call, inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["value", "several tiles"])
def test_float32_parameters_beside_low_precision(name, dtype):
    call, inputs = case(name)
    check_numerics(call, inputs, dtype, keep=(1, 2), draws=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shifted_window_of_8(dtype):
    """As ASCEND has it, one head of 64."""
    check_numerics(call_with(1, (8, 8), (4, 4)), make(1, 16, 16, 1, 64, (8, 8)), dtype)


@pytest.mark.parametrize("d", [17, 31, 48, 128])
def test_head_widths(d):
    call, inputs = call_with(2, (3, 4), (1, 2)), make(1, 3, 7, 2, d, (3, 4))
    check_numerics(call, inputs, torch.bfloat16)


@pytest.mark.parametrize("window", [(2, 2), (2, 16), (16, 3), (3, 11), (5, 13), (16, 2)])
def test_windows(window):
    """One token below, at and above what a tile holds, and far from square."""
    call = call_with(1, window, (window[0] // 2, 1))
    check_numerics(call, make(1, window[0] + 1, window[1], 1, 16, window), torch.float16)


@pytest.mark.slow
def test_largest_window():
    check_numerics(call_with(1, (16, 16)), make(1, 16, 16, 1, 64, (16, 16)), torch.bfloat16)


@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 5), (3, 4), (4, 5), (9, 1)])
def test_map_sizes(H, W):
    inputs = on_device(make(2, H, W, 1, 16, (4, 4)))
    compare(call_with(1, (4, 4), (2, 2)), inputs, torch.randn(2, H, W, 16, device=DEVICE))


def test_without_table_and_with_scale():
    qkv = make(1, 8, 8, 2, 16, (4, 4))[0]
    check_numerics(call_with(2, (4, 4), (2, 2), scale=0.7), [qkv, None], torch.bfloat16)
    qkv = make(1, 6, 6, 1, 16, (6, 6))[0]
    check_numerics(call_with(1, (6, 6), scale=0.7), [qkv, None], torch.float32)


def hard(kind: str, window) -> tuple:
    H, W, shift = 2 * window[0], window[1], (window[0] - 1, 0)
    inputs = make(1, H, W, 1, 16, window)
    qkv, table, _ = inputs
    if kind == "large mean":
        qkv += 20
    elif kind == "constant":
        qkv[..., :32] = 1  # every score is the same
        table.zero_()
    elif kind == "huge logits":
        qkv[..., :32] *= 15
    elif kind == "one huge logit":
        qkv[0, 0, 0, 16:32] = 300 * qkv[0, 1, 1, :16].sign()
    elif kind == "huge bias":
        table *= 300
    elif kind == "lone region":  # one row of the last windows sees itself only; the rest differ
        qkv[0, : window[0] - 1, :, 16:32] *= 20
    return call_with(1, window, shift), inputs


HARD = ["large mean", "constant", "huge logits", "one huge logit", "huge bias", "lone region"]


@each_dtype
@pytest.mark.parametrize("kind", HARD)
def test_hard_data(kind, dtype):
    call, inputs = hard(kind, (4, 4))
    check_numerics(call, inputs, dtype)


@pytest.mark.parametrize("kind", HARD[2:])
def test_hard_data_in_several_tiles(kind):
    """The first tile of keys may hold none that a query sees."""
    call, inputs = hard(kind, (9, 8))
    check_numerics(call, inputs, torch.float16)


@pytest.mark.parametrize("window", [(4, 4), (9, 8)])
def test_masked_pairs_are_excluded_exactly(window):
    """A logit of 1000 across the tear, and of padding, weighs nothing: forward and backward."""
    h, w = window
    qkv = torch.zeros(1, 2 * h - 1, w, 48)
    qkv[..., 0] = 1
    qkv[0, :2, :, 16] = 1000  # keys of the first rows, which the roll brings to the last window
    qkv[0, :2, :, 32] = 1
    qkv = qkv.to(DEVICE).requires_grad_()
    out = window_attention(qkv, None, heads=1, window_size=window, shift=(2, 0), scale=1.0)
    assert (out[0, 2 - h :] == 0).all()
    (dqkv,) = torch.autograd.grad(out[0, 2 - h :, :, 1].sum(), qkv)
    assert (dqkv[0, :2] == 0).all()


@pytest.mark.parametrize("form", ["channels first", "sliced", "expanded", "offset"])
def test_non_contiguous_input(form):
    qkv, table, pad = make(2, 5, 6, 1, 16, (4, 4), pad=True)
    if form == "channels first":
        qkv = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        table = table.t().repeat(2, 1).t()[:, :1]
    elif form == "sliced":
        qkv, pad = (t.repeat_interleave(2, -1)[..., ::2] for t in (qkv, pad))
    elif form == "expanded":
        qkv, table = qkv[:1].expand(2, -1, -1, -1), table[:1].expand(49, 1)
    else:
        qkv = torch.cat([torch.zeros(3), qkv.flatten()])[3:].view(qkv.shape)
    qkv, table, pad = (t.to(DEVICE) for t in (qkv, table, pad))
    inputs = [t.requires_grad_() for t in (qkv, table, pad)]
    assert form == "offset" or not qkv.is_contiguous()
    call = call_with(1, (4, 4), (2, 2), value=True)
    compare(call, inputs, torch.randn(2, 5, 6, 16, device=DEVICE))


def test_table_of_several_heads_laid_out_by_head():
    qkv, table, _ = make(1, 6, 6, 3, 16, (3, 3))
    inputs = on_device([qkv, table.t().contiguous().t()])
    assert not inputs[1].is_contiguous()
    compare(call_with(3, (3, 3)), inputs, torch.randn(1, 6, 6, 48, device=DEVICE))


def test_strided_gradients():
    inputs = on_device(make(2, 5, 6, 1, 16, (4, 4)))
    for dy in (
        torch.randn(2, 1, 1, 1, device=DEVICE).expand(2, 5, 6, 16),
        torch.randn(2, 16, 5, 6, device=DEVICE).permute(0, 2, 3, 1),
        torch.randn(2, 5, 9, 16, device=DEVICE)[:, :, 2:8],
    ):
        compare(call_with(1, (4, 4), (2, 2)), inputs, dy)


@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_empty(shape):
    inputs = on_device(make(*shape, 2, 16, (4, 4), pad=True))
    out = call_with(2, (4, 4), (2, 2), value=True)(*inputs)
    assert out.shape == (*shape, 32)
    out.sum().backward()
    for tensor in inputs:
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_nothing_is_padded_in_value_mode():
    inputs = on_device(make(1, 8, 4, 1, 16, (4, 4), pad=True))
    compare(call_with(1, (4, 4), value=True), inputs, torch.randn(1, 8, 4, 16, device=DEVICE))


@pytest.mark.parametrize("name", ["value", "35 tokens"])
def test_only_what_requires_grad_gets_one(name):
    call, inputs = case(name)
    inputs = on_device(inputs)
    dy = torch.randn_like(call(*inputs))
    full = run(call, inputs, [dy])[1:]
    for wanted in range(3):
        for index, tensor in enumerate(inputs):
            tensor.requires_grad_(index == wanted)
        got = run(call, inputs, [dy])[1:]
        assert len(got) == 1
        # The additions are the same; a compiler may contract them otherwise.
        torch.testing.assert_close(got[0], full[wanted], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES[:1] if DEVICE == "cpu" else DTYPES)
@pytest.mark.parametrize("name", ["value", "35 tokens"])
def test_repeats_bit_for_bit(name, dtype):
    call, inputs = case(name)
    inputs[0] = inputs[0].repeat(1 if DEVICE == "cpu" else 500, 1, 1, 1)
    check_repeats(call, [t.to(dtype) for t in inputs])


@needs_triton
@pytest.mark.parametrize("processors", [1, 500])
@pytest.mark.parametrize("name", ["value", "35 tokens"])
def test_few_programs_and_many(name, processors):
    call, inputs = case(name)
    inputs = on_device([inputs[0].repeat(2, 1, 1, 1), *inputs[1:]])
    with _launch.pretend(_launch.Chip("default", processors, 101_376, 1 << 20)):
        compare(call, inputs, torch.randn_like(inputs[0])[..., ::3])


@needs_triton
def test_launches_no_more_than_it_must():
    """One kernel forward; backward two, and one where the table needs no gradient."""

    def launches(window, *needs: bool) -> list[str]:
        qkv, table, pad = make(2, 20, 20, 6, 64, window, pad=True)
        inputs = [
            t.to("meta", torch.bfloat16).requires_grad_(need)
            for t, need in zip((qkv, table, pad), needs, strict=True)
        ]
        with _launch.recording() as record:
            out = call_with(6, window, value=True)(*inputs)
            forward = len(record)
            if any(needs):
                out.backward(torch.empty_like(out))
        assert forward == 1
        return [launch.kernel.fn.__name__.removeprefix("window_attention") for launch in record[1:]]

    assert launches((8, 8), False, False, False) == []
    assert launches((8, 8), True, False, False) == ["_backward"]
    assert launches((8, 8), True, True, False) == ["_backward", "_reduce_bias"]
    assert launches((8, 8), True, False, True) == ["_backward", "_reduce_pad"]
    parts = ["_backward_queries", "_backward_keys", "_backward_bias"]
    assert launches((9, 9), True, False, False) == parts[:2]
    assert launches((9, 9), False, True, False) == [parts[0], parts[2], "_reduce_bias"]
    assert launches((9, 9), True, True, True) == [*parts, "_reduce_bias", "_reduce_pad"]


@needs_triton
def test_batch_and_map_do_not_compile_anew():
    """What a kernel is specialised by is the same for every batch, map and number of programs."""

    def plan(B, H, W) -> list[dict]:
        qkv = torch.empty(B, H, W, 1152, device="meta", dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(225, 6, device="meta", requires_grad=True)
        with _launch.recording() as record:
            call_with(6, (8, 8), (4, 4))(qkv, table).sum().backward()
        return [launch.arguments for launch in record]

    varying = {"windows", "H", "W", "groups"}
    for one, *others in zip(plan(1, 16, 16), plan(16, 64, 32), plan(7, 24, 136), strict=True):
        for name in one.keys() - varying:
            if not isinstance(one[name], Tensor):
                assert [other[name] for other in others] == [one[name]] * 2, name


@pytest.mark.skipif(BACKEND != "triton", reason="its own limits")
def test_says_why_it_refuses():
    qkv = torch.zeros(1, 4, 4, 48, device=DEVICE)
    for wrong, options, message in (
        (qkv.double(), {}, "qkv is float64"),
        (qkv, {"heads": 2}, "head widths are 16 to 128, and this one is 8"),
        (qkv.repeat(1, 1, 1, 9), {}, "this one is 144"),
        (qkv, {"window_size": (4, 17)}, r"windows are 2 to 16 .* \(4, 17\)"),
        (qkv, {"window_size": (1, 4)}, r"windows are 2 to 16 .* \(1, 4\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            window_attention(wrong, None, **({"heads": 1, "window_size": 4} | options))


@pytest.mark.skipif(BACKEND != "triton", reason="names of the operators are its own")
def test_opcheck():
    operator = torch.ops.fastdiff.window_attention_triton.default
    qkv, table, pad = on_device(make(2, 3, 4, 1, 16, (4, 4), pad=True))
    torch.library.opcheck(operator, (qkv, table, 1, (4, 4), (0, 0), pad, 0.25, True))
    permuted = qkv.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    torch.library.opcheck(operator, (permuted, None, 1, (4, 4), (0, 0), None, 0.25, False))


def test_compiles_to_one_graph(check_compiled):
    call = call_with(1, (4, 3), (2, 1), value=True)

    def moved(*inputs):
        return call(*(t.to(DEVICE) for t in inputs)).cpu()

    check_compiled(moved, lambda B: make(B, 3, 5, 1, 16, (4, 3), pad=True), batched=1)


def test_matches_transformers_swin():
    """Its shifted layer with windows of 7 on a map of 10, which it pads before its Linears."""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    size, heads, C = 10, 2, 32
    config = SwinConfig(window_size=7, attn_implementation="eager")
    layer = SwinLayer(config, C, (size, size), heads, shift_size=3).eval()
    layer.layernorm_before = torch.nn.Identity()
    for parameter in layer.mlp.parameters():
        torch.nn.init.zeros_(parameter)  # leaves shortcut + attention
    attention = layer.attention
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    table = attention.relative_position_bias.relative_position_bias_table
    x, dy = (torch.randn(1, size, size, C) for _ in range(2))
    x.requires_grad_()

    theirs = layer(x.flatten(1, 2), (size, size))[0].view(x.shape)
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = (torch.cat([getattr(p, n) for p in parts]) for n in ("weight", "bias"))
    qkv = torch.nn.functional.linear(x, weight, bias)
    call = call_with(heads, (7, 7), (3, 3), value=True)
    ours = x + attention.o_proj(call(*(t.to(DEVICE) for t in (qkv, table, bias))).cpu())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    wanted = [x, table, *(p.weight for p in parts), *(p.bias for p in parts)]
    mine, true = (torch.autograd.grad(y, wanted, dy) for y in (ours, theirs))
    for a, b in zip(mine, true, strict=True):
        size = max(
            1, b.abs().max(), true[-1].abs().max()
        )  # a key's bias has a gradient of almost 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)


def check_any(data, dtypes, most: int) -> None:
    B, H, W = (data.draw(st.integers(1, n)) for n in (2, 2 * most, 2 * most))
    heads, d = data.draw(st.integers(1, 3)), data.draw(st.integers(16, 40))
    window = (data.draw(st.integers(2, most)), data.draw(st.integers(2, most)))
    shift = tuple(data.draw(st.integers(0, size - 1)) for size in window)
    padding = data.draw(st.sampled_from(["mask", "zeros", "vector"]))
    dtype = data.draw(st.sampled_from(dtypes))
    inputs = [
        None if t is None else t.to(DEVICE, dtype).requires_grad_()
        for t in make(B, H, W, heads, d, window, padding == "vector")
    ]
    call = call_with(heads, window, shift, padding != "mask")
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    compare(call, inputs, torch.randn(B, H, W, heads * d, device=DEVICE, dtype=dtype), tolerance)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape(data):
    check_any(data, DTYPES[:2], 4)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_shape_at_length(data):
    check_any(data, DTYPES, 11)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cuda", reason="11 GB of tensors")
def test_more_elements_than_32_bits_count():
    B, size, heads = 29, 256, 6  # 2.2e9 elements of qkv
    table = torch.randn(225, heads, device=DEVICE)
    qkv = torch.randn(B, size, size, 1152, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    call = call_with(heads, (8, 8), (4, 4))
    out = call(qkv, table)
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = qkv.detach()[-1:].requires_grad_()
    with backend("reference"):
        true = call(last, table)
        (d_true,) = torch.autograd.grad(true, last, torch.ones_like(true))
    torch.testing.assert_close(out[-1:], true, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dqkv[-1:], d_true, rtol=2e-2, atol=2e-2)
