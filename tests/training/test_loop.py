"""The loop in one process: exact resume, interruption, accumulation, bad numbers, bad folders."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import ASCEND, IUVIT, tiny_recipe

import fastdiff
from fastdiff.data import scenes
from fastdiff.data.stream import BadSampleError
from fastdiff.training import faults
from fastdiff.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    open_state,
    read_manifest,
)
from fastdiff.training.config import save
from fastdiff.training.loop import Interrupted, Trainer, load_run, train


def points(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    saved = open_state(checkpoint)
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    state = {f"{k}/{name}": saved.full(k, name) for k in kinds for name in saved.names(k)}
    return {**state, "updates": torch.tensor(saved.updates)}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert differing == []


@pytest.mark.parametrize("model", [IUVIT, ASCEND], ids=["iuvit", "ascend"])
def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(model, tmp_path):
    """Across an epoch boundary (96 samples, 14 steps of 8), with dropout, flips and an EMA."""
    whole = train(tiny_recipe(tmp_path, model=model, max_steps=14, out=str(tmp_path / "whole")))
    broken = tiny_recipe(tmp_path, model=model, max_steps=14, out=str(tmp_path / "broken"))
    stop_after(broken, 5)
    assert read_manifest(latest_checkpoint(tmp_path / "broken"))["step"] == 5
    resumed = train(broken)
    assert_same(newest(whole), newest(resumed))
    mine, other = points(whole), points(resumed)
    assert [p["step"] for p in other] == list(range(1, 15))
    assert [p["loss"] for p in mine] == [p["loss"] for p in other]
    weights = load_file(whole / "model" / "model.safetensors")
    assert_same(weights, load_file(resumed / "model" / "model.safetensors"))


def test_checkpointed_activations_change_no_bit(tmp_path):
    runs = [
        train(
            tiny_recipe(
                tmp_path,
                model=ASCEND,
                max_steps=2,
                checkpointing=checkpointing,
                out=str(tmp_path / f"run{checkpointing}"),
            )
        )
        for checkpointing in (False, True)
    ]
    assert_same(*map(newest, runs))


def stop_after(recipe, steps: int) -> None:
    """Run `steps` steps of a recipe, then interrupt it as Ctrl-C does."""
    trainer = Trainer(recipe, 0, 1, torch.device("cpu"))
    step = trainer.engine.step

    def counted(*args):
        result = step(*args)
        if trainer.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    trainer.engine.step = counted
    with pytest.raises(Interrupted) as stopped:
        trainer.run()
    assert stopped.value.code == 130


def test_training_learns_and_leaves_what_it_says(tmp_path):
    run = train(tiny_recipe(tmp_path, max_steps=30, checkpoint_every=10, sample_every=15))
    losses = [p["loss"] for p in points(run)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {"images_seen", "grad_norm", "lr", "images_per_s", "data_s"} < points(run)[-1].keys()
    assert [p.name for p in list_checkpoints(run)] == ["step-00000020", "step-00000030"]
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-00000015.png",
        "step-00000030.png",
    ]
    with Image.open(run / "samples" / "step-00000030.png") as grid:
        assert grid.size[0] > 256
    assert list((run / "tensorboard").iterdir())
    # the exported weights are the averaged ones, and not the trained ones
    learner, recipe = load_run(run)
    model = fastdiff.from_pretrained(run / "model")
    assert recipe.train.max_steps == 30
    exported, averaged = model.state_dict(), learner.backbone.state_dict()
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    trained = newest(run)
    assert not torch.equal(
        exported["head.conv.weight"], trained["weight/backbone.head.conv.weight"]
    )
    pictures = learner.draw(["a red disc"], [3], steps=2, guidance=2.0)
    assert pictures.shape == (1, 3, 16, 16)
    again = learner.draw(["a blue bar", "a red disc"], [9, 3], steps=2, guidance=2.0)
    torch.testing.assert_close(again[1], pictures[0], rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_not_trained_again(tmp_path):
    recipe = tiny_recipe(tmp_path)
    before = newest(train(recipe))
    assert_same(before, newest(train(recipe)))
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_steps=10))
    assert [p["step"] for p in points(train(longer))] == list(range(1, 11))


def test_micro_batches_make_the_same_step(tmp_path):
    whole = newest(train(tiny_recipe(tmp_path, max_steps=3, out=str(tmp_path / "a"))))
    parts = tiny_recipe(tmp_path, max_steps=3, micro_batch=2, out=str(tmp_path / "b"))
    split = newest(train(parts))
    for name, value in whole.items():
        if name.startswith("weight/"):
            torch.testing.assert_close(value, split[name], rtol=0, atol=2e-4)


def test_workers_do_not_change_the_run(tmp_path):
    plain = newest(train(tiny_recipe(tmp_path, out=str(tmp_path / "a"))))
    recipe = tiny_recipe(tmp_path, out=str(tmp_path / "b"))
    data = dataclasses.replace(recipe.data, workers=2)
    assert_same(plain, newest(train(dataclasses.replace(recipe, data=data))))


def test_min_snr_weighs_the_training_loss_alone(tmp_path):
    plain = Trainer(tiny_recipe(tmp_path), 0, 1, torch.device("cpu"))
    weighed = Trainer(tiny_recipe(tmp_path, min_snr=0.5), 0, 1, torch.device("cpu"))
    inputs = next(plain._batches()).inputs
    losses = plain.engine.learner(**inputs)
    weight = plain.engine.learner.process.min_snr_weight(inputs["t"], 0.5)
    assert weight.min() < 0.9
    torch.testing.assert_close(weighed.engine.learner(**inputs), losses * weight)
    torch.testing.assert_close(weighed.engine.learner.eval()(**inputs), losses)
    with pytest.raises(ValueError, match=r"train\.min_snr=0, expected > 0"):
        tiny_recipe(tmp_path, min_snr=0)


def test_bf16_autocast_trains(tmp_path):
    run = train(tiny_recipe(tmp_path, precision="bf16"))
    assert {v.dtype for k, v in newest(run).items() if k.startswith("weight/")} == {torch.float32}
    exact = train(tiny_recipe(tmp_path, out=str(tmp_path / "fp32")))
    for a, b in zip(points(run), points(exact), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


def test_a_non_finite_step_changes_nothing_and_a_row_of_them_stops(tmp_path):
    trainer = Trainer(tiny_recipe(tmp_path, max_steps=40), 0, 1, torch.device("cpu"))
    head = trainer.engine.learner.backbone.head.conv.bias
    with torch.no_grad():
        head[0] = torch.inf
    before = {n: p.clone() for n, p in trainer.engine.learner.named_parameters()}
    averaged = {n: v.clone() for n, v in trainer.ema.state_dict().items()}
    told = r"20 steps in a row .* The last batch was images/.*: python -m fastdiff.training.faults"
    with pytest.raises(FloatingPointError, match=told):
        trainer.run()
    assert_same(before, dict(trainer.engine.learner.named_parameters()))
    assert_same(averaged, trainer.ema.state_dict())


def test_a_bad_batch_is_kept_and_replayed(tmp_path, capsys):
    """One picture of the batch that stops a run is to blame, and the replay names it."""
    recipe = tiny_recipe(tmp_path, max_steps=40, micro_batch=4)
    trainer = Trainer(recipe, 0, 1, torch.device("cpu"))
    step, seen = trainer.engine.step, []

    def spoiled(micro_batches, lr):
        if trainer.step >= 3:
            micro_batches[1].inputs["x0"][2, 0, 0, 0] = torch.inf
            seen.append(micro_batches[1].keys[2])
        return step(micro_batches, lr)

    trainer.engine.step = spoiled
    with pytest.raises(FloatingPointError, match="now step 22"):
        trainer.run()
    faults.main([str(tmp_path / "run" / "nonfinite")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "<- not finite" in line] == [seen[-1]]
    assert len([line for line in lines if "loss" in line]) == 8
    assert "gradients that are not finite: 0" not in lines[8]
    # A sound batch gives the same losses as it did in the run.
    kept = faults.read_batches(tmp_path / "run" / "nonfinite" / "batch-00000.safetensors")
    losses = trainer.engine.learner(**kept[0].inputs)
    samples, _ = faults.replay(tmp_path / "run" / "nonfinite")
    torch.testing.assert_close([s.loss for s in samples[:4]], losses.tolist(), rtol=1e-6, atol=0)
    assert latest_checkpoint(tmp_path / "run").name == "step-00000020"  # the dump is not one
    with pytest.raises(SystemExit, match="holds no batch"):
        faults.main([str(tmp_path)])


def test_a_run_of_another_model_is_refused_with_the_fields(tmp_path):
    train(tiny_recipe(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match=r"model\.dim: 32 in the checkpoint, 64 asked for"):
        train(tiny_recipe(tmp_path, model=dataclasses.replace(IUVIT, dim=64)))


def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=8)
    run = train(recipe)
    final = newest(run)
    torn = run / "checkpoints" / "step-00000008"
    with (torn / "state-00000-of-00001.safetensors").open("r+b") as file:
        file.truncate(100)
    assert latest_checkpoint(run).name == "step-00000004"
    assert "not whole" in caplog.text
    train(recipe)
    assert_same(final, newest(run))
    for name in ("step-00000004", "step-00000008"):
        (run / "checkpoints" / name / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        train(recipe)


def test_a_new_checkpoint_outlives_damaged_and_later_ones(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=12, keep=1)
    run = train(recipe)
    manifest = run / "checkpoints" / "step-00000012" / "manifest.json"
    shutil.copytree(manifest.parent, run / "checkpoints" / "step-00000099")
    (run / "checkpoints" / "step-00000099" / "manifest.json").unlink()
    train(tiny_recipe(tmp_path, max_steps=13, keep=1))
    assert [p.name for p in list_checkpoints(run)] == ["step-00000013"]
    assert read_manifest(latest_checkpoint(run))["step"] == 13


def test_the_same_seed_starts_from_the_same_weights(tmp_path):
    device = torch.device("cpu")
    first = Trainer(tiny_recipe(tmp_path), 0, 1, device).engine.learner.state_dict()
    again = Trainer(tiny_recipe(tmp_path), 0, 1, device).engine.learner.state_dict()
    assert_same(first, again)
    other = Trainer(tiny_recipe(tmp_path, seed=1), 0, 1, device).engine.learner.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_another_batch_size_goes_on_in_the_data(tmp_path, caplog):
    train(tiny_recipe(tmp_path, max_steps=4))
    resumed = tiny_recipe(tmp_path, max_steps=6, batch_size=4, seed=5)
    trainer = Trainer(resumed, 0, 1, torch.device("cpu"))
    assert trainer.images == 32
    assert "train.seed=0" in caplog.text
    run = trainer.run()
    assert read_manifest(latest_checkpoint(run))["images"] == 40
    assert [p["images_seen"] for p in points(run)] == [8, 16, 24, 32, 36, 40]


def test_a_drawing_that_fails_costs_nothing(tmp_path, caplog, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=4, sample_every=2)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fastdiff.training.learner.Learner.draw", broken)
    run = train(recipe)
    assert read_manifest(latest_checkpoint(run))["step"] == 4
    assert "no sample grid: out of memory" in caplog.text


def test_a_checkpoint_before_the_first_update_resumes(tmp_path):
    trainer = Trainer(tiny_recipe(tmp_path, max_steps=3), 0, 1, torch.device("cpu"))
    with torch.no_grad():
        trainer.engine.learner.backbone.head.conv.bias[0] = torch.nan
    run = trainer.run()
    assert [(p["loss"], p["skipped"]) for p in points(run)] == [(None, 1)] * 3
    assert Trainer(tiny_recipe(tmp_path), 0, 1, torch.device("cpu")).step == 3


def test_shards_that_cannot_be_read_are_limited(tmp_path):
    recipe = tiny_recipe(tmp_path)
    scenes.write_shards(tmp_path / "shards", n=40, resolution=16, shard_size=10)
    data = dataclasses.replace(recipe.data, path=str(tmp_path / "shards"))
    recipe = dataclasses.replace(recipe, data=data)
    (tmp_path / "shards" / "00001.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"1 of 4 shards cannot be read, over the limit of 1\.00%"):
        train(recipe)
    train(dataclasses.replace(recipe, data=dataclasses.replace(data, bad_limit=0.5)))


def test_other_data_is_said(tmp_path, caplog):
    train(tiny_recipe(tmp_path, max_steps=4))
    metadata = tmp_path / "data" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join(lines[:-1]) + "\n")
    train(tiny_recipe(tmp_path, max_steps=5))
    assert "trained on other data" in caplog.text


def test_bad_samples_are_counted_and_limited(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, max_steps=12)
    pictures = sorted((tmp_path / "data").rglob("*.png"))
    pictures[5].write_bytes(b"not a picture")
    train(recipe)
    assert "bad sample" in caplog.text
    for picture in pictures[: len(pictures) // 2]:
        picture.write_bytes(b"not a picture")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(BadSampleError, match=r"over the limit of 1\.00%; worst shard"):
        train(recipe)


def test_missing_data_is_said(tmp_path):
    recipe = tiny_recipe(tmp_path)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        train(recipe)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_the_same_command_goes_on(number, status, tmp_path):
    """Sent to the whole group, loader worker included, as terminals and launchers do."""
    recipe = tiny_recipe(tmp_path, max_steps=100_000, checkpoint_every=100_000)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=1))
    save(recipe, tmp_path / "recipe.yaml")
    code = (
        "import sys, pathlib; from fastdiff.training.config import load;"
        "from fastdiff.training.loop import train; train(load(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")]
    run = tmp_path / "run"
    for _ in range(2):
        seen = len(points(run)) if (run / "metrics.jsonl").exists() else 0
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").exists() and len(points_or_none(run)) > seen + 3:
                break
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "the same command continues from it" in errors
        manifest = read_manifest(latest_checkpoint(run))
        assert manifest["step"] == len(points(run)) > seen + 3


def points_or_none(run: Path) -> list[dict]:
    try:
        return points(run)
    except json.JSONDecodeError:
        return []  # read while a line was being written
