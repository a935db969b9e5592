"""Numbers of a trained model, each with its count and a 95 % interval.

Letters: N pictures, K times, D features, R side in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.data import scenes
from fastdiff.data.transforms import to_tensor
from fastdiff.grid import to_uint8
from fastdiff.metrics.extractors import Extractor, from_module
from fastdiff.metrics.scores import frechet_distance
from fastdiff.metrics.statistics import Moments

Z = 1.959964
ROUNDS = 1000
FID_ROUNDS = 100

Number = dict[str, float]  # value, low, high, n


def number(value: float, low: float, high: float, n: float) -> Number:
    """A measured value, its 95 % interval and what it was measured on."""
    return {"value": value, "low": low, "high": high, "n": n}


def share(right: Sequence[bool]) -> Number:
    """A share with Wilson's interval."""
    return number(
        sum(right) / len(right), *scenes.wilson_interval(sum(right), len(right)), len(right)
    )


def bootstrap(values: Tensor, of: Callable[[Tensor], Tensor], *, rounds: int = ROUNDS) -> Number:
    """A statistic and the 2.5 and 97.5 percentiles of it over samples drawn again.

    Args:
        values: (N, ...) one row for each sample.
        of: Maps drawn rows (rounds, N, ...) to the statistic (rounds,).
        rounds: Drawings; always the same ones for an N.
    """
    n = len(values)
    generator = np.random.Generator(np.random.Philox(key=[n, 4]))
    drawn = torch.from_numpy(generator.integers(0, n, (rounds, n)))
    low, high = np.percentile(of(values[drawn]).numpy(), [2.5, 97.5]).tolist()
    return number(float(of(values[None])[0]), low, high, n)


def mean(values: Tensor) -> Number:
    """The mean of (N,) values with its bootstrap interval."""
    return bootstrap(values.double(), lambda drawn: drawn.mean(1))


def patch_effect(pictures: Tensor, patch: int) -> Number:
    """Mean squared step between pixels across patch borders, over that inside patches.

    1 where borders are nothing special; a model that draws its patches apart is above it.

    Args:
        pictures: (N, 3, R, R).
        patch: p; R is a multiple of it.
    """
    parts = []
    for axis in (2, 3):
        step = pictures.double().diff(dim=axis).square().mean(1)  # channels
        step = step.transpose(1, axis - 1).flatten(2).mean(2)  # (N, R - 1), by place of the step
        border = torch.arange(1, step.shape[1] + 1) % patch == 0
        parts.append(torch.stack([step[:, border].mean(1), step[:, ~border].mean(1)], 1))
    energy = torch.stack(parts).sum(0)  # (N, 2)
    return bootstrap(energy, lambda drawn: drawn[..., 0].sum(1) / drawn[..., 1].sum(1))


class SceneFeatures(nn.Module):
    """A small convolutional classifier of a scene's four attributes.

    Returns features (B, 64), what the logits are read from, and the 18 logits.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * (side // 8) ** 2, 64),
            nn.SiLU(),
        )
        self.heads = nn.Linear(64, sum(map(len, NAMES)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, R, R) in [-1, 1]."""
        features = self.body(x)
        return features, self.heads(features)


NAMES = (
    tuple(scenes.SHAPES),
    tuple(scenes.COLOURS),
    tuple(scenes.BACKGROUNDS),
    tuple(scenes.PLACES),
)


def attribute_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Sum of the four cross entropies: logits (B, 18), wanted (B, 4) int64."""
    parts = logits.split([len(names) for names in NAMES], dim=1)
    losses = [nn.functional.cross_entropy(p, w) for p, w in zip(parts, wanted.T, strict=True)]
    return torch.stack(losses).sum()


def scene_extractor(side: int, steps: int, file: Path) -> tuple[Extractor, float]:
    """The feature extractor of the experiments' FID, trained on scenes of its own seed.

    Args:
        side: Of the pictures; those over 32 pixels are scaled to 32 for it.
        steps: Of 128 fresh scenes each.
        file: Where the weights are kept, and read from the next time.

    Returns:
        The extractor, and the share of 720 fresh scenes of which it names all four attributes.
    """
    from safetensors.torch import load_file, save_file

    inner = min(side, 32)
    torch.manual_seed(0)
    module = SceneFeatures(inner)
    if file.is_file():
        module.load_state_dict(load_file(file))
    else:
        optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
        generator = np.random.Generator(np.random.Philox(key=[0, 5]))
        for step in range(steps):
            picked = generator.integers(0, len(scenes.CAPTIONS), 128).tolist()
            x, wanted = _scenes_of(picked, inner, seed=1_000_000 + step)
            loss = attribute_loss(module(x)[1], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.partial")  # another row may write it, too
        save_file(module.state_dict(), beside)
        beside.replace(file)
    x, wanted = _scenes_of(list(range(len(scenes.CAPTIONS))) * 2, inner, seed=2_000_000)
    with torch.no_grad():
        parts = module(x)[1].split([len(names) for names in NAMES], dim=1)
    named = torch.stack([part.argmax(1) for part in parts], 1)
    extractor = from_module(
        module, name="scenes", value_range=(-1, 1), image_size=None if side == inner else inner
    )
    return extractor, float((named == wanted).all(1).double().mean())


def _scenes_of(numbers: Sequence[int], side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures of captions, and the numbers of their attributes (B, 4)."""
    x = to_tensor(scenes.render([scenes.CAPTIONS[i] for i in numbers], side, seed))
    wanted = [
        [names.index(a) for names, a in zip(NAMES, scenes.SCENES[i], strict=True)] for i in numbers
    ]
    return x, torch.tensor(wanted)


def fid(extractor: Extractor, real: Tensor, drawn: Tensor) -> Number:
    """Frechet distance of features, and its interval by the bootstrap's standard deviation.

    Percentiles would not hold the value: drawing pictures again takes variety away, which the
    distance counts a second time.

    Args:
        extractor: Of the features.
        real: (M, 3, R, R) in [-1, 1], taken as given.
        drawn: (N, 3, R, R), more than there are features.
    """
    features = [_features(extractor, pictures) for pictures in (real, drawn)]
    reference = _moments(features[0])
    value = frechet_distance(*reference, *_moments(features[1]))
    generator = np.random.Generator(np.random.Philox(key=[len(drawn), 6]))
    again = [
        frechet_distance(*reference, *_moments(features[1][rows]))
        for rows in generator.integers(0, len(drawn), (FID_ROUNDS, len(drawn)))
    ]
    half = Z * float(np.std(again, ddof=1))
    return number(value, max(0.0, value - half), value + half, len(drawn))


def _features(extractor: Extractor, pictures: Tensor) -> Tensor:
    pixels = to_uint8(pictures)
    return torch.cat([extractor(part).features.cpu() for part in pixels.split(256)])


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments()
    moments.add(features)
    return moments.result()


def difference(mine: Sequence[float], other: Sequence[float]) -> Number:
    """Mean of paired differences with its interval: the same pictures with the same noise."""
    return mean(torch.tensor(mine).double() - torch.tensor(other).double())


def as_json(value: Any) -> Any:
    """Floats with 9 digits, which tell float32 apart; the rest as it is."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
