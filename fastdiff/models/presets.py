"""The models of the paper by name: Table 5 (IU-ViT), Table 6 (ASCEND), Figure 9b, and U-ViT.

What training them takes (schedule, rates, batch) is in `fastdiff.recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.models.ascend import ASCENDConfig
from fastdiff.models.iuvit import IUViTConfig

Config = IUViTConfig | ASCENDConfig


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


PRESETS: dict[str, Preset] = {
    "iuvit_cifar10": Preset(
        IUViTConfig(image_size=32, patch_size=2, dim=512, layers=13), "Table 5", "45M", 45.04
    ),
    "iuvit_celeba64": Preset(
        IUViTConfig(image_size=64, patch_size=4, dim=512, layers=13), "Table 5", "45M", 45.06
    ),
    "iuvit_celeba128": Preset(
        IUViTConfig(image_size=128, patch_size=8, dim=1408, layers=17), "Table 5", "442M", 441.95
    ),
    "iuvit_church256": Preset(
        IUViTConfig(image_size=256, patch_size=16, dim=1536, layers=17), "Table 5", "527M", 526.66
    ),
    "iuvit_church256_wide": Preset(
        IUViTConfig(image_size=256, patch_size=16, dim=2048, layers=17),
        "Figure 9b",
        "935M",
        935.00,
    ),
    "iuvit_cc12m64": Preset(
        IUViTConfig(image_size=64, patch_size=4, dim=1024, layers=17, context_dim=1024),
        "Table 5",
        "307M",
        307.44,
    ),
    "uvit_s2_cifar10": Preset(
        IUViTConfig(
            image_size=32,
            patch_size=2,
            dim=512,
            layers=13,
            ffn="mlp",
            head="linear_first",
            time_mlp=False,
        ),
        "Table 3 (U-ViT)",
        "44M",
        44.26,
    ),
    "uvit_s4_celeba64": Preset(
        IUViTConfig(
            image_size=64,
            patch_size=4,
            dim=512,
            layers=13,
            ffn="mlp",
            head="linear_first",
            time_mlp=False,
        ),
        "Table 2 (U-ViT)",
        "44M",
        44.29,
    ),
    "ascend_cifar10": Preset(
        ASCENDConfig(
            image_size=32,
            channels=128,
            depth=3,
            multipliers=(1, 2, 2, 2),
            attention_resolutions=(16, 8),
            dropout=0.1,
        ),
        "Table 6",
        "-",
        69.1,
    ),
    "ascend_celeba64": Preset(
        ASCENDConfig(
            image_size=64,
            channels=192,
            depth=2,
            multipliers=(1, 2, 3, 4),
            attention_resolutions=(32, 16, 8),
            dropout=0.1,
        ),
        "Table 6",
        "-",
        281.8,
    ),
    "ascend_256": Preset(
        ASCENDConfig(
            image_size=256,
            channels=256,
            depth=2,
            multipliers=(1, 1, 2, 2, 3, 4),
            attention_resolutions=(32, 16, 8),
        ),
        "Table 6",
        "-",
        562.6,
    ),
    "ascend_t2i_128": Preset(
        ASCENDConfig(
            image_size=128,
            channels=192,
            depth=3,
            multipliers=(1, 2, 3, 4, 4),
            attention_resolutions=(64, 32, 16, 8),
            context_dim=1024,
        ),
        "Table 6",
        "~590M",
        591.6,
    ),
}
