"""What one sees of a run while it trains."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdiff.grid import picture_grid, to_uint8
from fastdiff.training.config import Recipe, to_dict
from fastdiff.training.engine import StepResult, learning_rate
from fastdiff.training.sensors import Sensors, make_utilisation

log = logging.getLogger("fastdiff")


class Watch:
    """What one sees of a run: progress bar, `metrics.jsonl`, TensorBoard, sample grids.

    A full disk costs points of the log, and a warning; it does not end the run.

    Args:
        recipe: The run's.
        step: Optimiser steps made before.
        device: Of this process.
        world: Number of processes.
    """

    def __init__(
        self, recipe: Recipe, step: int, device: torch.device | None = None, world: int = 1
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.recipe = recipe
        self.world = world
        device = device or torch.device("cpu")
        self.sensors = Sensors(device)
        self.utilisation = make_utilisation(recipe, device)
        folder = Path(recipe.train.out)
        self._warned: set[str] = set()
        self.samples = folder / "samples"
        self.samples.mkdir(exist_ok=True)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = _start_wandb(recipe) if recipe.train.wandb else None
        self.metrics = folder / "metrics.jsonl"
        if self.metrics.is_file():
            # points after the checkpoint that the run continues from will be made again
            lines = self.metrics.read_text().splitlines()
            beside = self.metrics.with_suffix(".partial")
            beside.write_text("".join(line + "\n" for line in lines if _step_of(line) <= step))
            os.replace(beside, self.metrics)
        self.bar = tqdm(
            total=recipe.train.max_steps,
            initial=step,
            unit="step",
            desc=folder.name,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            dynamic_ncols=True,
        )
        self.bands: torch.Tensor | None = None
        self.step_time = self.data_time = self.wait_time = self.tokens = 0.0
        self._forget()

    def log_step(
        self,
        step: int,
        images: int,
        result: StepResult,
        data_time: float,
        step_time: float,
        wait_time: float = 0.0,
        tokens: float = 0.0,
        found: Mapping[str, float] | None = None,
    ) -> None:
        """Count one optimiser step.

        Args:
            step: Steps made.
            images: Seen over all ranks.
            result: What the step gave.
            data_time: Seconds of waiting for the loader.
            step_time: Seconds in all.
            wait_time: Seconds of waiting for the other ranks, after the step.
            tokens: Of a text in this step, padding counted.
            found: Further fields; a step that has them gets a point of its own in the log.
        """
        self.count += 1
        if result.skipped:
            self.skipped += 1
        else:
            self.losses.append(result.loss)
            if result.bands is not None:
                self.bands = result.bands if self.bands is None else self.bands + result.bands
        self.tokens += tokens
        self.data_time += data_time
        self.step_time += step_time
        self.wait_time += wait_time
        self.bar.update()
        every = self.recipe.train.log_every
        if step % every and step != self.recipe.train.max_steps and not found:
            return
        count = self.count
        point: dict[str, Any] = {
            "step": step,
            "images_seen": images,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "grad_norm": None if result.skipped else result.grad_norm,
            "skipped": self.skipped,
            "lr": learning_rate(self.recipe, step - 1),
            "images_per_s": count * self.recipe.train.batch_size / self.step_time,
            "step_s": self.step_time / count,
            "data_s": self.data_time / count,
            "wait_s": self.wait_time / count,
        }
        point |= self._by_band() | self.sensors.read() | dict(found or {})
        if self.utilisation is not None:
            point["mfu"] = self.utilisation(point["images_per_s"] / self.world, self.tokens / count)
        loss = "not finite" if point["loss"] is None else f"{point['loss']:.4f}"
        self.bar.set_postfix_str(
            f"loss {loss}, {point['images_per_s']:.0f} images/s, "
            f"{self.step_time / count * 1000:.0f} ms/step"
        )
        with self._tolerating("metrics.jsonl"):
            _append(self.metrics, json.dumps(point) + "\n")
        with self._tolerating("TensorBoard's log"):
            for name, value in point.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(f"train/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"train/{k}": v for k, v in point.items() if v is not None}, step=step)
        self._forget()

    @contextmanager
    def _tolerating(self, what: str) -> Iterator[None]:
        """A file that cannot be written is told once."""
        try:
            yield
        except OSError as error:
            if what not in self._warned:
                log.warning("%s cannot be written: %s; points are lost", what, error)
            self._warned.add(what)

    def _by_band(self) -> dict[str, float | None]:
        """Mean loss of rank 0's images in each band of diffusion time, None without an image."""
        if self.bands is None:
            return {}
        sums, counts = self.bands.tolist()
        return {
            f"loss_band_{i}": total / count if count else None
            for i, (total, count) in enumerate(zip(sums, counts, strict=True))
        }

    def _forget(self) -> None:
        """Start a new interval of the log."""
        self.losses: list[float] = []
        self.bands = None
        self.tokens = 0.0
        self.count = self.skipped = 0
        self.data_time = self.step_time = self.wait_time = 0.0

    def log_pictures(
        self, step: int, pictures: torch.Tensor, captions: Sequence[str] | None
    ) -> None:
        """Write a grid of pictures, with their captions where they have some."""
        grid = picture_grid(pictures, captions)
        grid.save(self.samples / f"step-{step:08d}.png")
        self.board.add_images("samples", to_uint8(pictures), step)
        if self.wandb is not None:
            import wandb

            self.wandb.log({"samples": wandb.Image(grid)}, step=step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        with self._tolerating("TensorBoard's log"):
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(recipe: Recipe) -> Any:
    """A run of Weights & Biases, which a resumed run goes on with.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("train.wandb=True needs wandb: pip install wandb") from error
    folder = Path(recipe.train.out).resolve()
    identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    return wandb.init(
        project="fastdiff",
        name=folder.name,
        id=identity,
        resume="allow",
        dir=str(folder),
        config=to_dict(recipe),
    )


def _append(file: Path, line: str) -> None:
    """Append a line as a whole or not at all."""
    with file.open("ab") as opened:
        size = opened.tell()
        try:
            opened.write(line.encode())
            opened.flush()
        except OSError:
            opened.truncate(size)
            raise


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill
