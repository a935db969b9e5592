"""The classifier of noised pictures that classifier guidance follows: ADM's encoder half.

Letters: B batch, C channels, H W pixels, E width of the embedding, K labels.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from fastdiff.models.backbone import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Backbone,
    check_image,
    load_weights,
)
from fastdiff.models.encoders import AttentionMiddle, Encoder
from fastdiff.models.hierarchical import HierarchicalConfig
from fastdiff.nn import GroupNormSiLU, TimeEmbedding, as_timesteps
from fastdiff.nn.attention import attention


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(HierarchicalConfig):
    """Configuration of the classifier; the defaults are those of ADM's code.

    Args:
        image_size: Pixels of a side, or (H, W); pictures of another size are refused.
        in_channels, channels, depth, multipliers, attention_resolutions, head_dim, dropout, groups:
            as in `UNetConfig`. ADM's multipliers: 1,2,3,4 for 64, 1,1,2,3,4 for 128 and
            1,1,2,2,4,4 for 256 pixels; its published 64x64 classifier has depth 4.
        num_classes: K.
    """

    image_size: int | tuple[int, int] = 64
    depth: int = 2
    multipliers: tuple[float, ...] = (1, 2, 3, 4)
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    num_classes: int | None = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_classes is None:
            raise ValueError("ClassifierConfig: num_classes=None, expected a whole number >= 1")
        if self.context_dim is not None or self.out_channels is not None or self.learn_variance:
            raise ValueError(
                "ClassifierConfig: context_dim, out_channels and learn_variance are of models that "
                "denoise; a classifier has none"
            )


class AttentionPool(nn.Module):
    """A map to one vector: attention of the mean of all pixels to the pixels and to itself.

    Args:
        channels: C.
        sides: (H, W) of the map; each pixel and the mean have a learned position.
        out_channels: Width of the output.
        head_dim: Width of a head.

    Raises:
        ValueError: `head_dim` does not divide `channels`.

    Source: ADM's `AttentionPool2d`, which is CLIP's.
    """

    def __init__(
        self, channels: int, sides: tuple[int, int], out_channels: int, *, head_dim: int = 64
    ) -> None:
        super().__init__()
        if channels % head_dim:
            raise ValueError(
                f"AttentionPool: head_dim={head_dim} does not divide channels={channels}"
            )
        self.heads = channels // head_dim
        places = sides[0] * sides[1] + 1
        self.position = nn.Parameter(torch.randn(places, channels) / channels**0.5)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, out_channels)."""
        pixels = rearrange(x, "b c h w -> b (h w) c")
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.position
        q = rearrange(self.q(tokens[:, :1]), "b l (n d) -> b l n d", n=self.heads)
        k, v = rearrange(self.kv(tokens), "b l (two n d) -> two b l n d", two=2, n=self.heads)
        return self.proj(attention(q, k, v, implementation="sdpa").flatten(1))


class NoisyClassifier(Backbone):
    """log p(y | x_t) up to a constant: the encoder and the middle of ADM's U-Net, and a pool.

    It shares a backbone's saving, settings and configuration, and is none: it gives logits. Train
    it with `train/classifier.py`; `fastdiff.diffusion.classifier_guided` follows it.

    Source: Dhariwal and Nichol 2021, section 4.3 and its code's `EncoderUNetModel` with
        `pool="attention"`.
    """

    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        assert config.num_classes is not None, "the config refuses it"
        width, below = config.level_channels[-1], len(config.multipliers) - 1
        self.time = TimeEmbedding(config.channels, config.emb_dim)
        self.encoder = Encoder(config)
        self.middle = AttentionMiddle(config)
        self.norm_out = GroupNormSiLU(width, groups=config.groups)
        height, wide = (side >> below for side in config.sides)
        self.pool = AttentionPool(
            width, (height, wide), config.num_classes, head_dim=config.head_dim
        )

    def forward(self, x: Tensor, t: int | float | Tensor) -> Tensor:  # type: ignore[override]
        """Logits of noised pictures.

        Args:
            x: (B, C, H, W) of the configuration's size, image in [-1, 1] plus noise.
            t: Time in steps 0..999; int, float, or tensor of shape (), (1,) or (B,).

        Returns:
            (B, num_classes), dtype of x.

        Raises:
            ValueError: x has another shape.
        """
        check_image("NoisyClassifier", x, self.config.in_channels, self.config.multiple)
        if tuple(x.shape[2:]) != self.config.sides:
            raise ValueError(
                f"NoisyClassifier: image {tuple(x.shape[2:])}, expected {self.config.sides}: its "
                "pool has a place for each pixel"
            )
        emb = self.time(as_timesteps(t, x.shape[0], x.device)).to(self.dtype)
        h = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        h = self.middle(self.encoder(h, emb, None)[-1], emb, None)
        return self.pool(self.norm_out(h)).to(x.dtype)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> NoisyClassifier:
        """Build the classifier that `save_pretrained` wrote, in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Another model, an unknown field, or weights that do not fit.
        """
        path = Path(folder)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).is_file():
                raise FileNotFoundError(f"NoisyClassifier: no {file} in {path}")
        values = json.loads((path / CONFIG_FILE).read_text())
        if (kind := values.pop("model", None)) != cls.__name__:
            raise ValueError(f"NoisyClassifier: {path} holds the model {kind!r}")
        model = cls.from_config(values)
        load_weights(model, path / WEIGHTS_FILE)
        return model.eval()


__all__ = ["AttentionPool", "ClassifierConfig", "NoisyClassifier"]
