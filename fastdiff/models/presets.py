"""The models of the paper and its baselines by name: Tables 1 to 6 and the figures.

What training them takes (schedule, rates, batch) is in `fastdiff.recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastdiff.models.ascend import ASCENDConfig
from fastdiff.models.iuvit import IUViTConfig
from fastdiff.models.unet import UNetConfig

Config = IUViTConfig | ASCENDConfig | UNetConfig


@dataclass(frozen=True)
class Preset:
    """A named configuration and where in the paper it stands.

    Args:
        config: The model's configuration.
        source: Table or figure.
        published: The paper's own parameter count, "-" where it gives none.
        parameters: Count in millions that this reading gives (PAPER.md).
    """

    config: Config
    source: str
    published: str
    parameters: float


# IU-ViT and U-ViT: Tables 3 and 5, Figures 9 and 10.

_CIFAR10 = IUViTConfig(image_size=32, patch_size=2, dim=512, layers=13)
_CELEBA64 = replace(_CIFAR10, image_size=64, patch_size=4)
_CHURCH256 = IUViTConfig(image_size=256, patch_size=16, dim=1536, layers=17)
_CC12M64 = IUViTConfig(image_size=64, patch_size=4, dim=1024, layers=17, context_dim=1024)
# The paper does not state Figure 10's model. Reading: Table 5's at 64x64, with as many tokens.
_T2I128 = replace(_CC12M64, image_size=128, patch_size=8)


def _uvit(config: IUViTConfig) -> IUViTConfig:
    """Both switches of Table 3 off, and no time MLP: U-ViT as it was published."""
    return replace(config, ffn="mlp", head="linear_first", time_mlp=False)


_IUVIT = {
    "iuvit_cifar10": Preset(_CIFAR10, "Table 5", "45M", 45.04),
    "iuvit_celeba64": Preset(_CELEBA64, "Table 5", "45M", 45.06),
    "iuvit_celeba128": Preset(
        IUViTConfig(image_size=128, patch_size=8, dim=1408, layers=17), "Table 5", "442M", 441.95
    ),
    "iuvit_church256": Preset(_CHURCH256, "Table 5", "527M", 526.66),
    "iuvit_church256_wide": Preset(replace(_CHURCH256, dim=2048), "Figure 9b", "935M", 935.00),
    "iuvit_church256_p8": Preset(replace(_CHURCH256, patch_size=8), "Figure 9c", "-", 526.96),
    "iuvit_cc12m64": Preset(_CC12M64, "Table 5", "307M", 307.44),
    "iuvit_t2i128": Preset(_T2I128, "Figure 10, top", "-", 307.58),
    "iuvit_t2i128_fused": Preset(
        replace(_T2I128, text_attention="fused"), "Figure 10, bottom", "-", 271.88
    ),
    # One improvement of two. Reading: the time MLP stays, as in the model with both.
    "iuvit_cifar10_mlp": Preset(
        replace(_CIFAR10, ffn="mlp"), "Table 3, Rearrange-first alone", "-", 44.78
    ),
    "iuvit_cifar10_linear_first": Preset(
        replace(_CIFAR10, head="linear_first"), "Table 3, DWConv-FFN alone", "-", 45.05
    ),
    "uvit_s2_cifar10": Preset(_uvit(_CIFAR10), "Tables 1 and 3, U-ViT", "44M", 44.26),
    "uvit_s4_celeba64": Preset(_uvit(_CELEBA64), "Table 2, U-ViT", "44M", 44.29),
}

# ASCEND: Tables 4 and 6, Figure 21.

_A32 = ASCENDConfig(
    image_size=32,
    channels=128,
    depth=3,
    multipliers=(1, 2, 2, 2),
    attention_resolutions=(16, 8),
    dropout=0.1,
)
_A64 = ASCENDConfig(
    image_size=64,
    channels=192,
    depth=2,
    multipliers=(1, 2, 3, 4),
    attention_resolutions=(32, 16, 8),
    dropout=0.1,
)
_A256 = ASCENDConfig(
    image_size=256,
    channels=256,
    depth=2,
    multipliers=(1, 1, 2, 2, 3, 4),
    attention_resolutions=(32, 16, 8),
)
_AT2I = ASCENDConfig(
    image_size=128,
    channels=192,
    depth=3,
    multipliers=(1, 2, 3, 4, 4),
    attention_resolutions=(64, 32, 16, 8),
    context_dim=1024,
)

_ASCEND = {
    "ascend_cifar10": Preset(_A32, "Table 6", "-", 69.11),
    "ascend_celeba64": Preset(_A64, "Table 6", "-", 281.8),
    "ascend_256": Preset(_A256, "Table 6", "-", 562.6),
    # Reading: one more level of width 1 in front.
    "ascend_512": Preset(
        replace(_A256, image_size=512, multipliers=(1, *_A256.multipliers)), "Figure 21", "-", 576.7
    ),
    "ascend_t2i_128": Preset(_AT2I, "Table 6", "~590M", 591.6),
    # Reading: ADM with Swin for attention in the encoder, and text on both sides.
    "ascend_t2i_128_res_swin": Preset(
        replace(_AT2I, encoder="res_swin", decoder_text=True),
        "Table 6, other reading",
        "~590M",
        593.5,
    ),
    "ascend_cifar10_patchmerge": Preset(
        replace(_A32, downsample="patch_merging", upsample="patch_expanding"), "Table 4", "-", 62.84
    ),
    "ascend_cifar10_reduced_skips": Preset(replace(_A32, skips="reduced"), "Table 4", "-", 62.40),
    "ascend_cifar10_swin_decoder": Preset(replace(_A32, decoder="swin"), "Table 4", "-", 76.43),
    "ascend_cifar10_conv_encoder_swin_decoder": Preset(
        replace(_A32, encoder="conv", decoder="swin"), "Table 4", "-", 64.41
    ),
}

# U-Nets: what Figures 6 and 7 compare with.


def _unet(config: ASCENDConfig) -> UNetConfig:
    """ADM's U-Net at the widths of an ASCEND."""
    return UNetConfig(
        image_size=config.image_size,
        channels=config.channels,
        depth=config.depth,
        multipliers=config.multipliers,
        attention_resolutions=config.attention_resolutions,
        dropout=config.dropout,
        context_dim=config.context_dim,
    )


_UNET = {
    "unet_cifar10": Preset(_unet(_A32), "ADM at Table 6's widths", "-", 57.1),
    "unet_64": Preset(_unet(_A64), "ADM at Table 6's widths", "-", 228.6),
    "unet_256": Preset(_unet(_A256), "Figures 6 and 15, U-Net", "-", 469.6),
    # The authors' text-to-image code at its small size.
    "unet_t2i_64": Preset(
        replace(_unet(_A64), depth=3, context_dim=1024), "Figures 7 and 16, U-Net", "~300M", 323.5
    ),
    "unet_t2i_128": Preset(_unet(_AT2I), "ADM at Table 6's widths", "-", 481.3),
}

PRESETS: dict[str, Preset] = {**_IUVIT, **_ASCEND, **_UNET}
