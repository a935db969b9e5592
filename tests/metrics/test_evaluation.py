"""`fastdiff stats` and `fastdiff fid` from pictures to the JSON; what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_network import Network
from torch import Tensor

from fastdiff import cli
from fastdiff.data import open_dataset, scenes
from fastdiff.metrics import (
    Statistics,
    caption_agreement,
    evaluate,
    evaluation,
    frechet_distance,
    from_module,
    load_torchscript,
    measure,
    open_pictures,
)

TRAIN = Path(__file__).resolve().parents[2] / "train"
SETTINGS = {"sampler": "euler_maruyama", "steps": 1000, "guidance": None, "model": "0f3a"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 other scenes, with the settings that sampling leaves."""
    folder = tmp_path_factory.mktemp("samples") / "samples"
    scenes.write_folder(folder, n=40, resolution=16, seed=1)
    (folder / "settings.json").write_text(json.dumps({**SETTINGS, "seeds": [0, 40], "other": 1}))
    return folder


@pytest.fixture(scope="module")
def statistics(data: Path, torchscript: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "scenes.npz"
    command = ["stats", str(data), str(path), "--extractor", str(torchscript)]
    cli.main([*command, "--transform", "square16", "--value-range", "-1", "1"])
    return path


def fid(samples: Path, statistics: Path, torchscript: Path, out: Path, *options: str) -> Any:
    paths = [str(samples), str(statistics), "--extractor", str(torchscript), "--out", str(out)]
    cli.main(["fid", *paths, *options])
    return json.loads(out.read_text())


def test_the_result_says_all_that_it_depends_on(
    samples: Path,
    statistics: Path,
    torchscript: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = fid(samples, statistics, torchscript, tmp_path / "fid.json")
    assert json.loads(capsys.readouterr().out) == result
    # The extractor is called as it was for the statistics, without being told again.
    extractor = load_torchscript(torchscript, value_range=(-1, 1))
    ours, real = measure(open_pictures(samples), extractor), Statistics.load(statistics)
    expected = frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance)
    assert result["fid"] == pytest.approx(expected, rel=1e-9)
    assert result["fid"] > 0
    assert result["count"] == 40
    assert result["size"] == [16, 16]
    assert result["crop"] == "largest square in the centre"
    assert result["resize"].startswith("16x16, PIL bicubic")
    assert result["statistics"]["count"] == 50
    assert result["samples"] == {"path": str(samples), "crop": None, "resize": None}
    assert len(result["statistics"]["sha256"]) == 64
    assert result["evaluator"]["extractor"] == {"name": "network.pt", **extractor.about}
    assert result["evaluator"]["software"]["torch"] == torch.__version__
    assert {name: result[name] for name in SETTINGS} == SETTINGS
    assert result["seeds"] == [0, 40]


def test_the_data_against_itself_is_at_zero(
    data: Path, statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    every = ("--scores", "fid", "kid", "precision_recall", "inception_score")
    result = fid(data, statistics, torchscript, tmp_path / "fid.json", *every)
    scale = float(Statistics.load(statistics).covariance.trace())
    assert abs(result["fid"]) < 1e-10 * scale
    assert (result["precision"], result["recall"]) == (1, 1)
    assert abs(result["kid"]) < 0.01
    assert result["evaluator"]["kid"] == {"subsets": 100, "subset_size": 50, "seed": 0}
    assert 1 <= result["inception_score"] < 4
    assert result["sampler"] is result["seeds"] is None  # no settings.json


def test_the_result_lies_beside_the_samples_and_is_not_replaced_unasked(
    statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    folder = scenes.write_folder(tmp_path / "mine", n=20, resolution=16)
    command = ["fid", str(folder), str(statistics), "--extractor", str(torchscript)]
    cli.main(command)
    first = (tmp_path / "mine.fid.json").read_text()
    with pytest.raises(SystemExit, match=r"fastdiff fid: .*mine\.fid\.json exists"):
        cli.main([*command, "--count", "10"])
    assert (tmp_path / "mine.fid.json").read_text() == first
    cli.main([*command, "--count", "10", "--overwrite"])
    assert json.loads((tmp_path / "mine.fid.json").read_text())["count"] == 10
    with pytest.raises(SystemExit, match=r"fastdiff stats: .*exists"):
        cli.main(["stats", str(folder), str(statistics), "--extractor", str(torchscript)])


def test_statistics_of_another_extractor_or_size_are_refused_at_once(
    samples: Path,
    statistics: Path,
    torchscript: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "fid.json"
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: pytest.fail("it was measured"))
    pictures = open_pictures(samples)
    with pytest.raises(ValueError, match=r"Network has sha256 .*, the statistics' .*network\.pt"):
        evaluate(pictures, from_module(Network(1), value_range=(-1, 1)), statistics)
    with pytest.raises(SystemExit, match=r"value_range \[0\.0, 1\.0\], the statistics' \[-1\.0, 1"):
        fid(samples, statistics, torchscript, out, "--value-range", "0", "1")
    with pytest.raises(SystemExit, match="samples have 8x8 pixels, the statistics are of 16x16"):
        fid(samples, statistics, torchscript, out, "--transform", "square8")
    assert not out.exists()


def test_statistics_of_other_tools_warn_and_must_have_as_many_features(
    samples: Path, tmp_path: Path
) -> None:
    extractor, pictures = from_module(Network()), open_pictures(samples)
    np.savez(tmp_path / "a.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.warns(UserWarning, match="do not say which extractor"):
        result = evaluate(pictures, extractor, tmp_path / "a.npz")
    assert result["crop"] is None
    assert result["statistics"]["count"] is None
    np.savez(tmp_path / "b.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="Network gives 6 features, the statistics have 5"):
        evaluate(pictures, extractor, tmp_path / "b.npz")


def test_scores_that_lack_what_they_need_are_refused(
    data: Path, samples: Path, torchscript: Path, tmp_path: Path
) -> None:
    extractor, pictures = from_module(Network()), open_pictures(samples)
    bare = measure(open_pictures(data), extractor).save(tmp_path / "bare.npz")
    with pytest.raises(ValueError, match="hold no features"):
        evaluate(pictures, extractor, bare, scores=["kid"])
    with pytest.raises(ValueError, match=r"scores \['fud'\]; expected names out of"):
        evaluate(pictures, extractor, bare, scores=["fud"])
    with pytest.raises(ValueError, match="no statistics"):
        evaluate(pictures, extractor)
    assert evaluate(pictures, extractor, scores=["inception_score"])["statistics"] is None
    with pytest.raises(SystemExit, match="no extractor; give --extractor"):
        cli.main(["fid", str(samples), str(bare), "--out", str(tmp_path / "x.json")])
    for wrong in ("--batch-size", "--workers"):
        with pytest.raises(SystemExit, match="must be at least"):
            fid(samples, bare, torchscript, tmp_path / "x.json", wrong, "-1")


def test_statistics_of_too_few_pictures_warn_with_the_count(
    data: Path, samples: Path, tmp_path: Path
) -> None:
    extractor = from_module(Network())
    with pytest.warns(UserWarning, match="data: 5 pictures for 6 features"):
        few = measure(open_pictures(data, count=5), extractor).save(tmp_path / "few.npz")
    with pytest.warns(UserWarning, match="the statistics: 5 pictures for 6 features"):
        evaluate(open_pictures(samples), extractor, few)


def test_an_unreadable_picture_is_named_on_the_command_line(
    statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    folder = scenes.write_folder(tmp_path / "mine", n=20, resolution=16)
    (folder / "images" / "000011.png").write_bytes(b"rotten")
    with pytest.raises(SystemExit, match=r"fastdiff fid: bad sample 'images/000011\.png'"):
        fid(folder, statistics, torchscript, tmp_path / "fid.json")


def test_settings_of_an_archive_lie_beside_it(
    samples: Path, statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    pictures = open_pictures(samples)
    np.savez(tmp_path / "drawn.npz", arr_0=np.stack([pictures[i] for i in range(40)]))
    (tmp_path / "drawn.npz.json").write_text(json.dumps({"steps": 50}))
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 1}))
    result = fid(tmp_path / "drawn.npz", statistics, torchscript, tmp_path / "fid.json")
    assert result["steps"] == 50
    assert result["fid"] == fid(samples, statistics, torchscript, tmp_path / "2.json")["fid"]


def test_samples_that_are_not_all_there_are_refused(
    statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    folder = scenes.write_folder(tmp_path / "mine", n=20, resolution=16)
    (folder / "settings.json").write_text(json.dumps({"count": 21, "steps": 50}))
    with pytest.raises(SystemExit, match="holds 20 of the 21 pictures of its drawing"):
        fid(folder, statistics, torchscript, tmp_path / "fid.json")
    result = fid(folder, statistics, torchscript, tmp_path / "fid.json", "--count", "19")
    assert (result["count"], result["steps"]) == (19, 50)


def test_settings_that_are_no_object_are_refused(
    statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    folder = scenes.write_folder(tmp_path / "mine", n=20, resolution=16)
    for text in ("[1]", "{"):
        (folder / "settings.json").write_text(text)
        with pytest.raises(SystemExit, match=r"settings\.json is"):
            fid(folder, statistics, torchscript, tmp_path / "fid.json")


def test_agreement_with_captions_is_the_mean_over_all(samples: Path) -> None:
    def score(pictures: Tensor, captions: list[str]) -> Tensor:
        assert pictures.shape[1:] == (3, 16, 16)
        assert (float(pictures.min()), float(pictures.max())) == (-1, 1)
        return torch.tensor([float(len(caption)) for caption in captions])

    dataset = open_dataset(samples)
    lengths = [len(dataset[i].caption) for i in range(len(dataset))]
    for batch_size in (7, 64):
        spread = caption_agreement(dataset, score, batch_size=batch_size)
        assert spread.mean == pytest.approx(np.mean(lengths), rel=1e-12)
        assert spread.std == pytest.approx(np.std(lengths), rel=1e-12)


def test_the_script_says_what_it_takes() -> None:
    done = subprocess.run(
        [sys.executable, str(TRAIN / "evaluate.py")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "torchrun" in done.stderr


@pytest.mark.slow
def test_torchrun_gives_the_same_result_as_one_process(
    samples: Path, statistics: Path, torchscript: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    common = [str(TRAIN / "evaluate.py"), "fid", str(samples), str(statistics)]
    common += ["--extractor", str(torchscript), "--batch-size", "8"]
    common += ["--scores", "fid", "kid", "precision_recall", "inception_score"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for name, start in (("one", []), ("two", launch)):
        out = tmp_path / f"{name}.json"
        command = [sys.executable, *start, *common, "--out", str(out), "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
        assert done.stdout.count('"fid"') == 1  # printed once
    assert results[0] == results[1]
