"""The experiments: tasks and their judge, numbers with intervals, rows, the runner, the report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data import scenes
from fastdiff.data.transforms import to_tensor
from fastdiff.experiments import evaluate, grid, measure, report, runner, tasks

ROOT = Path(__file__).resolve().parents[1]
TINY = dataclasses.replace(
    grid.DEFAULT,
    steps=2,
    figure1_steps=2,
    caption_steps=2,
    batch_size=4,
    pictures=16,
    samples=20,
    figure1_samples=20,
    held_out=6,
    real=100,
    extractor_steps=1,
    sampler_steps=2,
    snapshots=(1, 2),
    snapshot_side=16,
    sides=(16,),
)


def rows(scale: grid.Scale = TINY) -> dict[str, grid.Row]:
    return {row.id: row for row in grid.rows(scale)}


@pytest.mark.parametrize("side", [16, 32, 64])
def test_pairs_are_named_by_their_judge(side: int) -> None:
    pairs = tasks.draw_pairs(60, seed=3)
    found = tasks.PairJudge(side).judge(to_tensor(tasks.render_pairs(pairs, side, seed=4)))
    assert [pair for pair, _ in found] == pairs
    assert max(rmse for _, rmse in found) < tasks.RMSE_BOUND_OF_PAIRS
    pictures = to_tensor(tasks.render_pairs(pairs, side, seed=4))
    again = tasks.PairJudge(side).distances(pictures, pairs)
    assert again == pytest.approx([rmse for _, rmse in found], abs=1e-4)
    assert len(set(pairs)) > 50


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_perfect_model_is_right_and_another_is_not(task: tasks.Task) -> None:
    n = 24
    asked = tasks.conditions(task, n)
    if task == "pair":
        pictures = tasks.render_pairs(tasks.draw_pairs(n, tasks.PAIRS_SEED), 16, seed=1)
    else:
        shown = asked if task == "caption" else tasks.conditions("caption", n)
        pictures = scenes.render(shown, 16, seed=1)
    right = tasks.judge(task, to_tensor(pictures), 16)
    assert all(all(values) for values in right.values())
    assert ("joint" in right) == (task != "none")
    near = tasks.distances(task, to_tensor(pictures), 16)
    assert near.max() <= tasks.RMSE_BOUND_OF_PAIRS
    smeared = tasks.judge(task, to_tensor(pictures) * 0.5, 16)
    assert sum(smeared["strict"]) < n / 2  # grey stays grey
    if task != "none":
        # what another one was asked for
        other = to_tensor(np.roll(pictures, n // 2, axis=0))
        assert sum(tasks.judge(task, other, 16)["joint"]) < n / 2
        assert (tasks.distances(task, other, 16) > near).double().mean() > 0.5


def test_data_of_every_task_can_be_trained_on(tmp_path) -> None:
    for task in tasks.TASKS:
        folder = tasks.write_data(task, tmp_path / task, n=16, side=16, seed=0)
        assert len(list(folder.rglob("*.png"))) == 16
        tasks.write_data(task, tmp_path / task, n=16, side=16, seed=0)  # they are there
    assert sorted(p.name for p in (tmp_path / "label").iterdir()) == list(tasks.LABELS)


def test_patch_effect_worked_out_by_hand() -> None:
    # along a row steps are 1, 1, 1 within patches of 4 pixels and 3 between them
    row = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]).float()
    flat = row.expand(1, 3, 8, 8)
    assert measure.patch_effect(flat, 4)["value"] == pytest.approx(9.0)
    assert measure.patch_effect(flat.transpose(2, 3), 4)["value"] == pytest.approx(9.0)
    noise = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = measure.patch_effect(noise, 4)
    assert found["low"] < 1 < found["high"]
    assert found["high"] - found["low"] < 0.05


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(100):
        found = measure.mean(torch.randn(60, generator=generator) + 3)
        inside += found["low"] <= 3 <= found["high"]
    assert 88 <= inside <= 100
    again = measure.mean(torch.arange(9.0))
    assert again == measure.mean(torch.arange(9.0))
    assert (again["value"], again["n"]) == (4.0, 9)


def test_differences() -> None:
    # Newcombe's own example: 56 of 70 beside 48 of 80
    a, b = measure.share([True] * 56 + [False] * 14), measure.share([True] * 48 + [False] * 32)
    found = report.apart(a, b)
    assert [found[k] for k in ("value", "low", "high")] == pytest.approx(
        [0.2, 0.0524, 0.3339], abs=1e-4
    )
    assert report.verdict(found, less_is_better=False) == "better"
    assert report.verdict(report.apart(b, a), less_is_better=False) == "worse"
    assert report.verdict(report.apart(a, a), less_is_better=False) == "none"
    # paired: every picture a little better, far less than pictures differ
    losses = np.linspace(0.1, 2.0, 50)
    paired = measure.difference((losses - 0.01).tolist(), losses.tolist())
    assert report.verdict(paired, less_is_better=True) == "better"
    # three seeds by Student's t: 2 +- 4.303 * 1 / sqrt(3)
    seeds = [measure.number(v, 0, 0, 10) for v in (1.0, 2.0, 3.0)]
    low, high = (report.over_seeds(seeds)[k] for k in ("low", "high"))
    assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)


def test_fid_tells_noise_from_scenes_and_its_weights_are_kept(tmp_path) -> None:
    file = tmp_path / "features" / "scenes16.safetensors"
    extractor, accuracy = measure.scene_extractor(16, 5, file)
    again, _ = measure.scene_extractor(16, 5, file)
    assert again.sha256 == extractor.sha256
    assert 0 <= accuracy <= 1
    real = tasks.real_pictures("none", n=300, side=16, seed=1)
    fresh = tasks.real_pictures("none", n=100, side=16, seed=2)
    good, bad = (measure.fid(extractor, real, x) for x in (fresh, torch.randn_like(fresh)))
    assert good["high"] < bad["low"]


def test_rows_of_the_paper() -> None:
    every = grid.rows(grid.DEFAULT)
    assert sum(row.experiment in ("table3", "table4") for row in every) == 9
    assert len({row.id for row in every}) == len(every) == 50
    assert len(grid.rows(grid.FULL)) == 150
    for row in grid.rows(grid.FULL):
        recipe = grid.recipe_of(row, grid.FULL, Path("out"))  # its checks pass
        assert recipe.train.seed == row.seed
    for experiment, spread in (("figure1", 0.1), ("figure6", 0.08), ("table3", 0.06)):
        by_task: dict[str, list[int]] = {}
        for row in every:
            if row.experiment == experiment:
                by_task.setdefault(row.task, []).append(grid.parameters(row.model))
        for sizes in by_task.values():
            assert max(sizes) / min(sizes) < 1 + spread
    row, other = every[0], dataclasses.replace(grid.DEFAULT, batch_size=31)
    assert grid.settings_of(row, grid.DEFAULT) != grid.settings_of(row, other)
    other = dataclasses.replace(grid.DEFAULT, sides=(16,), caption_steps=1)  # of other rows
    assert grid.settings_of(row, grid.DEFAULT) == grid.settings_of(row, other)


FIXTURE = (
    "table3/uvit-seed0",
    "table3/iuvit-seed0",
    "figure6/iuvit-seed0",
    "figure10/separate-seed0",
    "figure10/fused-seed0",
    "figure1/iuvit-16-pair-seed0",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with tiny rows that were really run."""
    out = tmp_path_factory.mktemp("grid")
    threads = torch.get_num_threads()
    for name in FIXTURE:
        runner.append_result(out / runner.RESULTS, runner.run_row(rows()[name], TINY, out))
    torch.set_num_threads(threads)
    return out


def test_a_row_run_again_gives_the_same_numbers(finished, tmp_path) -> None:
    first = runner.read_results(finished / runner.RESULTS)[2]
    again = json.loads(json.dumps(runner.run_row(rows()["figure6/iuvit-seed0"], TINY, tmp_path)))
    for result in (first, again):
        for field in ("train_s", "measure_s"):
            assert result.pop(field) > 0
    assert again == first
    assert len(first["val_losses"]) == 6
    assert [shot["step"] for shot in first["snapshots"]] == [1, 2]
    assert first["snapshots"][0]["patch_effect"] != first["snapshots"][1]["patch_effect"]
    for found in first["numbers"].values():
        assert found["n"] > 0
        assert found["low"] <= found["value"] <= found["high"]


def test_the_report_holds_what_was_found(finished, tmp_path) -> None:
    file = tmp_path / "docs" / "experiments.md"
    runner.main(["--out", str(finished), "--report", str(file)])
    text = file.read_text()
    results = {r["row"]: r for r in runner.read_results(finished / runner.RESULTS)}
    for result in results.values():
        if result["experiment"] in ("table3", "figure10"):
            assert report.told(result["numbers"]["val_loss"], 4) in text
            assert f"{result['parameters'] / 1e6:.2f}M" in text
    assert results["table3/uvit-seed0"]["commit"] in text
    one, two = (results[f"table3/{name}-seed0"]["val_losses"] for name in ("iuvit", "uvit"))
    change = report.told(measure.difference(one, two), 4, sign=True)
    assert change in text
    counts = {int(results[row]["numbers"]["distance"]["n"]) for row in results}
    assert len(counts) == 1
    assert text.count("Samples of each number: ") == 4
    assert text.count(f"distance to a scene {counts.pop()}, clean scenes") == 1
    assert "| 3.11 |" in text
    assert "Not run yet" in text  # Table 4
    pictures = {
        f"experiments-{n}.png" for n in ("figure1", "figure6", "figure10", "table3", "tables")
    }
    assert {p.name for p in (file.parent / "images").iterdir()} == pictures
    assert all(f"(images/{name})" in text for name in pictures)
    with pytest.raises(SystemExit, match="no finished row"):
        runner.main(["--out", str(tmp_path), "--report", str(file)])


def test_the_report_names_machines_and_compares_no_fids_of_different_extractors(
    finished, tmp_path
) -> None:
    lines = runner.read_results(finished / runner.RESULTS)
    for line in lines:
        file = tmp_path / line["picture"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((finished / line["picture"]).read_bytes())
    lines = [line for line in lines if line["experiment"] == "table3"]
    assert len(lines) == 2
    lines[1]["machine"] = "another"
    for line in lines:
        runner.append_result(tmp_path / runner.RESULTS, line)
    text = report.write_report(tmp_path, tmp_path / "docs" / "page.md").read_text()
    for line in lines:
        assert f"1 row: {line['commit']}, {torch.__version__}, {line['machine']}, 1" in text
    assert "on another machine" not in text
    again = lines[0] | {"machine": "third", "val_losses": [x + 1 for x in lines[0]["val_losses"]]}
    runner.append_result(tmp_path / report.REPEATS, again | {"extractor": "0" * 64})
    text = report.write_report(tmp_path, tmp_path / "docs" / "page.md").read_text()
    assert f"{again['commit'][:7]}, third | +1.0000 (+1.0000 to +1.0000) | other features" in text
    runner.append_result(tmp_path / runner.RESULTS, lines[1] | {"extractor": "0" * 64})
    with pytest.raises(SystemExit, match="FIDs of table3 are of 2 feature extractors"):
        runner.main(["--out", str(tmp_path), "--report", str(tmp_path / "docs" / "page.md")])


def test_rows_stand_in_the_grids_order_whichever_ended_first() -> None:
    ended = [("table4", "patchmerge"), ("table3", "iuvit"), ("table4", "ascend"), ("new", "x")]
    found = report.Results(
        [{"row": f"{one}/{name}", "experiment": one, "name": name} for one, name in ended]
    )
    assert [r["row"] for r in found.all] == [
        *("table3/iuvit", "table4/ascend", "table4/patchmerge", "new/x")
    ]


def test_steps_of_difficulty_are_counted() -> None:
    def cell(value: float, half: float = 0.01) -> measure.Number:
        return measure.number(value, value - half, value + half, 100)

    cells = {f"unet-16-{task}": cell(0.1 * i) for i, task in enumerate(tasks.TASKS)}
    cells |= {"unet-32-none": cell(0.1), "unet-32-label": cell(0.05), "unet-32-pair": cell(0.305)}
    told = report.steps_of_difficulty(cells, [16, 32])
    assert "harder in 1, easier in 1, none in 1 | harder in 3, easier in 1, none in 0" in told
    assert "| IU-ViT | harder in 0, easier in 0, none in 0 |" in told


def test_what_is_done_is_not_done_again_and_torn_lines_are_made_again(finished, capsys) -> None:
    file = finished / runner.RESULTS
    wanted = [rows()[name] for name in FIXTURE]
    assert runner.Runner(wanted, TINY, [], finished).run() == 0
    assert "6 of 6 rows are done" in capsys.readouterr().err
    whole = file.read_bytes()
    results = runner.read_results(file)
    file.write_bytes(whole[:-40])  # killed while it wrote
    assert runner.read_results(file) == results[:-1]
    runner.append_result(file, results[-1])
    assert runner.read_results(file) == results
    file.write_bytes(whole)


def test_other_settings_begin_anew(tmp_path) -> None:
    run = tmp_path / "run"
    evaluate._forget_other_settings(run, "a")
    (run / "weights").touch()
    evaluate._forget_other_settings(run, "a")
    assert (run / "weights").exists()
    evaluate._forget_other_settings(run, "b")
    assert not (run / "weights").exists()
    assert len(list(tmp_path.glob("run.old-*/weights"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "table5*"], r"no row 'table5\*'"),
        (["--steps", "0"], "expected at least 1"),
        (["--samples", "1"], "needs at least 2"),
        (["--jobs", "0"], "expected at least 1"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as told:
        runner.main(arguments)
    assert re.search(message, f"{told.value}{capsys.readouterr().err}")


KILLED = "--only table3/[ui]*vit-seed0 --steps 220 --samples 16 --pictures 32 --batch-size 2"


def start(out: Path, more: str = "") -> subprocess.Popen[bytes]:
    """The script on two rows; what it tells goes to a file beside its folder."""
    script = str(ROOT / "train" / "experiments.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("ab") as log:
        command = [sys.executable, script, "--out", str(out), *KILLED.split(), *more.split()]
        return subprocess.Popen(command, env=environment, stderr=log)


def found_in(out: Path) -> dict[str, tuple[dict, str]]:
    results = runner.read_results(out / runner.RESULTS)
    return {r["row"]: (r["numbers"], r["weights"]) for r in results}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "grid"
    assert start(out).wait(timeout=300) == 0
    return out


@pytest.mark.slow
def test_two_rows_at_a_time_give_the_same_numbers(unbroken, tmp_path) -> None:
    out = tmp_path / "grid"
    assert start(out, "--jobs 2").wait(timeout=300) == 0
    assert found_in(out) == found_in(unbroken)
    told = out.with_suffix(".log").read_text()
    assert "[2/2] table3/iuvit-seed0" in told
    assert "images/s" not in told
    assert "images/s" in (out / "logs" / "table3-uvit-seed0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_runner_that_is_killed_goes_on_from_the_last_checkpoint(number, unbroken, tmp_path):
    """Killed in the first row's training, started again at once; the numbers are the same."""
    out = tmp_path / "grid"
    broken = start(out)
    log = out / "runs" / "table3-uvit-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or log.read_text().count("\n") < 5:  # step 125, checkpoint at 100
        assert time.monotonic() < deadline
        assert broken.poll() is None
        time.sleep(0.05)
    broken.send_signal(number)
    if number == signal.SIGTERM:
        assert broken.wait(timeout=60) == 128 + number
    assert start(out).wait(timeout=300) == 0
    assert broken.wait() != 0
    told = out.with_suffix(".log").read_text()
    continued = re.search(r"continuing from step (\d+)", told)
    assert continued is not None
    # A busy machine may have stopped it later than it was told to, not after its end.
    assert 100 <= int(continued[1]) < 220
    assert "0 of 2 rows are done" in told
    assert found_in(out) == found_in(unbroken)
    assert len(found_in(out)) == 2
