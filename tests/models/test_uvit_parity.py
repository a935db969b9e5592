"""Our U-ViT against U-ViT as it was published, written here in plain PyTorch from its description.

"All are Worth Words" (Bao et al. 2022), section 3 and Figures 1 and 2: everything is a token, the
time's and the label's in front; pre-norm blocks without bias in q, k and v; a long skip is
concatenated and projected before the block; Linear to pixels, then a 3x3 convolution.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from builders import make_iuvit, randomize
from torch import Tensor

UVIT = {"ffn": "mlp", "head": "linear_first", "time_mlp": False, "head_dim": 16, "layers": 5}


class PublishedUViT:
    """The published network on the weights of ours, by their names."""

    def __init__(self, weights: dict[str, Tensor], *, patch: int, heads: int, blocks: int) -> None:
        self.w, self.patch, self.heads, self.blocks = weights, patch, heads, blocks

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attention(self, x: Tensor, name: str) -> Tensor:
        B, L, D = x.shape
        d = D // self.heads
        q, k, v = self.linear(x, f"{name}.qkv").view(B, L, 3, self.heads, d).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * d**-0.5).softmax(dim=-1)
        return self.linear((scores @ v).transpose(1, 2).reshape(B, L, D), f"{name}.proj")

    def block(self, x: Tensor, name: str, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.linear(torch.cat([x, skip], dim=-1), f"{name}.skip_linear")
        x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn")
        h = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.ffn.fc1")
        return x + self.linear(F.gelu(h), f"{name}.ffn.fc2")

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        B, C, H, W = x.shape
        p = self.patch
        patches = F.unfold(x, p, stride=p).transpose(1, 2)
        weight = self.w["patch_embed.proj.weight"].flatten(1)
        tokens = F.linear(patches, weight, self.w["patch_embed.proj.bias"])
        D = tokens.shape[2]
        frequencies = torch.exp(-math.log(10000) * torch.arange(D // 2) / (D // 2))
        angles = t[:, None] * frequencies
        extras = [torch.cat([angles.cos(), angles.sin()], dim=1)[:, None]]
        if y is not None:
            extras.insert(0, self.w["label.weight"][y][:, None])
        h = torch.cat([*extras, tokens], dim=1) + self.w["positions.table"]
        skips = []
        for i in range(self.blocks):
            h = self.block(h, f"in_blocks.{i}")
            skips.append(h)
        h = self.block(h, "mid_block")
        for i in range(self.blocks):
            h = self.block(h, f"out_blocks.{i}", skips.pop())
        h = self.linear(self.norm(h, "head.norm"), "head.linear")[:, len(extras) :]
        h = h.view(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return F.conv2d(h, self.w["head.conv.weight"], self.w["head.conv.bias"], padding=1)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_outputs_and_gradients_are_those_of_the_published_network(num_classes):
    model = randomize(make_iuvit(image_size=(16, 24), num_classes=num_classes, **UVIT))
    model.requires_grad_()
    weights = dict(model.named_parameters())
    published = PublishedUViT(weights, patch=4, heads=4, blocks=2)
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 24, requires_grad=True)
    t = torch.tensor([0.0, 17.5, 999.0])
    y = None if num_classes is None else torch.tensor([3, 9, 10])
    mine, theirs = model(x, t, y=y), published(x, t, y)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    dy = torch.randn_like(mine)
    wanted = [x, *weights.values()]
    got, true = (torch.autograd.grad(out, wanted, dy) for out in (mine, theirs))
    for name, a, b in zip(["x", *weights], got, true, strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < 1e-5, f"{name}: {error:.2g}"
