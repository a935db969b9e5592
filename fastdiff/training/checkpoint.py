"""Checkpoints of a run: written aside, then put in place by one rename.

    RUN/checkpoints/step-00000500/
        manifest.json      step, ranks, fingerprint of the data, sizes of all files; written last
        recipe.yaml        the run's resolved recipe
        ema.safetensors    float32 averaged weights
        trainer.safetensors or zero/    weights and optimiser state, as the engine writes them

A folder without a manifest, or with a file of another size, does not count: the one before it does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fastdiff.training.config import Recipe, save
from fastdiff.training.ema import EMA
from fastdiff.training.engine import Engine

log = logging.getLogger("fastdiff")

_NAME = re.compile(r"step-(\d{8})$")
_MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"


def save_checkpoint(
    run: Path, step: int, recipe: Recipe, engine: Engine, ema: EMA | None, *, data: str
) -> None:
    """Write a checkpoint of `step` optimiser steps; collective. Older ones beyond `keep` go.

    Args:
        run: The run's folder.
        step: Optimiser steps made.
        recipe: The run's.
        engine: Writes weights and optimiser state.
        ema: The average, on rank 0.
        data: Fingerprint of the data set.
    """
    root = run / "checkpoints"
    final, partial = root / f"step-{step:08d}", root / f".partial-{step:08d}"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    engine.save(partial)
    engine.barrier()
    if engine.rank == 0 and ema is not None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, partial / EMA_FILE)
        save(recipe, partial / "recipe.yaml")
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in files}
        manifest = {"step": step, "world": engine.world, "data": data, "files": sizes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in (*files, partial / _MANIFEST):
            _sync(file)
        for folder in {p.parent for p in files} | {partial}:
            _sync(folder)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(root)
        for old in list_checkpoints(run)[: -recipe.train.keep]:
            shutil.rmtree(old, ignore_errors=True)
    engine.barrier()


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    root = run / "checkpoints"
    return sorted(p for p in root.glob("step-*") if _NAME.search(p.name))


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None if the checkpoint is not whole."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        sizes = manifest["files"].items()
        whole = all((checkpoint / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; a damaged one is passed over with a warning."""
    for checkpoint in reversed(list_checkpoints(run)):
        if read_manifest(checkpoint) is not None:
            return checkpoint
        log.warning("checkpoint %s is not whole; the one before it is used", checkpoint)
    return None


def load_ema(checkpoint: Path, ema: EMA) -> None:
    """Read the averaged weights of a checkpoint."""
    from safetensors.torch import load_file

    ema.load_state_dict(load_file(checkpoint / EMA_FILE))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
