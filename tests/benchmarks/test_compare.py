"""Comparison of results and the guard: they see a slower kernel, not noise and not a slow day."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare, guard

ENVIRONMENT = {"cpu": "a", "threads": 2}


def results(ours: float, eager: float = 3.0, *, noise: float = 0.03, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)

    def rounds(time: float) -> list[float]:
        return list(time * (1 + noise * random.random(21)))

    samples = {"ours": rounds(ours), "eager": rounds(eager), "floor": rounds(0.8)}
    row = {"case": "op", "dtype": "float32", "direction": "forward", "samples_us": samples}
    return {"environment": ENVIRONMENT, "rows": [row]}


def status(tmp_path: Path, old: dict, new: dict) -> int:
    for name, found in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(found))
    return compare.main([str(tmp_path / "old"), str(tmp_path / "new")])


def test_a_slower_kernel_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(tmp_path, results(1.0), results(1.25, seed=1)) == 1
    said = capsys.readouterr().out
    assert "op float32, forward" in said
    assert said.count("FELL") == 2  # against eager and against the floor


@pytest.mark.parametrize(
    "new",
    [
        results(1.1, seed=1),  # within the limit
        results(2.0, 6.0, seed=1),  # a machine half as fast
        results(0.5, seed=1),
    ],
    ids=["a little", "a slow day", "faster"],
)
def test_ratios_count_and_the_limit_holds(tmp_path: Path, new: dict) -> None:
    new["rows"][0]["samples_us"].pop("floor")
    assert status(tmp_path, results(1.0), new) == 0


def test_a_fall_that_may_be_chance_is_none() -> None:
    old, new = results(1.0), results(1.0, seed=2)
    new["rows"][0]["samples_us"]["ours"] = [0.99] * 5 + [1.5] * 16  # one more, and it is 0.99
    (eager,) = [c for c in compare.compare(old, new)[0] if c.rival == "eager"]
    assert eager.new < 0.85 * eager.old
    assert eager.low < 1 < eager.high
    assert not eager.fell(0.15)
    new["rows"][0]["samples_us"]["ours"] = [1.5] * 21
    assert all(c.fell(0.15) for c in compare.compare(old, new)[0])


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(60):
        old = results(1.0, noise=0.5, seed=2 * seed + 100)
        new = results(1.2, noise=0.5, seed=2 * seed + 101)
        (eager,) = [c for c in compare.compare(old, new)[0] if c.rival == "eager"]
        held += eager.low <= 1 / 1.2 <= eager.high
    assert held >= 51


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = results(1.0) | {"environment": {"cpu": "b", "threads": 2}}
    assert status(tmp_path, results(1.0), other) == 2
    assert "cpu a and b" in capsys.readouterr().err
    assert status(tmp_path, results(1.0), {"rows": []}) == 2
    gone = results(1.0)
    gone["rows"].append(gone["rows"][0] | {"case": "other"})
    assert status(tmp_path, gone, results(1.0)) == 1
    assert "other float32, forward: no number any more" in capsys.readouterr().out


def test_the_guard_measures_again_before_it_judges() -> None:
    asked: list[Sequence[str]] = []

    def measure(*times: float):
        left = iter(times)

        def once(names: Sequence[str]) -> dict:
            asked.append(names)
            return results(next(left), seed=len(asked))

        return once

    assert guard.judge(results(1.0), measure(1.0)) == []
    assert guard.judge(results(1.0), measure(1.5, 1.0)) == []
    assert len(guard.judge(results(1.0), measure(1.5, 1.4, 1.5))) == 1
    assert [list(names) for names in asked] == [["op"]] * 6


def test_the_baseline_is_of_what_the_guard_runs() -> None:
    stored = json.loads(guard.BASELINE.read_text())
    assert stored
    for key, found in stored.items():
        assert key == guard.machine(found["environment"])
        assert {row["case"] for row in found["rows"]} == set(guard.cases())
