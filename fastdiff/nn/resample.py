"""Swin's ways of halving and doubling a map, against which Table 4 holds the residual blocks.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from fastdiff.nn.attention import Text
from fastdiff.nn.checkpointed import Checkpointed
from fastdiff.nn.norms import LayerNorm


class PatchMerging(Checkpointed):
    """Four neighbours side by side, LayerNorm, Linear 4C -> C without bias.

    Swin's goes to 2C; here the next level's first block changes the width, as it does after the
    residual block whose place this takes (*reading*).

    Args:
        channels: C.

    Source: Swin Transformer; Table 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """x (B, C, H, W) to (B, C, H/2, W/2), channels_last; `emb` and `text` are not looked at."""
        h = rearrange(x, "b c (h p) (w q) -> b h w (q p c)", p=2, q=2)
        h, _ = self.norm(h)
        return self.reduction(h).permute(0, 3, 1, 2)


class PatchExpanding(Checkpointed):
    """Linear C -> 4C without bias, one quarter to each of four pixels, LayerNorm.

    Swin-Unet's goes from C to C/2; here the width stays, as it does in the residual block whose
    place this takes (*reading*).

    Args:
        channels: C.

    Source: Swinv2-Imagen after Swin-Unet; Table 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 4 * channels, bias=False)
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor, emb: Tensor, text: Text | None = None) -> Tensor:
        """x (B, C, H, W) to (B, C, 2H, 2W), channels_last; `emb` and `text` are not looked at."""
        h = self.expand(x.permute(0, 2, 3, 1))
        h = rearrange(h, "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
        h, _ = self.norm(h)
        return h.permute(0, 3, 1, 2)
