"""Our ADM blocks against diffusers' ResnetBlock2D, and against ADM's attention as published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn import FusedSpatialAttention, ResBlock, SpatialAttention


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.2)
    return module


def check(mine: Tensor, theirs: Tensor, ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Outputs, and gradients of the same weights under two names, to 1e-5."""
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(theirs)
    got = torch.autograd.grad(mine, list(ours.values()), dy)
    true = torch.autograd.grad(theirs, list(other.values()), dy)
    for name, a, b in zip(ours, got, true, strict=True):
        error = (a - b.view_as(a)).abs().max() / b.abs().max().clamp(min=1)
        assert error < 1e-5, f"{name}: {error:.2g}"


# Ours: diffusers' name.
NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}


@pytest.mark.parametrize("channels", [(64, 64), (64, 96)], ids=str)
@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_resblock_is_diffusers_with_scale_shift(resample, channels):
    from diffusers.models.resnet import ResnetBlock2D

    fields = {"temb_channels": 48, "groups": 32, "eps": 1e-5, resample: resample != "none"}
    fields.pop("none", None)
    theirs = ResnetBlock2D(
        in_channels=channels[0],
        out_channels=channels[1],
        time_embedding_norm="scale_shift",
        **fields,
    )
    ours = randomized(ResBlock(*channels, 48, resample=resample))
    renamed = {}
    for name, value in ours.state_dict().items():
        layer, kind = name.split(".")
        renamed[f"{NAMES[layer]}.{kind}"] = value
    theirs.load_state_dict(renamed)
    # with its gradient: PyTorch's group norm in channels_last crashes backward without
    x = torch.randn(2, channels[0], 8, 12).to(memory_format=torch.channels_last).requires_grad_()
    emb = torch.randn(2, 48)
    mine = dict(ours.named_parameters())
    by_their_names = dict(theirs.named_parameters())
    other = {n: by_their_names[f"{NAMES[n.split('.')[0]]}.{n.split('.')[1]}"] for n in mine}
    check(ours(x, emb), theirs(x, emb), {"x": x, **mine}, {"x": x, **other})


def adm_attention(
    x: Tensor, w: dict[str, Tensor], heads: int, context: Tensor | None = None
) -> Tensor:
    """ADM's: channels are split into heads first, each head's then into q, k, v; scaled apart.

    With text, GLIDE's: its keys and values, split alike, stand before those of the pixels.
    """
    B, C, H, W = x.shape
    d = C // heads
    h = F.group_norm(x, 32, w["norm.weight"], w["norm.bias"]).view(B, C, H * W)
    qkv = F.conv1d(h, w["qkv.weight"][..., None], w["qkv.bias"])
    q, k, v = qkv.view(B * heads, 3 * d, H * W).split(d, dim=1)
    if context is not None:
        kv = F.conv1d(context.mT, w["text_kv.weight"][..., None], w["text_kv.bias"])
        text_k, text_v = kv.view(B * heads, 2 * d, -1).split(d, dim=1)
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
    scale = d**-0.25
    weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
    a = torch.einsum("bts,bcs->bct", weight, v).reshape(B, C, H * W)
    h = F.conv1d(a, w["proj.weight"][..., None], w["proj.bias"])
    return x + h.view(B, C, H, W)


@pytest.mark.parametrize("text", [False, True])
def test_attention_is_adms(text):
    C, d, heads = 64, 16, 4
    if text:
        ours: SpatialAttention = FusedSpatialAttention(C, 24, head_dim=d)
    else:
        ours = SpatialAttention(C, head_dim=d)
    mine = dict(randomized(ours).named_parameters())

    # ours has all heads' q, then all k, then all v: ADM's order by a permutation of the rows
    def interleaved(parts: int) -> Tensor:
        return torch.arange(parts * C).view(parts, heads, d).transpose(0, 1).flatten()

    order = {"qkv": interleaved(3), "text_kv": interleaved(2)}
    other = {n: p[order[n.split(".")[0]]] if "kv" in n else p for n, p in mine.items()}
    x = torch.randn(2, C, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    context = torch.randn(2, 5, 24) if text else None
    pair = (context, torch.ones(2, 5, dtype=torch.bool)) if context is not None else None
    check(
        ours(x, pair), adm_attention(x, other, heads, context), {"x": x, **mine}, {"x": x, **mine}
    )


def test_masked_text_is_not_attended_to():
    ours = randomized(FusedSpatialAttention(64, 24, head_dim=16))
    x, context = torch.randn(2, 64, 4, 6), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 3 + [False] * 2]).expand(2, 5)
    short = ours(x, (context[:, :3], mask[:, :3]))
    torch.testing.assert_close(ours(x, (context, mask)), short, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="text is needed"):
        ours(x)
