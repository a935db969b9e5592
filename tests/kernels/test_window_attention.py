"""window_attention against a per-pixel definition and against transformers' Swin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import window_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def oracle(qkv, table=None, pad=None, *, heads, window, shift, value=False) -> Tensor:
    """Window attention pixel by pixel: who sees whom is decided from coordinates alone."""
    B, H, W, C3 = qkv.shape
    (h, w), d = window, C3 // 3 // heads
    Hp, Wp = -(-H // h) * h, -(-W // w) * w
    sy, sx = (0 if h >= H else shift[0]), (0 if w >= W else shift[1])
    zeros = qkv.new_zeros(C3) if pad is None else pad
    out = []
    for y in range(H):
        for x in range(W):
            ry, rx = (y - sy) % Hp, (x - sx) % Wp  # where the roll puts this pixel
            terms, values = [], []
            for ky in range(ry // h * h, ry // h * h + h):
                for kx in range(rx // w * w, rx // w * w + w):
                    oy, ox = (ky + sy) % Hp, (kx + sx) % Wp  # where the key came from
                    inside = oy < H and ox < W
                    # Both wrapped round an edge, or neither: else they are no neighbours.
                    together = (oy < sy) == (y < sy) and (ox < sx) == (x < sx)
                    if not together or not (inside or value):
                        continue
                    pixel = qkv[:, oy, ox] if inside else zeros.expand(B, C3)
                    q = qkv[:, y, x, : C3 // 3].reshape(B, heads, d)
                    k = pixel[:, C3 // 3 : 2 * C3 // 3].reshape(B, heads, d)
                    logit = (q * k).sum(-1) / d**0.5
                    if table is not None:
                        logit = logit + table[(ry - ky + h - 1) * (2 * w - 1) + rx - kx + w - 1]
                    terms.append(logit)
                    values.append(pixel[:, 2 * C3 // 3 :].reshape(B, heads, d))
            weights = torch.stack(terms, -1).softmax(-1)
            out.append((weights[:, :, None] * torch.stack(values, -1)).sum(-1).reshape(B, C3 // 3))
    return torch.stack(out, 1).reshape(B, H, W, C3 // 3)


def make(B, H, W, C, heads, window) -> list[Tensor]:
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    return [torch.randn(B, H, W, 3 * C), table, torch.randn(3 * C)]


CASES = [
    # H, W, window, shift, pad_mode
    (8, 8, (4, 4), (0, 0), "mask"),
    (8, 8, (4, 4), (2, 2), "mask"),
    (7, 9, (4, 4), (2, 2), "mask"),  # padding of one row and of three columns, torn by the roll
    (5, 9, (4, 4), (3, 1), "mask"),  # a window of padding and wrapped rows only
    (7, 9, (4, 4), (2, 2), "value"),
    (6, 8, (3, 2), (1, 1), "value"),
    (3, 9, (4, 4), (2, 2), "mask"),  # the window covers the rows: no shift there
    (3, 4, (5, 4), (2, 2), "value"),
    (1, 1, (1, 1), (0, 0), "mask"),
    (5, 3, (1, 2), (0, 1), "mask"),
]


@pytest.mark.parametrize(("H", "W", "window", "shift", "pad_mode"), CASES)
def test_matches_definition_in_each_dtype(H, W, window, shift, pad_mode, check_dtypes):
    inputs = make(2, H, W, 6, 2, window)
    value = pad_mode == "value"
    if not value:
        inputs.pop()

    def call(qkv, table, pad=None):
        return window_attention(
            qkv,
            table,
            heads=2,
            window_size=window,
            shift=shift,
            pad_mode=pad_mode,
            pad_qkv=pad,
        )

    def exact(qkv, table, pad=None):
        unused = 0 if pad is None else 0 * pad.sum()  # no padding: a gradient of zeros
        kw = {"heads": 2, "window": window, "shift": shift, "value": value}
        return oracle(qkv, table, pad, **kw) + unused

    if value and H % window[0] == 0 and W % window[1] == 0:
        inputs.pop()  # nothing is padded
    check_dtypes(call, exact, inputs, TOLERANCE)


def test_without_table_and_with_scale():
    qkv = torch.randn(1, 5, 6, 12, dtype=torch.float64)
    expected = oracle(qkv, heads=2, window=(3, 3), shift=(1, 1))
    got = window_attention(qkv, None, heads=2, window_size=3, shift=1)
    torch.testing.assert_close(got, expected)
    scaled = torch.cat([qkv[..., :4] * 3, qkv[..., 4:]], -1)
    expected = oracle(scaled, heads=2, window=(3, 3), shift=(1, 1))
    got = window_attention(qkv, None, heads=2, window_size=3, shift=1, scale=3 / 2**0.5)
    torch.testing.assert_close(got, expected)


def test_pad_value_without_vector_is_zeros():
    qkv, table, _ = make(1, 5, 5, 4, 2, (4, 4))
    kw = {"heads": 2, "window_size": 4, "shift": 2, "pad_mode": "value"}
    zeros = window_attention(qkv, table, pad_qkv=torch.zeros(12), **kw)
    torch.testing.assert_close(window_attention(qkv, table, **kw), zeros)
    masked = window_attention(qkv, table, heads=2, window_size=4, shift=2)
    assert (masked - zeros).abs().max() > 1e-2


@pytest.mark.parametrize("size", [56, 64])
@pytest.mark.parametrize("window", [7, 8])
@pytest.mark.parametrize("shifted", [False, True])
def test_matches_transformers_swin(size, window, shifted, differentiate):
    """The whole attention half of transformers' SwinLayer, values and every gradient."""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    C, heads, shift = 12, 3, window // 2 if shifted else 0
    config = SwinConfig(window_size=window, attn_implementation="eager")
    layer = SwinLayer(config, C, (size, size), heads, shift_size=shift).eval()
    layer.layernorm_before = torch.nn.Identity()
    for parameter in layer.mlp.parameters():
        torch.nn.init.zeros_(parameter)  # leaves shortcut + attention
    attention = layer.attention
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    table = attention.relative_position_bias.relative_position_bias_table
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([part.weight for part in parts]).detach().requires_grad_()
    bias = torch.cat([part.bias for part in parts]).detach().requires_grad_()
    x = torch.randn(1, size, size, C, requires_grad=True)

    def ours(x, weight, bias, table):
        qkv = torch.nn.functional.linear(x, weight, bias)
        attended = window_attention(
            qkv,
            table,
            heads=heads,
            window_size=window,
            shift=shift,
            pad_mode="value",
            pad_qkv=bias,
        )
        return x + attention.o_proj(attended)

    def theirs(x, *parameters):
        return layer(x.flatten(1, 2), (size, size))[0].view(1, size, size, C)

    y, dx, dweight, dbias, dtable = differentiate(ours, [x, weight, bias, table])
    weights, biases = [p.weight for p in parts], [p.bias for p in parts]
    their_y, their_dx, their_dtable, *rest = differentiate(theirs, [x, table, *weights, *biases])
    their_dweight, their_dbias = torch.cat(rest[:3]), torch.cat(rest[3:])
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    ours_and_theirs = [
        (dx, their_dx),
        (dweight, their_dweight),
        (dbias, their_dbias),
        (dtable, their_dtable),
    ]
    for a, b in ours_and_theirs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))
    if shifted:  # the mask matters: without it the torn windows' pixels would differ
        layer.get_attn_mask = lambda *args, **kwargs: None
        assert (theirs(x) - y).abs().max() > 0.1


def test_masked_pairs_are_excluded_exactly():
    """A logit of 1000 across the tear leaks through Swin's -100, and not through -inf."""
    qkv = torch.zeros(1, 4, 4, 3)
    qkv[..., 0] = 1
    qkv[0, 0, :, 1] = 1000  # keys of the first row, which the roll brings to the last window
    qkv[0, 0, :, 2] = 1
    out = window_attention(qkv, None, heads=1, window_size=2, shift=1)
    assert out[0, 3].abs().max() == 0


def test_gradcheck():
    torch.manual_seed(3)
    inputs = [t.double().requires_grad_() for t in make(2, 3, 5, 4, 2, (2, 3))]

    def call(qkv, table, pad):
        return window_attention(
            qkv,
            table,
            heads=2,
            window_size=(2, 3),
            shift=1,
            pad_mode="value",
            pad_qkv=pad,
        )

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradcheck(
        lambda qkv, table: window_attention(qkv, table, heads=2, window_size=(2, 3), shift=1),
        inputs[:2],
    )


@pytest.mark.parametrize("shape", [(0, 5, 6, 12), (2, 0, 6, 12), (2, 5, 0, 12)])
def test_empty(shape):
    qkv, table = torch.randn(shape, requires_grad=True), torch.randn(49, 2, requires_grad=True)
    out = window_attention(qkv, table, heads=2, window_size=4, shift=2)
    assert out.shape == (*shape[:3], 4)
    out.sum().backward()
    assert qkv.grad.shape == shape
    assert (table.grad == 0).all()


def test_noncontiguous_inputs_give_a_contiguous_result():
    qkv, table, _ = make(2, 6, 7, 4, 2, (4, 4))
    expected = window_attention(qkv, table, heads=2, window_size=4, shift=2)
    strided = torch.randn(2, 7, 6, 24)[..., ::2].transpose(1, 2).copy_(qkv)
    channels_first = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for variant in (strided, channels_first):
        assert not variant.is_contiguous()
        got = window_attention(variant, table.t().contiguous().t(), heads=2, window_size=4, shift=2)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected)


def test_float32_table_beside_bfloat16():
    qkv, table, pad = make(1, 5, 5, 4, 2, (4, 4))
    table.requires_grad_()
    kw = {"heads": 2, "window_size": 4, "pad_mode": "value"}
    out = window_attention(qkv.bfloat16(), table, pad_qkv=pad, **kw)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert table.grad.dtype is torch.float32


def test_autocast_runs_in_its_dtype_with_float32_softmax():
    qkv, table, _ = make(1, 5, 5, 4, 2, (4, 4))
    qkv.requires_grad_()
    expected = window_attention(qkv.bfloat16(), table, heads=2, window_size=4, shift=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = window_attention(qkv, table, heads=2, window_size=4, shift=2)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, expected)
    got.sum().backward()
    assert qkv.grad.dtype is torch.float32


def test_only_what_requires_grad_gets_one():
    qkv, table, _ = make(1, 5, 5, 4, 2, (4, 4))
    window_attention(qkv, table.requires_grad_(), heads=2, window_size=4).sum().backward()
    assert qkv.grad is None
    assert table.grad is not None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape(data):
    B, H, W = (data.draw(st.integers(1, n)) for n in (2, 7, 7))
    heads, d = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    window = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    shift = tuple(data.draw(st.integers(0, size - 1)) for size in window)
    mode = data.draw(st.sampled_from(["mask", "value"]))
    qkv, table, pad = (t.double() for t in make(B, H, W, heads * d, heads, window))
    pad = pad if mode == "value" else None
    kw = {"heads": heads, "shift": shift}
    got = window_attention(qkv, table, window_size=window, pad_mode=mode, pad_qkv=pad, **kw)
    expected = oracle(qkv, table, pad, window=window, value=mode == "value", **kw)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("pad_mode", ["mask", "value"])
def test_compiles_to_one_graph(pad_mode, check_compiled):
    def call(qkv, table, pad):
        given = pad if pad_mode == "value" else None
        out = window_attention(
            qkv,
            table,
            heads=2,
            window_size=(4, 3),
            shift=(2, 1),
            pad_mode=pad_mode,
            pad_qkv=given,
        )
        return out, pad * 2

    check_compiled(call, lambda B: make(B, 9, 7, 8, 2, (4, 3)), batched=1)


def test_meta_and_export():
    meta = torch.device("meta")
    qkv, table = torch.empty(2, 9, 7, 24, device=meta), torch.empty(49, 2, device=meta)
    assert window_attention(qkv, table, heads=2, window_size=4, shift=2).shape == (2, 9, 7, 8)

    class Module(torch.nn.Module):
        def forward(self, qkv, table):
            return window_attention(qkv, table, heads=2, window_size=4, shift=2)

    qkv, table = torch.randn(2, 9, 7, 24), torch.randn(49, 2)
    shapes = {"qkv": {0: torch.export.Dim("batch", min=2, max=64)}, "table": None}
    program = torch.export.export(Module(), (qkv, table), dynamic_shapes=shapes)
    more = torch.cat([qkv, qkv, qkv])
    torch.testing.assert_close(program.module()(more, table), Module()(more, table))


QKV, TABLE = torch.zeros(1, 8, 8, 384 * 3), torch.zeros(225, 6)
BAD = [
    ({"qkv": torch.zeros(8, 8, 18)}, ValueError, r"qkv has shape \(8, 8, 18\); expected 4 dim"),
    ({"qkv": torch.zeros(1, 8, 8, 16)}, ValueError, r"qkv has 16 channels; expected 3\*C"),
    ({"qkv": torch.zeros(1, 8, 8, 0)}, ValueError, r"qkv has 0 channels"),
    ({"heads": 5}, ValueError, "heads=5 does not divide C=384"),
    ({"heads": 0}, ValueError, "heads=0 does not divide C=384"),
    ({"window_size": 0}, ValueError, "window_size=0; expected at least 1"),
    ({"window_size": (8, -1)}, ValueError, r"window_size=\(8, -1\); expected at least 1"),
    ({"window_size": (8, 8, 8)}, ValueError, "expected an int or a pair"),
    ({"shift": -4}, ValueError, "shift=-4; expected at least 0"),
    ({"shift": (0, 8)}, ValueError, r"shift=\(0, 8\); expected less than window_size=8"),
    ({"bias_table": torch.zeros(224, 6)}, ValueError, r"\(224, 6\); expected \(225, 6\)"),
    ({"bias_table": torch.zeros(225, 3)}, ValueError, r"\(225, 3\); expected \(225, 6\)"),
    ({"pad_mode": "zeros"}, ValueError, "pad_mode='zeros'; expected 'mask' or 'value'"),
    ({"pad_qkv": torch.zeros(1152)}, ValueError, "pad_qkv is given with pad_mode='mask'"),
    (
        {"pad_qkv": torch.zeros(384), "pad_mode": "value"},
        ValueError,
        r"pad_qkv has shape \(384,\); expected \(1152,\)",
    ),
    ({"qkv": [1.0]}, TypeError, "qkv is list; expected a tensor"),
    ({"bias_table": 0.0}, TypeError, "bias_table is float; expected a tensor"),
    ({"qkv": QKV.long()}, TypeError, r"qkv is torch.int64; expected float32"),
    (
        {"bias_table": TABLE.half()},
        TypeError,
        "bias_table is torch.float16; expected torch.float32",
    ),
    ({"bias_table": TABLE.to("meta")}, ValueError, "bias_table is on meta and qkv on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_argument(change, error, message):
    arguments = {"qkv": QKV, "bias_table": TABLE, "heads": 6, "window_size": 8} | change
    with pytest.raises(error, match=f"^window_attention: .*{message}"):
        window_attention(**arguments)
