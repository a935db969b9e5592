"""`fastdiff sample` as users run it: killed, on two ranks, with bad arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_models as small
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.text import SmallTextEncoder

COMMAND = (sys.executable, "-m", "fastdiff", "sample")


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes have it: the order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    small.iuvit(layers=1).save_pretrained(folder)
    return str(folder)


def picture_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_killed_in_the_middle_of_a_thousand_pictures(tmp_path, model):
    options = ["--count", "1000", "--steps", "1", "--batch-size", "20"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, model, str(out), *options], env=environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.png"))) < 200:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.read_bytes() for path in out.glob("0*.png")}
    assert 200 <= len(there) < 1000
    for path in out.glob("0*.png"):
        picture_of(path)  # whole

    cli.main(["sample", model, str(out), *options])
    names = sorted(path.name for path in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(1000)), "settings.json"]
    assert all((out / name).read_bytes() == data for name, data in there.items())
    # The same bytes as without the interruption, and in an archive the same pixels.
    cli.main(["sample", model, str(tmp_path / "out.npz"), *options])
    pixels = np.load(tmp_path / "out.npz")["arr_0"]
    for i, name in enumerate(names[:1000]):
        assert np.array_equal(picture_of(out / name), pixels[i])
    assert len({picture.tobytes() for picture in pixels}) == 1000


def test_two_ranks_write_the_files_of_one(tmp_path, model):
    options = ["--count", "21", "--steps", "3", "--eta", "1", "--batch-size", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two, one = tmp_path / "two", tmp_path / "one"
    done = subprocess.run(
        [*launch, "-m", "fastdiff", "sample", model, str(two), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(two)
    cli.main(["sample", model, str(one), *options])
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert len(files) == 22
    assert files == {path.name: path.read_bytes() for path in two.iterdir()}


def test_prompts_labels_and_settings(tmp_path, capsys):
    captions = ["a red disc", "a blue bar on a green background"]
    small.iuvit(context_dim=small.WIDTH).save_pretrained(tmp_path / "text")
    torch.manual_seed(0)
    encoder = SmallTextEncoder.from_captions(captions, width=small.WIDTH, layers=1)
    encoder.save_pretrained(tmp_path / "text" / "text")
    small.iuvit(num_classes=3).save_pretrained(tmp_path / "labels")
    (tmp_path / "p.csv").write_text(f"Prompts,Category\n{captions[1]},x\n")

    def run(folder, out, *options):
        cli.main(["sample", str(tmp_path / folder), str(tmp_path / out), "--steps", "2", *options])
        return capsys.readouterr().out.split()

    told = run(
        *("text", "a", "--prompt", captions[0], "--prompts-file", str(tmp_path / "p.csv")),
        *("--count", "2", "--guidance", "2", "--grid", str(tmp_path / "grid.png")),
    )
    assert told == [str(tmp_path / "grid.png"), str(tmp_path / "a")]
    metadata = (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in metadata]
    assert [line["text"] for line in lines] == [captions[0]] * 2 + [captions[1]] * 2
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["sampler"], settings["steps"], settings["guidance"]) == ("ddim", 2, 2.0)
    assert (settings["seeds"], settings["count"], settings["size"]) == ([0, 3], 4, [8, 8])
    assert picture_of(tmp_path / "grid.png").shape[1] > 256

    run("labels", "b", "--labels", "0", "2", "--guidance", "2")
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["labels"] == [0, 2]
    with pytest.warns(UserWarning, match=r"does not know purple, box: .* It knows a, background, "):
        run("text", "c", "--prompt", "a purple box")
    # Other prompts, labels or weights are other settings.
    for folder, out, options in (
        ("text", "a", ["--prompt", captions[0], "--count", "4", "--guidance", "2"]),
        ("labels", "b", ["--labels", "0", "1", "--guidance", "2"]),
    ):
        with pytest.raises(SystemExit, match=r"pictures of other settings: (prompts|labels)="):
            run(folder, out, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps=0, expected 1 to 1000"),
        (["--steps", "1001"], "steps=1001, expected 1 to 1000"),
        (["--guidance", "-1"], "guidance=-1.0, expected at least 0"),
        (["--guidance", "2"], "--guidance 2.0 needs prompts or labels"),
        (["--count", "0"], "--count and --batch-size must be at least 1"),
        (["--seed", "-1"], "--seed -1, expected 0"),
        (["--prompt", "a"], "the model takes no text"),
        (["--labels", "1"], "the model takes none"),
        (["--prompt", "a", "--labels", "1"], "give prompts or labels, not both"),
        (["--sampler", "dpm"], "name='dpm', expected one of"),
        (["--size", "6", "8"], "IUViT: image"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt"),
        (["--schedule", "sigmoid"], "schedule: name must be one of"),
    ],
)
def test_bad_arguments_leave_no_folder(tmp_path, model, options, message):
    with pytest.raises(SystemExit, match=f"^fastdiff sample: .*{message}"):
        cli.main(["sample", model, str(tmp_path / "out"), *options])
    assert not list(tmp_path.iterdir())


def test_no_such_model(tmp_path):
    with pytest.raises(SystemExit, match="nowhere is no folder and no preset"):
        cli.main(["sample", "nowhere", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"no config\.json"):
        cli.main(["sample", str(tmp_path), str(tmp_path / "out")])
