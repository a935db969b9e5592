"""Layers and models of diffusers and transformers that compute the same as ours, on our weights.

Each function takes a module of `fastdiff` and gives one that is called alike, whose inside is the
other library's own code. diffusers and transformers are imported where they are asked for.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.nn import MLP, ResBlock, SpatialAttention
from fastdiff.nn.resblock import Downsample, Upsample
from fastdiff.nn.swin import PlainSwinLayer


class Called(nn.Module):
    """Another library's module behind our call.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class _Block(Called):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C1, H, W), emb (B, E), to (B, C, H', W')."""
        return self.inner(x, emb)


class _Layer(Called):
    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """x (B, H, W, C) to the same."""
        return self.inner(x.flatten(1, 2), x.shape[1:3])[0].view_as(x)


class _UNet(Called):
    def forward(self, x: Tensor, t: Tensor, context: None = None) -> Tensor:
        """x (B, C, H, W), t (B,), to (B, C, H, W)."""
        return self.inner(x, t).sample


def res_block(ours: nn.Module) -> nn.Module:
    """diffusers' `ResnetBlock2D` with scale and shift."""
    from diffusers.models.resnet import ResnetBlock2D

    assert isinstance(ours, ResBlock)
    theirs = ResnetBlock2D(
        in_channels=ours.conv1.in_channels,
        out_channels=ours.conv1.out_channels,
        temb_channels=ours.emb.in_features,
        groups=ours.norm1.groups,
        eps=ours.norm1.eps,
        time_embedding_norm="scale_shift",
        up=isinstance(ours.resample, Upsample),
        down=isinstance(ours.resample, Downsample),
    )
    _fill_block(theirs, ours)
    return _Block(_like(theirs, ours))


def swin_layer(ours: nn.Module) -> nn.Module:
    """transformers' `SwinLayer`, on SDPA."""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    assert isinstance(ours, PlainSwinLayer)
    attn, ffn = ours.attn, ours.ffn
    assert isinstance(ffn, MLP)
    dim = attn.proj.in_features
    config = SwinConfig(embed_dim=dim, window_size=attn.window, layer_norm_eps=ours.norm1.eps)
    config._attn_implementation = "sdpa"
    # The resolution only says that the window is smaller than the map.
    theirs = SwinLayer(config, dim, (1024, 1024), attn.heads, shift_size=attn.shift)
    parts: dict[str, nn.Module] = {
        "layernorm_before": ours.norm1,
        "layernorm_after": ours.norm2,
        "attention.o_proj": attn.proj,
        "mlp.fc1": ffn.fc1,
        "mlp.fc2": ffn.fc2,
    }
    _fill(theirs, parts)
    _fill_projections(theirs.attention, attn.qkv, ("q_proj", "k_proj", "v_proj"))
    table = theirs.attention.relative_position_bias.relative_position_bias_table
    table.data.copy_(attn.bias_table)
    return _Layer(_like(theirs, ours))


def unet(ours: nn.Module) -> nn.Module:
    """diffusers' `UNet2DModel` in ADM's form: residual re-sampling, scale and shift, no text."""
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    assert isinstance(ours, UNet)
    config = ours.config
    assert isinstance(config, UNetConfig)
    levels = range(len(config.multipliers))
    attended = [level in config.attention_levels for level in levels]
    theirs = UNet2DModel(
        sample_size=config.sides[0],
        in_channels=config.in_channels,
        out_channels=config.predicted_channels,
        block_out_channels=config.level_channels,
        layers_per_block=config.depth,
        # Their plain blocks re-sample by a convolution; those named Resnet by a residual block.
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        up_block_types=[
            "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)
        ],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.head_dim,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        norm_eps=ours.norm_out.eps,
        freq_shift=0,
        flip_sin_to_cos=True,
    )
    time: Any = ours.time
    parts: dict[str, nn.Module] = {
        "time_embedding.linear_1": time.fc1,
        "time_embedding.linear_2": time.fc2,
        "conv_in": ours.encoder.conv_in,
        "conv_norm_out": ours.norm_out,
        "conv_out": ours.conv_out,
    }
    _fill(theirs, parts)
    # Both meet the same blocks in the same order; a block's re-sampling one comes behind it.
    stages = [ours.encoder, ours.middle, ours.decoder]
    mine = [part for stage in stages for part in stage.modules()]
    order = [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]
    res_blocks = [part for part in mine if isinstance(part, ResBlock)]
    for block, own in zip(_of(order, ResnetBlock2D), res_blocks, strict=True):
        _fill_block(block, own)
    attentions = [part for part in mine if isinstance(part, SpatialAttention)]
    for attention, each in zip(_of(order, Attention), attentions, strict=True):
        _fill(attention, {"group_norm": each.norm, "to_out.0": each.proj})
        _fill_projections(attention, each.qkv, ("to_q", "to_k", "to_v"))
    return _UNet(_like(theirs, ours))


def _of(blocks: list[nn.Module], kind: type) -> list[Any]:
    """Layers of a kind in the order in which they run; re-sampling blocks come last in theirs."""
    found: list[Any] = []
    for block in blocks:
        names = ("resnets", "attentions", "downsamplers", "upsamplers")
        for name in names:
            for part in getattr(block, name, None) or ():
                found += [part] if isinstance(part, kind) else []
    return found


def _fill(theirs: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for name, own in parts.items():
        theirs.get_submodule(name).load_state_dict(own.state_dict())


def _fill_block(theirs: nn.Module, own: ResBlock) -> None:
    parts = {"norm1": own.norm1, "norm2": own.norm2, "conv1": own.conv1, "conv2": own.conv2}
    parts["time_emb_proj"] = own.emb
    if isinstance(own.skip, nn.Conv2d):
        parts["conv_shortcut"] = own.skip
    _fill(theirs, parts)


def _fill_projections(theirs: nn.Module, qkv: nn.Linear, names: tuple[str, str, str]) -> None:
    weights, biases = qkv.weight.chunk(3), qkv.bias.chunk(3)
    for name, weight, bias in zip(names, weights, biases, strict=True):
        theirs.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})


def _like(theirs: nn.Module, ours: nn.Module) -> nn.Module:
    """In the mode of ours, on its device and in its dtype."""
    weight = next(ours.parameters())
    for part in theirs.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    theirs = theirs.train(ours.training).to(weight.device)
    return theirs if weight.dtype is torch.float32 else theirs.to(weight.dtype)


TWINS: dict[type[nn.Module], tuple[str, Any]] = {
    ResBlock: ("diffusers", res_block),
    PlainSwinLayer: ("transformers", swin_layer),
    UNet: ("diffusers", unet),
}


def twin(ours: nn.Module) -> tuple[str, nn.Module] | None:
    """The other library's name and its module on our weights; None where there is none.

    Raises:
        ImportError: the library is not installed.
    """
    if type(ours) not in TWINS:
        return None
    name, make = TWINS[type(ours)]
    with torch.no_grad():
        return name, make(ours)
