"""Real data without a download: scikit-learn's 1797 handwritten 8x8 digits, with captions.

A fixed quarter of them is held out: pictures to train on and to fit the judge come from the rest,
so the judge's accuracy is measured on digits that neither has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from fastdiff.data import writers
from fastdiff.data.transforms import to_tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {name}" for name in NAMES)
SIDE = 8
_LEVELS = 16  # ink per pixel is 0..16


def parse(caption: str) -> int:
    """The digit that a caption names.

    Raises:
        ValueError: not one of the ten captions.
    """
    if caption not in CAPTIONS:
        raise ValueError(f"parse: {caption!r}; expected one like {CAPTIONS[7]!r}")
    return CAPTIONS.index(caption)


@cache
def _split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    return tuple(
        train_test_split(
            digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
        )
    )


def load(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The digits as pictures, white on black.

    Args:
        held_out: the quarter that is not for training, instead of the rest.

    Returns:
        Pictures (n, 8, 8, 3) uint8 and digits (n,) int64; n is 1347, held out 450.
    """
    train, test, train_digits, test_digits = _split()
    ink, target = (test, test_digits) if held_out else (train, train_digits)
    grey = np.rint(ink * (255 / _LEVELS)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1), target.astype(np.int64)


def write_folder(path: str | Path, *, held_out: bool = False) -> Path:
    """Write the digits as a folder with `metadata.jsonl`; nothing to do if they are there already.

    Args:
        path: the folder.
        held_out: the quarter that is not for training, instead of the rest.

    Raises:
        FileExistsError: something else is at `path`.
    """
    pictures, target = load(held_out)
    info = {"generator": "fastdiff.data.digits", "version": 1, "held_out": held_out}
    samples = ((p, CAPTIONS[d]) for p, d in zip(pictures, target, strict=True))
    return writers.write_folder(path, samples, info)


class DigitJudge:
    """Reads digits by a support vector machine fitted on the real ones (RBF, gamma 0.001).

    Attributes:
        held_out_accuracy: share right of the 450 real digits that were not fitted, about 0.99.
    """

    def __init__(self) -> None:
        from sklearn.svm import SVC

        pictures, target = load()
        self._classifier = SVC(gamma=0.001).fit(_features(to_tensor(pictures)), target)
        pictures, target = load(held_out=True)
        self.held_out_accuracy = float(np.mean(self.judge(to_tensor(pictures)) == target))

    def judge(self, pictures: torch.Tensor) -> np.ndarray:
        """The digit that each picture is nearest to.

        Args:
            pictures: (B, 3, S, S) float in [-1, 1], S a multiple of 8; averaged down to 8x8 grey.

        Returns:
            (B,) int64.

        Raises:
            ValueError: another shape.
        """
        side = pictures.shape[-1]
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, side, side) or side % SIDE:
            raise ValueError(
                f"DigitJudge: pictures {tuple(pictures.shape)}; expected (B, 3, S, S) with S a "
                f"multiple of {SIDE}"
            )
        return self._classifier.predict(_features(pictures)).astype(np.int64)

    def agreement(self, pictures: torch.Tensor, captions: Sequence[str]) -> float:
        """Share of pictures that show the digit of their caption; chance is 10 %.

        Args:
            pictures: (B, 3, S, S) float in [-1, 1].
            captions: B captions.

        Raises:
            ValueError: no pictures, or another number of captions than of pictures.
        """
        if len(captions) != len(pictures) or len(captions) == 0:
            raise ValueError(
                f"DigitJudge: {len(pictures)} pictures and {len(captions)} captions; "
                "expected as many, and at least one"
            )
        wanted = np.array([parse(caption) for caption in captions])
        return float(np.mean(self.judge(pictures) == wanted))


def _features(pictures: torch.Tensor) -> np.ndarray:
    grey = pictures.detach().float().cpu().mean(1, keepdim=True)
    grey = torch.nn.functional.avg_pool2d(grey, pictures.shape[-1] // SIDE)
    ink = (grey.clamp(-1, 1) + 1) * (_LEVELS / 2)
    return ink.flatten(1).numpy()
