"""Several ranks of one run, on CPUs over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from fastdiff.training.config import Recipe, save

# Trains recipes one after another, and notes the keys of each step's samples.
TRAIN = """
import json, sys
from pathlib import Path
from fastdiff.training import engine as engines
from fastdiff.training.config import load
from fastdiff.training.loop import make_trainer

stop, engines.stop = engines.stop, lambda: None  # the group serves the next recipe too
for recipe in map(load, map(Path, sys.argv[1:])):
    trainer = make_trainer(recipe)
    file = Path(recipe.train.out, f"keys-{trainer.rank}.jsonl")

    def step(micro_batches, lr, trainer=trainer, file=file, step=trainer.engine.step):
        with file.open("a") as out:
            keys = [key for batch in micro_batches for key in batch.keys]
            out.write(json.dumps([trainer.step, keys]) + "\\n")
        return step(micro_batches, lr)

    trainer.engine.step = step
    trainer.run()
stop()  # else threads of the group are there at exit, and may abort the process
"""


def start(script: str, *arguments: str, ranks: int) -> list[subprocess.Popen]:
    """Start a script on ranks, as a launcher does, in a process group of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[subprocess.Popen] = []
    for rank in range(ranks):
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> None:
    """Wait for ranks; fails where one fails, and leaves none running."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def train_on(folder: Path, *recipes: Recipe, ranks: int = 2) -> list[Path]:
    """Train recipes one after another on ranks; their run folders."""
    files = []
    for number, recipe in enumerate(recipes):
        files.append(folder / f"recipe-{number}.yaml")
        save(recipe, files[-1])
    finish(start(TRAIN, *map(str, files), ranks=ranks))
    return [Path(recipe.train.out) for recipe in recipes]


def losses(run: Path) -> list[float]:
    """Of all logged steps."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def keys_by_step(run: Path) -> dict[int, list[str]]:
    """Of all steps, in the order of the global batch, on however many ranks it was."""
    by_step: dict[int, list[str]] = {}
    for file in sorted(run.glob("keys-*.jsonl")):
        for line in file.read_text().splitlines():
            step, keys = json.loads(line)
            by_step.setdefault(step, []).extend(keys)
    return by_step
