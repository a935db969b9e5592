"""The training loop: the same for one process and for many.

Data order, noise, time steps, flips and condition dropout are functions of (seed, global sample
index), so the data side of a resumed run is one number, the images seen.
"""

from __future__ import annotations

import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from fastdiff.data.faults import BadSampleLimit
from fastdiff.data.folder import FolderDataset
from fastdiff.data.readers import open_dataset
from fastdiff.data.shards import ShardDataset
from fastdiff.data.stream import StreamConfig, make_loader
from fastdiff.ops import philox_normal
from fastdiff.text import SmallTextEncoder, T5TextEncoder, t5_label
from fastdiff.training import engine as engines
from fastdiff.training import faults, resume
from fastdiff.training.ahead import ahead
from fastdiff.training.checkpoint import (
    TEXT_FOLDER,
    CheckpointWriter,
    Progress,
    Ranks,
    Snapshot,
    latest_checkpoint,
    open_state,
    read_manifest,
    step_of,
)
from fastdiff.training.config import Recipe, load, save
from fastdiff.training.ema import EMA
from fastdiff.training.fid import ScheduledFID
from fastdiff.training.learner import AnyTextEncoder, Learner, make_t5
from fastdiff.training.lock import RunLock
from fastdiff.training.pictures import TrainingPictures
from fastdiff.training.shares import EMA as AVERAGE
from fastdiff.training.shares import WEIGHT, SavedState, tensors_of, updates_of
from fastdiff.training.validation import HeldOut, as_point, open_held_out, validation_losses
from fastdiff.training.watch import Watch

log = logging.getLogger("fastdiff")

T = TypeVar("T")
MAX_SKIPPED = 20
GRID = 16  # pictures of a sample grid without prompts
VOCABULARY_SAMPLES = 20_000
LABELS_FILE = "labels.json"
NOISE_STREAM = 0x7472_6E00  # of philox_normal: apart from the streams that sampling uses


class Interrupted(SystemExit):
    """A signal asked the run to stop; a checkpoint was saved. The code is the exit status."""


def train(recipe: Recipe) -> Path:
    """Train a recipe to its last step, from the newest checkpoint in its folder if there is one.

    Args:
        recipe: What to train. Under `deepspeed` or `torchrun`, every rank calls this alike.

    Returns:
        The run's folder: `model/` (averaged weights, `from_pretrained` reads them; the small text
        encoder in `model/text/`), `recipe.yaml`, `metrics.jsonl`, `samples/`, `tensorboard/`,
        `checkpoints/`.

    Raises:
        FileNotFoundError, ValueError: No data, or a folder with a run of another model.
        BadSampleError: Too many unreadable samples.
        FloatingPointError: The loss stayed non-finite.
        RuntimeError: Another job is at work in the folder.
        OSError: The last checkpoint could not be written.
        Interrupted: Ctrl-C (exit status 130), SIGTERM or SIGUSR1 (0), after a checkpoint.
    """
    return make_trainer(recipe).run()


def make_trainer(recipe: Recipe) -> Trainer:
    """Join the process group under a launcher, and open everything that a run needs.

    Raises:
        FileNotFoundError, ValueError: No data, or a folder with a run of another model.
        RuntimeError: Another job is at work in the folder.
    """
    rank, world, device = engines.start()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    lock = _on_first_rank(rank, lambda: RunLock(Path(recipe.train.out)), told=False)
    trainer = Trainer(recipe, rank, world, device)
    trainer.lock = lock
    return trainer


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
            raise ValueError("data.path is not set; give a folder of images or shards")
        micro = engines.micro_batch_size(recipe, world)
        self.micro_batches = recipe.train.batch_size // world // micro
        self.dataset = self._open_data(recipe.data.path)
        self._check_data()
        names = getattr(self.dataset, "labels", [])
        self.labels = {name: y for y, name in enumerate(names)}
        self.held_out: HeldOut | None = None
        if recipe.train.validate_every:
            self.held_out = _on_first_rank(
                rank, lambda: open_held_out(recipe, self.labels), told=False
            )
        self.fid = self._open_fid() if recipe.train.fid_every else None
        checkpoint = _on_first_rank(
            rank, lambda: resume.find_checkpoint(recipe, self.run_folder), told=True
        )
        saved = None if checkpoint is None else open_state(checkpoint)

        torch.manual_seed(recipe.train.seed)
        self.text = self._make_text(checkpoint)
        torch.manual_seed(recipe.train.seed)
        learner = Learner(recipe, self.text)
        if saved is not None:
            saved.copy_to(learner, WEIGHT)
        if recipe.train.compile:
            learner.backbone.compile()
        self.engine = engines.make_engine(recipe, learner, device)
        shares = [(share.name, share.weight) for share in self.engine.shares if len(share.weight)]
        self.ema: EMA | None = None
        if shares:
            train = recipe.train
            self.ema = EMA(shares, decay=train.ema_decay, warmup=train.ema_warmup)
        self.step = self.images = 0
        self.bad_before: dict[str, Any] | None = None
        self.writer = CheckpointWriter(
            self.run_folder,
            Ranks(rank, world, engines.gather),
            keep=recipe.train.keep,
            keep_every=recipe.train.keep_every,
        )
        if checkpoint is not None and saved is not None:
            self._resume(checkpoint, saved)
        self.lock: RunLock | None = None

        self.stream = StreamConfig(
            seed=recipe.train.seed,
            image_size=recipe.side,
            global_batch=recipe.train.batch_size,
            micro_batch=micro,
            num_steps=recipe.diffusion.steps,
            drop_rate=recipe.train.condition_dropout,
            flip=recipe.data.flip,
            window=recipe.data.window,
            # On a GPU it is drawn there: a worker takes longer to draw noise than to decode.
            noise=device.type != "cuda",
        )
        self.limit = BadSampleLimit(
            recipe.data.bad_limit,
            shards=len(getattr(self.dataset, "shards", [])),
            file=self.run_folder / f"bad_samples-{rank}.jsonl",
            before=self.bad_before,
        )
        self.skipped = 0
        self.signal: int | None = None

    def run(self) -> Path:
        """Train, then export the averaged weights."""
        recipe = self.recipe.train
        left = recipe.max_steps - self.step
        if left <= 0 and self.rank == 0:
            log.info("nothing to train: step %d of %d is done", self.step, recipe.max_steps)
        elif self.rank == 0:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            save(self.recipe, self.run_folder / "recipe.yaml")
        watch = None
        if self.rank == 0 and left > 0:
            watch = Watch(self.recipe, self.step, self.device, self.engine.world)
        before = {s: signal.getsignal(s) for s in _SIGNALS}
        try:
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)
            self._steps(watch)
            saved = self._save_last()
            self._export()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if watch is not None:
                watch.close()
            if self.lock is not None:
                self.lock.release()
        self.engine.barrier()
        engines.stop()
        if not saved:
            raise OSError(
                f"the checkpoint of the last step, {self.step}, could not be written; the averaged "
                f"weights are in {self.run_folder / 'model'}"
            )
        return self.run_folder

    def _steps(self, watch: Watch | None) -> None:
        recipe = self.recipe.train
        batches = self._batches()
        while self.step < recipe.max_steps:
            started = time.perf_counter()
            micro_batches = [next(batches) for _ in range(self.micro_batches)]
            loaded = time.perf_counter()
            result = self.engine.step(micro_batches, engines.learning_rate(self.recipe, self.step))
            self._count_skipped(result, micro_batches)
            if not result.skipped and self.ema is not None:
                self.ema.update(self.step)
            self.step += 1
            self.images += recipe.batch_size
            ended = time.perf_counter()
            stop, writing = self.engine.any_rank(self.signal is not None, self.writer.busy)
            waited = time.perf_counter() - ended
            found = self._validate() | self._measure_fid()
            if watch is not None:
                times = loaded - started, ended + waited - started, waited
                watch.log_step(
                    self.step, self.images, result, *times, _tokens(micro_batches), found
                )
            if not writing:
                self.writer.commit()
            if stop:
                self._stop_early()
            if self.step % recipe.checkpoint_every == 0:
                self._save()
            if recipe.sample_every and self.step % recipe.sample_every == 0:
                self._show(watch)

    def _batches(self) -> Iterator[engines.MicroBatch]:
        batch_size = self.recipe.train.batch_size
        if self.step >= self.recipe.train.max_steps:
            return
        loader = make_loader(
            self.dataset,
            self.stream,
            rank=self.rank,
            world=self.engine.world,
            start=self.images,
            stop=self.images + (self.recipe.train.max_steps - self.step) * batch_size,
            num_workers=self.recipe.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        # The workers are forked here, in the main thread.
        for batch in ahead(self._with_tokens(iter(loader))):
            self.limit.update(batch)
            tensors = {"x0": batch["image"], "t": batch["t"], "drop": batch["drop"]}
            if "noise" in batch:
                tensors["noise"] = batch["noise"]
            else:
                seeds = noise_seeds(self.recipe.train.seed, batch["position"]).to(self.device)
                shape = tuple(batch["image"].shape[1:])
                tensors["noise"] = philox_normal(seeds, 0, shape, stream=NOISE_STREAM)
            tensors |= {name: batch[name] for name in ("context", "ids", "mask") if name in batch}
            if self.labels:
                # a picture beside the folders of the labels has none
                y = [self.labels.get(name, len(self.labels)) for name in batch["caption"]]
                tensors["y"] = torch.tensor(y)
            yield engines.MicroBatch(
                seed=(self.recipe.train.seed * 1_000_003 + int(batch["position"][0])) % 2**63,
                inputs={k: v.to(self.device, non_blocking=True) for k, v in tensors.items()},
                keys=tuple(batch["key"]),
            )

    def _with_tokens(self, loader: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The loader's batches, with the tokens of captions whose features are not stored."""
        for batch in loader:
            if "context" not in batch and self.recipe.model.context_dim is not None:
                assert self.text is not None, "without stored features there is an encoder"
                batch["ids"], batch["mask"] = self.text.tokenize(batch["caption"])
            yield batch

    def _count_skipped(
        self, result: engines.StepResult, micro_batches: list[engines.MicroBatch]
    ) -> None:
        self.skipped = self.skipped + 1 if result.skipped else 0
        if result.skipped and self.rank == 0:
            log.warning(
                "step %d: loss %s, gradient norm %s; skipped, no weight changed",
                *(self.step, result.loss, result.grad_norm),
            )
        if self.skipped >= MAX_SKIPPED:
            folder = self.run_folder / faults.FOLDER
            faults.write_batch(folder, self.rank, micro_batches)
            ranks = Ranks(self.rank, self.engine.world, engines.gather)
            self._write(CheckpointWriter(folder, ranks, keep=1, keep_every=None)).commit()
            keys = [key for keys in engines.gather([b.keys for b in micro_batches]) for key in keys]
            named = [key for part in keys for key in part]
            raise FloatingPointError(
                f"{MAX_SKIPPED} steps in a row gave a non-finite loss or gradient (now step "
                f"{self.step}); resume from the last checkpoint with a lower optim.lr. The last "
                f"batch was {', '.join(named[:8])}{', ...' if len(named) > 8 else ''}; to compute "
                f"it again: python -m fastdiff.training.faults {folder}"
            )

    def _save(self) -> None:
        self._write(self.writer)
        if not self.recipe.train.background:
            self.writer.commit()
        self.limit.check(engines.gather(self.limit.counts.state()))

    def _write(self, writer: CheckpointWriter) -> CheckpointWriter:
        """Begin a checkpoint of this step."""
        shares, optimizer = self.engine.shares, self.engine.optimizer
        averages = {} if self.ema is None else self.ema.state_dict()
        tensors = tensors_of(shares, optimizer, averages)
        progress = Progress(
            step=self.step,
            images=self.images,
            seed=self.recipe.train.seed,
            world=self.engine.world,
            data=self.dataset.fingerprint,
            bad=self.limit.total(engines.gather(self.limit.counts.state())),
            scaler=self.engine.scaler(),
        )
        writer.commit()
        snapshot = Snapshot(
            tensors={
                name: value.detach().to("cpu", copy=True).flatten()
                for name, value in tensors.items()
            },
            starts={share.name: share.start for share in shares},
            shapes={share.name: share.shape for share in shares},
            updates=updates_of(shares, optimizer),
        )
        text = self.text if isinstance(self.text, SmallTextEncoder) else None
        writer.start(progress, snapshot, self.recipe, text)
        return writer

    def _save_last(self) -> bool:
        """Have a checkpoint of this step in place; whether that succeeded."""
        self.writer.commit()
        if self.writer.saved != self.step:
            self._save()
            self.writer.commit()
        return self.writer.saved == self.step

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.rank == 0 and number == signal.SIGINT:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def _stop_early(self) -> None:
        saved = self._save_last()
        if self.rank == 0 and saved:
            print(
                f"\nstopped: step {self.step} of {self.recipe.train.max_steps} is saved in "
                f"{self.run_folder}; the same command continues from it",
                file=sys.stderr,
            )
        elif self.rank == 0:
            print(
                f"\nstopped: step {self.step} COULD NOT BE SAVED; the same command continues from "
                f"step {self.writer.saved or 0}",
                file=sys.stderr,
            )
        engines.stop()
        raise Interrupted(1 if not saved else 130 if self.signal == signal.SIGINT else 0)

    def _resume(self, checkpoint: Path, saved: SavedState) -> None:
        manifest = read_manifest(checkpoint)
        assert manifest is not None, "it was whole when it was chosen"
        self.engine.load(saved, manifest.get("scaler") or {})
        for share in self.engine.shares:
            if self.ema is not None and len(share.weight):
                share.read(saved, AVERAGE, self.ema.shadows[share.name])
        self.step, self.images = int(manifest["step"]), int(manifest["images"])
        self.bad_before = manifest.get("bad") or None
        self.writer.saved = step_of(checkpoint)
        if self.rank == 0:
            resume.tell(
                checkpoint, manifest, self.recipe, self.dataset.fingerprint, self.engine.world
            )

    def _open_data(self, path: str) -> FolderDataset | ShardDataset | TrainingPictures:
        data, text = self.recipe.data, self.recipe.text
        if self.recipe.model.context_dim is None:
            return self._open_pictures(path)
        dataset = open_dataset(
            path,
            embeddings=data.embeddings,
            encoder=t5_label(text.name, text.revision, text.dtype, text.max_length),
            cache=data.cache,
            cache_gib=data.cache_gib,
        )
        if isinstance(dataset, ShardDataset):
            dataset.check_window(data.window)
        width = self.recipe.model.context_dim
        if data.embeddings is not None and isinstance(dataset, ShardDataset):
            assert dataset.embeddings is not None, "they were opened with it"
            if dataset.embeddings.width != width:
                raise ValueError(
                    f"{data.embeddings} holds text features of width {dataset.embeddings.width}, "
                    f"the model takes model.context_dim={width}"
                )
        return dataset

    def _open_pictures(self, path: str) -> TrainingPictures:
        classes = self.recipe.model.num_classes
        pictures = TrainingPictures(
            path, transform=self.recipe.data.transform, labelled=classes is not None
        )
        if classes is not None and len(pictures.labels) != classes:
            raise ValueError(
                f"{path} has {len(pictures.labels)} labels, the model takes model.num_classes="
                f"{classes}; set it to {len(pictures.labels)}"
            )
        return pictures

    def _check_data(self) -> None:
        """Refuse data of which too many shards are unreadable, or that ranks see differently."""
        bad = getattr(self.dataset, "bad_shards", [])
        shards = len(bad) + len(getattr(self.dataset, "shards", []))
        if bad and len(bad) > self.recipe.data.bad_limit * shards:
            worst = bad[0]
            raise ValueError(
                f"{self.recipe.data.path}: {len(bad)} of {shards} shards cannot be read, over the "
                f"limit of {self.recipe.data.bad_limit:.2%}; first: {worst.path}: {worst.reason}; "
                "repair or move them, or raise data.bad-limit"
            )
        seen = engines.gather(self.dataset.fingerprint)
        if len(set(seen)) > 1:
            raise ValueError(
                f"{self.recipe.data.path} differs between the ranks (fingerprints {seen}); "
                "give every node the same files"
            )

    def _make_text(self, checkpoint: Path | None) -> AnyTextEncoder | None:
        """The text encoder; a small one's vocabulary comes with the checkpoint, or is made now.

        None with stored features, which need none until a grid is drawn.
        """
        if self.recipe.data.embeddings is not None or self.recipe.model.context_dim is None:
            return None
        if self.recipe.text.encoder == "t5":
            return make_t5(self.recipe, self.device)
        if checkpoint is not None:
            return SmallTextEncoder.from_vocabulary(checkpoint / TEXT_FOLDER)
        config = self.recipe.text
        return SmallTextEncoder.from_captions(
            _some_captions(self.dataset),
            width=config.width,
            layers=config.layers,
            max_length=config.max_length,
        )

    def _validate(self) -> dict[str, Any]:
        """Losses of the held-out pictures, where this step has them, on rank 0. Collective."""
        every = self.recipe.train.validate_every
        if not every or (self.step % every and self.step != self.recipe.train.max_steps):
            return {}
        if self.recipe.model.context_dim is not None:
            _on_first_rank(self.rank, self._need_text, told=False)
        losses = []
        trained = {share.name: share.weight for share in self.engine.shares}
        for values in ({} if self.ema is None else self.ema.state_dict(), trained):
            learner = self._learner_of(values)
            if learner is not None and self.held_out is not None:
                losses.append(validation_losses(learner, self.held_out, self.recipe))
        return as_point(*losses) if losses else {}

    def _measure_fid(self) -> dict[str, Any]:
        """FID of the averaged weights, where this step has one. Collective."""
        every = self.recipe.train.fid_every
        if not every or (self.step % every and self.step != self.recipe.train.max_steps):
            return {}
        assert self.fid is not None, "it was opened with the run"
        if self.recipe.model.context_dim is not None:
            self._need_text()
        averages = {} if self.ema is None else self.ema.state_dict()
        learner = self._learner_of(averages, everywhere=True)
        assert learner is not None, "it is everywhere"
        return {"fid": self.fid(learner)}

    def _open_fid(self) -> ScheduledFID:
        captions = None
        if self.recipe.model.context_dim is not None:
            dataset = self.dataset
            if self.recipe.data.held_out is not None:
                dataset = open_dataset(self.recipe.data.held_out)
            wanted = self.recipe.sample.fid_images
            captions = list(itertools.islice(_captions(dataset, 1), wanted))
            if len(captions) < wanted:
                raise ValueError(
                    f"sample.fid_images={wanted}, but the data set has {len(captions)} captions"
                )
        return ScheduledFID(self.recipe, captions, len(self.labels), self.device)

    def _averaged(self) -> Learner | None:
        """A learner that holds the averaged weights, on rank 0's device. Collective."""
        return self._learner_of({} if self.ema is None else self.ema.state_dict())

    def _learner_of(
        self, values: dict[str, torch.Tensor], *, everywhere: bool = False
    ) -> Learner | None:
        """A learner on rank 0's device, of all ranks' shares of its weights. Collective.

        Args:
            values: This rank's shares by name, float32.
            everywhere: On every rank.
        """
        weights = self.engine.whole(values, everywhere=everywhere)
        if not weights:
            return None
        text = self.text
        if isinstance(text, SmallTextEncoder):
            text = text.fresh()
        learner = Learner(self.recipe, text)
        parameters = dict(learner.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        return learner.to(self.device).eval()

    def _show(self, watch: Watch | None) -> None:
        """Draw the recipe's prompts, or pictures of a model without text. Collective.

        A drawing that fails does not end the run.
        """
        sample, text = self.recipe.sample, self.recipe.model.context_dim is not None
        if text and not sample.prompts:
            return
        try:
            if text and self.rank == 0:
                self._need_text()
            learner = self._averaged()
            if learner is None or watch is None:
                return
            if text:
                captions: Sequence[str] | None = sample.prompts
                seeds = range(len(sample.prompts))
                pictures = learner.draw(
                    sample.prompts, seeds, steps=sample.steps, guidance=sample.guidance
                )
            else:
                names = list(self.labels)
                chosen = [i % len(names) for i in range(GRID)] if names else None
                captions = None if chosen is None else [names[i] for i in chosen]
                pictures = learner.draw_labels(
                    chosen, range(GRID), steps=sample.steps, guidance=sample.guidance
                )
            watch.log_pictures(self.step, pictures, captions)
        except (RuntimeError, OSError) as error:
            log.warning("step %d: no sample grid: %s", self.step, error)

    def _need_text(self) -> None:
        """With stored features only the prompts need an encoder: it must be the one of those."""
        if self.text is None:
            self.text = make_t5(self.recipe, torch.device("cpu"))
        stored = getattr(self.dataset, "embeddings", None)
        if stored is not None and isinstance(self.text, T5TextEncoder):
            there, here = stored.header.get("weights"), self.text.weights
            if there != here:
                raise RuntimeError(
                    f"text.name={self.recipe.text.name!r} has weights {here} on this machine; the "
                    f"stored text features are of {there}"
                )

    def _export(self) -> None:
        """Write the averaged weights for `from_pretrained`. Collective."""
        learner = self._averaged()
        if learner is None:
            return
        learner.backbone.save_pretrained(self.run_folder / "model")
        if learner.text is not None:
            learner.text.save_pretrained(self.run_folder / "model" / TEXT_FOLDER)
        if self.labels:
            names = json.dumps(list(self.labels), indent=2)
            (self.run_folder / "model" / LABELS_FILE).write_text(names + "\n")
        log.info("done: %d steps, weights in %s", self.step, self.run_folder / "model")


def _on_first_rank(rank: int, call: Callable[[], T], *, told: bool) -> T:
    """What a call gives on rank 0; its error is raised on every rank. Collective.

    Args:
        rank: This process.
        call: Made on rank 0 alone.
        told: Whether the other ranks get the value (it is pickled) or None.
    """
    value: Any = None
    error: Exception | None = None
    if rank == 0:
        try:
            value = call()
        except (RuntimeError, ValueError, OSError) as caught:
            error = caught
    error, others = engines.gather((error, value if told else None))[0]
    if error is not None:
        raise error
    return cast("T", value if rank == 0 else others)


def _tokens(micro_batches: list[engines.MicroBatch]) -> float:
    """Tokens of a text in a step, padding counted; a length, so no device is waited for."""
    lengths = [batch.inputs["mask"].shape[1] for batch in micro_batches if "mask" in batch.inputs]
    return sum(lengths) / max(1, len(lengths))


def noise_seeds(seed: int, positions: torch.Tensor) -> torch.Tensor:
    """A seed of noise for each position of a run, far from those of other runs.

    Args:
        seed: The run's.
        positions: (B,) int64.

    Returns:
        (B,) int64.
    """
    start = seed * 0x9E3779B97F4A7C15 % 2**64
    return positions + (start - 2**64 if start >= 2**63 else start)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _some_captions(dataset: Any) -> Iterator[str]:
    return _captions(dataset, max(1, len(dataset) // VOCABULARY_SAMPLES))


def _captions(dataset: Any, stride: int) -> Iterator[str]:
    from fastdiff.data.samples import BadSample

    for index in range(0, len(dataset), stride):
        try:
            yield dataset[index].caption
        except BadSample:
            continue


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
    text: AnyTextEncoder | None = None
    if recipe.model.context_dim is None:
        pass
    elif recipe.text.encoder == "t5":
        text = make_t5(recipe, device)
    else:
        text = SmallTextEncoder.from_vocabulary(checkpoint / TEXT_FOLDER)
    learner = Learner(recipe, text)
    open_state(checkpoint).copy_to(learner, AVERAGE)
    return learner.to(device).eval(), recipe
