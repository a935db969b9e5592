"""A batch whose loss or gradient is not finite: kept with the weights that met it, and replayed.

`python -m fastdiff.training.faults RUN/nonfinite` computes it again, sample by sample.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.text import SmallTextEncoder
from fastdiff.training.checkpoint import TEXT_FOLDER, latest_checkpoint, open_state
from fastdiff.training.config import load
from fastdiff.training.engine import MicroBatch
from fastdiff.training.learner import AnyTextEncoder, Learner, make_t5
from fastdiff.training.shares import WEIGHT

FOLDER = "nonfinite"


class Replayed(NamedTuple):
    """One sample of a replayed batch: its key, time step and loss."""

    key: str
    t: int
    loss: float


def write_batch(folder: Path, rank: int, micro_batches: Sequence[MicroBatch]) -> None:
    """Keep what a rank fed to the learner in one step.

    Args:
        folder: RUN/nonfinite.
        rank: This process.
        micro_batches: Of the step.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches):
        for name, value in batch.inputs.items():
            tensors[f"{number}/{name}"] = value.detach().cpu().contiguous()
    told = {
        "seeds": json.dumps([batch.seed for batch in micro_batches]),
        "keys": json.dumps([batch.keys for batch in micro_batches]),
    }
    save_file(tensors, folder / f"batch-{rank:05d}.safetensors", metadata=told)


def read_batches(file: Path) -> list[MicroBatch]:
    """The micro-batches that `write_batch` wrote for one rank."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
        seeds, keys = json.loads(told["seeds"]), json.loads(told["keys"])
        inputs: list[dict[str, Tensor]] = [{} for _ in seeds]
        for key in opened.keys():  # noqa: SIM118 - no mapping
            number, name = key.split("/")
            inputs[int(number)][name] = opened.get_tensor(key)
    return [
        MicroBatch(seed, part, tuple(names))
        for seed, part, names in zip(seeds, inputs, keys, strict=True)
    ]


def replay(folder: Path, device: torch.device | str = "cpu") -> tuple[list[Replayed], list[str]]:
    """Compute a kept batch again, with the weights that met it.

    Args:
        folder: RUN/nonfinite.
        device: Where.

    Returns:
        Its samples in order, and the names of the parameters whose gradients are not finite.

    Raises:
        FileNotFoundError: Nothing is kept there.
    """
    checkpoint, files = latest_checkpoint(folder), sorted(folder.glob("batch-*.safetensors"))
    if checkpoint is None or not files:
        raise FileNotFoundError(f"{folder} holds no batch with its weights")
    recipe, device = load(checkpoint / "recipe.yaml"), torch.device(device)
    text: AnyTextEncoder | None = None
    if (checkpoint / TEXT_FOLDER).is_dir():
        text = SmallTextEncoder.from_vocabulary(checkpoint / TEXT_FOLDER)
    elif recipe.model.context_dim is not None and recipe.data.embeddings is None:
        text = make_t5(recipe, device)
    learner = Learner(recipe, text)
    open_state(checkpoint).copy_to(learner, WEIGHT)
    learner.to(device).train()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.precision)
    samples: list[Replayed] = []
    for batch in (batch for file in files for batch in read_batches(file)):
        torch.manual_seed(batch.seed)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if dtype is not None:
            autocast = torch.autocast(device.type, dtype=dtype)
        with autocast:
            losses = learner(**{name: value.to(device) for name, value in batch.inputs.items()})
        losses.mean().backward()
        rows = zip(batch.keys, batch.inputs["t"].tolist(), losses.tolist(), strict=True)
        samples += [Replayed(*row) for row in rows]
    broken = [
        name
        for name, parameter in learner.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return samples, broken


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a kept batch's losses, and where its gradients are not finite."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.training.faults", description=__doc__)
    parser.add_argument("folder", type=Path, help="RUN/nonfinite")
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args(arguments)
    try:
        samples, broken = replay(parsed.folder, parsed.device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    for sample in samples:
        mark = "" if math.isfinite(sample.loss) else "   <- not finite"
        print(f"{sample.key:40} t = {sample.t:4d}  loss {sample.loss:.6g}{mark}")
    print(
        f"gradients that are not finite: {len(broken)}" + "".join(f"\n  {n}" for n in broken[:20])
    )


if __name__ == "__main__":
    main()
