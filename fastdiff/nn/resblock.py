"""ADM's residual block with its re-sampling forms.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn.attention import Text
from fastdiff.nn.checkpointed import Checkpointed
from fastdiff.nn.norms import GroupNormSiLU
from fastdiff.nn.skip import SkipConnection


class Downsample(nn.Module):
    """2x2 average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest-neighbour up-sampling by two."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(Checkpointed):
    """ADM's residual block.

    GN, SiLU, [re-sample], conv 3x3; GN * (1 + scale) + shift from SiLU and Linear of the embedding;
    SiLU, dropout, zero-initialised conv 3x3; plus the input, re-sampled alike, through a 1x1
    convolution where the width changes.

    Args:
        in_channels: Channels of the input.
        out_channels: C.
        emb_dim: E.
        skip_channels: Channels of a second input, read as if concatenated to the first.
        resample: "none" | "down" | "up" (BigGAN's: inside the residual and on the input).
        dropout: Rate before the last convolution.
        groups: Groups of the norms.

    Raises:
        ValueError: `resample` is none of the three or is asked for beside a second input, or
            `groups` does not divide the channels.

    Source: ADM's `ResBlock` with `use_scale_shift_norm` and `resblock_updown`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        skip_channels: int = 0,
        resample: str = "none",
        dropout: float = 0.0,
        groups: int = 32,
    ) -> None:
        super().__init__()
        kinds: dict[str, type[nn.Module]] = {
            "none": nn.Identity,
            "down": Downsample,
            "up": Upsample,
        }
        if resample not in kinds:
            raise ValueError(f"ResBlock: resample={resample!r}, expected one of {list(kinds)}")
        if skip_channels and resample != "none":
            raise ValueError(
                f"ResBlock: resample={resample!r} with skip_channels={skip_channels}, expected "
                "'none'"
            )
        total = in_channels + skip_channels
        self.resample = kinds[resample]()
        self.norm1 = GroupNormSiLU(total, groups=groups)
        self.conv1 = nn.Conv2d(total, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = GroupNormSiLU(out_channels, groups=groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.skip = (
            nn.Identity()
            if in_channels == out_channels and not skip_channels
            else SkipConnection(total, out_channels)
        )

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        text: Text | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, C1, H, W), channels_last.
            emb: (B, E).
            text: Not looked at: a ResBlock is called like any block of a backbone.
            skip: (B, C2, H, W) read behind x's channels as if concatenated.

        Returns:
            (B, C, H', W'), channels_last.
        """
        h = self.conv1(self.resample(self.norm1(x, skip=skip)))
        scale, shift = self.emb(F.silu(emb)).chunk(2, dim=1)
        h = self.conv2(self.dropout(self.norm2(h, scale=scale, shift=shift)))
        x = self.resample(x)
        return (self.skip(x) if skip is None else self.skip(x, skip)) + h
