"""The DeepSpeed engine under its own launcher, on CPU ranks over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe

from fastdiff.training.checkpoint import latest_checkpoint, read_manifest
from fastdiff.training.config import save
from fastdiff.training.loop import load_run, train

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
from fastdiff.training.config import load
from fastdiff.training.loop import train
train(load(Path(sys.argv[-1])))
"""


def launch(folder: Path, *script: str, ranks: int = 2) -> str:
    """Run a script under `deepspeed` on CPU ranks; returns its output, fails on its failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), *script]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def launch_recipe(folder: Path, recipe) -> Path:
    save(recipe, folder / "recipe.yaml")
    (folder / "run.py").write_text(RUN)
    launch(folder, str(folder / "run.py"), str(folder / "recipe.yaml"))
    return Path(recipe.train.out)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def ema_of(run: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in load_file(latest_checkpoint(run) / "ema.safetensors").items()}


def test_the_command_of_the_readme(tmp_path):
    """`deepspeed train/t2i.py` makes its data and trains, ZeRO 1 over two ranks."""
    script = str(ROOT / "train" / "t2i.py")
    steps = ("--train.max-steps", "20", "--train.log-every", "10")
    launch(tmp_path, script, "--config", "demo", *steps)
    run = tmp_path / "runs" / "demo"
    assert read_manifest(latest_checkpoint(run))["step"] == 20
    assert (run / "model" / "model.safetensors").is_file()
    first, last = losses(run)
    assert last < 0.9 * first


def test_two_ranks_equal_one_process_and_resume_exactly(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=8, micro_batch=2)

    def to(name, **changes):
        changed = dataclasses.replace(recipe.train, out=str(tmp_path / name), **changes)
        return dataclasses.replace(recipe, train=changed)

    one = train(to("one"))
    two = launch_recipe(tmp_path, to("two"))
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-5, atol=1e-5)
    for name, value in ema_of(one).items():
        torch.testing.assert_close(ema_of(two)[name], value, rtol=0, atol=2e-4)

    launch_recipe(tmp_path, to("broken", max_steps=4))
    resumed = launch_recipe(tmp_path, to("broken"))
    assert losses(resumed) == losses(two)
    whole, again = ema_of(two), ema_of(resumed)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []

    with pytest.raises(ValueError, match="under a launcher and cannot be resumed under plain"):
        train(to("broken"))
    learner, _ = load_run(resumed)
    assert learner.draw(["a red disc"], [0], steps=2).shape == (1, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_in_bf16(stage, tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=20, zero=stage, precision="bf16")
    run = launch_recipe(tmp_path, recipe)
    exact = train(tiny_recipe(tmp_path, max_steps=20, out=str(tmp_path / "exact")))
    torch.testing.assert_close(losses(run), losses(exact), rtol=0.08, atol=0)
    whole = ema_of(exact)
    for name, value in ema_of(run).items():
        assert value.dtype == torch.float32
        assert value.shape == whole[name].shape
        assert (value - whole[name]).abs().max() < 0.03
