"""A Swin layer written with our op against transformers' SwinLayer, with the same weights.

test_window_attention.py holds the attention half alone to the same layer; here norms and MLP take
part, several images, and maps that one window covers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff_kernels import backend, window_attention

C, HEADS = 24, 3


def make(size: tuple[int, int], window: int, shift: int):
    """(their layer, its parameters by name, tokens)"""
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(window_size=window, attn_implementation="eager", layer_norm_eps=1e-5)
    layer = SwinLayer(config, C, size, HEADS, shift_size=shift).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, size[0] * size[1], C, requires_grad=True)
    return layer, dict(layer.named_parameters()), x


def ours(p: dict[str, Tensor], x: Tensor, size: tuple[int, int], window: int, shift: int) -> Tensor:
    """The layer as Swin's paper has it, on their weights."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    weight, bias = (
        torch.cat([p[f"attention.{part}_proj.{kind}"] for part in "qkv"])
        for kind in ("weight", "bias")
    )
    qkv = F.linear(norm(x, "layernorm_before").view(-1, *size, C), weight, bias)
    attended = window_attention(
        qkv,
        p["attention.relative_position_bias.relative_position_bias_table"],
        heads=HEADS,
        window_size=window,
        shift=shift,
        pad_mode="value",
        pad_qkv=bias,
    )
    x = x + linear(attended.flatten(1, 2), "attention.o_proj")
    return x + linear(F.gelu(linear(norm(x, "layernorm_after"), "mlp.fc1")), "mlp.fc2")


def check(size: tuple[int, int], window: int, shift: int, our_shift: int) -> None:
    layer, parameters, x = make(size, window, shift)
    with backend("reference"):
        mine = ours(parameters, x, size, window, our_shift)
    theirs = layer(x, size)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    dy = torch.randn_like(theirs)
    names, wanted = ["x", *parameters], [x, *parameters.values()]
    got, true = (torch.autograd.grad(y, wanted, dy) for y in (mine, theirs))
    for name, a, b in zip(names, got, true, strict=True):
        # A gradient of thousands of pixels: measured by its largest element, and a key's bias,
        # whose own is nearly nothing, by the value's.
        size_of = true[names.index("attention.v_proj.bias")] if "k_proj.bias" in name else b
        error = (a - b).abs().max() / max(1, size_of.abs().max())
        assert error <= 1e-5, f"{name}: {error:.2g}"


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [7, 8])
@pytest.mark.parametrize("size", [(56, 56), (64, 64), (21, 30)])
def test_layer(size, window, shifted):
    shift = window // 2 if shifted else 0
    check(size, window, shift, shift)


@pytest.mark.parametrize(("size", "window"), [((7, 7), 7), ((8, 8), 8)])
def test_a_window_that_covers_the_map_is_not_shifted(size, window):
    check(size, window, window // 2, window // 2)


def test_a_map_of_one_window_across():
    """transformers then shifts along neither axis; we, as torchvision, still along the other."""
    check((16, 8), 8, 4, our_shift=0)
    layer, parameters, x = make((16, 8), 8, 4)
    shifted = ours(parameters, x, (16, 8), 8, shift=4)
    assert (shifted - layer(x, (16, 8))[0]).abs().max() > 1e-2
