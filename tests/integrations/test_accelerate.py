"""Models of diffusers and transformers before and after `fastdiff.accelerate`."""

from __future__ import annotations

import copy
import io

import diffusers
import pytest
import torch
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinLayer

import fastdiff
from fastdiff import ops


def randomize(model: nn.Module) -> nn.Module:
    """No zero output layers, no unit norms, no zero bias tables."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * noise + (name.endswith("weight")))
            else:
                p.copy_(noise * (0.2 if "bias_table" in name else p[0].numel() ** -0.5))
    return model.eval()


def unet(**fields) -> nn.Module:
    defaults = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return randomize(diffusers.UNet2DModel(**{**defaults, **fields}))


def conditional_unet() -> nn.Module:
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=24,
    )
    return randomize(model)


def swin(**fields) -> nn.Module:
    defaults = {
        "image_size": 48,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (3, 6),
        "window_size": 7,
        "drop_path_rate": 0.0,
    }
    return randomize(SwinModel(SwinConfig(**{**defaults, **fields})))


IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
BIG = torch.randn(2, 3, 48, 44, generator=torch.Generator().manual_seed(3))

CASES = {
    "unet": (unet, lambda m, x: m(x, 7).sample, IMAGE),
    "unet, scale and shift": (
        lambda: unet(resnet_time_scale_shift="scale_shift", downsample_type="resnet"),
        lambda m, x: m(x, 7).sample,
        IMAGE,
    ),
    "conditional unet": (conditional_unet, lambda m, x: m(x, 7, TEXT).sample, IMAGE),
    "swin": (swin, lambda m, x: m(x).last_hidden_state, BIG),
}


def outputs(model: nn.Module, call, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(model, x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad, **gradients}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_state_dict_stay(name, layout):
    make, call, x = CASES[name]
    model = make().to(memory_format=layout)
    x = x.to(memory_format=layout)
    state = copy.deepcopy(model.state_dict())
    before = outputs(model, call, x)
    report = fastdiff.accelerate(model)
    after = outputs(model, call, x)
    assert list(after) == list(before)
    for key in before:
        # a key's bias has no gradient but rounding's
        size = 1.0 if "k_proj.bias" in key or "to_k.bias" in key else before[key].abs().max()
        error = (after[key] - before[key]).abs().max() / size
        assert error <= 1e-5, f"{key}: {error:.2g}"
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    # what ran before runs again
    report.undo()
    assert torch.equal(call(model, x), before["output"])


def used(monkeypatch, model: nn.Module, call, x: Tensor) -> dict[str, int]:
    """How often each op ran."""
    counts = dict.fromkeys(("group_norm_silu", "window_attention"), 0)
    with monkeypatch.context() as patch:
        for name in counts:
            op = getattr(ops, name)

            def counted(*args, _name=name, _op=op, **kwargs):
                counts[_name] += 1
                return _op(*args, **kwargs)

            patch.setattr(ops, name, counted)
        call(model, x)
    return counts


@pytest.mark.parametrize("name", CASES)
def test_every_group_norm_and_window_is_fused(name, monkeypatch):
    make, call, x = CASES[name]
    model = make()
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    layers = sum(isinstance(module, SwinLayer) for module in model.modules())
    report = fastdiff.accelerate(model)
    assert used(monkeypatch, model, call, x) == {
        "group_norm_silu": norms,
        "window_attention": layers,
    }
    assert not report.left


def test_under_autocast_padding_is_rounded_as_the_projections_round_it(monkeypatch):
    """As `test_every_group_norm_and_window_is_fused`; the vector has the dtype of the tiles."""
    model, dtypes = swin(), set()
    fastdiff.accelerate(model)

    def noted(qkv, *args, _op=ops.window_attention, **kwargs):
        dtypes.add((qkv.dtype, kwargs["pad_qkv"].dtype))
        return _op(qkv, *args, **kwargs)

    monkeypatch.setattr(ops, "window_attention", noted)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(BIG).last_hidden_state
    assert dtypes == {(torch.bfloat16, torch.bfloat16)}
    out.float().sum().backward()
    bias = next(m for m in model.modules() if isinstance(m, SwinLayer)).attention.k_proj.bias
    assert bias.grad.dtype is torch.float32


def test_the_report_says_what_and_where():
    report = fastdiff.accelerate(unet())
    text = str(report)
    assert text.startswith("UNet2DModel: ")
    assert "17 x GroupNorm + SiLU (conv_norm_out, ...)" in text
    assert ("mid_block.attentions.0.group_norm", "GroupNorm") in report.changed
    assert ("conv_norm_out", "GroupNorm + SiLU") in report.changed
    # a second time there is nothing left to do
    again = fastdiff.accelerate(report.model)
    assert not again.changed
    assert not again.left


def test_what_the_ops_do_not_compute_is_left_and_named():
    model = unet(act_fn="gelu")
    report = fastdiff.accelerate(model)
    assert ("down_blocks.0.resnets.0", "residual block with GELU, not SiLU") in report.left
    assert "left: residual block with GELU" in str(report)

    weights = swin(attn_implementation="eager")
    with pytest.raises(ValueError, match="returns its weights"):
        fastdiff.accelerate(weights)
    with pytest.raises(ValueError, match="holds nothing"):
        fastdiff.accelerate(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    with pytest.raises(TypeError, match="model is a str"):
        fastdiff.accelerate("unet")


def test_swin_falls_back_where_attention_weights_are_dropped_or_wanted():
    model = swin(attention_probs_dropout_prob=0.5)
    plain = copy.deepcopy(model)
    fastdiff.accelerate(model)
    for both in (model, plain):
        both.train()
    results = []
    for each in (model, plain):
        torch.manual_seed(0)
        results.append(each(BIG).last_hidden_state)
    assert torch.equal(*results)
    model.eval().set_attn_implementation("eager")
    attentions = model(BIG, output_attentions=True).attentions
    assert attentions is not None
    assert attentions[0] is not None


def test_an_adapter_on_a_projection_is_not_passed_over():
    model = swin()
    attention = model.encoder.layers[0].blocks[1].attention

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.more = nn.Linear(24, 24, bias=False)

        @property
        def bias(self):
            return self.base.bias

        def forward(self, x):
            return self.base(x) + self.more(x)

    attention.q_proj = Adapter(attention.q_proj)
    before = model(BIG).last_hidden_state
    fastdiff.accelerate(model)
    torch.testing.assert_close(model(BIG).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_an_accelerated_model_is_copied_and_stored():
    model = unet()
    fastdiff.accelerate(model)
    expected = model(IMAGE, 7).sample
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for other in (twin, stored):
        assert other.conv_norm_out.__dict__["forward"].args == (other.conv_norm_out,)
        assert torch.equal(other(IMAGE, 7).sample, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet", "swin"])
def test_an_accelerated_model_compiles(name):
    make, call, x = CASES[name]
    model = make()
    fastdiff.accelerate(model)
    expected = call(model, x)
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(model, x), expected, rtol=1e-4, atol=1e-5)
