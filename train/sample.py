#!/usr/bin/env python
"""Draw pictures for prompts with a trained text-to-image model.

    python train/sample.py --run runs/demo "a green cross on a white background at the top left"
    python train/sample.py --run runs/demo --prompts-file prompts.txt --count 4 --guidance 3

Writes a PNG grid, the prompt under each picture, drawn with the averaged weights of the newest
checkpoint.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to draw.

    Args:
        prompts: One or several; none: those of the recipe.
        run: Folder of a run.
        prompts_file: Text file with a prompt a line, in addition.
        out: The PNG; default `samples.png` in the run's folder.
        count: Pictures for each prompt.
        seed: Of the first picture; the next one has seed + 1.
        guidance: Scale of classifier-free guidance, 1 = none; default the recipe's.
        steps: DDIM steps; default the recipe's.
        device: "cuda" | "cpu"; default what there is.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    run: Path = Path("runs/demo")
    prompts_file: Path | None = None
    out: Path | None = None
    count: int = 1
    seed: int = 0
    guidance: float | None = None
    steps: int | None = None
    device: str | None = None


def main() -> None:
    """Load the run, draw, write the grid."""
    options = tyro.cli(Options, description=__doc__)
    from tqdm import tqdm

    from fastdiff.grid import picture_grid
    from fastdiff.training.loop import load_run

    if options.count < 1 or options.seed < 0 or (options.guidance or 0) < 0:
        sys.exit("train/sample.py: --count must be at least 1, --seed and --guidance at least 0")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        learner, recipe = load_run(options.run, device)
        prompts = list(options.prompts)
        if options.prompts_file is not None:
            prompts += [x for x in options.prompts_file.read_text().splitlines() if x.strip()]
        steps = recipe.sample.steps if options.steps is None else options.steps
        if not 1 <= steps <= recipe.diffusion.steps:
            raise ValueError(f"--steps {steps}, expected 1 to {recipe.diffusion.steps}")
    except (OSError, ValueError) as error:
        sys.exit(f"train/sample.py: {error}")
    captions = [p for p in prompts or recipe.sample.prompts for _ in range(options.count)]
    if not captions:
        sys.exit("train/sample.py: no prompts; give some, or --prompts-file")
    with tqdm(total=len(captions), unit="picture", desc="drawing") as bar:
        pictures = learner.draw(
            captions,
            range(options.seed, options.seed + len(captions)),
            steps=steps,
            guidance=recipe.sample.guidance if options.guidance is None else options.guidance,
            progress=bar.update,
        )
    out = options.out or options.run / "samples.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(pictures, captions).save(out)
    print(out)


if __name__ == "__main__":
    main()
