"""How pictures reach a network, what is taken of it, and how networks are told apart."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from small_network import Network
from torch import Tensor, nn

from fastdiff.metrics import Extractor, from_module, load_torchscript

PIXELS = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)


class NvidiaLike(nn.Module):
    """The arguments of the published TorchScript Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(3, 4).cos())
        self.bias = nn.Parameter(torch.arange(4.0))

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = img.mean((2, 3)) / 255
        if return_features:
            return features
        logits = features @ self.weight
        return (logits if no_output_bias else logits + self.bias).softmax(1)


def test_value_range_and_size_are_what_the_module_asks_for() -> None:
    seen = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3), keepdim=True)

    x = PIXELS.float()
    for low, high in ((0.0, 255.0), (0.0, 1.0), (-1.0, 1.0)):
        out = from_module(Look(), value_range=(low, high))(PIXELS)
        torch.testing.assert_close(seen[-1], x / 255 * (high - low) + low)
        assert out.features.shape == (5, 3)
        assert out.logits is None
    from_module(Look(), image_size=24)(PIXELS)
    expected = nn.functional.interpolate(x, (24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[-1], expected)
    with pytest.raises(ValueError, match=r"1\.\.0; expected black < white"):
        from_module(Look(), value_range=(1, 0))


def test_the_module_is_put_into_evaluation_mode_and_out_of_autocast() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(768, 4), nn.Dropout(0.5))
    extractor = from_module(module, value_range=(0, 1))
    first = extractor(PIXELS).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(PIXELS).features, first)
    assert not first.requires_grad


def test_extractors_are_told_apart_by_class_weights_and_input() -> None:
    def about(module: nn.Module, **options: object) -> object:
        return from_module(module, **options).about

    first = about(Network())
    assert about(Network()) == first
    assert about(Network(1)) != first
    assert about(Network(), value_range=(0, 1)) != first
    assert about(Network(), image_size=299) != first
    changed = Network()
    with torch.no_grad():
        changed.weight[0, 0, 0, 0] += 1e-6
    assert about(changed) != first

    class Other(Network):
        pass

    assert about(Other()) != first


def test_torchscript_is_the_module_it_was_made_from(torchscript: Path) -> None:
    loaded, plain = load_torchscript(torchscript), from_module(Network())
    ours, theirs = loaded(PIXELS, logits=True), plain(PIXELS, logits=True)
    torch.testing.assert_close(ours.features, theirs.features)
    torch.testing.assert_close(ours.logits, theirs.logits)
    # The same at every call, whichever batch comes first.
    assert all(torch.equal(loaded(PIXELS).features, ours.features) for _ in range(4))
    assert len(loaded.sha256) == 64
    assert loaded.name == "network.pt"


def test_nvidias_inception_gives_features_and_unbiased_log_probabilities(tmp_path: Path) -> None:
    module = NvidiaLike()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(module).save(str(tmp_path / "inception.pt"))
    out = load_torchscript(tmp_path / "inception.pt")(PIXELS, logits=True)
    x = PIXELS.float()
    torch.testing.assert_close(out.features, module(x, return_features=True))
    expected = module(x, no_output_bias=True)
    assert out.logits is not None
    torch.testing.assert_close(out.logits.softmax(1), expected)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_torchscript_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_torchscript(tmp_path / "nothing.pt")
    torch.save(Network().state_dict(), tmp_path / "weights.pt")
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "bomb.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    for name in ("weights.pt", "bomb.pt", "pickle.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a TorchScript file"):
            load_torchscript(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_outputs_that_are_no_features_are_refused() -> None:
    class Returns(nn.Module):
        def __init__(self, make: object) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor) -> object:
            return self.make(x)

    def extractor(make: object) -> Extractor:
        return from_module(Returns(make), name="odd")

    for make, told in (
        (lambda x: x.mean(), "()"),
        (lambda x: x[:1], "(1, 3, 16, 16)"),
        (lambda x: {"a": x}, "dict"),
        (lambda x: (x, x, x), "tuple"),
    ):
        with pytest.raises(ValueError, match="odd returns") as caught:
            extractor(make)(PIXELS)
        assert told in str(caught.value)
    with pytest.raises(ValueError, match="odd returns no logits"):
        extractor(lambda x: x)(PIXELS, logits=True)
