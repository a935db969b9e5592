"""The benchmarks of the loader, the engine, the training loop and `accelerate`: rows, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_accelerate, bench_data, bench_sampling, bench_train_step, harness

ROOT = Path(__file__).resolve().parents[2]


def check(row: harness.Row, kind: str, rival: str) -> None:
    """A row as the table, the report and the comparison read it."""
    json.dumps(row)
    assert (row["kind"], row["best"], row["dtype"]) == (kind, rival, "float32")
    assert row["over_best"] == pytest.approx(row["times_us"][rival] / row["us"])
    assert rival in row["samples_us"]
    assert row["images_per_second"] > 0
    assert row["case"] in harness.table([row])


def test_engine() -> None:
    (name,) = bench_sampling.SMALL.keys() - bench_sampling.CASES.keys()
    row = bench_sampling.run_case(name, rounds=2, steps=2)
    check(row, "sampling engine", "plain loop")
    assert row["goal"]
    assert name in bench_sampling.line(row)


def test_engine_that_draws_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_sampling.Engine, "draw", lambda self, seeds, **more: torch.zeros(1, 3, 64, 64)
    )
    with pytest.raises(harness.Refused, match="pictures differ"):
        bench_sampling.run_case("iuvit_cc12m64 of width 256 b1", rounds=1, steps=1)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with 64 of the loader's pictures."""
    monkeypatch.setattr(bench_data, "COUNT", 64)
    return bench_data.write(tmp_path, 256)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loader(few: Path) -> None:
    pytest.importorskip("webdataset")
    rows = bench_data.run_case("256 to 64", few, rounds=2)
    assert [row["case"] for row in rows] == ["loader 256 to 64", "loader 256 to 64, noise"]
    for row in rows:
        check(row, "loader", "webdataset")
        assert "webdataset" in bench_data.line(row)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loader_of_other_tensors_is_refused(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    real = bench_data.ours
    monkeypatch.setattr(
        bench_data, "ours", lambda *given, **more: {k: -v for k, v in real(*given, **more).items()}
    )
    with pytest.raises(harness.Refused, match="different tensors"):
        bench_data.run_case("256 to 64", few, rounds=2)


def test_accelerate() -> None:
    row = bench_accelerate.run_case("unet 32, channels_last", rounds=3, seconds=0.01)
    check(row, "accelerate", "eager")
    times = row["times_us"]
    removed = (times["eager"] - times["ours"]) / (times["eager"] - times["floor"])
    assert row["removed"] == pytest.approx(removed)
    assert "removed" in bench_accelerate.line(row)


@pytest.mark.slow
def test_training_loop() -> None:
    threads = torch.get_num_threads()
    row = bench_train_step.run_case("demo", rounds=2, steps=4)
    assert torch.get_num_threads() == threads
    check(row, "training loop", "bare loop")
    assert 0.2 < row["of_bare"] < 1.2


@pytest.mark.slow
def test_compiled_rivals_from_the_command_line(tmp_path: Path) -> None:
    """A warning on torch.compile's way is no failure, and its time stands in the row."""
    file = tmp_path / "rows.json"
    command = ["benchmarks/bench_models.py", "--benchmark-only", "--compile", "-k", "ResBlock"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command, "--rows", str(file)],
        cwd=ROOT,
        # Without what tells a process that pytest runs it beside others.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for row in json.loads(file.read_text())["rows"]:
        assert isinstance(row["times_us"]["compile"], float)
