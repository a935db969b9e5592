"""Checkpoints under kills, flipped bytes and full disks: the one before is always there."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from tiny import ASCEND, tiny_recipe

from fastdiff.data import scenes
from fastdiff.training import checkpoint as checkpoints
from fastdiff.training import engine as engines
from fastdiff.training.checkpoint import (
    CheckpointWriter,
    Progress,
    Ranks,
    Snapshot,
    damage,
    latest_checkpoint,
    list_checkpoints,
    open_state,
    read_manifest,
    step_of,
)
from fastdiff.training.config import Recipe, save
from fastdiff.training.lock import RunLock
from fastdiff.training.loop import Trainer, make_trainer, train

ALONE = Ranks(0, 1, lambda value: [value])


def progress(step: int) -> Progress:
    return Progress(step=step, images=8 * step, seed=0, world=1, data="d")


def snapshot(step: int, size: int = 1000) -> Snapshot:
    """What no other step has."""
    tensors = {"weight/w": torch.full((size,), float(step)), "ema/w": torch.arange(size) + step / 2}
    return Snapshot(tensors=tensors, starts={"w": 0}, shapes={"w": (size,)}, updates=step)


def writer(run: Path, keep: int = 2, keep_every: int | None = None) -> CheckpointWriter:
    return CheckpointWriter(run, ALONE, keep=keep, keep_every=keep_every)


def write(run: Path, recipe: Recipe, step: int, **how) -> bool:
    mine = writer(run, **how)
    mine.start(progress(step), snapshot(step), recipe)
    mine.commit()
    return mine.saved == step


def assert_is(checkpoint: Path, step: int) -> None:
    saved = open_state(checkpoint)
    assert saved.updates == step
    assert torch.equal(saved.full("weight", "w"), torch.full((1000,), float(step)))
    assert torch.equal(saved.full("ema", "w"), torch.arange(1000) + step / 2)


# In a child: the checkpoint of step 2, and its process's end at the n-th call that changes a disk;
# a write is cut in the middle.
KILL = """
import os, sys
from pathlib import Path
from fastdiff.training import checkpoint as checkpoints
from fastdiff.training import engine as engines
from fastdiff.training.config import load
import test_checkpoint as test

run, recipe = Path(sys.argv[1]), load(Path(sys.argv[2]))

def ending(n, calls):
    def ends():
        calls[0] += 1
        return calls[0] == n

    def around(call, cut=None):
        def ended(*args, **kwargs):
            if ends():
                os._exit(9)
            result = call(*args, **kwargs)
            if cut is not None and ends():
                with open(cut(*args), "r+b") as file:
                    file.truncate(os.path.getsize(file.name) // 2)
                os._exit(9)
            return result
        return ended

    os.fsync, os.rename = around(os.fsync), around(os.rename)
    checkpoints.shutil.rmtree = around(checkpoints.shutil.rmtree)
    checkpoints.write_state = around(checkpoints.write_state, lambda file, *rest: file)
    checkpoints.save = around(checkpoints.save, lambda recipe, file: file)
    Path.write_text = around(Path.write_text, lambda file, *rest: file)

n, seen = 0, []
while True:
    n += 1
    child = os.fork()
    if child == 0:
        ending(n, [0])
        test.write(run, recipe, 2, keep=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    newest = checkpoints.latest_checkpoint(run)
    step = checkpoints.step_of(newest)
    test.assert_is(newest, step)
    seen.append(step)
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.waitstatus_to_exitcode(status) == 9
    if step == 2:  # begin again where only the first is there
        checkpoints.shutil.rmtree(newest)
        test.write(run, recipe, 1)
print(*seen)
"""


def test_killed_at_every_phase_of_a_write(tmp_path):
    run, recipe = tmp_path / "run", tiny_recipe(tmp_path)
    write(run, recipe, 1)
    save(recipe, tmp_path / "recipe.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(run), str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    # Before and within each of three writes, before four and more fsyncs, the rename, what follows.
    assert len(seen) > 12
    assert seen == sorted(seen), "once it is in place it stays"
    assert set(seen) == {"1", "2"}
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_a_flipped_byte_is_found_and_the_one_before_is_used(tmp_path, caplog):
    run, recipe = tmp_path / "run", tiny_recipe(tmp_path)
    write(run, recipe, 1)
    write(run, recipe, 2)
    newest = run / "checkpoints" / "step-00000002"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors", ".yaml"}
    for file in files:
        whole = file.read_bytes()
        for position in (5, len(whole) // 2, len(whole) - 3):
            assert damage(newest) is None
            torn = bytearray(whole)
            torn[position] ^= 1
            file.write_bytes(torn)
            caplog.clear()
            assert latest_checkpoint(run).name == "step-00000001"
            assert "step-00000002" in caplog.text
            file.write_bytes(whole)
    assert_is(latest_checkpoint(run), 2)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    run, recipe = tmp_path / "run", tiny_recipe(tmp_path)
    for step in range(1, 12):
        assert write(run, recipe, step, keep=2, keep_every=4)
    assert [step_of(path) for path in list_checkpoints(run)] == [4, 8, 10, 11]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    trainer = Trainer(tiny_recipe(tmp_path, checkpoint_every=2), 0, 1, torch.device("cpu"))
    slow, write_state = threading.Event(), checkpoints.write_state
    weights = {share.name: share.indexed(share.weight) for share in trainer.engine.shares}
    then: dict[str, torch.Tensor] = {}

    def waiting(*args):
        assert slow.wait(60)
        write_state(*args)

    step = trainer.engine.step

    def stepping(*args):
        if trainer.step == 2:
            then.update({name: value.clone() for name, value in weights.items()})
        if trainer.step == 3:
            assert trainer.writer.in_flight == 2
            assert trainer.writer.busy
            assert trainer.writer.saved is None
            slow.set()
        return step(*args)

    monkeypatch.setattr(checkpoints, "write_state", waiting)
    trainer.engine.step = stepping
    run = trainer.run()
    assert [step_of(path) for path in list_checkpoints(run)] == [6, 8]
    # The state is of the step that asked for it, not of when it was written.
    slow.set()
    shutil.rmtree(run)
    again = Trainer(
        tiny_recipe(tmp_path, checkpoint_every=2, max_steps=3), 0, 1, torch.device("cpu")
    )
    again.run()
    saved = open_state(run / "checkpoints" / "step-00000002")
    assert all(
        torch.equal(saved.full("weight", n).view(-1), value.flatten()) for n, value in then.items()
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB, where the system lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, small_disk, caplog):
    recipe = tiny_recipe(tmp_path, out=str(small_disk / "run"), max_steps=8, checkpoint_every=2)
    trainer = Trainer(recipe, 0, 1, torch.device("cpu"))
    step, run = trainer.engine.step, Path(recipe.train.out)

    def filling(*args):
        if trainer.step == 3:
            trainer.writer.commit()
            with (
                (small_disk / "full").open("wb", buffering=0) as file,
                pytest.raises(OSError, match="No space"),
            ):
                file.writelines(itertools.repeat(bytes(4096)))
        if trainer.step == 5:
            trainer.writer.commit()
            (small_disk / "full").unlink()
        return step(*args)

    trainer.engine.step = filling
    trainer.run()
    assert "THE CHECKPOINT OF STEP 4 COULD NOT BE WRITTEN" in caplog.text
    assert "the newest checkpoint is that of step 2" in caplog.text
    assert "No space left" in caplog.text
    assert [step_of(path) for path in list_checkpoints(run)] == [6, 8]
    assert all(damage(path) is None for path in list_checkpoints(run))
    assert not list((run / "checkpoints").glob(".partial-*"))


def test_a_write_that_fails_anywhere_costs_that_checkpoint(tmp_path, monkeypatch, caplog):
    """Also where no file system can be mounted: the error comes from each call in turn."""
    run, recipe = tmp_path / "run", tiny_recipe(tmp_path)
    write(run, recipe, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for owner, name in (
        (checkpoints, "write_state"),
        (checkpoints, "save"),
        (os, "fsync"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (os, "rename"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            caplog.clear()
            assert not write(run, recipe, 2), name
        assert "STEP 2 COULD NOT BE WRITTEN: rank 0: [Errno 28]" in caplog.text
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert write(run, recipe, 2)


def test_the_last_checkpoint_that_fails_is_an_error(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, max_steps=6)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = Trainer(recipe, 0, 1, torch.device("cpu"))
    monkeypatch.setattr(checkpoints, "write_state", full)
    with pytest.raises(OSError, match=r"checkpoint of the last step, 6, could not be written"):
        trainer.run()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


LOCK = """
import sys, time
from pathlib import Path
from fastdiff.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_job_at_a_time(tmp_path):
    recipe = tiny_recipe(tmp_path, max_steps=1)
    command = [sys.executable, "-c", LOCK, recipe.train.out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=rf"run is in use by process {other.pid} on "):
            train(recipe)
        other.kill()
    train(recipe)  # a killed job leaves nothing behind
    lock = RunLock(Path(recipe.train.out))
    lock.release()


def kill_again_and_again(recipe: Recipe, folder: Path, number: int, kills: list[int]) -> None:
    """Kill -9 a job on `number` ranks where its log has these steps, then let it end."""
    run, file = Path(recipe.train.out), folder / "killed.yaml"
    save(recipe, file)
    metrics = run / "metrics.jsonl"
    for step in kills:
        processes = ranks.start(ranks.TRAIN, str(file), ranks=number)
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert all(process.poll() is None for process in processes), "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
        for process in processes:
            process.communicate()
    ranks.finish(ranks.start(ranks.TRAIN, str(file), ranks=number))


def state(run: Path) -> dict[str, torch.Tensor]:
    saved = open_state(latest_checkpoint(run))
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    return {f"{k}/{name}": saved.full(k, name) for k in kinds for name in saved.names(k)}


@pytest.mark.parametrize(
    ("number", "steps", "kills"),
    [
        (1, 200, 2),
        (2, 60, 2),
        pytest.param(1, 200, 20, marks=pytest.mark.slow),
        pytest.param(2, 200, 20, marks=pytest.mark.slow),
    ],
)
def test_kill_9_changes_no_bit(number, steps, kills, tmp_path):
    """Tar shards, shuffled, read by two workers; a checkpoint every 10 steps."""
    scenes.write_shards(tmp_path / "shards", n=96, resolution=16, shard_size=12)
    recipe = tiny_recipe(tmp_path, max_steps=steps, checkpoint_every=10)
    data = dataclasses.replace(recipe.data, path=str(tmp_path / "shards"), workers=2, window=4)
    recipe = dataclasses.replace(recipe, data=data)

    def to(name: str) -> Recipe:
        changed = dataclasses.replace(recipe.train, out=str(tmp_path / name))
        return dataclasses.replace(recipe, train=changed)

    (whole,) = ranks.train_on(tmp_path, to("whole"), ranks=number)
    at = sorted(random.Random(number).sample(range(5, steps - 5), kills))
    kill_again_and_again(to("killed"), tmp_path, number, at)
    expected, got = state(whole), state(tmp_path / "killed")
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert read_manifest(latest_checkpoint(tmp_path / "killed"))["step"] == steps
    assert ranks.losses(whole) == ranks.losses(tmp_path / "killed")


@pytest.mark.parametrize("first", ["channels_last", "contiguous"])
def test_a_run_goes_on_with_weights_in_the_other_memory_format(tmp_path, monkeypatch, first):
    def trainer(last, steps):
        monkeypatch.setattr(engines, "CHANNELS_LAST", {"cpu"} if last else set())
        made = make_trainer(tiny_recipe(tmp_path, model=ASCEND, max_steps=steps))
        formats = [p.is_contiguous() for p in made.engine.learner.parameters()]
        assert all(formats) != last
        return made

    one = trainer(first == "channels_last", 4)
    one.run()
    other = trainer(first != "channels_last", 8)
    for values in (
        lambda t: {s.name: s.weight for s in t.engine.shares},
        lambda t: t.ema.state_dict(),
        lambda t: {s.name: s.moment(t.engine.optimizer, "exp_avg") for s in t.engine.shares},
    ):
        before, after = (t.engine.whole(values(t)) for t in (one, other))
        assert all(torch.equal(before[name], after[name]) for name in before)
    other.run()
    assert other.step == 8
