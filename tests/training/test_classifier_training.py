"""Training the classifier: it learns, it continues exactly, it refuses what does not fit."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data.labelled import LabelledFolder
from fastdiff.data.samples import BadSample
from fastdiff.models.classifier import ClassifierConfig, NoisyClassifier
from fastdiff.training.classifier import ClassifierRun, train_classifier

SCRIPT = Path(__file__).parents[2] / "train" / "classifier.py"
TINY = ClassifierConfig(
    image_size=8,
    channels=16,
    depth=1,
    multipliers=(1, 2),
    attention_resolutions=(4,),
    head_dim=16,
    groups=4,
    dropout=0.1,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve dark and twelve bright pictures."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 210)):
        (root / label / "more").mkdir(parents=True)
        for i in range(12):
            pixels = (level + rng.integers(-30, 30, (8, 8, 3))).astype(np.uint8)
            folder = root / label / ("more" if i % 2 else "")
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (root / "empty").mkdir()
    return root


def run_of(data: Path, out: Path, **values: object) -> ClassifierRun:
    given = {"batch_size": 8, "max_steps": 6, "lr": 3e-3, "workers": 0, "flip": False, **values}
    return ClassifierRun(data=data, out=out, model=TINY, **given)  # type: ignore[arg-type]


def test_the_folder_is_read_label_by_label(pictures: Path, tmp_path: Path) -> None:
    data = LabelledFolder(pictures)
    assert data.labels == ["dark", "light"]
    assert len(data) == 24
    assert [data[i].caption for i in (0, 11, 12, 23)] == ["dark", "dark", "light", "light"]
    assert data[0].key == "dark/0.png"
    with pytest.raises(IndexError):
        data[24]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no picture")
    with pytest.raises(BadSample, match=r"a/1\.png"):
        LabelledFolder(tmp_path)[0]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        LabelledFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"0 labels in .*at least two"):
        LabelledFolder(tmp_path / "a")


def test_it_learns_and_is_less_sure_in_noise(pictures: Path, tmp_path: Path) -> None:
    model = train_classifier(run_of(pictures, tmp_path / "run", max_steps=60, log_every=20))
    data = LabelledFolder(pictures)
    x0 = torch.stack(
        [torch.from_numpy(np.array(data[i].image)).permute(2, 0, 1) / 127.5 - 1 for i in range(24)]
    )
    y = torch.arange(24) // 12
    with torch.no_grad():
        clean, noisy = model(x0, 0).softmax(1), model(torch.randn_like(x0), 999).softmax(1)
    assert float((clean.argmax(1) == y).float().mean()) > 0.95
    assert float(clean.max(1).values.mean()) > float(noisy.max(1).values.mean()) + 0.03
    again = NoisyClassifier.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(again(x0, 0).softmax(1), clean)
    labels = json.loads((tmp_path / "run" / "model" / "labels.json").read_text())
    assert labels == ["dark", "light"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 60]


def test_a_run_that_is_interrupted_continues_exactly(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_classifier(run_of(pictures, tmp_path / "whole"))
    run = run_of(pictures, tmp_path / "broken", checkpoint_every=2)
    adam, calls = torch.optim.AdamW.step, [0]

    def breaks(self: torch.optim.AdamW, *args: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return adam(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(run)
    torch.manual_seed(99)
    continued = train_classifier(run)
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name
    # And a finished run is left as it is.
    assert torch.equal(train_classifier(run).state_dict()[name], value)


def test_another_run_in_the_same_folder_is_refused(pictures: Path, tmp_path: Path) -> None:
    run = run_of(pictures, tmp_path / "run", max_steps=1)
    train_classifier(run)
    wider = dataclasses.replace(TINY, channels=32)
    with pytest.raises(ValueError, match="another model"):
        train_classifier(dataclasses.replace(run, model=wider))
    with pytest.raises(ValueError, match="seed 0, not 1"):
        train_classifier(dataclasses.replace(run, seed=1))
    renamed = tmp_path / "renamed"
    for label, name in (("dark", "a"), ("light", "b")):
        (renamed / name).mkdir(parents=True)
        (renamed / name / "0.png").write_bytes((pictures / label / "0.png").read_bytes())
    with pytest.raises(ValueError, match="other labels"):
        train_classifier(dataclasses.replace(run, data=renamed))
    for name in ("batch_size", "max_steps"):
        with pytest.raises(ValueError, match=f"{name}=0; expected at least 1"):
            dataclasses.replace(run, **{name: 0})
    with pytest.raises(ValueError, match=r"lr=0\.0"):
        dataclasses.replace(run, lr=0.0)


def test_the_script(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    arguments = ["--data", str(pictures), "--out", str(out), "--max-steps", "1"]
    arguments += ["--batch-size", "2", "--workers", "0", "--precision", "bfloat16"]
    arguments += ["--model.image-size", "8", "--model.channels", "16", "--model.depth", "1"]
    arguments += ["--model.multipliers", "1", "2", "--model.attention-resolutions", "4"]
    arguments += ["--model.head-dim", "16", "--model.groups", "4"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert NoisyClassifier.from_pretrained(out / "model").config.num_classes == 2
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="is no folder"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
