"""Decoding untrusted pictures and captions, and the transform to a square tensor."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff.data.samples import caption_of, decode_caption, decode_image, parse_json
from fastdiff.data.transforms import to_square_tensor


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def picture(width: int = 9, height: int = 7) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_lossless_pictures_keep_their_pixels(file_format: str) -> None:
    image = decode_image(encode(picture(), file_format, lossless=True))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(picture()))


def test_transparency_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((1, 1), (255, 0, 0, 255))
    image = decode_image(encode(rgba))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (255, 0, 0)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decode_image(encode(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert decode_image(encode(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_and_cmyk_become_rgb() -> None:
    assert decode_image(encode(Image.new("L", (3, 3), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode(Image.new("LA", (3, 3), (77, 0)))).getpixel((0, 0)) == (255,) * 3
    assert decode_image(encode(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == (255,) * 3
    cmyk = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    ramp = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    image = decode_image(encode(Image.fromarray(ramp)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 0, 0)  # red at the top left, whatever way it is stored
    # The EXIF standard: which visual side the stored 0th row is, then the 0th column.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright[:, ::-1].swapaxes(0, 1),  # right, top
        7: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: upright[::-1].swapaxes(0, 1),  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(Image.fromarray(stored.copy()), exif=exif))
    assert image.size == (24, 16)
    assert np.array_equal(np.asarray(image), upright)


def test_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode(Image.new("1", (7200, 7200)))
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="7200x7200 pixels; at most 50 million"):
        decode_image(bomb)


def test_bomb_beyond_the_limit_of_pil_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        decode_image(encode(Image.new("1", (10_000, 9_500))))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_animation_is_refused(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animated"):
        decode_image(data)


def test_first_picture_of_an_mpo_is_taken() -> None:
    data = encode(Image.new("RGB", (8, 8), "red"), "MPO", save_all=True, append_images=[picture()])
    assert decode_image(data).getpixel((4, 4))[0] > 240


def test_other_formats_are_refused() -> None:
    for file_format in ("GIF", "BMP", "TIFF", "PPM"):
        with pytest.raises(ValueError, match="not JPEG, PNG or WebP"):
            decode_image(encode(picture(), file_format))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_errors(file_format: str) -> None:
    data = encode(picture(64, 64), file_format)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ValueError, match="picture"):
            decode_image(data[: int(len(data) * share)])


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_decoded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JPEG"):
        decode_image(pickle.dumps(Bomb(tmp_path / "ran")))
    assert not (tmp_path / "ran").exists()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_decode_or_raise_value_error(
    file_format: str, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(picture(20, 12), file_format))
    for place, value in damage:
        data[place % len(data)] = value
    try:
        image = decode_image(bytes(data))
    except ValueError:
        return
    assert image.mode == "RGB"


def test_captions() -> None:
    assert decode_caption(" ein grünes Kreuz\n".encode()) == "ein grünes Kreuz"
    for data, reason in ((b"caf\xe9", "UTF-8"), (b" \n", "empty"), (b"", "empty")):
        with pytest.raises(ValueError, match=reason):
            decode_caption(data)
    assert caption_of(parse_json(b'{"caption": "a"}'), "caption") == "a"
    rotten = {
        b'{"caption": null}': "missing",
        b"{}": "missing",
        b'{"caption": ""}': "empty",
        b'{"caption": 3}': "is int",
        b'{"caption": "\\ud800"}': "UTF-8",
        b"[1]": "is list",
        b'{"caption"': "not JSON",
        b'{"caption": "\xff"}': "UTF-8",
        b"[" * 100_000: "not JSON",
    }
    for data, reason in rotten.items():
        with pytest.raises(ValueError, match=reason):
            caption_of(parse_json(data), "caption")


def test_right_size_keeps_pixels() -> None:
    image = picture(16, 16)
    tensor = to_square_tensor(image, 16)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    back = ((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.asarray(image))
    assert torch.equal(to_square_tensor(image, 16, flip=True), tensor.flip(2))


def test_range_is_minus_one_to_one() -> None:
    assert to_square_tensor(Image.new("RGB", (5, 9), "white"), 4).unique().tolist() == [1.0]
    assert to_square_tensor(Image.new("RGB", (5, 9), "black"), 4).unique().tolist() == [-1.0]


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_it_is_the_resized_picture_cropped_at_its_centre(side: int) -> None:
    for width, height in ((96, 32), (32, 96)):
        # Half contrast: PIL clips between its two passes, whose order depends on the sizes.
        image = picture(width, height).point(lambda value: 64 + value // 2)
        whole = image.resize((width * side // 32, height * side // 32), Image.Resampling.BICUBIC)
        left, top = (whole.width - side) // 2, (whole.height - side) // 2
        crop = whole.crop((left, top, left + side, top + side))
        expected = to_square_tensor(crop, side)
        assert (to_square_tensor(image, side) - expected).abs().max() <= 2.01 / 127.5


def test_scaling_down_is_antialiased() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # sampled without a filter these stay black or white
    assert to_square_tensor(Image.fromarray(stripes), 32).abs().max() < 0.05


def test_a_long_strip_costs_no_memory() -> None:
    assert to_square_tensor(Image.new("RGB", (200_000, 1)), 64).shape == (3, 64, 64)


def test_transform_errors() -> None:
    with pytest.raises(ValueError, match="mode L; expected RGB"):
        to_square_tensor(Image.new("L", (4, 4)), 4)
    with pytest.raises(ValueError, match="image_size=0"):
        to_square_tensor(picture(), 0)
