"""The real digits: folder, split and judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data import digits, open_dataset, to_square_tensor


@pytest.fixture(scope="module")
def judge() -> digits.DigitJudge:
    return digits.DigitJudge()


def test_split_is_fixed_and_disjoint() -> None:
    train, train_digits = digits.load()
    held_out, held_out_digits = digits.load(held_out=True)
    assert (train.shape, held_out.shape) == ((1347, 8, 8, 3), (450, 8, 8, 3))
    assert train.dtype == np.uint8
    assert train.max() == 255
    assert not {p.tobytes() for p in train} & {p.tobytes() for p in held_out}
    assert np.bincount(train_digits).min() > 125
    assert np.bincount(held_out_digits).min() > 40


def test_folder_is_read_as_any_data(tmp_path: Path, judge: digits.DigitJudge) -> None:
    dataset = open_dataset(digits.write_folder(tmp_path / "digits", held_out=True))
    assert len(dataset) == 450
    assert {dataset[i].caption for i in range(450)} == set(digits.CAPTIONS)
    captions = [dataset[i].caption for i in range(450)]
    for size in (8, 16, 32):
        pictures = torch.stack([to_square_tensor(dataset[i].image, size) for i in range(450)])
        assert judge.agreement(pictures, captions) >= 0.96
    digits.write_folder(tmp_path / "digits", held_out=True)
    with pytest.raises(FileExistsError, match="held_out=True, asked False"):
        digits.write_folder(tmp_path / "digits")


def test_judge_reads_digits_it_has_not_seen(judge: digits.DigitJudge) -> None:
    assert judge.held_out_accuracy >= 0.97


def test_judge_is_at_chance_on_noise_and_on_other_captions(judge: digits.DigitJudge) -> None:
    captions = [digits.CAPTIONS[i % 10] for i in range(2000)]
    noise = torch.randn(2000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert abs(judge.agreement(noise, captions) - 0.1) < 0.03
    pictures, target = digits.load(held_out=True)
    other = [digits.CAPTIONS[(d + 3) % 10] for d in target]
    assert judge.agreement(digits.to_tensor(pictures), other) < 0.02


def test_errors(judge: digits.DigitJudge) -> None:
    assert digits.parse("a handwritten seven") == 7
    with pytest.raises(ValueError, match="'a seven'; expected one like 'a handwritten seven'"):
        digits.parse("a seven")
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 12\); expected .* multiple of 8"):
        judge.judge(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        judge.agreement(torch.zeros(1, 3, 8, 8), digits.CAPTIONS[:2])
