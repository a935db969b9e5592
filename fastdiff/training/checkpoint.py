"""Checkpoints of a run: written aside, then put in place by one rename.

    RUN/checkpoints/step-00000500/
        manifest.json      step, ranks, fingerprint of the data, sizes of all files; written last
        recipe.yaml        the run's resolved recipe
        ema.safetensors    float32 averaged weights
        text/              the small text encoder with its vocabulary, where the run has one
        trainer.safetensors or zero/    weights and optimiser state, as the engine writes them

A folder without a manifest, or with a file of another size, does not count: the one before it does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastdiff.text import SmallTextEncoder
from fastdiff.training.config import Recipe, save
from fastdiff.training.ema import EMA
from fastdiff.training.engine import Engine

log = logging.getLogger("fastdiff")

_NAME = re.compile(r"step-(\d{8})$")
_MANIFEST = "manifest.json"
EMA_FILE = "ema.safetensors"
TEXT_FOLDER = "text"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and what its position in the data means.

    Args:
        step: Optimiser steps made.
        images: Images seen, over all ranks: the whole state of the data.
        seed: Of the run.
        world: Number of ranks.
        data: Fingerprint of the data set.
        bad: What `BadSampleLimit.total` counted, over all ranks and resumes.
    """

    step: int
    images: int
    seed: int
    world: int
    data: str
    bad: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    progress: Progress,
    recipe: Recipe,
    engine: Engine,
    ema: EMA | None,
    text: SmallTextEncoder | None,
) -> None:
    """Write a checkpoint; collective. Whole ones beyond the `keep` newest go.

    A checkpoint of a later step, left by a run that went on from an earlier one, goes too.

    Args:
        run: The run's folder.
        progress: How far the run is.
        recipe: The run's.
        engine: Writes weights and optimiser state.
        ema: The average, on rank 0.
        text: The small text encoder, where the run has one.
    """
    step = progress.step
    root = run / "checkpoints"
    final, partial = root / f"step-{step:08d}", root / f".partial-{step:08d}"
    if engine.rank == 0:
        for left in root.glob(".partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    engine.save(partial)
    engine.barrier()
    if engine.rank == 0 and ema is not None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, partial / EMA_FILE)
        save(recipe, partial / "recipe.yaml")
        if text is not None:
            text.save_pretrained(partial / TEXT_FOLDER)
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        sizes = {str(p.relative_to(partial)): p.stat().st_size for p in files}
        manifest = {**asdict(progress), "files": sizes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in (*files, partial / _MANIFEST):
            _sync(file)
        for folder in {p.parent for p in files} | {partial}:
            _sync(folder)
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        for folder in (root, run):
            _sync(folder)
        names = list_checkpoints(run)
        whole = [p for p in names if p.name <= final.name and read_manifest(p) is not None]
        for old in set(names) - set(whole[-recipe.train.keep :]):
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
        Progress(**{f.name: manifest[f.name] for f in fields(Progress) if f.name in manifest})
        sizes = manifest["files"].items()
        whole = all((checkpoint / name).stat().st_size == size for name, size in sizes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; a damaged one is passed over with a warning."""
    for checkpoint in reversed(list_checkpoints(run)):
        if read_manifest(checkpoint) is not None:
            return checkpoint
        log.warning("checkpoint %s is not whole; the one before it is used", checkpoint)
    return None


def progress_of(run: Path) -> Progress:
    """How far a run's newest whole checkpoint is.

    Raises:
        FileNotFoundError: There is none.
    """
    checkpoint = latest_checkpoint(run)
    manifest = None if checkpoint is None else read_manifest(checkpoint)
    if manifest is None:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    return Progress(**{f.name: manifest[f.name] for f in fields(Progress) if f.name in manifest})


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
