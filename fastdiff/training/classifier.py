"""Training of the noise-aware classifier that classifier guidance follows, in one process.

Data order, noise, time and flip of a sample are functions of (seed, its position), as in the
training of models, so a run that is continued meets what an uninterrupted one would have met.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.faults import BadSampleLimit
from fastdiff.data.labelled import LabelledFolder
from fastdiff.data.stream import StreamConfig, make_loader
from fastdiff.diffusion import DiffusionProcess, schedule
from fastdiff.models.classifier import ClassifierConfig, NoisyClassifier

log = logging.getLogger(__name__)

LABELS_FILE = "labels.json"
STATE_FILE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class ClassifierRun:
    """A training run of a classifier; the values are those that ADM's code gives for 128x128.

    Args:
        data: Folder with a folder of pictures for each label.
        out: Folder of the run; the same command again continues it.
        model: The classifier; its num_classes is taken from the data.
        schedule: "linear" | "cosine", that of the model to be guided.
        timesteps: T.
        batch_size: Pictures per optimiser step.
        max_steps: Optimiser steps.
        lr: Peak rate of AdamW, falling linearly to 0.
        weight_decay: AdamW's.
        precision: "float32", or "bfloat16" by autocast.
        flip: Mirror half of the pictures.
        seed: Of everything.
        workers: Reading processes.
        bad_limit: Largest share of pictures that may be unreadable.
        log_every: Steps between lines of the log.
        checkpoint_every: Steps between checkpoints.
    """

    data: Path
    out: Path = Path("runs/classifier")
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    schedule: Literal["linear", "cosine"] = "cosine"
    timesteps: int = 1000
    batch_size: int = 256
    max_steps: int = 300_000
    lr: float = 3e-4
    weight_decay: float = 0.05
    precision: Literal["float32", "bfloat16"] = "float32"
    flip: bool = True
    seed: int = 0
    workers: int = 4
    bad_limit: float = 0.01
    log_every: int = 100
    checkpoint_every: int = 5_000

    def __post_init__(self) -> None:
        for name in ("timesteps", "batch_size", "max_steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ClassifierRun: {name}={getattr(self, name)}; expected at least 1"
                )
        if not (self.lr > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"ClassifierRun: lr={self.lr}, weight_decay={self.weight_decay}; expected a rate "
                "above 0 and a decay of at least 0"
            )


def train_classifier(run: ClassifierRun, device: torch.device | str = "cpu") -> NoisyClassifier:
    """Train, or continue, a classifier on noised pictures.

    The loss is the cross entropy of the label at x_t, t drawn from all steps alike.

    Args:
        run: What to train on what.
        device: Where.

    Returns:
        The classifier in evaluation mode. `out/model` holds it as `save_pretrained` writes it, and
        `labels.json`, the names of the labels in order.

    Raises:
        FileNotFoundError, ValueError: the data are no labelled folder, a value does not fit, or
            `out` holds a run with another model or other labels.
        BadSampleError: too many pictures cannot be read.
        FloatingPointError: the loss is not finite.

    Source: Dhariwal and Nichol 2021, section 4.3; its code's `classifier_train.py`.
    """
    dataset = LabelledFolder(run.data)
    config = dataclasses.replace(run.model, num_classes=len(dataset.labels))
    height, width = config.sides
    if height != width:
        raise ValueError(f"train_classifier: pictures are cut to squares, not {height}x{width}")
    process = DiffusionProcess(schedule(run.schedule, run.timesteps))
    torch.manual_seed(run.seed)
    model = NoisyClassifier(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=run.weight_decay)
    step = _resume(run, model, optimizer, dataset.labels)
    if step:
        log.info("continuing from step %d", step)

    stream = StreamConfig(
        seed=run.seed,
        image_size=height,
        global_batch=run.batch_size,
        num_steps=run.timesteps,
        flip=run.flip,
    )
    index = {name: y for y, name in enumerate(dataset.labels)}
    limit = BadSampleLimit(run.bad_limit)
    kind = torch.device(device).type
    loader = make_loader(
        dataset,
        stream,
        start=step * run.batch_size,
        stop=max(step, run.max_steps) * run.batch_size,
        num_workers=run.workers,
        pin_memory=kind == "cuda",
    )
    for batch in loader:
        limit.update(batch)
        x0, noise, t = (batch[name].to(device) for name in ("image", "noise", "t"))
        y = torch.tensor([index[name] for name in batch["caption"]], device=device)
        torch.manual_seed((run.seed * 1_000_003 + step) % 2**63)  # of the dropout
        for group in optimizer.param_groups:
            group["lr"] = run.lr * (1.0 - step / run.max_steps)
        with torch.autocast(kind, torch.bfloat16, enabled=run.precision == "bfloat16"):
            logits = model(process.q_sample(x0, t, noise), t)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % run.log_every == 0 or step == run.max_steps:
            _log(run, step, loss.detach(), logits.detach(), y)
        if step % run.checkpoint_every == 0 or step == run.max_steps:
            _save(run, step, model, optimizer, dataset.labels)

    model.eval().save_pretrained(run.out / "model")
    (run.out / "model" / LABELS_FILE).write_text(json.dumps(dataset.labels, indent=2) + "\n")
    return model


def _log(run: ClassifierRun, step: int, loss: Tensor, logits: Tensor, y: Tensor) -> None:
    right = (logits.argmax(dim=1) == y).float().mean()
    line = {"step": step, "loss": float(loss), "accuracy": float(right)}
    if not torch.isfinite(loss):
        raise FloatingPointError(f"step {step}: loss {line['loss']}; lower lr, and continue")
    log.info(
        "step %d of %d: loss %.4f, accuracy %.3f", step, run.max_steps, *list(line.values())[1:]
    )
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _save(
    run: ClassifierRun,
    step: int,
    model: NoisyClassifier,
    optimizer: torch.optim.AdamW,
    labels: list[str],
) -> None:
    """Weights and AdamW's moments in one file, so that a checkpoint is whole or absent."""
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        tensors[f"exp_avg.{name}"] = state["exp_avg"].contiguous()
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"].contiguous()
    told = {"step": str(step), "seed": str(run.seed), "labels": json.dumps(labels)}
    run.out.mkdir(parents=True, exist_ok=True)
    temporary = run.out / f".{STATE_FILE}.{os.getpid()}"
    save_file(tensors, temporary, metadata=told)
    os.replace(temporary, run.out / STATE_FILE)


def _resume(
    run: ClassifierRun, model: NoisyClassifier, optimizer: torch.optim.AdamW, labels: list[str]
) -> int:
    """Load the run's checkpoint, if there is one; the steps that it has made."""
    from safetensors import safe_open

    path = run.out / STATE_FILE
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
        shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        wanted = {f"weight.{k}": tuple(p.shape) for k, p in model.named_parameters()}
        if {k: v for k, v in shapes.items() if k.startswith("weight.")} != wanted:
            raise ValueError(f"{run.out} holds a run of another model; give another --out")
        if json.loads(told["labels"]) != labels:
            raise ValueError(f"{run.out} was trained on other labels than {run.data} has")
        if told["seed"] != str(run.seed):
            raise ValueError(f"{run.out} was trained with seed {told['seed']}, not {run.seed}")
        step = int(told["step"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{
                        key: file.get_tensor(f"{key}.{name}").to(
                            parameter.device, memory_format=torch.preserve_format
                        )
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
    return step
