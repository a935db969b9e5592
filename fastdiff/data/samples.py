"""One captioned picture, the error for one that is rotten, and the decoding of untrusted bytes.

Nothing here unpickles; only JPEG, PNG and WebP decoders are reachable, and the size of a picture
is checked before a pixel of it is decoded.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

MAX_PIXELS = 50_000_000
MAX_IMAGE_BYTES = 1 << 28
MAX_CAPTION_BYTES = 1 << 20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# EXIF orientation to the operation that undoes it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Sample:
    """A picture (PIL, mode RGB), its caption and its key: unique in its shard.

    context: (tokens, width) bfloat16, the caption's stored text features where the data set has
    them.
    """

    image: Image.Image
    caption: str
    key: str
    context: Tensor | None = None


class BadSample(Exception):
    """A sample that cannot be used: its key, its shard (or metadata file) and the reason.

    lost: it is the shard that cannot be used, with all of its samples.
    """

    def __init__(self, key: str, shard: str, reason: str, lost: bool = False) -> None:
        super().__init__(key, shard, reason, lost)
        self.key, self.shard, self.reason, self.lost = key, shard, reason, lost

    def __str__(self) -> str:
        return f"bad sample {self.key!r} in {self.shard}: {self.reason}"


class CaptionedImages(Protocol):
    """What `open_dataset` returns: a map-style data set, the same in every process."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class ShardedImages(CaptionedImages, Protocol):
    """A data set of shards: their sizes decide the order, and they may be fetched ahead."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples of each shard; samples are numbered through them."""

    def check_window(self, shards: int) -> None:
        """Raise ValueError where so many shards cannot be read at the same time."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background, in this order; what was asked before is forgotten."""


def decode_caption(data: bytes) -> str:
    """Text of a caption: UTF-8, stripped, not empty.

    Raises:
        ValueError: not UTF-8, or empty.
    """
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8 (byte {error.start})") from None
    if not text:
        raise ValueError("caption is empty")
    return text


def caption_of(fields: object, name: str) -> str:
    """The caption under `name` in a parsed JSON object.

    Raises:
        ValueError: not an object, nothing there, not a text, or empty.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"JSON is {type(fields).__name__}; expected an object")
    if fields.get(name) is None:
        raise ValueError(f"caption is missing (no {name!r})")
    text = fields[name]
    if not isinstance(text, str):
        raise ValueError(f"caption is {type(text).__name__}; expected a text")
    # A lone surrogate is valid JSON but no text, and would fail in every tokenizer.
    return decode_caption(text.encode("utf-8", "surrogatepass"))


def parse_json(data: bytes) -> object:
    """Parsed JSON.

    Raises:
        ValueError: not UTF-8 or not JSON.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def decode_image(data: bytes) -> Image.Image:
    """Decode one JPEG, PNG or WebP picture, upright, as 8-bit RGB.

    Transparency is composited on white, 16-bit grey keeps its high byte, palettes, grey and CMYK
    are converted, EXIF orientation is applied. Animations are refused, as one frame of them is not
    what the caption describes; of a JPEG that carries more pictures (MPO) the first is taken.

    Args:
        data: the encoded picture.

    Raises:
        ValueError: over 50 megapixels (checked before decoding), animated, truncated, or none of
            the three formats.
    """
    with warnings.catch_warnings():
        # PIL warns about many harmless oddities of web pictures, once per picture and worker.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"picture has {image.width}x{image.height} pixels; at most "
                    f"{MAX_PIXELS / 1e6:.0f} million are decoded"
                )
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError("picture is animated")
            image.load()
            return _to_rgb(_turn_upright(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"picture is too large: {error}") from None
        except Image.UnidentifiedImageError:
            raise ValueError("picture is not JPEG, PNG or WebP") from None
        # PIL's decoders raise nearly anything on rotten bytes (OSError, SyntaxError, struct.error).
        except Exception as error:
            raise ValueError(f"picture does not decode: {error}") from None


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    # Rotten EXIF around a sound picture is common on the web and says nothing about orientation.
    except Exception:
        return image
    operation = _UPRIGHT.get(orientation)
    return image if operation is None else image.transpose(operation)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # PIL's own conversion clips 16-bit values at 255.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    # PIL's conversion copies a picture that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")
