"""IU-ViT: U-ViT with DWConv-FFN and the Rearrange-first head (section 3.2, Figures 4 and 8, B.1).

Letters: B batch, C channels, H W pixels, p patch size, h w = H/p W/p, D width, L tokens,
S text positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.models.backbone import (
    Backbone,
    BackboneConfig,
    check_choice,
    check_positive,
)
from fastdiff.nn import (
    FFN,
    HEADS,
    MHCA,
    MHSA,
    Checkpointed,
    FusedAttention,
    LabelEmbedding,
    LayerNorm,
    PatchEmbed,
    PositionEmbedding,
    SinusoidEmbedding,
    SkipLinear,
    Text,
    TextCondition,
    TimeEmbedding,
)


@dataclass(frozen=True, kw_only=True)
class IUViTConfig(BackboneConfig):
    """Configuration of IU-ViT.

    Args:
        image_size: Pixels of a side, or (H, W).
        patch_size: p, divides both sides.
        in_channels: Channels of the image.
        out_channels: Channels of the prediction; None = `in_channels`.
        learn_variance: Predict the variance too: as many channels again, behind the prediction.
        dim: D.
        layers: Transformer blocks in all, odd: (layers - 1) / 2 in, one in the middle, as many out.
        head_dim: Width of an attention head.
        ffn: "dwconv" | "mlp" (Table 3).
        head: "rearrange_first" | "linear_first" (Table 3).
        time_mlp: Two D x D Linears after the sinusoid. A reading, pinned by the published counts;
            U-ViT's published configurations have none.
        context_dim: Width of the text encoder, None without text.
        text_attention: "separate" | "fused": cross-attention after self-attention, or keys and
            values of the text beside the image's in one attention (Figure 10).
        num_classes: Number of labels, None without labels.
        resize_positions: Interpolate position embeddings for other image sizes.
        init_std: Deviation of the truncated normal that Linears start from. U-ViT's 0.02 suits D
            of 512 and more; a narrow model learns sooner from about 1/sqrt(D).
        position_std: The same for position embeddings. 0.02 in U-ViT, where it takes thousands of
            steps until they count beside the patches; about 1 tells places apart from the start.
    """

    patch_size: int = 2
    dim: int = 512
    layers: int = 13
    head_dim: int = 64
    ffn: str = "dwconv"
    head: str = "rearrange_first"
    time_mlp: bool = True
    text_attention: str = "separate"
    resize_positions: bool = False
    init_std: float = 0.02
    position_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("IUViTConfig", self, ("patch_size", "dim", "layers", "head_dim"))
        for side in self.sides:
            if side % self.patch_size:
                raise ValueError(
                    f"IUViTConfig: patch_size={self.patch_size} does not divide image side {side}"
                )
        if self.layers % 2 == 0:
            raise ValueError(f"IUViTConfig: layers={self.layers}, expected an odd number")
        if self.dim % self.head_dim:
            raise ValueError(
                f"IUViTConfig: head_dim={self.head_dim} does not divide dim={self.dim}"
            )
        if self.head == "rearrange_first" and self.dim % self.patch_size**2:
            raise ValueError(
                f"IUViTConfig: patch_size^2={self.patch_size**2} does not divide dim={self.dim}, "
                "which the Rearrange-first head needs"
            )
        check_choice("IUViTConfig", "ffn", self.ffn, FFN)
        check_choice("IUViTConfig", "head", self.head, HEADS)
        check_choice("IUViTConfig", "text_attention", self.text_attention, TEXT_BLOCKS)

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return self.patch_size


class Block(Checkpointed):
    """Pre-norm transformer block: MHSA, FFN (Figure 8).

    Args:
        config: The model's.
        long_skip: Take the twin's features: Linear 2D -> D on their concatenation, before the
            block (U-ViT's order).
    """

    def __init__(self, config: IUViTConfig, *, long_skip: bool = False) -> None:
        super().__init__()
        dim = config.dim
        self.skip_linear: nn.Module = SkipLinear(2 * dim, dim) if long_skip else nn.Identity()
        self.norm1 = LayerNorm(dim)
        self.make_attention(config)
        self.norm2 = LayerNorm(dim)
        self.ffn = FFN[config.ffn](dim)

    def make_attention(self, config: IUViTConfig) -> None:
        """The layers of `attend` behind its first norm."""
        self.attn = MHSA(config.dim, head_dim=config.head_dim)

    def attend(self, x: Tensor, text: Text | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D): the attention's branch, to be added, and the stream it is added to."""
        h, _ = self.norm1(x)
        return self.attn(h), x

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        prefix: int,
        text: Text | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """x, skip (B, L, D); text = context (B, S, width), mask (B, S). Returns (B, L, D)."""
        if skip is not None:
            x = self.skip_linear(x, skip)
        h, x = self.attend(x, text)
        h, x = self.norm2(h, residual=x)
        return x + self.ffn(h, grid, prefix)


class CrossBlock(Block):
    """MHSA, then MHCA to the text, then FFN: each modality's attention apart (section 3.2)."""

    def make_attention(self, config: IUViTConfig) -> None:
        """The layers of `attend` behind its first norm."""
        assert config.context_dim is not None
        super().make_attention(config)
        self.norm_cross = LayerNorm(config.dim)
        self.cross = MHCA(config.dim, config.context_dim, head_dim=config.head_dim)

    def attend(self, x: Tensor, text: Text | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D): the cross-attention's branch, and the stream with self-attention in it."""
        assert text is not None
        h, x = super().attend(x, text)
        h, x = self.norm_cross(h, residual=x)
        return self.cross(h, *text), x


class FusedBlock(Block):
    """One attention over image and text, then FFN: what the paper argues against (Figure 10)."""

    def make_attention(self, config: IUViTConfig) -> None:
        """The layers of `attend` behind its first norm."""
        assert config.context_dim is not None
        self.attn = FusedAttention(config.dim, config.context_dim, head_dim=config.head_dim)

    def attend(self, x: Tensor, text: Text | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D): the attention's branch, to be added, and the stream it is added to."""
        assert text is not None
        h, _ = self.norm1(x)
        return self.attn(h, *text), x


TEXT_BLOCKS = {"separate": CrossBlock, "fused": FusedBlock}


def block_class(config: IUViTConfig) -> type[Block]:
    """The block of a configuration."""
    return Block if config.context_dim is None else TEXT_BLOCKS[config.text_attention]


class TimeTextLinear(nn.Linear):
    """Time and pooled text side by side, and one Linear.

    Args:
        dim: D.
        context_dim: Width of the pooled text.

    Source: B.1 ("concatenated with timestep embedding"); a reading, pinned by the published count.
    """

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__(dim + context_dim, dim)

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:  # type: ignore[override]
        """time (B, D), pooled (B, width), to (B, D)."""
        return super().forward(torch.cat([time, pooled.to(time.dtype)], dim=1))


class IUViT(Backbone):
    """The improved U-ViT.

    Everything is a token: one for the time (and one for the label) in front of the patches. Text
    enters by cross-attention in every block and, pooled, beside the time embedding.

    Source: section 3.2; U-ViT for the skeleton; PAPER.md for what the paper leaves open.
    """

    Config = IUViTConfig

    def __init__(self, config: IUViTConfig) -> None:
        super().__init__(config)
        dim = config.dim
        grid = (config.sides[0] // config.patch_size, config.sides[1] // config.patch_size)
        self.prefix = 1 if config.num_classes is None else 2

        self.patch_embed = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time: TimeEmbedding | SinusoidEmbedding
        self.time = TimeEmbedding(dim, dim) if config.time_mlp else SinusoidEmbedding(dim)
        self.label = None
        if config.num_classes is not None:
            self.label = LabelEmbedding(config.num_classes, dim)
        self.text, self.time_text = None, None
        if config.context_dim is not None:
            self.text = TextCondition(config.context_dim)
            self.time_text = TimeTextLinear(dim, config.context_dim)
        self.positions = PositionEmbedding(self.prefix, grid, dim, std=config.position_std)
        half = config.layers // 2
        block = block_class(config)
        self.in_blocks = nn.ModuleList(block(config) for _ in range(half))
        self.mid_block = block(config)
        self.out_blocks = nn.ModuleList(block(config, long_skip=True) for _ in range(half))
        self.head = HEADS[config.head](dim, config.patch_size, config.predicted_channels)
        self.apply(self._init_linear)

    def _init_linear(self, module: nn.Module) -> None:
        # convolutions keep PyTorch's initialisation, as in U-ViT
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def denoise(self, x: Tensor, emb: Tensor, label: Tensor | None, text: Text | None) -> Tensor:
        """x (B, C, H, W), emb and label (B, D), to (B, out_channels, H, W)."""
        _, _, height, width = x.shape
        if (height, width) != self.config.sides and not self.config.resize_positions:
            sides = "x".join(map(str, self.config.sides))
            raise ValueError(
                f"IUViT: image is {height}x{width}, the model has positions for {sides}; create it "
                "with resize_positions=True to interpolate them"
            )
        grid = (height // self.config.patch_size, width // self.config.patch_size)
        tokens = self.patch_embed(x)
        extra = [emb] if label is None else [label, emb]
        front = [token.unsqueeze(1).to(tokens.dtype) for token in extra]
        h = torch.cat([*front, tokens], dim=1) + self.positions(grid)

        skips = []
        for block in self.in_blocks:
            h = block(h, grid, self.prefix, text)
            skips.append(h)
        h = self.mid_block(h, grid, self.prefix, text)
        for block in self.out_blocks:
            h = block(h, grid, self.prefix, text, skips.pop())
        return self.head(h, grid, self.prefix)
