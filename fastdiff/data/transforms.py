"""From a picture of any size to the square that a model is trained on and judged by.

A FID depends on the crop and the filter that made the data, so each data set of the paper has its
own by name (`named_transform`), and evaluation stores both beside the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32, contiguous, in [-1, 1]: x / 127.5 - 1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


@dataclass(frozen=True, kw_only=True)
class SquareTransform:
    """Crop a square and scale it to `size`, pixels staying 8-bit.

    The largest square in the centre is that of the scaled picture (torchvision's Resize, then
    CenterCrop); a named crop is cut first and scaled alone.

    Args:
        name: as `named_transform` takes it.
        size: side of the result in pixels.
        crop: (centre x, centre y, side) in pixels, or None for the largest square in the centre.
        filter: PIL's antialiased one; unused where the crop has the size already.
        expects: (width, height) that pictures must have, where `crop` names pixels of them.
        reducing_gap: PIL's shortcut for large pictures, None for the filter alone.
    """

    name: str
    size: int
    crop: tuple[int, int, int] | None = None
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    expects: tuple[int, int] | None = None
    reducing_gap: float | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The square as (size, size, 3) uint8.

        Raises:
            ValueError: not RGB, or not of the expected size.
        """
        if image.mode != "RGB":
            raise ValueError(f"{self.name}: image has mode {image.mode}; expected RGB")
        if self.expects is not None and image.size != self.expects:
            width, height = self.expects
            raise ValueError(
                f"{self.name}: picture has {image.width}x{image.height} pixels; "
                f"expected {width}x{height}"
            )
        if self.crop is None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # The filter reaches beyond the box: as if the whole were scaled and then cropped.
            box = (left, top, left + side, top + side)
        else:
            x, y, side = self.crop
            image = image.crop((x - side // 2, y - side // 2, x + side // 2, y + side // 2))
            box = (0, 0, side, side)
        size, filter = (self.size, self.size), Image.Resampling[self.filter.upper()]
        return np.array(image.resize(size, filter, box=box, reducing_gap=self.reducing_gap))

    def tensor(self, image: Image.Image, flip: bool = False) -> torch.Tensor:
        """The square as a model takes it: (3, size, size) float32 in [-1, 1]; flip mirrors it."""
        pixels = self(image)[None]
        return to_tensor(pixels[:, :, ::-1].copy() if flip else pixels)[0]

    @property
    def crop_text(self) -> str:
        """The crop in words, to be stored beside a result."""
        if self.crop is None:
            return "largest square in the centre"
        x, y, side = self.crop
        return f"{side}x{side} centred at x {x}, y {y}"

    @property
    def resize_text(self) -> str:
        """Size and filter in words, to be stored beside a result."""
        gap = "" if self.reducing_gap is None else f", reducing_gap {self.reducing_gap:g}"
        return f"{self.size}x{self.size}, PIL {self.filter}{gap}"


def to_square_tensor(image: Image.Image, image_size: int, flip: bool = False) -> torch.Tensor:
    """Scale the shorter side to `image_size`, crop the centre, and map pixels to [-1, 1].

    Only the central square is scaled, so that a long strip costs no memory: by PIL's antialiased
    bicubic filter, after an integer box reduction that leaves at least three times the size (the
    filter's own result to about 1 %, in half the time). Smaller pictures are scaled up; one of
    exactly the right size keeps its pixels.

    Args:
        image: mode RGB, any size.
        image_size: side of the square in pixels.
        flip: mirror left and right.

    Returns:
        (3, image_size, image_size) float32, contiguous, in [-1, 1].

    Raises:
        ValueError: not RGB, or an image_size below 1.
    """
    if image_size < 1:
        raise ValueError(f"to_square_tensor: image_size={image_size}; expected at least 1")
    return _stream_transform("to_square_tensor", image_size).tensor(image, flip)


def _stream_transform(name: str, size: int) -> SquareTransform:
    return SquareTransform(name=name, size=size, filter="bicubic", reducing_gap=3.0)


def _celeba(size: int) -> SquareTransform:
    return SquareTransform(name=f"celeba{size}", size=size, crop=(89, 121, 128), expects=(178, 218))


#: The data sets of the paper. CelebA's crop is the one of DDIM's and U-ViT's reference statistics,
#: on the aligned pictures (`img_align_celeba`); the paper names no filter, and these codes scale by
#: PIL's bilinear one. 256 pixels of CelebA are that crop scaled up (reading).
TRANSFORMS = {
    transform.name: transform
    for transform in (
        SquareTransform(name="cifar10", size=32, expects=(32, 32)),
        _celeba(64),
        _celeba(128),
        _celeba(256),
        SquareTransform(name="lsun256", size=256),
        SquareTransform(name="cub256", size=256),
        SquareTransform(name="celebahq256", size=256),
        SquareTransform(name="celebahq512", size=512),
    )
}


def named_transform(name: str) -> SquareTransform:
    """A transform by name: one of TRANSFORMS, or `squareN`.

    `square64` gives the pixels of `to_square_tensor(image, 64)`: the training stream's own.

    Raises:
        ValueError: an unknown name.
    """
    if name in TRANSFORMS:
        return TRANSFORMS[name]
    size = name.removeprefix("square")
    if size != name and size.isdecimal() and int(size) > 0:
        return _stream_transform(name, int(size))
    raise ValueError(
        f"named_transform: {name!r}; expected squareN (N pixels) or {', '.join(TRANSFORMS)}"
    )
