"""Fused ops inside models of diffusers and transformers, in place.

    import fastdiff

    print(fastdiff.accelerate(unet))

Parameters, buffers, state-dict keys and classes stay as they are: a module whose arithmetic changes
gets a `forward` of its own. So hooks, adapters, DeepSpeed, FSDP and saving see the model they know.

Letters: B batch, C channels, H W pixels, L tokens, E width of the embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did to a model.

    Args:
        model: The model.
        changed: Name of a module and what it computes now.
        left: Name of a module that looks alike and why it was left.
    """

    model: nn.Module
    changed: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.changed)} modules on fused ops"]
        for title, entries in (("", self.changed), ("left: ", self.left)):
            for what, count in Counter(what for _, what in entries).items():
                example = next(name for name, of in entries if of == what)
                lines.append(f"  {count:4d} x {title}{what} ({example}{', ...' * (count > 1)})")
        return "\n".join(lines)

    def undo(self) -> None:
        """Give every changed module its own forward back."""
        modules = dict(self.model.named_modules())
        for name, _ in self.changed:
            modules[name].__dict__.pop("forward", None)


def accelerate(model: nn.Module) -> Accelerated:
    """Let a model of diffusers or transformers compute on the fused ops, in place.

    In diffusers' U-Nets and autoencoders GroupNorm with the SiLU behind it, and with the time's
    scale and shift between them, becomes one op, and so do GroupNorms alone; in transformers' Swin
    padding, shift, windows, attention and back become one.

    Args:
        model: A module that holds such models. Its weights, keys and outputs stay; the outputs to
            rounding.

    Returns:
        What was changed and what was left. Modules that already were changed are not named again.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: Nothing in it can be changed; the message says what was left and why.

    Numerics: statistics in float32. Under autocast GroupNorm then gives the autocast dtype, where
    PyTorch's gives float32.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, expected an nn.Module")
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    already = False

    def change(name: str, module: nn.Module, forward: Callable[..., Any], what: str) -> None:
        # unlike a bound method, copied and pickled with the module
        module.__dict__["forward"] = partial(forward, module)
        changed[name] = what

    modules = dict(model.named_modules())
    prefix = {id(module): f"{name}." if name else "" for name, module in modules.items()}
    for name, module in modules.items():
        if "forward" in module.__dict__:
            already |= getattr(module.__dict__["forward"], "func", None) in _FORWARDS
            continue
        kind = _kind(module)
        within = prefix[id(module)]
        if kind == "ResnetBlock2D":
            if why := _why_not_resnet(module):
                left[name] = why
                continue
            change(name, module, _resnet_block, "residual block")
            for part in ("norm1", "norm2"):
                norm = module.get_submodule(part)
                change(f"{within}{part}", norm, _group_norm_silu, "GroupNorm + SiLU")
        elif kind == "SwinLayer":
            if why := _why_not_swin(module):
                left[name] = why
                continue
            change(name, module, _swin_layer, "window attention")
        elif kind and _pair(module):
            norm, act = f"{within}conv_norm_out", f"{within}conv_act"
            change(norm, modules[norm], _group_norm_silu, "GroupNorm + SiLU")
            change(act, modules[act], _identity, "SiLU, in the norm before it")
    for name, module in modules.items():
        if type(module) is nn.GroupNorm and "forward" not in module.__dict__:
            if module.weight is None:
                left[name] = "GroupNorm without weights"
            elif _kind(modules[name.rpartition(".")[0]]):
                change(name, module, _group_norm, "GroupNorm")
    if not changed and not already:
        reasons = "".join(f"\n  {name}: {why}" for name, why in left.items())
        raise ValueError(
            f"accelerate: {type(model).__name__} holds nothing that the fused ops can compute: "
            "GroupNorm and SiLU in diffusers' models, window attention in transformers' "
            f"Swin{reasons}"
        )
    return Accelerated(model, tuple(changed.items()), tuple(left.items()))


def _kind(module: nn.Module) -> str:
    """Name of a class of diffusers' or of transformers' Swin, else nothing; imports neither."""
    home = type(module).__module__
    known = home.startswith(("diffusers.", "transformers.models.swin."))
    return type(module).__name__ if known else ""


def _why_not_resnet(block: Any) -> str:
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"residual block with {type(block.nonlinearity).__name__}, not SiLU"
    for norm in (block.norm1, block.norm2):
        if type(norm) is not nn.GroupNorm or norm.weight is None:
            return f"residual block with {type(norm).__name__}, not GroupNorm with weights"
    return ""


def _why_not_swin(layer: Any) -> str:
    if layer.attention.config._attn_implementation == "eager":
        return "window attention with attn_implementation='eager', which returns its weights"
    return ""


def _pair(module: Any) -> bool:
    """Whether a U-Net or autoencoder ends in GroupNorm and SiLU."""
    norm, act = (getattr(module, name, None) for name in ("conv_norm_out", "conv_act"))
    if type(norm) is not nn.GroupNorm or norm.weight is None or type(act) is not nn.SiLU:
        return False
    return "forward" not in norm.__dict__ and "forward" not in act.__dict__


def _group_norm_silu(
    self: Any, x: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """x (B, C, H, W), scale and shift (B, C)."""
    return ops.group_norm_silu(
        x,
        self.weight,
        self.bias,
        num_groups=self.num_groups,
        eps=self.eps,
        scale=scale,
        shift=shift,
    )


def _group_norm(self: Any, x: Tensor) -> Tensor:
    """x (B, C, H, W) or (B, C, L)."""
    if x.ndim not in (3, 4):
        return type(self).forward(self, x)
    image = x if x.ndim == 4 else x.unsqueeze(2)
    out = ops.group_norm_silu(
        image,
        self.weight,
        self.bias,
        num_groups=self.num_groups,
        eps=self.eps,
        activation="identity",
    )
    return out if x.ndim == 4 else out.squeeze(2)


def _identity(self: Any, x: Tensor) -> Tensor:
    return x


def _resnet_block(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *_: Any) -> Tensor:
    """diffusers' `ResnetBlock2D`; x (B, C, H, W), temb (B, E), to (B, C', H', W')."""
    x = input_tensor
    h = self.norm1(x)
    resample = self.upsample or self.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    film: dict[str, Tensor] = {}
    if self.time_emb_proj is not None:
        assert temb is not None
        emb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            film["scale"], film["shift"] = emb.chunk(2, dim=1)
        else:
            h = _add(self.conv1, h, emb[:, :, None, None])
    h = self.conv2(self.dropout(self.norm2(h, **film)))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    h = _add(self.conv2, h, x)
    return h if self.output_scale_factor == 1.0 else h / self.output_scale_factor


def _add(convolution: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """h + x, in place where h is what a plain convolution has just made and nobody else saw.

    A convolution's backward pass looks at its input and weight alone.
    """
    unseen = type(convolution) is nn.Conv2d and not convolution._forward_hooks
    return h.add_(x) if unseen and h.dtype == x.dtype else h + x


def _swin_layer(
    self: Any,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    always_partition: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' `SwinLayer`; (B, L, C) to the same, and no attention weights."""
    attention = self.attention
    dropped = self.training and attention.attention_dropout > 0
    # a window larger than the map, weights that are asked for, or some of them dropped
    if min(input_dimensions) < self.window_size or dropped or _why_not_swin(self):
        return type(self).forward(
            self, hidden_states, input_dimensions, always_partition=always_partition, **kwargs
        )
    if not always_partition:
        self.set_shift_and_window_size(input_dimensions)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    h = self.layernorm_before(hidden_states)
    qkv = torch.cat([projection(h) for projection in projections], dim=-1)
    biases = [projection.bias for projection in projections]
    h = ops.window_attention(
        qkv.unflatten(1, tuple(input_dimensions)),
        attention.relative_position_bias.relative_position_bias_table,
        heads=attention.num_attention_heads,
        window_size=self.window_size,
        shift=int(self.shift_size),
        pad_mode="value",
        # What the projections give for padding: their biases, under autocast rounded like qkv.
        pad_qkv=None if biases[0] is None else torch.cat(biases).to(qkv.dtype),
        scale=attention.scaling,
    )
    h = self.dropout(attention.o_proj(h.flatten(1, 2)))
    hidden_states = hidden_states + self.drop_path(h)
    h = self.mlp(self.layernorm_after(hidden_states))
    return hidden_states + self.dropout(h), None


_FORWARDS = {_group_norm_silu, _group_norm, _identity, _resnet_block, _swin_layer}
