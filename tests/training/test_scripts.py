"""The scripts of `train/` as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train" / script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


SMALL = shlex.split(
    "--config demo --train.max-steps 3 --train.batch-size 4 --train.checkpoint-every 2 "
    "--data.workers 0 --train.log-every 1 --sample.steps 2 --model.dim 64 --model.layers 3"
)


def test_train_then_sample_then_demo(tmp_path):
    done = run(tmp_path, "t2i.py", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/data/scenes32/metadata.jsonl").is_file()
    assert (tmp_path / "runs/demo/checkpoints/step-00000003").is_dir()

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue bar\n\na green cross\n")
    arguments = ["--prompt", "a red disc", "--prompts-file", str(prompts), "--count", "2"]
    done = run(tmp_path, "sample.py", "runs/demo", "drawn", *arguments, "--grid", "grid.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["grid.png", "drawn"]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 6
    settings = json.loads((tmp_path / "drawn/settings.json").read_text())
    assert (settings["steps"], settings["guidance"]) == (2, 2.0)  # the run's own
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 2 * 128  # six pictures of at least 128 pixels

    # the demonstration goes on from the run that is there; three steps do not pass its gate
    done = run(tmp_path, "demo.py", *SMALL)
    assert "joint agreement" in done.stderr
    assert "is under" in done.stderr
    assert done.returncode == 1
    assert "held-out pairs" in done.stdout
    report = json.loads((tmp_path / "runs/demo/agreement.json").read_text())
    assert report["trained captions"]["n"] >= 100
    assert (tmp_path / "runs/demo/samples.png").is_file()
    assert (tmp_path / "runs/demo/learning_curve.png").is_file()


def test_errors_say_what_to_do(tmp_path):
    done = run(tmp_path, "t2i.py", "--config", "ascend_t2i_128")
    assert done.returncode != 0
    assert "--data.path FOLDER" in done.stderr
    done = run(tmp_path, "t2i.py", "--config", "ascend_t2i")
    assert "did you mean ascend_t2i_128" in done.stderr
    done = run(tmp_path, "t2i.py", "--config", "demo", "--data.path", "nowhere")
    assert "nowhere does not exist; expected a folder with metadata.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(tmp_path, "sample.py", "nowhere", "drawn")
    assert "nowhere is no folder and no preset" in done.stderr
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    done = run(tmp_path, "sample.py", "empty", "drawn")
    assert "empty holds no checkpoint; train first" in done.stderr
    assert "Traceback" not in done.stderr
