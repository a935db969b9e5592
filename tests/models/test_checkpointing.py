"""Gradient checkpointing: the same bits, less memory, every block once."""

from __future__ import annotations

import pytest
import torch
from builders import make_ascend, make_iuvit, make_unet, randomize

from fastdiff import model_table, ops
from fastdiff.models import create_model
from fastdiff.nn import Checkpointed

CASES = {
    "iuvit": lambda: make_iuvit(context_dim=12),
    "iuvit fused": lambda: make_iuvit(context_dim=12, text_attention="fused"),
    "ascend": lambda: make_ascend(context_dim=12, dropout=0.3),
    "ascend patchmerge": lambda: make_ascend(
        downsample="patch_merging", upsample="patch_expanding", decoder="swin", dropout=0.3
    ),
    "unet": lambda: make_unet(context_dim=12, dropout=0.3),
}


def step(model, checkpointing: bool) -> list[torch.Tensor]:
    """The output and every gradient of a step whose dropout starts from one seed."""
    torch.manual_seed(3)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    context = None if model.config.context_dim is None else torch.randn(2, 5, 12)
    model.set_checkpointing(checkpointing).zero_grad()
    torch.manual_seed(4)
    out = model(x, torch.tensor([5, 700]), context)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *grads]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits(case, backend):
    model = randomize(CASES[case]()).train()
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    blocks = [m for m in model.modules() if isinstance(m, Checkpointed)]
    hook = blocks[1].register_forward_pre_hook(count)
    with ops.backend(backend):
        plain = step(model, False)
        assert calls == 1
        checkpointed = step(model, True)
        assert calls == 3  # once forward, once more backward
    hook.remove()
    for mine, expected in zip(checkpointed, plain, strict=True):
        assert torch.equal(mine, expected)


def test_nothing_is_computed_again_without_gradients(make):
    model = make().set_checkpointing()
    blocks = [m for m in model.modules() if isinstance(m, Checkpointed) and m.checkpointing]
    # no block within another one
    assert not any(a is not b and b in list(a.modules()) for a in blocks for b in blocks)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 16, 16), 0).grad_fn is None
    assert not any(m.checkpointing for m in make().modules() if isinstance(m, Checkpointed))


def test_it_frees_four_fifths_of_the_activations():
    plain, checkpointed = (
        model_table.activation_bytes(
            "iuvit_cifar10", 64, checkpointing=checkpointing, dtype=torch.float32
        )
        for checkpointing in (False, True)
    )
    assert checkpointed < 0.2 * plain


@pytest.mark.parametrize("name", ["ascend_cifar10", "unet_64"])
def test_it_frees_two_thirds_of_the_hierarchical_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    plain, checkpointed = (
        model_table.activation_bytes(model, 32, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert checkpointed < plain / 3
