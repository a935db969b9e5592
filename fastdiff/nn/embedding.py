"""Embeddings of time step, patches, positions, labels and text.

Letters: B batch, C channels, H W pixels, h w patches, p patch size, D width, L tokens,
S text positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def as_timesteps(t: int | float | Tensor, batch: int, device: torch.device) -> Tensor:
    """Bring a time step in any of the accepted forms to a float32 vector.

    Args:
        t: Time in steps, 0..999; int, float, or tensor of shape (), (1,) or (B,), integer or
            floating (fractions allowed, as continuous-time samplers send them).
        batch: B.
        device: Where the result lives.

    Returns:
        (B,) float32.

    Raises:
        ValueError: The shape is none of the accepted ones.
    """
    steps = torch.as_tensor(t, device=device).to(torch.float32)
    # not `in (1, batch)`: torch.compile answers that wrongly where one of the two is symbolic
    if steps.ndim > 1 or (steps.ndim == 1 and steps.shape[0] != 1 and steps.shape[0] != batch):
        raise ValueError(
            f"model: t has shape {tuple(steps.shape)}, expected (), (1,) or ({batch},) for a "
            f"batch of {batch}"
        )
    return steps.expand(batch)


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the time step, cosines first.

    emb[i] = cos(t w_i), emb[dim/2 + i] = sin(t w_i), w_i = max_period^(-i / (dim/2))

    Args:
        t: (B,) float32, in steps 0..999.
        dim: Width of the result, even.
        max_period: Longest wave length over 2 pi, in steps.

    Returns:
        (B, dim) float32.

    Raises:
        ValueError: `dim` is odd.

    Source: DDPM's code, in the order that ADM and U-ViT share.
    """
    if dim % 2:
        raise ValueError(f"timestep_embedding: dim={dim} is odd, expected an even width")
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(steps * (-math.log(max_period) / half))
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoid of the time step, then Linear, SiLU, Linear.

    Args:
        dim: Width of the sinusoid.
        hidden: Width of both Linears' outputs.

    Source: ADM (4 ch wide); for IU-ViT the paper is silent, and two D x D Linears are the reading
    that its published parameter counts pin.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) float32 steps to (B, hidden)."""
        emb = timestep_embedding(t, self.dim).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(emb)))


class SinusoidEmbedding(nn.Module):
    """The bare sinusoid, as every published U-ViT configuration has it.

    Args:
        dim: Width.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """(B,) float32 steps to (B, dim) float32."""
        return timestep_embedding(t, self.dim)


class PatchEmbed(nn.Module):
    """Image to tokens by a convolution with kernel = stride = p.

    Args:
        in_channels: C.
        dim: D.
        patch_size: p, in pixels.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, (H/p)(W/p), D), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class PositionEmbedding(nn.Module):
    """One learned vector per token, extra tokens first.

    Args:
        prefix: Number of tokens in front that are not patches.
        grid: (h, w) of the patches.
        dim: D.
        std: Deviation of the truncated normal it starts from.
    """

    def __init__(self, prefix: int, grid: tuple[int, int], dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.prefix, self.grid = prefix, grid
        self.table = nn.Parameter(torch.empty(1, prefix + grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.table, std=std)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(1, prefix + h w, D) for a grid of patches, interpolated bicubically for another one."""
        if grid == self.grid:
            return self.table
        extra, patches = self.table[:, : self.prefix], self.table[:, self.prefix :]
        patches = patches.transpose(1, 2).unflatten(2, self.grid)
        patches = F.interpolate(patches.float(), size=grid, mode="bicubic", antialias=True)
        return torch.cat([extra, patches.to(extra.dtype).flatten(2).transpose(1, 2)], dim=1)


class LabelEmbedding(nn.Embedding):
    """Class label to a vector, with one more row for "no label".

    Args:
        num_classes: Number of labels; label `num_classes` is the null label.
        dim: Width.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes + 1, dim)
        self.num_classes = num_classes
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, y: Tensor | None, batch: int = 1) -> Tensor:
        """(B,) int64 in 0..num_classes to (B, dim); None is the null label for all."""
        if y is None:
            y = torch.full((batch,), self.num_classes, device=self.weight.device)
        # on a GPU the look would cost a synchronisation; the kernel itself refuses there
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > self.num_classes:
                raise ValueError(
                    f"model: y lies in {low}..{high}, expected labels 0..{self.num_classes - 1}, "
                    f"or {self.num_classes} for no label"
                )
        return super().forward(y)


class TextCondition(nn.Module):
    """Text features with a learned null condition, and their pooled vector.

    A row whose mask is all False has no text: `null_context` takes its first position, alone
    valid, and `null_pooled` is its pooled vector. So dropping a condition at training and leaving
    it out at sampling are the same tensors, and attention never meets a row without a key.

    Args:
        width: Width of the text encoder (1024 for t5-11b, 4096 for t5-v1_1-xxl).
        norm: LayerNorm of the features first, as the authors' text-to-image U-Net has it; not of
            the null condition, nor of a `pooled` that is given.

    Source: PAPER.md, section 3.2 and B.1 (pooled text as the mean over valid positions).
    """

    def __init__(self, width: int, *, norm: bool = False) -> None:
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.null_context = nn.Parameter(torch.empty(1, width))
        self.null_pooled = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.null_context, std=0.02)
        nn.init.trunc_normal_(self.null_pooled, std=0.02)

    def forward(
        self, context: Tensor | None, mask: Tensor | None, pooled: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fill in the null condition where there is no text.

        Args:
            context: (B, S, width), or None: no row has text.
            mask: (B, S) bool, True = valid; None = all valid. A row of False = no text.
            pooled: (B, width), or None = mean of the valid positions.
            batch: B.

        Returns:
            context (B, S, width), mask (B, S) with no row all False, pooled (B, width).

        Raises:
            ValueError: Shapes or the mask's dtype do not fit.
        """
        null_context, null_pooled = self.null_context, self.null_pooled
        if context is None:
            context = null_context.expand(batch, 1, self.width)
            mask = torch.ones(batch, 1, dtype=torch.bool, device=context.device)
            return context, mask, null_pooled.expand(batch, self.width)
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != self.width:
            raise ValueError(
                f"model: context has shape {tuple(context.shape)}, expected "
                f"({batch}, S, {self.width}): batch {batch} and text width {self.width}"
            )
        context = self.norm(context.to(null_context.dtype))
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        if mask.shape != context.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"model: context_mask is {mask.dtype} of shape {tuple(mask.shape)}, expected "
                f"torch.bool of shape {tuple(context.shape[:2])}"
            )
        if pooled is None:
            weight = mask.to(context.dtype).unsqueeze(2)
            pooled = (context * weight).sum(1) / weight.sum(1).clamp(min=1)
        elif pooled.shape != (batch, self.width):
            raise ValueError(
                f"model: pooled has shape {tuple(pooled.shape)}, expected ({batch}, {self.width})"
            )
        has_text = mask.any(1, keepdim=True)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        is_null = ~has_text & first
        context = torch.where(is_null.unsqueeze(2), null_context, context)
        pooled = torch.where(has_text, pooled.to(null_pooled.dtype), null_pooled)
        return context, mask | is_null, pooled
