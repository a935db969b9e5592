"""The report: every plot that its rows allow, runs side by side, one page that loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report


def run(us: float) -> dict:
    op = {"case": "op a", "op": "a", "dtype": "float32", "direction": "forward", "us": us}
    op |= {"of_floor": 0.5, "times_us": {"ours": us, "eager": 2 * us, "flex": "n/a: no <GPU>"}}
    both = op | {"direction": "forward+backward", "peak_mib": 3.0}
    model = {"case": "m", "dtype": "float32", "direction": "training", "us": us, "flops": 1e9}
    model |= {"images_per_second": 4.0, "peak_mib": 1.0, "of_roofline": 0.3, "goal": "missed: x"}
    model |= {"times_us": {"ours": us, "eager": us}}
    points = [
        {"case": f"s {axis} {n}", "dtype": "float32", "direction": "forward", "us": us}
        | {"scaling": axis, "line": "s", "value": n, "ns_per_pixel": us, "mflop_per_pixel": 1.0}
        for axis in ("resolution", "batch", "window")
        for n in (1, 2)
    ]
    parts = [
        {"case": way, "dtype": "float32", "direction": way, "kind": way, "us": us}
        | {"images_per_second": 3.0, "times_us": {"ours": us, "plain loop": 3 * us}}
        for way in ("sampling", "training loop", "loading")
    ]
    rows = [op, both, model, model | {"direction": "forward"}, *points, *parts]
    rows.append({"case": "op b", "failed": "refused"})
    return {"environment": {"cpu": f"cpu {us}", "torch": "2", "gpu": None}, "rows": rows}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name, us in (("one", 10.0), ("two", 20.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run(us)))
    (tmp_path / "other.json").write_text("[1]")
    paths = sorted(map(str, tmp_path.glob("*.json")))
    assert report.main([*paths, "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_every_plot_is_drawn_of_both_runs(made: Path) -> None:
    assert {path.stem for path in made.glob("*.svg")} == set(report.PLOTS)
    for path in made.glob("*.svg"):
        ElementTree.fromstring(path.read_bytes())
    text = (made / "report.md").read_text()
    for part in ("|  | one | two |", "cpu 10.0", "cpu 20.0"):
        assert part in text
    for name in report.PLOTS:
        assert f"({name}.svg)" in text
    assert "- one: m float32, training: missed: x" in text
    assert "op b: no number: refused" in text


def test_the_page_loads_nothing_and_escapes(made: Path) -> None:
    text = (made / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<GPU>" not in text
    assert "no &lt;GPU&gt;" in text
    assert text.count("data:image/svg+xml;base64,") == len(report.PLOTS)


def test_the_same_results_give_the_same_plots(made: Path) -> None:
    runs = [report.read(made.parent / f"{name}.json") for name in ("one", "two")]
    for name, _, svg in report.figures([r for r in runs if r is not None]):
        assert svg == (made / f"{name}.svg").read_bytes(), name


def test_only_what_is_there_is_drawn_and_nothing_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(1.0)
    found["rows"] = [row for row in found["rows"] if row.get("op")]
    (tmp_path / "ops.json").write_text(json.dumps(found))
    runs = [report.read(tmp_path / "ops.json")]
    names = {name for name, _, _ in report.figures([r for r in runs if r is not None])}
    assert names == {"time", "memory", "roofline", "speedup"}
    (tmp_path / "none.json").write_text("{}")
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "no results" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert report.main([str(tmp_path / "bad.json")]) == 2
    assert "bad.json is no JSON" in capsys.readouterr().err
