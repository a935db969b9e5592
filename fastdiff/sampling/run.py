"""From prompts or labels to files, on one process or many."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.sampling.output import Output


def draw_all(
    draw: Callable[[Sequence[int]], Tensor],
    output: Output,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Draw what is missing of an output, and write each batch while the next one is drawn.

    Batch k is pictures k batch_size .. (k + 1) batch_size - 1 and is drawn by rank k mod world, as
    a whole also where only some of it is missing: so a file has the same bytes on any number of
    ranks and after any interruption. One rank calls `output.finish()` when all have returned.

    Args:
        draw: Numbers of pictures to pictures (B, 3, H, W) in [-1, 1], on any device.
        output: Where they go.
        batch_size: Pictures drawn at once.
        rank, world: This process, and how many there are.
        progress: Called with the number of pictures that came, those already there first.

    Raises:
        ValueError: batch_size below 1, or pictures that are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"draw_all: batch_size={batch_size}, expected at least 1")
    batches = -(-output.count // batch_size)
    with ThreadPoolExecutor(1) as writer:
        pending = None
        for k in range(rank, batches, world):
            indices = range(k * batch_size, min((k + 1) * batch_size, output.count))
            if output.missing(indices):
                pixels = to_pixels(draw(indices))
                if pending is not None:
                    pending.result()
                pending = writer.submit(output.write, indices, pixels)
            if progress is not None:
                progress(len(indices))
        if pending is not None:
            pending.result()


def to_pixels(pictures: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8 on the host, rounded.

    Raises:
        ValueError: Numbers that are not finite: the network or the sampler diverged.
    """
    levels = ((pictures.float() + 1.0) * 127.5).permute(0, 2, 3, 1).cpu()
    if not bool(levels.isfinite().all()):
        raise ValueError("draw_all: pictures are not finite; the model or the sampler diverged")
    return levels.round_().clamp_(0, 255).to(torch.uint8).contiguous().numpy()


def prompts_of(file: str | Path) -> list[str]:
    """Prompts of a file: one a line, or the column "Prompts" (or prompt, caption, text) of a table.

    Args:
        file: A text, or a .csv or .tsv with a header, such as DrawBench's. Blank ones are left out.

    Raises:
        OSError: It cannot be read.
        ValueError: A table without such a column, or no prompt.
    """
    path = Path(file)
    if path.suffix.lower() in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as table:
            rows = csv.DictReader(table, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            names = {name.strip().lower(): name for name in rows.fieldnames or ()}
            columns = ("prompts", "prompt", "caption", "text")
            column = next((names[c] for c in columns if c in names), None)
            if column is None:
                raise ValueError(f"{path}: columns {list(names)}; expected one of {columns}")
            prompts = [row[column] or "" for row in rows]
    else:
        prompts = path.read_text("utf-8-sig").splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


def weights_digest(model: nn.Module) -> str:
    """Names, dtypes, shapes and values of a model's weights as 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
