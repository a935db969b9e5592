"""Pictures for people: a grid with a caption under each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_uint8(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) float in [-1, 1] to uint8 in [0, 255], rounded."""
    return ((pictures.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def picture_grid(
    pictures: Tensor,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    min_side: int = 128,
) -> Image:
    """Lay pictures out in a grid, captions drawn under them.

    Args:
        pictures: (B, 3, H, W) float in [-1, 1]; small ones are enlarged by whole factors, each
            pixel a sharp square.
        captions: B texts, or None.
        columns: Pictures in a row; None = about square, at most 8.
        min_side: Pixels that a picture's shorter side gets at least.

    Returns:
        A PIL image.

    Raises:
        ValueError: No pictures, or another number of captions.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = pictures.shape
    if count == 0 or (captions is not None and len(captions) != count):
        given = 0 if captions is None else len(captions)
        raise ValueError(f"picture_grid: {count} pictures and {given} captions, expected as many")
    columns = columns or min(8, max(1, round(count**0.5 + 0.2)))
    factor = max(1, -(-min_side // min(height, width)))
    w, h = width * factor, height * factor
    gap = 8
    font = ImageFont.load_default(size=13)
    lines = [textwrap.wrap(c, max(8, w // 7)) for c in captions] if captions is not None else []
    text_height = 16 * max((len(x) for x in lines), default=0) + (4 if lines else 0)
    rows = -(-count // columns)
    size = (columns * (w + gap) + gap, rows * (h + text_height + gap) + gap)
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(to_uint8(pictures).permute(0, 2, 3, 1).cpu().numpy()):
        row, column = divmod(index, columns)
        x, y = gap + column * (w + gap), gap + row * (h + text_height + gap)
        image = Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + w, y + h), outline=(200, 200, 200))
        for number, line in enumerate(lines[index] if lines else ()):
            draw.text((x, y + h + 3 + 16 * number), line, fill=(40, 40, 40), font=font)
    return sheet
