"""Convolution weights in channels_last: the same model, the same training, the same files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastdiff.models import ASCEND, ASCENDConfig, Backbone, IUViT, IUViTConfig, from_pretrained
from fastdiff.nn import channels_last_, contiguous_
from fastdiff.training.ema import EMA
from fastdiff.training.shares import SavedState, part, restore, tensors_of, whole, write_state

LAST = torch.channels_last
LEVELS = {"channels": 16, "depth": 1, "multipliers": (1, 2), "attention_resolutions": (8,)}
MODELS = {
    "iuvit": lambda: IUViT(IUViTConfig(image_size=16, patch_size=4, dim=32, layers=3, head_dim=16)),
    "ascend": lambda: ASCEND(
        ASCENDConfig(image_size=16, head_dim=16, groups=8, window=4, **LEVELS)
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> Backbone:
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def reformatted(model: nn.Module) -> list[str]:
    """Names of the weights that are channels_last and not contiguous."""
    return [
        name
        for name, p in model.named_parameters()
        if p.dim() == 4 and p.is_contiguous(memory_format=LAST) and not p.is_contiguous()
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    loss = (model(x, torch.tensor([3, 700])) - x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@each_model
def test_values_gradients_and_steps_are_those_of_contiguous_weights(name):
    plain = made(name)
    other = channels_last_(copy.deepcopy(plain))
    expected = {
        f"{key}.weight"
        for key, layer in other.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.kernel_size != (1, 1)
    }
    assert set(reformatted(other)) == expected != set()
    assert reformatted(plain) == []
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (plain, other)]
    for _ in range(2):
        losses = [step(m, o) for m, o in zip((plain, other), optimizers, strict=True)]
        torch.testing.assert_close(*losses)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert q.grad.stride() == q.stride()
        assert optimizers[1].state[q]["exp_avg"].stride() == q.stride()
    assert set(reformatted(other)) == expected
    held = list(other.parameters())
    assert reformatted(contiguous_(other)) == []
    assert all(a is b for a, b in zip(held, other.parameters(), strict=True))


@each_model
def test_the_format_lives_through_copies_loading_and_saving(name, tmp_path):
    plain = made(name)
    model = channels_last_(copy.deepcopy(plain))
    names = reformatted(model)
    assert reformatted(copy.deepcopy(model)) == names
    assert reformatted(copy.deepcopy(model).to(torch.bfloat16)) == names
    model.load_state_dict(plain.state_dict())
    assert reformatted(model) == names
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    for (key, a), b in zip(plain.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert reformatted(channels_last_(loaded)) == names
    with torch.device("meta"):
        empty = channels_last_(MODELS[name]())
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert reformatted(empty) == []  # the tensors of the file, as they are
    assert reformatted(channels_last_(copy.deepcopy(empty))) == names
    ema = EMA(model.named_parameters(), decay=0.5)
    ema.update(0)
    with ema.applied(model):
        assert reformatted(model) == names
    for key, p in model.named_parameters():
        assert torch.equal(ema.shadows[key], p), key


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_checkpoint_holds_the_same_numbers_in_either_format(world, tmp_path):
    """Written by ranks in one format, read by a process in the other."""
    for first, second in (channels_last_, contiguous_), (contiguous_, channels_last_):
        writer, reader = first(made("ascend")), second(made("ascend"))
        optimizer = torch.optim.AdamW(writer.parameters(), lr=1e-2)
        step(writer, optimizer)
        files, shapes = [], {name: tuple(p.shape) for name, p in writer.named_parameters()}
        for rank in range(world):
            shares = [part(whole(n, p), rank, world) for n, p in writer.named_parameters()]
            averages = {share.name: share.weight * 2 for share in shares}
            tensors = tensors_of(shares, optimizer, averages)
            files.append(tmp_path / f"{rank}.safetensors")
            starts = {share.name: share.start for share in shares}
            write_state(files[-1], {k: v.flatten() for k, v in tensors.items()}, starts, 1)
        saved = SavedState(files, shapes)
        other = torch.optim.AdamW(reader.parameters(), lr=1e-2)
        shares = [whole(n, p) for n, p in reader.named_parameters()]
        for p in reader.parameters():
            nn.init.zeros_(p)
        restore(shares, other, saved)
        for share, (name, p), q in zip(
            shares, writer.named_parameters(), reader.parameters(), strict=True
        ):
            assert torch.equal(p, q), name
            assert torch.equal(saved.full("weight", name), p), name
            assert torch.equal(saved.full("ema", name), 2 * p), name
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][key], other.state[q][key]), name
            average = torch.empty_like(share.weight)
            share.read(saved, "ema", average)
            assert torch.equal(average, 2 * share.weight)
