"""The training loop against a bare loop of the same model, optimiser and batches.

    python -m benchmarks.bench_train_step [--rounds 5] [--steps 50] [CASE ...]

The loop does all that a run does: a loader worker decodes and draws noise, the average is kept, a
point is logged every 10 steps, and a checkpoint is written every `steps`. The bare loop gets the
loop's own batches, ready in memory. They take turns within one process, `steps` at a time, and
their weights stay equal bit for bit, or there is no number. What the loop left to a thread is
waited for on its own time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdiff.data import scenes
from fastdiff.recipes import get_recipe
from fastdiff.text import SmallTextEncoder
from fastdiff.training.config import Recipe
from fastdiff.training.engine import MicroBatch, StepResult, learning_rate
from fastdiff.training.learner import Learner
from fastdiff.training.loop import Trainer

from . import harness
from .bench_ops import verdict
from .harness import Refused, Row, Timing

GOAL = 0.97  # of the bare loop's steps a second
CASES = ("demo", "demo_ascend")


class Bare:
    """Forward, backward, clipping and AdamW; nothing else.

    Args:
        recipe: Of the run.
        learner: A copy of the run's, from its first step.
    """

    def __init__(self, recipe: Recipe, learner: Learner) -> None:
        self.recipe, self.learner, optim = recipe, learner, recipe.optim
        self.parameters = list(learner.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=self.parameters[0].is_cuda or None,
        )

    def run(self, step: int, batches: Sequence[MicroBatch]) -> float:
        """Seconds for steps `step`, `step` + 1, ... on these batches."""
        device = self.parameters[0].device
        harness.synchronize(device)
        started = time.perf_counter()
        for number, batch in enumerate(batches, start=step):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, number)
            torch.manual_seed(batch.seed)
            self.learner(**batch.inputs).mean().backward()
            if self.recipe.optim.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.recipe.optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        harness.synchronize(device)
        return time.perf_counter() - started


def recipe_of(name: str, folder: Path, rounds: int, steps: int) -> Recipe:
    """The case's recipe: a few hundred of its steps in float32."""
    recipe = get_recipe(name)
    scenes.write_folder(folder / "data", n=512, resolution=recipe.side)
    data = dataclasses.replace(recipe.data, path=str(folder / "data"), workers=1)
    train = dataclasses.replace(
        recipe.train,
        out=str(folder / "run"),
        precision="fp32",
        max_steps=(rounds + 1) * steps + 1,
        log_every=10,
        checkpoint_every=steps,
        sample_every=0,
    )
    return dataclasses.replace(recipe, data=data, train=train)


def run_case(name: str, rounds: int, steps: int) -> Row:
    """Train both, and make the row; the first round warms up.

    Raises:
        Refused: Their weights differ.
    """
    # The loader's worker has a core of its own, as beside a GPU.
    threads = max(1, (os.cpu_count() or 2) - 1)
    with harness.threads(threads), tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(name, Path(folder), rounds, steps)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trainer = Trainer(recipe, 0, 1, device)
        learner = trainer.engine.learner
        assert isinstance(learner, Learner)
        assert isinstance(trainer.text, SmallTextEncoder)
        copy = Learner(recipe, trainer.text.fresh()).to(device)
        copy.load_state_dict(learner.state_dict())
        bare = Bare(recipe, copy)
        kept: list[MicroBatch] = []
        times: list[tuple[float, float]] = []
        step, began = trainer.engine.step, time.perf_counter()

        def hooked(micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
            nonlocal began
            if len(kept) == steps:
                while trainer.writer.busy:
                    time.sleep(1e-4)
                harness.synchronize(device)
                loop = time.perf_counter() - began
                times.append((bare.run(trainer.step - steps, kept), loop))
                pairs = zip(learner.parameters(), copy.parameters(), strict=True)
                if not all(torch.equal(a, b) for a, b in pairs):
                    raise Refused(f"{name}: the weights differ at step {trainer.step}")
                kept.clear()
                began = time.perf_counter()
            (batch,) = micro_batches
            kept.append(batch)
            return step(micro_batches, lr)

        trainer.engine.step = hooked  # type: ignore[method-assign]
        trainer.run()
    times = times[1:]
    how = "cpu" if device.type == "cpu" else "clock"
    timed: dict[str, Timing | str] = {
        name: Timing.of([pair[i] / steps for pair in times], how)
        for i, name in enumerate(("bare loop", "ours"))
    }
    ratio = statistics.median(bare / loop for bare, loop in times)
    batch = recipe.train.batch_size
    row = harness.race_row(f"train {name}, batch {batch}", "training loop", timed, dtype="float32")
    return row | {
        "kind": "training loop",
        "batch": batch,
        "threads": threads,
        "parameters": sum(p.numel() for p in copy.parameters()),
        "images_per_second": 1e6 * batch / row["us"],
        "of_bare": ratio,
        "goal": verdict([("of the bare loop's speed", ratio, GOAL, True)]),
    }


def line(row: Row) -> str:
    """A row as one prints it."""
    return (
        f"{row['case']}, {row['parameters'] / 1e6:.1f}M: bare "
        f"{row['times_us']['bare loop'] / 1e3:.1f} ms a step, the loop {row['us'] / 1e3:.1f}, "
        f"{row['of_bare']:.3f} of its speed, {row['goal']}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", CASES if metafunc.config.getoption("--full") else ["demo"])


def test_train_step(
    name: str, benchmark: Any, request: pytest.FixtureRequest, results: list[Row]
) -> None:
    """The loop of a recipe, as pytest-benchmark sees it."""
    rounds, steps = (5, 50) if request.config.getoption("--full") else (3, 8)
    rows: list[Row] = []
    benchmark.pedantic(lambda: rows.append(run_case(name, rounds, steps)), rounds=1)
    if steps < 50:
        del rows[0]["goal"]  # a checkpoint in so few steps weighs more than in a run
    results += rows
    benchmark.extra_info["row"] = rows[0]


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    for name in given.cases or CASES:
        print(line(run_case(name, given.rounds, given.steps)), flush=True)


if __name__ == "__main__":
    main()
