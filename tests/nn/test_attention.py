"""Choice of an attention implementation.

flash-attn and xformers cannot be installed where these tests run, so small stand-ins of the two
take their place in sys.modules: with the signatures and the demands on layout of flash-attn 2.8 and
xformers 0.0.35, and the result computed in plain PyTorch. Without a GPU the check for cuda tensors
is lifted too. Where a package and a GPU are there, the last test runs the real one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.models import ASCEND, ASCENDConfig, IUViT, IUViTConfig, UNet, UNetConfig
from fastdiff.nn import MHCA, MHSA, SpatialAttention, set_attention
from fastdiff.nn.attention import attention

layers = sys.modules["fastdiff.nn.attention"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
calls: list[str] = []


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, N, d), written out in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias.double()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    calls.append(f"flash deterministic={deterministic}")
    assert q.ndim == 4
    assert q.shape[::2] == k.shape[::2] == v.shape[::2]
    assert q.dtype is k.dtype is v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert (dropout_p, softmax_scale, causal, window_size) == (0.0, None, False, (-1, -1))
    return plain(q, k, v, None).to(q.dtype)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    calls.append("xformers" if attn_bias is None else "xformers with a bias")
    B, L, N, d = query.shape
    S = key.shape[1]
    assert key.shape == value.shape == (B, S, N, d)
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    if attn_bias is not None:
        assert attn_bias.shape == (B, N, L, S)  # it does not broadcast
        assert attn_bias.dtype is query.dtype
        lanes = 128 // torch.finfo(attn_bias.dtype).bits
        assert all(stride % lanes == 0 for stride in attn_bias.stride()[:-1])
        assert attn_bias.stride(-1) <= 1
    return plain(query, key, value, attn_bias).to(query.dtype)


@pytest.fixture
def absent_gpu(monkeypatch):
    """Both packages as they are on a machine without a GPU, and nothing of them left behind."""
    flash, xformers, ops = (types.ModuleType(n) for n in ("flash_attn", "xformers", "xformers.ops"))
    flash.flash_attn_func = flash_attn_func
    ops.memory_efficient_attention = memory_efficient_attention
    xformers.ops = ops
    for module in (flash, xformers, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(layers, "_loaded", {"sdpa": layers._sdpa})
    calls.clear()


@pytest.fixture
def packages(absent_gpu, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(layers, "_check_cuda", lambda name, q: None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    assert (layers._choice, layers._cross_choice) == ("sdpa", "sdpa")


def make(S=7, dtype=torch.bfloat16) -> list[Tensor]:
    return [torch.randn(2, n, 3, 16, dtype=dtype, device=DEVICE) for n in (5, S, S)]


def key_mask(S: int) -> Tensor:
    mask = torch.rand(2, S, device=DEVICE) < 0.5
    mask[:, 0] = True
    return mask


RUNS = [("sdpa", False), ("sdpa", True), ("flash", False), ("xformers", False), ("xformers", True)]


@pytest.mark.parametrize("S", [1, 7, 8, 77])
@pytest.mark.parametrize(("name", "masked"), RUNS)
def test_values(name, masked, S, packages):
    q, k, v = make(S)
    mask = key_mask(S) if masked else None
    bias = None if mask is None else torch.zeros(2, 1, 1, S, device=DEVICE)
    if mask is not None:
        bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
    got = attention(q, k, v, mask, implementation=name)
    assert got.dtype is q.dtype
    torch.testing.assert_close(got.double(), plain(q, k, v, bias), rtol=2e-2, atol=2e-2)
    assert len(calls) == (name != "sdpa")


def test_float32_with_a_mask_on_xformers(packages):
    q, k, v = make(dtype=torch.float32)
    mask = key_mask(7)
    expected = attention(q, k, v, mask)
    torch.testing.assert_close(attention(q, k, v, mask, implementation="xformers"), expected)


def test_flash_is_deterministic_where_pytorch_is_asked_to_be(packages):
    attention(*make(), implementation="flash")
    torch.use_deterministic_algorithms(True)
    try:
        attention(*make(), implementation="flash")
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["flash deterministic=False", "flash deterministic=True"]


def test_what_an_implementation_cannot_run(packages):
    q, k, v = make()
    with pytest.raises(ValueError, match=r"takes no mask.*set_attention\('flash', cross='sdpa'\)"):
        attention(q, k, v, key_mask(7), implementation="flash")
    with pytest.raises(ValueError, match=r"float16 and bfloat16, and q is torch\.float32; cast"):
        attention(*make(dtype=torch.float32), implementation="flash")
    wide = torch.zeros(1, 2, 1, 264, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="heads of width up to 256, not 264; choose 'sdpa'"):
        attention(wide, wide, wide, implementation="flash")
    assert not calls  # and nothing else was taken in its place


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_needs_cuda_tensors(name, absent_gpu):
    message = f"'{name}' runs on cuda tensors, and q is on cpu; choose 'sdpa'"
    with pytest.raises(ValueError, match=message):
        attention(*(t.cpu() for t in make()), implementation=name)
    assert not calls


def test_unknown_name():
    message = r"implementation='falsh', expected one of \('sdpa', 'flash', 'xformers'\)"
    with pytest.raises(ValueError, match=message):
        set_attention("falsh")
    with pytest.raises(ValueError, match=message):
        set_attention("sdpa", cross="falsh")
    with pytest.raises(ValueError, match=message):
        attention(*make(), implementation="falsh")
    with pytest.raises(ValueError, match=message):
        IUViT(IUViTConfig(dim=64, layers=1)).set_attention("falsh")


@pytest.mark.parametrize(("name", "package"), [("flash", "flash_attn"), ("xformers", "xformers")])
def test_absent_package(name, package, monkeypatch):
    """None in sys.modules is how Python marks a module that cannot be imported."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(layers, "_loaded", {"sdpa": layers._sdpa})
    message = rf'pip install "fastdiff\[{name}\]"'
    with pytest.raises(ImportError, match=message):
        set_attention(name)
    with pytest.raises(ImportError, match=message):
        attention(*make(), implementation=name)
    model = IUViT(IUViTConfig(dim=64, layers=1))
    with pytest.raises(ImportError, match=message):
        model.set_attention("sdpa", cross=name)
    assert all(getattr(m, "implementation", None) is None for m in model.modules())


def test_set_attention_for_good_and_for_a_block(packages):
    q, k, v = make()
    with set_attention("flash", cross="xformers"):
        attention(q, k, v)
        attention(q, k, v, key_mask(7))
        with set_attention("sdpa"):
            attention(q, k, v)
        attention(q, k, v)
    attention(q, k, v)
    assert [call.split()[0] for call in calls] == ["flash", "xformers", "flash"]
    set_attention("xformers")
    attention(q, k, v)
    assert len(calls) == 4
    set_attention("sdpa")


def test_a_block_ends_with_an_error(packages):
    with pytest.raises(ValueError, match="takes no mask"), set_attention("flash"):
        attention(*make(), key_mask(7))


def iuvit(**fields) -> IUViT:
    return IUViT(
        IUViTConfig(image_size=16, patch_size=4, dim=64, layers=3, context_dim=12, **fields)
    )


LEVELS = {
    "image_size": 16,
    "channels": 32,
    "depth": 1,
    "multipliers": (1, 2),
    "attention_resolutions": (8,),
    "head_dim": 32,
    "groups": 8,
    "context_dim": 12,
}


def ascend() -> ASCEND:
    return ASCEND(ASCENDConfig(window=4, **LEVELS))


@pytest.mark.parametrize("make_model", [iuvit, ascend])
def test_per_model(make_model, packages):
    """A model's choice comes before the global one; every layer takes it, and None undoes it."""
    model = make_model().to(DEVICE, torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.05)  # ASCEND starts with zeros that hide its attention
    x, t = torch.randn(2, 3, 16, 16, device=DEVICE, dtype=torch.bfloat16), torch.tensor([3, 500])
    context = torch.randn(2, 7, 12, device=DEVICE, dtype=torch.bfloat16)
    inputs = (x, t.to(DEVICE), context)
    with torch.no_grad():
        expected = model(*inputs)
        assert not calls
        assert model.set_attention("flash", cross="xformers") is model
        torch.testing.assert_close(model(*inputs), expected, rtol=0.1, atol=0.1)
        whole = sum(isinstance(m, (MHSA, SpatialAttention)) for m in model.modules())
        cross = sum(isinstance(m, MHCA) for m in model.modules())
        assert whole > 0
        assert cross > 0
        assert calls.count("flash deterministic=False") == whole
        assert calls.count("xformers with a bias") == cross
        calls.clear()
        with set_attention("xformers"):
            model.set_attention(None)
            model(*inputs)
            assert calls.count("xformers") == whole
            assert calls.count("xformers with a bias") == cross
            calls.clear()
            model.set_attention("sdpa")
            assert torch.equal(model(*inputs), expected)
        assert not calls
        with pytest.raises(ValueError, match="takes no mask"):
            model.set_attention("flash")(*inputs)


@pytest.mark.parametrize(
    "make_model", [lambda: iuvit(text_attention="fused"), lambda: UNet(UNetConfig(**LEVELS))]
)
def test_attention_fused_with_the_text_takes_the_choice_for_masks(make_model, packages):
    model = make_model().to(DEVICE, torch.bfloat16).set_attention("flash", cross="xformers").eval()
    x = torch.randn(2, 3, 16, 16, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        model(x, 5, torch.randn(2, 7, 12, device=DEVICE, dtype=torch.bfloat16))
    fused = sum(isinstance(m, (MHSA, SpatialAttention)) for m in model.modules())
    assert calls == ["xformers with a bias"] * fused


def test_the_choice_is_not_saved(packages):
    model = iuvit()
    keys = list(model.state_dict())
    assert list(model.set_attention("flash").state_dict()) == keys


def test_compiled_layer_follows_the_choice(packages):
    layer = MHSA(32, head_dim=16).to(DEVICE, torch.bfloat16)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(2, 5, 32, device=DEVICE, dtype=torch.bfloat16)
    compiled(x)
    compiled(x)
    assert counter.frame_count == 1
    with set_attention("sdpa"):
        compiled(x)
    assert counter.frame_count == 1
    layers._loaded["flash"] = lambda q, k, v, mask: q * 0 + 1  # traceable, unlike the stand-in
    with set_attention("flash"):
        expected = layer.proj(torch.ones_like(x))
        torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count == 2
    torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "masked"), RUNS[2:])
def test_the_real_package(name, masked):
    package = {"flash": "flash_attn"}.get(name, name)
    if DEVICE == "cpu" or importlib.util.find_spec(package) is None:
        pytest.skip(f"needs a GPU and {package}")
    inputs = [
        torch.randn(2, n, 3, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for n in (257, 77, 77)
    ]
    mask = key_mask(77) if masked else None
    results = []
    for chosen in (name, "sdpa"):
        out = attention(*inputs, mask, implementation=chosen)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=3e-2, atol=3e-2)
