"""`Backbone.project_text`: the same output from keys and values that were made once."""

from __future__ import annotations

import pytest
import small_models as small
import torch
from torch import nn

from fastdiff.nn import MHCA, FusedAttention, FusedSpatialAttention

MODELS = {
    "iuvit": lambda: small.iuvit(context_dim=small.WIDTH),
    "iuvit fused": lambda: small.iuvit(context_dim=small.WIDTH, text_attention="fused"),
    "ascend": lambda: small.ascend(context_dim=small.WIDTH),
    "ascend, text in the decoder": lambda: small.ascend(
        context_dim=small.WIDTH, encoder="res_swin", decoder_text=True
    ),
    "unet": lambda: small.unet(context_dim=small.WIDTH),
}


def text_linears(model: nn.Module) -> list[nn.Linear]:
    kinds = (MHCA, FusedAttention, FusedSpatialAttention)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    return [layer.kv if isinstance(layer, MHCA) else layer.text_kv for layer in layers]


@pytest.mark.parametrize("null", ["no row", "the last rows", "rows between", "all rows"])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_that_of_the_text(name, null):
    model = MODELS[name]()
    context, mask = small.text(5)
    if null != "no row":
        mask[{"the last rows": slice(3, 5), "rows between": [1, 3]}.get(null, slice(0, 5))] = False
    x = torch.randn(5, 3, *model.config.sides)
    t = torch.tensor([0, 10, 500, 998, 999])
    with torch.no_grad():
        expected = model(x, t, context, context_mask=mask)
        text = model.project_text(context, context_mask=mask)
        torch.testing.assert_close(model(x, t, text), expected, rtol=1e-5, atol=1e-5)
        whole = model.project_text(context, pooled=context[:, 0])
        expected = model(x, t, context, pooled=context[:, 0])
        torch.testing.assert_close(model(x, t, whole), expected, rtol=1e-5, atol=1e-5)
    rows = {"the last rows": 3, "all rows": 0}.get(null, 5)
    assert text.rows == rows
    assert text.mask.shape == (5, 16)  # of 40 positions five at most are valid
    assert whole.mask.shape == (5, 40)


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_projects_again(name):
    model = MODELS[name]()
    calls = []
    linears = text_linears(model)
    for linear in linears:
        linear.register_forward_hook(lambda module, *_: calls.append(module))
    context, mask = small.text(2)
    text = model.project_text(context, context_mask=mask)
    assert len(calls) == len(linears) == len(set(calls)) > 0
    for t in range(3):
        model(torch.randn(2, 3, *model.config.sides), t, text)
    assert len(calls) == len(linears)


@pytest.mark.parametrize("name", ["iuvit", pytest.param("unet", marks=pytest.mark.slow)])
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    model = MODELS[name]()
    context, mask = small.text(4)
    mask[2:] = False
    x, t = torch.randn(4, 3, *model.config.sides), torch.full((4,), 7)
    with torch.no_grad():
        text = model.project_text(context, context_mask=mask)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t, text), model(x, t, text), rtol=1e-5, atol=1e-5)


def test_text_of_another_batch_or_with_a_mask_is_refused():
    model = MODELS["iuvit"]()
    context, mask = small.text(2)
    text = model.project_text(context, context_mask=mask)
    x = torch.randn(3, 3, 8, 8)
    with pytest.raises(ValueError, match="projected text of batch 2, expected 3"):
        model(x, 0, text)
    with pytest.raises(ValueError, match="context_mask or pooled given with a projected text"):
        model(x[:2], 0, text, context_mask=mask)
    with pytest.raises(ValueError, match="context_dim=None"):
        small.iuvit().project_text(context)
