"""Which checkpoint a run goes on from, and what may have changed since."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.training.checkpoint import latest_checkpoint, list_checkpoints
from fastdiff.training.config import Recipe, load, model_differences

log = logging.getLogger("fastdiff")


def find_checkpoint(recipe: Recipe, run: Path) -> Path | None:
    """The newest checkpoint of a run without damage; None if it has none at all.

    Raises:
        ValueError: It is of another model, or all are damaged.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        if list_checkpoints(run):
            raise ValueError(f"{run}: no checkpoint is whole; move the folder away to start anew")
        return None
    differing = model_differences(recipe, load(checkpoint / "recipe.yaml"))
    if differing:
        raise ValueError(
            f"{run} holds a run of another model; give another train.out, or the same values:\n  "
            + "\n  ".join(differing)
        )
    return checkpoint


def tell(
    checkpoint: Path, manifest: Mapping[str, Any], recipe: Recipe, data: str, world: int
) -> None:
    """Log what a run goes on from, and what is not as it was.

    Args:
        checkpoint: Its folder.
        manifest: Its manifest.
        recipe: The run's, now.
        data: Fingerprint of the data set, now.
        world: Number of ranks, now.
    """
    if manifest["data"] != data:
        log.warning(
            "%s was trained on other data than %s holds now; the run goes on with these",
            *(checkpoint, recipe.data.path),
        )
    if manifest["seed"] != recipe.train.seed:
        log.warning(
            "%s was trained with train.seed=%s; from here the data follow seed %s",
            *(checkpoint, manifest["seed"], recipe.train.seed),
        )
    if manifest["world"] != world:
        log.info("written by %d ranks, read by %d", manifest["world"], world)
    log.info("continuing from step %d (%s)", manifest["step"], checkpoint)
