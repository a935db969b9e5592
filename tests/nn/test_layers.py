"""Every layer against plain PyTorch with the same weights, written here from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.nn import (
    MHCA,
    MHSA,
    DWConvFFN,
    FusedAttention,
    GroupNormSiLU,
    LayerNorm,
    LinearFirstHead,
    PatchEmbed,
    PatchExpanding,
    PatchMerging,
    PlainSwinLayer,
    PositionEmbedding,
    RearrangeFirstHead,
    ResBlock,
    SkipConnection,
    SkipLinear,
    SpatialAttention,
    SwinBlock,
    SwinLayer,
    TextCondition,
    TimeEmbedding,
    as_timesteps,
    timestep_embedding,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 1.0, 17.5, 999.0])
    emb = timestep_embedding(t, 8)
    for row, time in zip(emb, t.tolist(), strict=True):
        for i in range(4):
            angle = time * 10000 ** (-i / 4)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[4 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)
    with pytest.raises(ValueError, match="dim=7 is odd"):
        timestep_embedding(t, 7)


def test_a_compiled_model_takes_as_many_times_as_the_image_has_channels():
    """One symbol then stands for the batch, a number for what it is compared with."""

    def model(x, t):
        assert x.shape[1] == 3
        return as_timesteps(t, x.shape[0], x.device)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    t = torch.tensor([1.0, 2.0, 3.0])
    close(compiled(torch.zeros(3, 3, 16, 16), t), t)


def test_time_embedding():
    layer = randomized(TimeEmbedding(8, 16))
    t = torch.tensor([3.0, 5.0])
    close(layer(t), layer.fc2(F.silu(layer.fc1(timestep_embedding(t, 8)))))


def test_patch_embed_goes_row_by_row():
    layer = randomized(PatchEmbed(3, 5, 2))
    x = torch.randn(2, 3, 4, 6)
    tokens = layer(x)
    assert tokens.shape == (2, 6, 5)
    patch = x[:, :, 2:4, 0:2]  # second row, first column: token 3
    weight = layer.proj.weight.flatten(1)
    close(tokens[:, 3], patch.flatten(1) @ weight.T + layer.proj.bias)


def test_position_embedding_interpolates_patches_only():
    layer = PositionEmbedding(1, (4, 4), 3)
    with torch.no_grad():
        layer.table.copy_(torch.arange(17.0).div(4).floor()[None, :, None].expand(1, 17, 3))
    assert layer((4, 4)) is layer.table
    other = layer((8, 2))
    assert other.shape == (1, 1 + 16, 3)
    close(other[:, 0], layer.table[:, 0])


def attention(q, k, v, mask=None):
    """Softmax attention written out, float64. q, k, v: (B, N, L, d)."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).float()


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_mhsa():
    layer = randomized(MHSA(32, head_dim=8, qkv_bias=True))
    x = torch.randn(2, 5, 32)
    q, k, v = (split(part, 4) for part in layer.qkv(x).split(32, dim=-1))
    close(layer(x), layer.proj(attention(q, k, v).transpose(1, 2).flatten(2)))
    with pytest.raises(ValueError, match="head_dim=64 does not divide dim=32"):
        MHSA(32)


def test_mhca_ignores_masked_text():
    layer = randomized(MHCA(32, 12, head_dim=8))
    x, context = torch.randn(2, 5, 32), torch.randn(2, 3, 12)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    q = split(layer.q(x), 4)
    k, v = (split(part, 4) for part in layer.kv(context).split(32, dim=-1))
    expected = attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)
    close(layer(x, context, mask), layer.proj(expected))


def test_fused_attention_reads_image_and_valid_text():
    layer = randomized(FusedAttention(32, 12, head_dim=8))
    x, context = torch.randn(2, 5, 32), torch.randn(2, 3, 12)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    q, k, v = (split(part, 4) for part in layer.qkv(x).split(32, dim=-1))
    text_k, text_v = (split(part, 4) for part in layer.text_kv(context).split(32, dim=-1))
    keys = torch.cat([torch.ones(2, 5, dtype=torch.bool), mask], dim=1)[:, None, None]
    out = attention(q, torch.cat([k, text_k], 2), torch.cat([v, text_v], 2), keys)
    close(layer(x, context, mask), layer.proj(out.transpose(1, 2).flatten(2)))


def test_a_norm_of_the_text_is_of_what_is_read_and_pooled():
    layer, plain = TextCondition(6, norm=True), TextCondition(6)
    randomized(layer)
    plain.load_state_dict(layer.state_dict(), strict=False)
    context = torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    normed = F.layer_norm(context, (6,), layer.norm.weight, layer.norm.bias)
    for mine, expected in zip(
        layer(context, mask, None, 2), plain(normed, mask, None, 2), strict=True
    ):
        close(mine, expected)
    pooled = torch.randn(2, 6)
    close(layer(context, mask, pooled, 2)[2][0], pooled[0])


def test_skip_linear_reads_a_skip_as_if_concatenated():
    layer = randomized(SkipLinear(10, 4))
    x, skip = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    close(layer(x, skip), F.linear(torch.cat([x, skip], -1), layer.weight, layer.bias))


class Launches(TorchDispatchMode):
    """Names of the operators that compute or copy, in order; views are left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [r.alias_info for r in func._schema.returns]
        if all(a is None or a.is_write for a in aliases) and "view" not in func.name():
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def skips(dtype=torch.float32):
    """Each layer of two inputs, its inputs, and its definition by a concatenation."""
    last = torch.channels_last
    image = [torch.randn(2, c, 3, 5, dtype=dtype).to(memory_format=last) for c in (6, 4)]
    rows = [torch.randn(2, 3, c, dtype=dtype) for c in (6, 4)]
    return {
        "linear": (
            SkipLinear(10, 4),
            rows,
            lambda m, x, s: nn.Linear.forward(m, torch.cat([x, s], -1)),
        ),
        "image": (
            SkipConnection(10, 4),
            image,
            lambda m, x, s: nn.Conv2d.forward(m, torch.cat([x, s], 1)),
        ),
    }


@pytest.mark.parametrize("kind", ["linear", "image"])
def test_a_second_input_accumulates_without_an_addition(kind):
    layer, inputs, exact = skips()[kind]
    randomized(layer)
    with Launches() as seen, torch.no_grad():
        y = layer(*inputs)
    assert seen.names == ["addmm", "addmm"]
    y2 = layer(*inputs)
    close(y, exact(layer, *inputs))
    assert torch.equal(y, y2)
    if kind == "image":
        assert y.is_contiguous(memory_format=torch.channels_last)
        close(layer(*(t.contiguous() for t in inputs)), y)
    inputs = [t.requires_grad_() for t in inputs]
    dy = torch.randn_like(y)
    with Launches() as seen:
        layer(*inputs).backward(dy)
    # the two products of each direction, the bias and the weight's halves side by side
    assert sorted(set(seen.names)) == ["addmm", "addmm_", "cat", "mm", "sum"]
    mine = [t.grad for t in (*inputs, *layer.parameters())]
    expected = torch.autograd.grad(exact(layer, *inputs), (*inputs, *layer.parameters()), dy)
    for a, b in zip(mine, expected, strict=True):
        close(a, b)
    assert all(p.grad.stride() == p.stride() for p in layer.parameters())
    layer.double()
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(layer, doubles)
    assert torch.autograd.gradgradcheck(layer, doubles)


@pytest.mark.parametrize("kind", ["linear", "image"])
def test_a_second_input_under_autocast_and_in_other_places(kind):
    layer, inputs, exact = skips()[kind]
    randomized(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(*inputs), exact(layer, *inputs)
        mixed = layer(inputs[0].bfloat16(), inputs[1])
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mixed, y)
    y.sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    with pytest.raises(RuntimeError):  # without autocast no dtype is changed unasked
        layer(inputs[0], inputs[1].bfloat16())
    meta = layer.to("meta")
    assert meta(*(t.to("meta") for t in inputs)).shape == y.shape


@pytest.mark.parametrize("kind", ["linear", "image"])
def test_a_second_input_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    layer, inputs, _ = skips()[kind]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(*inputs), layer(*inputs))
    with torch.no_grad():
        close(compiled(*inputs), layer(*inputs))


def test_patch_merging_and_expanding():
    merging, expanding = randomized(PatchMerging(6)), randomized(PatchExpanding(6))
    x = torch.randn(2, 6, 4, 8).to(memory_format=torch.channels_last)
    half = merging(x, None)
    assert half.shape == (2, 6, 2, 4)
    four = torch.cat(  # Swin's order: down the column first
        [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=1
    ).permute(0, 2, 3, 1)
    normed = F.layer_norm(four, (24,), merging.norm.weight, merging.norm.bias)
    close(half, (normed @ merging.reduction.weight.T).permute(0, 3, 1, 2))

    double = expanding(x, None)
    assert double.shape == (2, 6, 8, 16)
    wide = x.permute(0, 2, 3, 1) @ expanding.expand.weight.T
    for i in (0, 1):
        for j in (0, 1):
            quarter = wide[..., (2 * i + j) * 6 :][..., :6]
            normed = F.layer_norm(quarter, (6,), expanding.norm.weight, expanding.norm.bias)
            close(double[:, :, i::2, j::2], normed.permute(0, 3, 1, 2))
    for out in (half, double):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_spatial_attention():
    layer = randomized(SpatialAttention(32, head_dim=8, groups=4))
    x = torch.randn(2, 32, 3, 5).to(memory_format=torch.channels_last)
    norm = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias)
    tokens = norm.flatten(2).transpose(1, 2)
    q, k, v = (split(part, 4) for part in layer.qkv(tokens).split(32, dim=-1))
    out = layer.proj(attention(q, k, v).transpose(1, 2).flatten(2))
    close(layer(x), x + out.transpose(1, 2).unflatten(2, (3, 5)))
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    fresh = SpatialAttention(32, head_dim=8, groups=4)
    close(fresh(x), x)


def test_dwconv_ffn_and_its_prefix():
    layer = randomized(DWConvFFN(6))
    x = torch.randn(2, 1 + 12, 6)
    hidden = layer.fc1(x)
    grid = hidden[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    conv = F.conv2d(grid, layer.conv.weight, layer.conv.bias, padding=1, groups=24)
    hidden = torch.cat([hidden[:, :1], conv.flatten(2).transpose(1, 2)], dim=1)
    close(layer(x, (3, 4), 1), layer.fc2(F.gelu(hidden)))


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(affine):
    layer = randomized(LayerNorm(6, affine=affine))
    x, residual = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    gate, scale, shift = torch.randn(3, 2, 6)
    y, r = layer(x, residual=residual, gate=gate, scale=scale, shift=shift)
    wide = [v[:, None, None] for v in (gate, scale, shift)]
    expected = residual + wide[0] * x
    close(r, expected)
    normed = F.layer_norm(expected, (6,), layer.weight, layer.bias)
    close(y, normed * (1 + wide[1]) + wide[2])


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_group_norm_silu_over_two_tensors(activation):
    layer = randomized(GroupNormSiLU(12, groups=3, activation=activation))
    x, skip = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    scale, shift = torch.randn(2, 2, 12, 1, 1)
    y = F.group_norm(torch.cat([x, skip], 1), 3, layer.weight, layer.bias) * (1 + scale) + shift
    expected = F.silu(y) if activation == "silu" else y
    close(layer(x, skip=skip, scale=scale[..., 0, 0], shift=shift[..., 0, 0]), expected)
    with pytest.raises(ValueError, match="groups=5 does not divide channels=12"):
        GroupNormSiLU(12, groups=5)


@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_resblock(resample):
    layer = randomized(ResBlock(8, 12, 10, resample=resample, groups=4))
    x = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last)
    emb = torch.randn(2, 10)

    def sampled(z):
        if resample == "down":
            return (
                z[..., ::2, ::2] + z[..., 1::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, 1::2]
            ) / 4
        if resample == "up":
            return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return z

    h = F.silu(F.group_norm(x, 4, layer.norm1.weight, layer.norm1.bias))
    h = layer.conv1(sampled(h))
    scale, shift = layer.emb(F.silu(emb))[..., None, None].chunk(2, dim=1)
    h = F.group_norm(h, 4, layer.norm2.weight, layer.norm2.bias) * (1 + scale) + shift
    h = layer.conv2(F.silu(h))
    close(layer(x, emb), layer.skip(sampled(x)) + h)


def test_resblock_reads_a_skip_as_if_concatenated():
    layer = randomized(ResBlock(8, 12, 10, skip_channels=4, groups=4))
    x, skip, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 10)
    twin = ResBlock(12, 12, 10, groups=4)
    twin.skip = nn.Conv2d(12, 12, 1)
    twin.load_state_dict(layer.state_dict())
    close(layer(x, emb, skip=skip), twin(torch.cat([x, skip], 1), emb))


def test_resblock_starts_as_its_skip_and_checks_its_arguments():
    x = torch.randn(2, 8, 4, 4)
    close(ResBlock(8, 8, 10, groups=4)(x, torch.randn(2, 10)), x)
    with pytest.raises(ValueError, match="resample='side'"):
        ResBlock(8, 8, 10, resample="side", groups=4)
    with pytest.raises(ValueError, match="skip_channels=4, expected 'none'"):
        ResBlock(8, 8, 10, skip_channels=4, resample="up", groups=4)


def test_heads_put_pixels_where_their_patch_is():
    x = torch.randn(2, 1 + 6, 16)
    head = randomized(RearrangeFirstHead(16, 2, 3))
    out = head(x, (2, 3), 1)
    assert out.shape == (2, 3, 4, 6)
    tokens = F.layer_norm(x[:, 1:], (16,), head.norm.weight, head.norm.bias)
    image = torch.empty(2, 4, 4, 6)
    for token in range(6):
        row, column = divmod(token, 3)
        block = tokens[:, token].view(2, 2, 2, 4).permute(0, 3, 1, 2)
        image[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = block
    close(out, head.conv(image))

    head = randomized(LinearFirstHead(16, 2, 3))
    tokens = head.linear(F.layer_norm(x, (16,), head.norm.weight, head.norm.bias))[:, 1:]
    image = tokens.view(2, 2, 3, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4, 6)
    close(head(x, (2, 3), 1), head.conv(image))


def test_swin_layer_in_the_order_of_its_docstring():
    layer = randomized(SwinLayer(32, 10, window=4, head_dim=8, context_dim=12))
    x, emb = torch.randn(2, 4, 4, 32), torch.randn(2, 10)
    context, mask = torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool)
    modulation = layer.modulation(F.silu(emb))[:, None, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)

    h = layer.attn(F.layer_norm(x, (32,)) * (1 + scale1) + shift1)
    r = x + gate1 * h
    norm = F.layer_norm(r, (32,), layer.cross.norm.weight, layer.cross.norm.bias)
    r = r + layer.cross.attn(norm.flatten(1, 2), context, mask).view_as(r)
    h = (F.layer_norm(r, (32,)) * (1 + scale2) + shift2).flatten(1, 2)
    expected = r + gate2 * layer.ffn(h, (4, 4)).view_as(r)
    close(layer(x, emb, (context, mask)), expected)
    with pytest.raises(ValueError, match="text is needed"):
        layer(x, emb)


def test_plain_swin_layer():
    layer = randomized(PlainSwinLayer(32, window=4, head_dim=8, context_dim=12))
    x, context = torch.randn(2, 4, 4, 32), torch.randn(2, 3, 12)
    mask = torch.ones(2, 3, dtype=torch.bool)

    def norm(x, layer):
        return F.layer_norm(x, (32,), layer.weight, layer.bias)

    r = x + layer.attn(norm(x, layer.norm1))
    h = norm(r, layer.cross.norm).flatten(1, 2)
    r = r + layer.cross.attn(h, context, mask).view_as(r)
    expected = r + layer.ffn(norm(r, layer.norm2).flatten(1, 2), (4, 4)).view_as(r)
    close(layer(x, torch.randn(2, 10), (context, mask)), expected)


def test_swin_block_reads_a_skip_as_if_concatenated():
    block = randomized(SwinBlock(8, 32, 10, skip_channels=4, window=4, head_dim=8))
    twin = SwinBlock(12, 32, 10, window=4, head_dim=8)
    twin.load_state_dict(block.state_dict())
    x, skip, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 10)
    close(block(x, emb, skip=skip), twin(torch.cat([x, skip], 1), emb))


def test_swin_block_shifts_its_second_layer():
    block = randomized(SwinBlock(8, 32, 10, window=4, head_dim=8))
    assert [layer.attn.shift for layer in block.layers] == [0, 2]
    x = torch.randn(1, 8, 12, 12, requires_grad=True)
    emb = torch.zeros(1, 10)
    # without the depth-wise convolution, only attention moves information between pixels
    with torch.no_grad():
        for layer in block.layers:
            layer.ffn.conv.weight[:, :, :, [0, 2]] = 0
            layer.ffn.conv.weight[:, :, [0, 2]] = 0

    def reach(output):
        (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        touched = grad.abs().sum((0, 1)) > 0
        return touched.any(1).nonzero().flatten().tolist()

    first = block.layers[0](block.width(x.permute(0, 2, 3, 1)), emb)
    assert reach(first[:, 4]) == [4, 5, 6, 7]
    out = block(x, emb)
    assert reach(out[:, :, 4]) == list(range(8))
    assert reach(out[:, :, 0]) == [0, 1, 2, 3]


def test_the_rearrange_first_head_copies_once():
    """The norm takes all tokens as they lie; what is copied is its output, into channels_last."""
    layer = randomized(RearrangeFirstHead(16, 2, 3))
    x = torch.randn(2, 1 + 12, 16)
    with Launches() as seen, torch.no_grad():
        layer(x, (3, 4), 1)
    assert seen.names.count("clone") == 1
    taken = []
    layer.norm.register_forward_hook(lambda module, args, out: taken.append(args[0]))
    layer.conv.register_forward_hook(lambda module, args, out: taken.append(args[0]))
    layer(x, (3, 4), 1)
    assert taken[0].is_contiguous()
    assert taken[1].is_contiguous(memory_format=torch.channels_last)
