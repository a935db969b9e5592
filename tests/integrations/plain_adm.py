"""ADM's U-Net, and hana's with text, as papers and checkpoints describe them, in plain PyTorch.

Nothing of fastdiff. Only what their text-free and text-to-image models use: scale-shift norms,
residual re-sampling, hana's keys and values of the text beside the image's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResBlock(nn.Module):
    def __init__(self, channels: int, emb: int, out: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def change(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.change(act(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.change(x)) + self.out_layers[3](h)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head: int, legacy: bool, text: int | None) -> None:
        super().__init__()
        self.head, self.legacy = head, legacy
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        if text is not None:
            self.encoder_kv = nn.Conv1d(text, 2 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def split(self, rows: Tensor, parts: int, head: int) -> list[Tensor]:
        """The rows (B, parts C, L) of one head, for each part."""
        d, heads = self.head, rows.shape[1] // (parts * self.head)
        starts = [
            (head * parts + part) * d if self.legacy else (part * heads + head) * d
            for part in range(parts)
        ]
        return [rows[:, start : start + d] for start in starts]

    def forward(self, x: Tensor, text: Tensor | None) -> Tensor:
        tokens = x.flatten(2)
        rows = self.qkv(self.norm(tokens))
        results = []
        for head in range(x.shape[1] // self.head):
            q, k, v = self.split(rows, 3, head)
            if text is not None:
                text_k, text_v = self.split(self.encoder_kv(text), 2, head)
                k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
            weights = (q.mT @ k / math.sqrt(self.head)).softmax(2)
            results.append(v @ weights.mT)
        return (tokens + self.proj_out(torch.cat(results, dim=1))).view_as(x)


class UNetModel(nn.Module):
    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        channel_mult: tuple[float, ...],
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        assert use_scale_shift_norm
        assert resblock_updown
        self.width, self.text_width, emb = model_channels, text_width, 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        if text_width is not None:
            self.final_ln = nn.LayerNorm(text_width)
            self.transformer_proj = nn.Linear(text_width, emb)
            self.time_to_half = nn.Linear(emb, emb // 2)
            self.clip_to_half = nn.Linear(emb, emb // 2)
            self.clip_embed_proj = nn.Linear(7, emb)  # in the checkpoint, never read

        def attention(channels: int, rate: int) -> list[nn.Module]:
            legacy = not use_new_attention_order
            if rate not in attention_resolutions:
                return []
            return [AttentionBlock(channels, width(channels), legacy, text_width)]

        def width(channels: int) -> int:
            return channels // num_heads if num_head_channels == -1 else num_head_channels

        widths = [int(model_channels * multiplier) for multiplier in channel_mult]
        ch, rate = widths[0], 1
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([nn.Conv2d(in_channels, ch, 3, padding=1)])]
        )
        kept = [ch]
        for level, out in enumerate(widths):
            for _ in range(num_res_blocks):
                block = [ResBlock(ch, emb, out), *attention(out, rate)]
                self.input_blocks.append(nn.ModuleList(block))
                ch = out
                kept.append(ch)
            if level + 1 < len(widths):
                self.input_blocks.append(nn.ModuleList([ResBlock(ch, emb, ch, "down")]))
                kept.append(ch)
                rate *= 2
        legacy = not use_new_attention_order
        self.middle_block = nn.ModuleList(
            [
                ResBlock(ch, emb, ch),
                AttentionBlock(ch, width(ch), legacy, text_width),
                ResBlock(ch, emb, ch),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for index in range(num_res_blocks + 1):
                block = [ResBlock(ch + kept.pop(), emb, out), *attention(out, rate)]
                ch = out
                if level and index == num_res_blocks:
                    block.append(ResBlock(ch, emb, ch, "up"))
                    rate //= 2
                self.output_blocks.append(nn.ModuleList(block))
        self.out = nn.Sequential(
            nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1)
        )

    def run(self, block: nn.Module, h: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
        for layer in block.children():
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, AttentionBlock):
                h = layer(h, text)
            else:
                h = layer(h)
        return h

    def forward(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        half = self.width // 2
        angles = timesteps[:, None].float() * 10000 ** (-torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        if text is not None:
            text = self.final_ln(text)
            pooled = self.transformer_proj(text.mean(1))
            emb = torch.cat([self.time_to_half(emb), self.clip_to_half(pooled)], dim=1)
            text = text.mT
        kept, h = [], x
        for block in self.input_blocks:
            h = self.run(block, h, emb, text)
            kept.append(h)
        h = self.run(self.middle_block, h, emb, text)
        for block in self.output_blocks:
            h = self.run(block, torch.cat([h, kept.pop()], dim=1), emb, text)
        return self.out(h)
