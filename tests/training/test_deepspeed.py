"""Runs on several ranks: every ZeRO stage against one process, resumes, faults; CPUs over gloo."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from tiny import ASCEND, tiny_recipe

import fastdiff
from fastdiff.data import scenes
from fastdiff.training.checkpoint import latest_checkpoint, open_state, read_manifest
from fastdiff.training.config import Recipe, save
from fastdiff.training.loop import load_run, train

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *script: str) -> subprocess.CompletedProcess:
    """Run a script under `deepspeed` on two CPU ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", "2", "--master_port", str(port), *script]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def to(recipe: Recipe, folder: Path, **changes) -> Recipe:
    """The recipe with another run folder."""
    train = dataclasses.replace(recipe.train, out=str(folder), **changes)
    return dataclasses.replace(recipe, train=train)


def state_of(run: Path, *kinds: str) -> dict[str, torch.Tensor]:
    saved = open_state(latest_checkpoint(run))
    return {f"{k}/{name}": saved.full(k, name) for k in kinds for name in saved.names(k)}


def test_the_command_of_the_readme(tmp_path):
    """`deepspeed train/t2i.py` makes its data and trains, ZeRO 1 over two ranks."""
    script = str(ROOT / "train" / "t2i.py")
    steps = ("--train.max-steps", "20", "--train.log-every", "10")
    done = launch(tmp_path, script, "--config", "demo", *steps)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "demo"
    assert read_manifest(latest_checkpoint(run))["step"] == 20
    assert (run / "model" / "model.safetensors").is_file()
    first, last = ranks.losses(run)
    assert last < 0.9 * first


def test_the_590m_recipe_at_reduced_width(tmp_path):
    """`deepspeed train/t2i.py --config ascend_t2i_128`, with a narrow model and a narrow T5."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    narrow = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(narrow).save_pretrained(tmp_path / "t5")
    ByT5Tokenizer().save_pretrained(tmp_path / "t5")
    scenes.write_shards(tmp_path / "shards", n=16, resolution=128, shard_size=8)
    done = launch(
        tmp_path,
        *(str(ROOT / "train" / "t2i.py"), "--config", "ascend_t2i_128"),
        *("--data.path", "shards", "--data.workers", "1", "--text.name", "t5"),
        *("--model.context-dim", "24", "--model.channels", "32", "--model.groups", "16"),
        *("--model.head-dim", "32", "--model.depth", "1"),
        *("--train.batch-size", "4", "--train.micro-batch", "1", "--train.max-steps", "2"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checkpoint = latest_checkpoint(tmp_path / "runs" / "ascend_t2i_128")
    assert read_manifest(checkpoint)["step"] == 2
    model = fastdiff.from_pretrained(tmp_path / "runs" / "ascend_t2i_128" / "model")
    assert model.config.sides == (128, 128)


def test_every_stage_is_one_process_and_resumes_exactly(tmp_path):
    """Float32, 20 steps, accumulation over two micro-batches on each of two ranks."""
    recipe = tiny_recipe(tmp_path, max_steps=20, micro_batch=2, checkpoint_every=10)
    one = train(to(recipe, tmp_path / "one"))
    stages = [to(recipe, tmp_path / f"zero{zero}", zero=zero) for zero in range(4)]
    broken = tmp_path / "broken"
    parts = [to(recipe, broken, zero=2, max_steps=10), to(recipe, broken, zero=2)]
    ranks.train_on(tmp_path, *stages, *parts)
    expected, trained = state_of(one, "ema"), set(state_of(one, "weight"))
    for stage in stages:
        run = Path(stage.train.out)
        torch.testing.assert_close(ranks.losses(run), ranks.losses(one), rtol=1e-5, atol=1e-5)
        averages = state_of(run, "ema")
        assert averages.keys() == expected.keys()
        assert state_of(run, "weight").keys() == trained
        for name, value in averages.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)
        learner, _ = load_run(run)
        exported = fastdiff.from_pretrained(run / "model").state_dict()
        averaged = learner.backbone.state_dict()
        assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    whole, again = state_of(tmp_path / "zero2", *kinds), state_of(broken, *kinds)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert ranks.losses(broken) == ranks.losses(tmp_path / "zero2")


def test_from_two_ranks_to_one_and_back(tmp_path):
    """The same samples in the same order, whatever reads the checkpoint."""
    recipe = tiny_recipe(tmp_path, max_steps=12)
    one = to(recipe, tmp_path / "one")
    changing = tmp_path / "changing"
    first, second, third = (
        to(recipe, changing, max_steps=steps, zero=zero)
        for steps, zero in ((4, 1), (8, 0), (12, 3))
    )
    ranks.train_on(tmp_path, first)
    ranks.train_on(tmp_path, one, second, ranks=1)
    ranks.train_on(tmp_path, third)
    assert ranks.keys_by_step(changing) == ranks.keys_by_step(tmp_path / "one")
    assert sorted(ranks.keys_by_step(changing)) == list(range(12))
    torch.testing.assert_close(
        ranks.losses(changing), ranks.losses(tmp_path / "one"), rtol=0, atol=1e-4
    )
    assert read_manifest(latest_checkpoint(changing))["world"] == 2


# One rank's gradients become NaN in one step: nothing may change on any rank, in no stage.
NAN = """
import json, sys
from pathlib import Path
import torch
from fastdiff.training import engine as engines
from fastdiff.training.config import load
from fastdiff.training.loop import make_trainer
from fastdiff.training.shares import tensors_of

engines.stop = lambda: None
for recipe in map(load, map(Path, sys.argv[1:])):
    trainer = make_trainer(recipe)
    engine = trainer.engine
    forward, step = engine.learner.forward, engine.step
    engine.learner.forward = lambda forward=forward, trainer=trainer, **inputs: (
        forward(**inputs) * (float("nan") if (trainer.rank, trainer.step) == (1, 2) else 1.0)
    )

    def checked(micro_batches, lr, trainer=trainer, engine=engine, step=step):
        def state():
            averages = trainer.ema.state_dict()
            tensors = tensors_of(engine.shares, engine.optimizer, averages)
            return {name: value.clone() for name, value in tensors.items()}

        before, result = state(), step(micro_batches, lr)
        after = state()
        same = {name for name in before if torch.equal(before[name], after[name])}
        unchanged = len(same) == len(before) == len(after)
        assert result.skipped == (trainer.step == 2), (recipe.train, trainer.step, result)
        assert unchanged == (trainer.step == 2), (recipe.train, trainer.step)
        return result

    engine.step = checked
    trainer.run()
    assert trainer.step == 5
"""


def test_a_nan_on_one_rank_skips_the_step_on_all(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=5, sample_every=0)
    cases = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 2)]
    files = []
    for precision, zero in cases:
        name = f"{precision}-{zero}"
        files.append(str(tmp_path / f"{name}.yaml"))
        changed = to(recipe, tmp_path / name, precision=precision, zero=zero)
        save(changed, Path(files[-1]))
    ranks.finish(ranks.start(NAN, *files, ranks=2))
    for precision, zero in cases:
        assert ranks.losses(tmp_path / f"{precision}-{zero}")[2] is None


DIE = """
import os, signal, sys
from pathlib import Path
from fastdiff.training.config import load
from fastdiff.training.loop import make_trainer

trainer = make_trainer(load(Path(sys.argv[-1])))
step = trainer.engine.step

def dying(micro_batches, lr):
    if trainer.rank == 1 and trainer.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(micro_batches, lr)

trainer.engine.step = dying
trainer.run()
"""


@pytest.mark.parametrize("zero", [0, 2])
def test_a_killed_rank_ends_the_other(zero, tmp_path):
    """Without a launcher, which would end it too."""
    save(tiny_recipe(tmp_path, max_steps=10_000, zero=zero), tmp_path / "recipe.yaml")
    first, second = ranks.start(DIE, str(tmp_path / "recipe.yaml"), ranks=2)
    try:
        second.communicate(timeout=120)
        assert second.returncode == -9
        started = time.monotonic()
        _, errors = first.communicate(timeout=60)
        assert first.returncode not in (0, None), errors
        assert time.monotonic() - started < 60
    finally:
        first.kill()


@pytest.mark.slow
def test_the_launcher_ends_when_a_rank_is_killed(tmp_path):
    save(tiny_recipe(tmp_path, max_steps=10_000), tmp_path / "recipe.yaml")
    (tmp_path / "die.py").write_text(DIE)
    started = time.monotonic()
    done = launch(tmp_path, str(tmp_path / "die.py"), str(tmp_path / "recipe.yaml"))
    assert done.returncode != 0
    assert time.monotonic() - started < 120


@pytest.mark.slow
def test_every_stage_trains_in_lower_precision(tmp_path):
    """bf16 and fp16 under each stage, and the optimiser on the CPU, against float32."""
    recipe = tiny_recipe(tmp_path, max_steps=20)
    exact = train(to(recipe, tmp_path / "exact"))
    cases = [("bf16", zero, False) for zero in range(4)]
    cases += [("fp16", 0, False), ("bf16", 2, True), ("fp32", 3, True)]
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # else DeepSpeed refuses it on a CPU
        cases.append(("fp16", 2, False))
    recipes = [
        to(recipe, tmp_path / f"{p}-{zero}-{off}", precision=p, zero=zero, offload=off)
        for p, zero, off in cases
    ]
    expected = state_of(exact, "ema")
    for run in ranks.train_on(tmp_path, *recipes):
        skipped = [loss is None for loss in ranks.losses(run)]
        if not any(skipped):
            torch.testing.assert_close(
                ranks.losses(run), ranks.losses(exact), rtol=0.08, atol=0, msg=str(run)
            )
        for name, value in state_of(run, "ema").items():
            assert value.dtype == torch.float32
            assert (value - expected[name]).abs().max() < 0.03, (run, name)


@pytest.mark.slow
# Within inductor and dynamo.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_compiled_backbone_trains_and_resumes(tmp_path):
    recipe = tiny_recipe(tmp_path, model=ASCEND, max_steps=6)
    exact = train(to(recipe, tmp_path / "exact"))
    train(to(recipe, tmp_path / "compiled", compile=True, max_steps=3))
    run = train(to(recipe, tmp_path / "compiled", compile=True))
    assert state_of(run, "ema").keys() == state_of(exact, "ema").keys()
    torch.testing.assert_close(ranks.losses(run), ranks.losses(exact), rtol=0.05, atol=0)
