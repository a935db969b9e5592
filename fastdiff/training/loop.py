"""The training loop: the same for one process and for many.

Data order, noise, time steps, flips and condition dropout are functions of (seed, global sample
index), so the data side of a resumed run is one number, the images seen.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.data.readers import open_dataset
from fastdiff.data.stream import BadSampleLimit, StreamConfig, make_loader
from fastdiff.grid import picture_grid, to_uint8
from fastdiff.text import SmallTextEncoder
from fastdiff.training import engine as engines
from fastdiff.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_ema,
    read_manifest,
    save_checkpoint,
)
from fastdiff.training.config import Recipe, load, model_differences, save
from fastdiff.training.ema import EMA
from fastdiff.training.learner import AnyTextEncoder, Learner, make_t5

log = logging.getLogger("fastdiff")

MAX_SKIPPED = 20
VOCABULARY_SAMPLES = 20_000


class Interrupted(SystemExit):
    """A signal asked the run to stop; a checkpoint was saved. The code is the exit status."""


def train(recipe: Recipe) -> Path:
    """Train a recipe to its last step, from the newest checkpoint in its folder if there is one.

    Args:
        recipe: What to train. Under `deepspeed` or `torchrun`, every rank calls this alike.

    Returns:
        The run's folder: `model/` (averaged weights, `from_pretrained` reads them), `text/`,
        `recipe.yaml`, `metrics.jsonl`, `samples/`, `tensorboard/`, `checkpoints/`.

    Raises:
        FileNotFoundError, ValueError: No data, or a folder with a run of another model.
        BadSampleError: Too many unreadable samples.
        FloatingPointError: The loss stayed non-finite.
        Interrupted: Ctrl-C (exit status 130), SIGTERM or SIGUSR1 (0), after a checkpoint.
    """
    return make_trainer(recipe).run()


def make_trainer(recipe: Recipe) -> Trainer:
    """Join the process group under a launcher, and open everything that a run needs.

    Raises:
        FileNotFoundError, ValueError: No data, or a folder with a run of another model.
    """
    rank, world, device = engines.start()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    return Trainer(recipe, rank, world, device)


class Trainer:
    """One run on one rank.

    Args:
        recipe: What to train.
        rank: This process.
        world: Number of processes.
        device: Where this rank computes.
    """

    def __init__(self, recipe: Recipe, rank: int, world: int, device: torch.device) -> None:
        self.recipe, self.rank, self.device = recipe, rank, device
        self.run_folder = Path(recipe.train.out)
        if recipe.data.path is None:
            raise ValueError("data.path is not set; give a folder of captioned images or shards")
        micro = engines.micro_batch_size(recipe, world)
        self.micro_batches = recipe.train.batch_size // world // micro
        self.dataset = open_dataset(recipe.data.path)
        checkpoint = self._find_checkpoint(world)

        torch.manual_seed(recipe.train.seed)
        self.text = self._make_text()
        learner = Learner(recipe, self.text)
        self.ema: EMA | None = None
        if rank == 0:
            trained = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
            learner.to(device)
            train = recipe.train
            self.ema = EMA(trained, decay=train.ema_decay, warmup=train.ema_warmup)
        self.engine = engines.make_engine(recipe, learner, device)
        self.step = 0
        if checkpoint is not None:
            self._resume(checkpoint)

        self.stream = StreamConfig(
            seed=recipe.train.seed,
            image_size=recipe.side,
            global_batch=recipe.train.batch_size,
            micro_batch=micro,
            num_steps=recipe.diffusion.steps,
            drop_rate=recipe.train.condition_dropout,
            flip=recipe.data.flip,
        )
        self.limit = BadSampleLimit(recipe.data.bad_limit)
        self.skipped = 0
        self.saved_at = self.step
        self.signal: int | None = None

    def run(self) -> Path:
        """Train, then export the averaged weights."""
        recipe = self.recipe.train
        if self.rank == 0:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            save(self.recipe, self.run_folder / "recipe.yaml")
        left = recipe.max_steps - self.step
        watch = Watch(self.recipe, self.step) if self.rank == 0 and left > 0 else None
        before = {s: signal.getsignal(s) for s in _SIGNALS}
        try:
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)
            self._steps(watch)
            if self.saved_at != self.step:
                self._save()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if watch is not None:
                watch.close()
        if self.rank == 0:
            self._export()
            log.info("done: %d steps, weights in %s", recipe.max_steps, self.run_folder / "model")
        self.engine.barrier()
        engines.stop()
        return self.run_folder

    def _steps(self, watch: Watch | None) -> None:
        recipe = self.recipe.train
        batches = self._batches()
        while self.step < recipe.max_steps:
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.micro_batches)]
            loaded = time.perf_counter()
            result = self.engine.step(micro_batches, engines.learning_rate(self.recipe, self.step))
            self._count_skipped(result)
            if not result.skipped:
                weights = self.engine.weights()
                if self.ema is not None:
                    self.ema.update(self.step, weights)
            self.step += 1
            if watch is not None:
                watch.log_step(self.step, result, loaded - started, time.perf_counter() - started)
                if recipe.sample_every and self.step % recipe.sample_every == 0:
                    watch.log_pictures(self.step, self._draw())
            if self.engine.any_rank(self.signal is not None):
                self._stop_early()
            if self.step % recipe.checkpoint_every == 0:
                self._save()

    def _batches(self) -> Iterator[engines.MicroBatch]:
        batch_size = self.recipe.train.batch_size
        if self.step >= self.recipe.train.max_steps:
            return
        loader = make_loader(
            self.dataset,
            self.stream,
            rank=self.rank,
            world=self.engine.world,
            start=self.step * batch_size,
            stop=self.recipe.train.max_steps * batch_size,
            num_workers=self.recipe.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            self.limit.update(batch)
            ids, mask = self.text.tokenize(batch["caption"])
            tensors = {
                "x0": batch["image"],
                "noise": batch["noise"],
                "t": batch["t"],
                "ids": ids,
                "mask": mask,
                "drop": batch["drop"],
            }
            yield engines.MicroBatch(
                seed=(self.recipe.train.seed * 1_000_003 + int(batch["position"][0])) % 2**63,
                inputs={k: v.to(self.device, non_blocking=True) for k, v in tensors.items()},
            )

    def _count_skipped(self, result: engines.StepResult) -> None:
        self.skipped = self.skipped + 1 if result.skipped else 0
        if result.skipped:
            log.warning(
                "step %d: loss %s, gradient norm %s; skipped, no weight changed",
                *(self.step, result.loss, result.grad_norm),
            )
        if self.skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"{MAX_SKIPPED} steps in a row gave a non-finite loss or gradient (now step "
                f"{self.step}); resume from the last checkpoint with a lower optim.lr"
            )

    def _save(self) -> None:
        save_checkpoint(
            self.run_folder,
            self.step,
            self.recipe,
            self.engine,
            self.ema,
            data=self.dataset.fingerprint,
        )
        self.saved_at = self.step

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.rank == 0 and number == signal.SIGINT:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def _stop_early(self) -> None:
        if self.saved_at != self.step:
            self._save()
        if self.rank == 0:
            print(
                f"\nstopped: step {self.step} of {self.recipe.train.max_steps} is saved in "
                f"{self.run_folder}; the same command continues from it",
                file=sys.stderr,
            )
        engines.stop()
        raise Interrupted(130 if self.signal == signal.SIGINT else 0)

    def _find_checkpoint(self, world: int) -> Path | None:
        """The checkpoint to resume from, if it is of this model."""
        checkpoint = latest_checkpoint(self.run_folder)
        if checkpoint is None:
            if list_checkpoints(self.run_folder):
                raise ValueError(
                    f"{self.run_folder}: no checkpoint is whole; move the folder away to start anew"
                )
            return None
        differing = model_differences(self.recipe, load(checkpoint / "recipe.yaml"))
        if differing:
            raise ValueError(
                f"{self.run_folder} holds a run of another model; give another train.out, or the "
                "same values:\n  " + "\n  ".join(differing)
            )
        manifest = read_manifest(checkpoint)
        assert manifest is not None, "latest_checkpoint returns whole ones"
        if engines.under_launcher() != (checkpoint / engines.DeepSpeedEngine.TAG).is_dir():
            here, there = ("a launcher", "plain python")[:: 1 if engines.under_launcher() else -1]
            raise ValueError(
                f"{checkpoint} was written under {there} and cannot be resumed under {here}; start "
                f"the run as before, or give another train.out"
            )
        if manifest["world"] != world:
            raise ValueError(
                f"{checkpoint} was written by {manifest['world']} ranks, this run has {world}; "
                "resume on as many"
            )
        return checkpoint

    def _resume(self, checkpoint: Path) -> None:
        self.engine.load(checkpoint)
        if self.ema is not None:
            load_ema(checkpoint, self.ema)
        manifest = read_manifest(checkpoint)
        assert manifest is not None, "it was whole when it was chosen"
        self.step = int(manifest["step"])
        if self.rank == 0 and manifest["data"] != self.dataset.fingerprint:
            log.warning(
                "%s was trained on other data than %s holds now; the run goes on with these",
                *(checkpoint, self.recipe.data.path),
            )
        if self.rank == 0:
            log.info("continuing from step %d (%s)", self.step, checkpoint)

    def _make_text(self) -> AnyTextEncoder:
        """The text encoder; a small one's vocabulary is made once and kept in the run's folder."""
        if self.recipe.text.encoder == "t5":
            return make_t5(self.recipe, self.device)
        folder = self.run_folder / "text"
        if self.rank == 0 and not (folder / "model.safetensors").is_file():
            config = self.recipe.text
            SmallTextEncoder.from_captions(
                _some_captions(self.dataset),
                width=config.width,
                layers=config.layers,
                max_length=config.max_length,
            ).save_pretrained(folder)
        if engines.under_launcher():
            torch.distributed.barrier()
        return SmallTextEncoder.from_pretrained(folder)

    def _averaged(self) -> Learner:
        """A learner that holds the averaged weights, on this rank's device."""
        assert self.ema is not None, "rank 0 has the average"
        text = self.text
        if isinstance(text, SmallTextEncoder):
            text = SmallTextEncoder.from_pretrained(self.run_folder / "text")
        learner = Learner(self.recipe, text).to(self.device).requires_grad_(True)
        self.ema.copy_to(learner)
        return learner.eval()

    def _draw(self) -> torch.Tensor:
        sample = self.recipe.sample
        return self._averaged().draw(
            sample.prompts,
            range(len(sample.prompts)),
            steps=sample.steps,
            guidance=sample.guidance,
        )

    def _export(self) -> None:
        learner = self._averaged()
        learner.backbone.save_pretrained(self.run_folder / "model")
        if learner.text is not None:
            learner.text.save_pretrained(self.run_folder / "text")


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _some_captions(dataset: Any) -> Iterator[str]:
    from fastdiff.data.samples import BadSample

    stride = max(1, len(dataset) // VOCABULARY_SAMPLES)
    for index in range(0, len(dataset), stride):
        try:
            yield dataset[index].caption
        except BadSample:
            continue


class Watch:
    """What one sees of a run: progress bar, `metrics.jsonl`, TensorBoard, sample grids.

    Args:
        recipe: The run's.
        step: Optimiser steps made before.
    """

    def __init__(self, recipe: Recipe, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.recipe = recipe
        folder = Path(recipe.train.out)
        self.samples = folder / "samples"
        self.samples.mkdir(exist_ok=True)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.metrics = folder / "metrics.jsonl"
        if self.metrics.is_file():
            # points after the checkpoint that the run continues from will be made again
            kept = [
                line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step
            ]
            self.metrics.write_text("".join(line + "\n" for line in kept))
        self.bar = tqdm(
            total=recipe.train.max_steps,
            initial=step,
            unit="step",
            desc=folder.name,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,
            dynamic_ncols=True,
        )
        self.losses: list[float] = []
        self.data_time = self.step_time = 0.0

    def log_step(
        self, step: int, result: engines.StepResult, data_time: float, step_time: float
    ) -> None:
        """Count one optimiser step; times in seconds."""
        if math.isfinite(result.loss):
            self.losses.append(result.loss)
        self.data_time += data_time
        self.step_time += step_time
        self.bar.update()
        every = self.recipe.train.log_every
        if step % every and step != self.recipe.train.max_steps:
            return
        count = (step - 1) % every + 1
        point = {
            "step": step,
            "images_seen": step * self.recipe.train.batch_size,
            "loss": sum(self.losses) / max(1, len(self.losses)),
            "grad_norm": result.grad_norm,
            "lr": engines.learning_rate(self.recipe, step - 1),
            "images_per_s": count * self.recipe.train.batch_size / self.step_time,
            "step_s": self.step_time / count,
            "data_s": self.data_time / count,
        }
        self.bar.set_postfix_str(
            f"loss {point['loss']:.4f}, {point['images_per_s']:.0f} images/s, "
            f"{point['step_s'] * 1000:.0f} ms/step"
        )
        with self.metrics.open("a") as file:
            file.write(json.dumps(point) + "\n")
        for name, value in point.items():
            if name != "step":
                self.board.add_scalar(f"train/{name}", value, step)
        self.losses, self.data_time, self.step_time = [], 0.0, 0.0

    def log_pictures(self, step: int, pictures: torch.Tensor) -> None:
        """Write a grid of the recipe's prompts."""
        grid = picture_grid(pictures, self.recipe.sample.prompts)
        grid.save(self.samples / f"step-{step:08d}.png")
        self.board.add_images("samples", to_uint8(pictures), step)

    def close(self) -> None:
        """Flush everything."""
        self.bar.close()
        self.board.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line cut off by a kill


def load_run(folder: Path, device: torch.device | str = "cpu") -> tuple[Learner, Recipe]:
    """The averaged weights of a run, for drawing.

    Args:
        folder: A run's folder; its newest checkpoint is read.
        device: Where the learner lives.

    Returns:
        The learner in evaluation mode, and the run's recipe.

    Raises:
        FileNotFoundError: No whole checkpoint there.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; train first, or give the folder of a run (train.out)"
        )
    recipe = load(checkpoint / "recipe.yaml")
    device = torch.device(device)
    text: AnyTextEncoder
    if recipe.text.encoder == "t5":
        text = make_t5(recipe, device)
    else:
        text = SmallTextEncoder.from_pretrained(folder / "text")
    learner = Learner(recipe, text).to(device)
    parameters: list[tuple[str, nn.Parameter]] = list(learner.named_parameters())
    ema = EMA(parameters)
    load_ema(checkpoint, ema)
    ema.copy_to(learner)
    return learner.eval(), recipe
