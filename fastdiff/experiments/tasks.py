"""What the experiments ask of a model: scenes without a condition, of a shape, of a caption.

The fourth task has two objects, each in a corner of its own: 10,368 captions. Its judge measures
every quadrant against every object on every background, and takes the nearest whole.

Letters: B pictures, R side in pixels, J jitters of one shape at one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.data import scenes, writers
from fastdiff.data.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SceneJudge
from fastdiff.data.transforms import to_tensor

Task = Literal["none", "label", "caption", "pair"]
TASKS: tuple[Task, ...] = ("none", "label", "caption", "pair")
LABELS = tuple(sorted(SHAPES))  # label y is LABELS[y], as the training stream numbers folders
CORNERS = tuple(name for name in PLACES if name != "in the centre")
OBJECTS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)


class PairScene(NamedTuple):
    """Two objects: numbers out of OBJECTS, and of CORNERS in ascending order."""

    background: str
    corners: tuple[int, int]
    objects: tuple[int, int]

    @property
    def caption(self) -> str:
        told = [
            f"a {OBJECTS[o][1]} {OBJECTS[o][0]} {CORNERS[c]}"
            for o, c in zip(self.objects, self.corners, strict=True)
        ]
        return f"{' and '.join(told)} on a {self.background} background"


def draw_pairs(n: int, seed: int) -> list[PairScene]:
    """n pairs at random, any of the 10,368 as likely."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 2]))
    corners = list(combinations(range(len(CORNERS)), 2))
    names = tuple(BACKGROUNDS)
    drawn = generator.integers(0, (len(names), len(corners), *[len(OBJECTS)] * 2), (n, 4))
    return [PairScene(names[b], corners[c], (o, p)) for b, c, o, p in drawn.tolist()]


def render_pairs(pairs: Sequence[PairScene], side: int, seed: int) -> np.ndarray:
    """One picture for each pair, with the jitter of `scenes.render`: (B, R, R, 3) uint8."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 3]))
    shake = generator.uniform(-1.0, 1.0, (len(pairs), 2, 3))
    out = np.empty((len(pairs), side, side, 3), np.float32)
    for picture, pair, both in zip(out, pairs, shake, strict=True):
        back = np.array(BACKGROUNDS[pair.background], np.float32)
        picture[:] = back
        for corner, number, shaken in zip(pair.corners, pair.objects, both, strict=True):
            shape, colour = OBJECTS[number]
            x, y = np.array(PLACES[CORNERS[corner]]) + scenes.PLACE_JITTER * shaken[:2]
            radius = scenes.RADIUS * (1 + scenes.SIZE_JITTER * shaken[2])
            centre_x, centre_y, radius = (np.array([v]) for v in (x, y, radius))
            mask = scenes.coverage(shape, centre_x, centre_y, radius, side)[0, :, :, None]
            picture += mask * (np.array(COLOURS[colour], np.float32) - back)
    return np.rint(out.clip(0, 255)).astype(np.uint8)


class PairJudge:
    """Names the pair whose rendering is nearest, quadrant by quadrant.

    Args:
        side: R; over 32 pixels pictures are averaged down to 32, as in `SceneJudge`.
    """

    def __init__(self, side: int) -> None:
        self.side = min(side, 32)
        half = self.side // 2
        shift = np.linspace(-1.0, 1.0, 5) * scenes.PLACE_JITTER
        size = scenes.RADIUS * (1 + np.array([-2 / 3, 0.0, 2 / 3]) * scenes.SIZE_JITTER)
        dx, dy, radius = (a.ravel() for a in np.meshgrid(shift, shift, size, indexing="ij"))
        self._quadrants = [
            (slice(int(y > 0.5) * half, None if y > 0.5 else half),
             slice(int(x > 0.5) * half, None if x > 0.5 else half))
            for x, y in (PLACES[name] for name in CORNERS)
        ]  # fmt: skip
        self._masks = []
        for name, (rows, columns) in zip(CORNERS, self._quadrants, strict=True):
            x, y = PLACES[name]
            masks = [scenes.coverage(s, x + dx, y + dy, radius, self.side) for s in SHAPES]
            whole = torch.from_numpy(np.stack(masks))  # (4, J, R, R)
            self._masks.append(whole[:, :, rows, columns].flatten(2))

    def judge(self, pictures: Tensor) -> list[tuple[PairScene, float]]:
        """The nearest pair of each picture and the root-mean-square distance to it.

        Args:
            pictures: (B, 3, R, R) float in [-1, 1].
        """
        empty, least = self._squares(pictures)
        gain, which = least.min(3)  # (3, B, 4)
        corners = list(combinations(range(len(CORNERS)), 2))
        total = torch.stack([empty + gain[..., i] + gain[..., j] for i, j in corners], 2)
        best, place = total.permute(1, 0, 2).flatten(1).min(1)  # over backgrounds and corners
        names = tuple(BACKGROUNDS)
        verdicts = []
        for row, (d2, k) in enumerate(zip(best.tolist(), place.tolist(), strict=True)):
            back, (i, j) = k // len(corners), corners[k % len(corners)]
            objects = int(which[back, row, i]), int(which[back, row, j])
            verdicts.append((PairScene(names[back], (i, j), objects), self._rmse(d2)))
        return verdicts

    def distances(self, pictures: Tensor, wanted: Sequence[PairScene]) -> list[float]:
        """Root-mean-square distance of each picture to the nearest rendering of its pair."""
        empty, least = self._squares(pictures)
        names = tuple(BACKGROUNDS)
        found = []
        for row, pair in enumerate(wanted):
            back = names.index(pair.background)
            d2 = float(empty[back, row])
            for corner, number in zip(pair.corners, pair.objects, strict=True):
                d2 += float(least[back, row, corner, number])
            found.append(self._rmse(d2))
        return found

    def _rmse(self, d2: float) -> float:
        return (max(0.0, d2) / (3 * self.side**2)) ** 0.5

    def _squares(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance to each empty background (3, B), and what each object in each corner
        adds to it at its nearest jitter (3, B, 4, 24), objects in the order of OBJECTS."""
        x = pictures.float().cpu()
        if x.shape[-1] > self.side:
            x = torch.nn.functional.avg_pool2d(x, x.shape[-1] // self.side)
        empty, least = [], []
        front = torch.tensor(list(COLOURS.values())) / 127.5 - 1
        for back in BACKGROUNDS.values():
            b = torch.tensor(back) / 127.5 - 1
            delta = front - b  # (6, 3)
            empty.append((x - b[:, None, None]).square().sum((1, 2, 3)))
            corners = []
            for (rows, columns), masks in zip(self._quadrants, self._masks, strict=True):
                y = x[:, :, rows, columns].flatten(2) - b[:, None]
                along = torch.einsum("bkp,sjp,ck->bscj", y, masks, delta)
                square = masks.square().sum(2)[:, None] * delta.square().sum(1)[:, None]
                corners.append((square - 2 * along).amin(3).flatten(1))
            least.append(torch.stack(corners, 1))
        return torch.stack(empty), torch.stack(least)


def write_data(task: Task, folder: Path, *, n: int, side: int, seed: int) -> Path:
    """Write a task's pictures, unless they are there; every caption (about) equally often."""
    if task == "label":
        for y, shape in enumerate(LABELS):
            captions = [c for c in scenes.TRAIN_CAPTIONS if scenes.parse(c).shape == shape]
            part = {"n": n // len(LABELS), "resolution": side, "seed": len(LABELS) * seed + y}
            scenes.write_folder(folder / shape, **part, captions=captions)
        return folder
    if task == "pair":
        info = {"generator": __name__, "version": 1, "n": n, "resolution": side, "seed": seed}
        return writers.write_folder(folder, _pair_samples(n, side, seed), info)
    return scenes.write_folder(folder, n=n, resolution=side, seed=seed)


def _pair_samples(n: int, side: int, seed: int) -> Iterator[tuple[np.ndarray, str]]:
    pairs = draw_pairs(n, seed)
    for start in range(0, n, 512):
        part = pairs[start : start + 512]
        pictures = render_pairs(part, side, seed * 1_000_003 + start)
        yield from zip(pictures, (pair.caption for pair in part), strict=True)


def real_pictures(task: Task, *, n: int, side: int, seed: int) -> Tensor:
    """(n, 3, R, R) in [-1, 1]: what a perfect model would draw for `conditions`."""
    if task == "pair":
        return to_tensor(render_pairs(draw_pairs(n, seed), side, seed))
    captions = scenes.TRAIN_CAPTIONS
    return to_tensor(scenes.render([captions[i % len(captions)] for i in range(n)], side, seed))


#: Of `strict`: two objects are off by twice the squares of one.
RMSE_BOUND_OF_PAIRS = SceneJudge.RMSE_BOUND * 2**0.5

#: Of evaluation: apart from those of the training pictures and of the held-out ones.
PAIRS_SEED = 77


def conditions(task: Task, n: int) -> list[str]:
    """What n pictures are asked to show: captions, or names of labels, or nothing."""
    if task == "pair":
        return [pair.caption for pair in draw_pairs(n, PAIRS_SEED)]
    captions = [scenes.TRAIN_CAPTIONS[7 * i % len(scenes.TRAIN_CAPTIONS)] for i in range(n)]
    if task == "caption":
        return captions
    return [scenes.parse(c).shape for c in captions] if task == "label" else [""] * n


def judge(task: Task, pictures: Tensor, side: int) -> dict[str, list[bool]]:
    """Which pictures, drawn for `conditions(task, len(pictures))`, are right, by what is asked.

    `strict`: shows all that was asked and lies within SceneJudge.RMSE_BOUND (or that of pairs) of a
    rendering, so that tasks can be compared. `joint`: shows all that was asked. And each attribute.
    """
    n = len(pictures)
    fields: dict[str, list[bool]] = {}
    if task == "pair":
        pairs = PairJudge(side).judge(pictures)
        near = [rmse <= RMSE_BOUND_OF_PAIRS for _, rmse in pairs]
        fields = _matches([pair for pair, _ in pairs], draw_pairs(n, PAIRS_SEED))
    else:
        verdicts = SceneJudge(side).judge(pictures)
        near = [v.rmse <= SceneJudge.RMSE_BOUND for v in verdicts]
        asked, seen = conditions(task, n), [v.attributes for v in verdicts]
        if task == "label":
            fields["shape"] = [s.shape == a for s, a in zip(seen, asked, strict=True)]
        elif task == "caption":
            fields = _matches(seen, [scenes.parse(caption) for caption in asked])
    joint = [all(row) for row in zip(*fields.values(), strict=True)] if fields else [True] * n
    strict = [a and b for a, b in zip(joint, near, strict=True)]
    return {"strict": strict} if task == "none" else {"strict": strict, "joint": joint, **fields}


def distances(task: Task, pictures: Tensor, side: int) -> Tensor:
    """Root-mean-square distance of each picture to the nearest rendering of what was asked.

    Args:
        task: Whose `conditions` the pictures were drawn for; without one, any rendering will do.
        pictures: (B, 3, R, R) in [-1, 1]; over 32 pixels they are averaged down to 32.
        side: R.

    Returns:
        (B,) float32, in units of [-1, 1].
    """
    n = len(pictures)
    if task == "pair":
        return torch.tensor(PairJudge(side).distances(pictures, draw_pairs(n, PAIRS_SEED)))
    found = SceneJudge(side).distances(pictures)  # (B, 360)
    if task == "caption":
        numbers = [scenes.CAPTIONS.index(caption) for caption in conditions(task, n)]
        return found[torch.arange(n), numbers]
    if task == "label":
        shapes = [scene.shape for scene in scenes.SCENES]
        allowed = [[shape == asked for shape in shapes] for asked in conditions(task, n)]
        found = found.masked_fill(~torch.tensor(allowed), torch.inf)
    return found.amin(1)


def _matches(seen: Sequence[Any], wanted: Sequence[Any]) -> dict[str, list[bool]]:
    """Field by field of two rows of named tuples."""
    return {
        name: [getattr(s, name) == getattr(w, name) for s, w in zip(seen, wanted, strict=True)]
        for name in wanted[0]._fields
    }
