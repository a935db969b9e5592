"""Checkpoints of a run: written aside, checked by their hashes, put in place by one rename.

    RUN/checkpoints/step-00000500/
        manifest.json      step, images, shapes of the parameters, SHA-256 of all files; last
        recipe.yaml        the run's resolved recipe
        state-00000-of-00002.safetensors, ...    each rank's share of weights, moments and average
        text/              tokens of the small text encoder, where the run has one

A folder without a manifest, or with a file that is not as the manifest says, does not count: the
one before it does. The shares say which elements they are (`fastdiff.training.shares`), so any
number of ranks reads a checkpoint, under any ZeRO stage or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.text import SmallTextEncoder
from fastdiff.training.config import Recipe, save
from fastdiff.training.shares import SavedState, write_state

log = logging.getLogger("fastdiff")

_NAME = re.compile(r"step-(\d{8})$")
_MANIFEST = "manifest.json"
_CHUNK = 1 << 22
FORMAT = 2
TEXT_FOLDER = "text"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and what its position in the data means.

    Args:
        step: Optimiser steps made.
        images: Images seen, over all ranks: the whole state of the data.
        seed: Of the run.
        world: Number of ranks that wrote it.
        data: Fingerprint of the data set.
        bad: What `BadSampleLimit.total` counted, over all ranks and resumes.
        scaler: Of float16's loss scale.
    """

    step: int
    images: int
    seed: int
    world: int
    data: str
    bad: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A rank's part of a checkpoint, in host memory, while training goes on.

    Args:
        tensors: "KIND/NAME" to (N,) float32 on the CPU.
        starts: Number of the first element of each NAME's share.
        shapes: Of all whole parameters, by name.
        updates: Adam's number of updates.
    """

    tensors: Mapping[str, Tensor]
    starts: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    updates: int


@dataclass(frozen=True)
class Ranks:
    """What a writer needs of the process group.

    Args:
        rank: This process.
        world: Number of processes.
        gather: A value of each rank, on every rank. Collective.
    """

    rank: int
    world: int
    gather: Callable[[Any], list[Any]]


class CheckpointWriter:
    """Writes a run's checkpoints beside the training, one at a time.

    `start` and `commit` are collective and called from the training thread; between them each rank
    writes its own file in a thread of its own. Whatever goes wrong on any rank (a full disk, say)
    ends that checkpoint alone: the run goes on, older checkpoints stay, the error is logged.

    Args:
        run: The run's folder, which all ranks see.
        ranks: The process group.
        keep: Newest checkpoints kept.
        keep_every: Those of steps divisible by it are kept for good; None: no others.

    Attributes:
        saved: Step of the newest checkpoint that is in place, None before the first.
    """

    def __init__(self, run: Path, ranks: Ranks, *, keep: int, keep_every: int | None) -> None:
        self.run, self.ranks = run, ranks
        self.keep, self.keep_every = keep, keep_every
        self.saved: int | None = None
        self._progress: Progress | None = None
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._thread: threading.Thread | None = None
        self._files: dict[str, dict[str, Any]] = {}
        self._error: OSError | None = None

    @property
    def in_flight(self) -> int | None:
        """Step of the checkpoint that is being written; the same on every rank."""
        return None if self._progress is None else self._progress.step

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        progress: Progress,
        snapshot: Snapshot,
        recipe: Recipe,
        text: SmallTextEncoder | None = None,
    ) -> None:
        """Begin to write a checkpoint, after the one in flight.

        Args:
            progress: How far the run is.
            snapshot: This rank's part; it may not change until `commit`.
            recipe: The run's.
            text: The small text encoder, for its vocabulary.
        """
        self.commit()
        self._progress, self._shapes = progress, snapshot.shapes
        self._files, self._error = {}, None
        partial = self._partial
        if self.ranks.rank == 0:
            try:
                for left in partial.parent.glob(".partial-*"):
                    shutil.rmtree(left, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                self._error = error
        if any(self.ranks.gather(self._error is not None)):
            self.commit()
            return

        def write() -> None:
            rank, world = self.ranks.rank, self.ranks.world
            try:
                file = partial / f"state-{rank:05d}-of-{world:05d}.safetensors"
                write_state(file, snapshot.tensors, snapshot.starts, snapshot.updates)
                written = [file]
                if rank == 0:
                    save(recipe, partial / "recipe.yaml")
                    written.append(partial / "recipe.yaml")
                    if text is not None:
                        text.save_vocabulary(partial / TEXT_FOLDER)
                        written += sorted((partial / TEXT_FOLDER).iterdir())
                for path in written:
                    _sync(path)
                    self._files[str(path.relative_to(partial))] = _describe(path)
            except OSError as error:
                self._error = error
            except Exception as error:  # what a library makes of an OSError, safetensors for one
                self._error = OSError(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=write, name="fastdiff checkpoint")
        self._thread.start()

    def commit(self) -> None:
        """Put the checkpoint in flight in place, if there is one; waits for all ranks' parts.

        `saved` is its step then, or as before where it failed.
        """
        if self._progress is None:
            return
        if self._thread is not None:
            self._thread.join()
        step, partial = self._progress.step, self._partial
        parts = self.ranks.gather((self._files, None if self._error is None else str(self._error)))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error]
        if self.ranks.rank == 0 and not errors:
            try:
                self._put_in_place({name: of for files, _ in parts for name, of in files.items()})
            except OSError as error:
                errors = [f"rank 0: {error}"]
        errors = self.ranks.gather(errors)[0]
        self._progress = self._thread = None
        if errors:
            if self.ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                log.error(
                    "THE CHECKPOINT OF STEP %d COULD NOT BE WRITTEN: %s; the run goes on, the "
                    "newest checkpoint is that of step %s",
                    *(step, "; ".join(errors), self.saved),
                )
        else:
            self.saved = step

    @property
    def _partial(self) -> Path:
        assert self._progress is not None, "one is in flight"
        return self.run / "checkpoints" / f".partial-{self._progress.step:08d}"

    def _put_in_place(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        assert self._progress is not None, "one is in flight"
        partial = self._partial
        for name, of in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != of["size"]:
                raise FileNotFoundError(
                    f"{partial / name} is not to be seen on rank 0: train.out must lie on a file "
                    "system that all ranks share"
                )
        manifest = {
            "format": FORMAT,
            **asdict(self._progress),
            "parameters": {name: list(shape) for name, shape in self._shapes.items()},
            "files": files,
        }
        manifest = json.loads(json.dumps(manifest))  # keys as they will be read
        manifest["sha256"] = _digest(manifest)
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _sync(partial / _MANIFEST)
        for folder in {(partial / name).parent for name in files} | {partial}:
            _sync(folder)
        final = partial.with_name(f"step-{self._progress.step:08d}")
        if final.exists():
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(final.parent)
        _sync(self.run)
        self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Keep the newest whole ones and every Nth; one of a later step is of an abandoned run."""
        names = list_checkpoints(self.run)
        whole = [p for p in names if p.name <= newest.name and read_manifest(p) is not None]
        kept = set(whole[-self.keep :])
        if self.keep_every is not None:
            kept |= {p for p in whole if step_of(p) % self.keep_every == 0}
        for old in set(names) - kept:
            shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    root = run / "checkpoints"
    return sorted(p for p in root.glob("step-*") if _NAME.search(p.name))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest; None if it is damaged, or files are missing or of another size."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        Progress(**{f.name: manifest[f.name] for f in fields(Progress) if f.name in manifest})
        files = manifest["files"].items()
        unchanged = manifest.pop("sha256") == _digest(manifest)
        whole = (
            manifest["format"] == FORMAT
            and unchanged
            and all((checkpoint / name).stat().st_size == of["size"] for name, of in files)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None if every byte is as it was written."""
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return "it is not whole"
    for name, of in manifest["files"].items():
        try:
            found = _describe(checkpoint / name)["sha256"]
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != of["sha256"]:
            return f"{name} has changed since it was written (SHA-256)"
    return None


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run without damage; every byte of it is read.

    A damaged one is passed over with a warning that names it and what is wrong.
    """
    for checkpoint in reversed(list_checkpoints(run)):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        log.warning("CHECKPOINT %s: %s; the one before it is used", checkpoint, wrong)
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


def open_state(checkpoint: Path) -> SavedState:
    """The weights, moments and averages of a whole checkpoint.

    Raises:
        OSError, ValueError: It is not whole.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise ValueError(f"{checkpoint} is not whole")
    files = [checkpoint / name for name in manifest["files"] if name.startswith("state-")]
    return SavedState(files, manifest["parameters"])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
