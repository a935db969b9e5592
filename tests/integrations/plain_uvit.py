"""U-ViT as its paper and its checkpoints describe it, in plain PyTorch; nothing of fastdiff."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        results = []
        for head in range(self.heads):
            width = x.shape[2] // self.heads
            of = slice(head * width, (head + 1) * width)
            weights = (q[..., of] @ k[..., of].mT / math.sqrt(width)).softmax(2)
            results.append(weights @ v[..., of])
        return self.proj(torch.cat(results, dim=2))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)


class UViT(nn.Module):
    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int = -1,
        conv: bool = True,
    ) -> None:
        super().__init__()
        self.patch, self.channels, self.dim = patch_size, in_chans, embed_dim
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.extras = 1
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
            self.extras = 2
        tokens = self.extras + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        half = range(depth // 2)
        self.in_blocks = nn.ModuleList(Block(embed_dim, num_heads, False) for _ in half)
        self.mid_block = Block(embed_dim, num_heads, False)
        self.out_blocks = nn.ModuleList(Block(embed_dim, num_heads, True) for _ in half)
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        batch, channels, _, width = x.shape
        p = self.patch
        rates = 10000 ** (-torch.arange(self.dim // 2) / (self.dim // 2))
        angles = timesteps[:, None].float() * rates
        tokens = [torch.cat([angles.cos(), angles.sin()], dim=1)[:, None]]
        if self.extras == 2:
            tokens.insert(0, self.label_emb(y)[:, None])
        # patches row by row
        tokens.append(self.patch_embed.proj(x).reshape(batch, self.dim, -1).mT)
        h = torch.cat(tokens, dim=1) + self.pos_embed
        kept = []
        for block in self.in_blocks:
            h = block(h)
            kept.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, kept.pop())
        h = self.decoder_pred(self.norm(h))[:, self.extras :]
        image = torch.zeros_like(x)
        for n in range(h.shape[1]):
            top, left = p * (n // (width // p)), p * (n % (width // p))
            patch = h[:, n].reshape(batch, p, p, channels).permute(0, 3, 1, 2)
            image[:, :, top : top + p, left : left + p] = patch
        return self.final_layer(image)
