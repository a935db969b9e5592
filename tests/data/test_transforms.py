"""The named crops of the paper's data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data.transforms import TRANSFORMS, named_transform, to_square_tensor


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_celeba_is_128_pixels_around_x_89_y_121() -> None:
    image = picture(178, 218)
    cropped = np.asarray(image)[121 - 64 : 121 + 64, 89 - 64 : 89 + 64]
    assert np.array_equal(named_transform("celeba128")(image), cropped)
    for size in (64, 256):
        scaled = Image.fromarray(cropped).resize((size, size), Image.Resampling.BILINEAR)
        assert np.array_equal(named_transform(f"celeba{size}")(image), np.asarray(scaled))


def test_celeba_refuses_pictures_that_were_cropped_before() -> None:
    with pytest.raises(ValueError, match="celeba64: picture has 128x128 pixels; expected 178x218"):
        named_transform("celeba64")(picture(128, 128))


@pytest.mark.parametrize("name", ["lsun256", "cub256", "celebahq256", "celebahq512"])
def test_the_others_take_the_largest_square_in_the_centre(name: str) -> None:
    transform = named_transform(name)
    side = transform.size
    # Half contrast: PIL clips between its two passes, whose order depends on the sizes.
    image = picture(96, 64).point(lambda value: 64 + value // 2)
    scaled = image.resize((side * 3 // 2, side), Image.Resampling.BILINEAR)
    expected = np.asarray(scaled)[:, side // 4 : side // 4 + side].astype(int)
    assert np.abs(transform(image) - expected).max() <= 1
    right = picture(side, side)
    assert np.array_equal(transform(right), np.asarray(right))


def test_cifar_keeps_its_pixels() -> None:
    assert np.array_equal(named_transform("cifar10")(picture(32, 32)), np.asarray(picture(32, 32)))
    with pytest.raises(ValueError, match="expected 32x32"):
        named_transform("cifar10")(picture(33, 32))


def test_square_is_what_the_training_stream_makes() -> None:
    image = picture(300, 200)
    for flip in (False, True):
        tensor = named_transform("square24").tensor(image, flip)
        assert torch.equal(tensor, to_square_tensor(image, 24, flip))
    assert torch.equal(tensor, named_transform("square24").tensor(image).flip(2))


def test_names_and_words() -> None:
    assert all(named_transform(name).name == name for name in TRANSFORMS)
    celeba = named_transform("celeba64")
    assert celeba.crop_text == "128x128 centred at x 89, y 121"
    assert celeba.resize_text == "64x64, PIL bilinear"
    assert "bicubic" in named_transform("square64").resize_text
    for name in ("celeba63", "square", "square0", "square-4", ""):
        with pytest.raises(ValueError, match=r"named_transform: .* celeba64"):
            named_transform(name)


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode L; expected RGB"):
        named_transform("lsun256")(Image.new("L", (256, 256)))
