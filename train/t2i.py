#!/usr/bin/env python
"""Train a text-to-image model.

    deepspeed train/t2i.py --config ascend_t2i_128 --data.path /data/shards   # GPUs, any number
    python train/t2i.py --config demo                                         # one process

Without arguments it trains the embedded demonstration. `--config NAME --help` lists every field of
a recipe; any can be overridden. The same command again continues an interrupted run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from fastdiff.data import scenes
from fastdiff.training.cli import log_to_stderr, parse_recipe
from fastdiff.training.config import Recipe

SCENES = 12_000

HINT = """\
Training the embedded demonstration (captioned scenes, a small model, minutes on a CPU).
The 590M text-to-image ASCEND of the paper:
    deepspeed train/t2i.py --config ascend_t2i_128 --data.path FOLDER
where FOLDER holds tar shards as img2dataset writes them, or images and a metadata.jsonl."""


def embedded_data(recipe: Recipe) -> Recipe:
    """Make the captioned scenes at the recipe's resolution, unless they are there."""
    folder = Path("runs/data") / f"scenes{recipe.side}"
    if int(os.environ.get("RANK", 0)) == 0:
        scenes.write_folder(folder, n=SCENES, resolution=recipe.side, seed=0)
    data = dataclasses.replace(recipe.data, path=str(folder))
    return dataclasses.replace(recipe, data=data)


def main() -> None:
    """Parse, make the embedded data if it is wanted, train."""
    assert __doc__ is not None
    bare = len([a for a in sys.argv[1:] if not a.startswith("--local_rank")]) == 0
    name, recipe = parse_recipe(sys.argv[1:], default="demo", description=__doc__)
    log_to_stderr()
    chief = int(os.environ.get("RANK", 0)) == 0
    if bare and chief:
        print(HINT, file=sys.stderr)
    if recipe.data.path is None:
        if not name.startswith("demo"):
            raise SystemExit(
                f"train/t2i.py: recipe {name} needs data: --data.path FOLDER (tar shards as "
                "img2dataset writes them, or images and a metadata.jsonl)"
            )
        try:
            recipe = embedded_data(recipe)
        except OSError as error:
            sys.exit(f"train/t2i.py: {error}")
    from fastdiff.data.cache import CacheFull
    from fastdiff.data.embeddings import WrongEncoder
    from fastdiff.data.faults import BadSampleError
    from fastdiff.training.loop import make_trainer

    try:
        trainer = make_trainer(recipe)
    except (OSError, ValueError, ImportError, CacheFull, WrongEncoder) as error:
        sys.exit(f"train/t2i.py: {error}")
    try:
        trainer.run()
    except (BadSampleError, CacheFull, WrongEncoder, FloatingPointError, OSError) as error:
        sys.exit(f"train/t2i.py: {error}")


if __name__ == "__main__":
    main()
