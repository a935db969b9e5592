"""Curves of runs: what is read, what is drawn, what the page holds."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdiff import _plot, cli


def log(folder: Path, points: list[dict[str, Any]], rest: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(point) + "\n" for point in points)
    (folder / "metrics.jsonl").write_text(lines + rest)
    return folder


POINTS = [
    {"step": 10, "loss": 0.5, "grad_norm": 1.0, "images_per_s": 80.0},
    {"step": 20, "loss": None, "grad_norm": None, "images_per_s": 90.0},
    {"step": 30, "loss": 0.25, "grad_norm": 2.0, "images_per_s": 100.0},
]


def test_a_log_with_holes_and_a_torn_line(tmp_path) -> None:
    again = {"step": 30, "loss": 0.125}
    run = _plot.read_run(log(tmp_path / "a", [*POINTS, again], '{"step": 40, "lo'))
    assert run.name == "a"
    assert run.torn == 1
    assert run.curve("loss") == ([10, 30], [0.5, 0.125])  # the newest of a step made twice
    assert run.curve("images_per_s")[0] == [10, 20]
    assert run.curve("fid") == ([], [])


def test_the_command_writes_a_picture_and_a_page_of_its_own(tmp_path, capsys) -> None:
    one, two = log(tmp_path / "one", POINTS), log(tmp_path / "two <b>", POINTS[:1])
    (one / "samples").mkdir()
    for step, colour in ((10, "red"), (20, "lime")):
        Image.new("RGB", (4, 4), colour).save(one / "samples" / f"step-{step:08d}.png")
    cli.main(["plot", str(one), str(two), "--out", str(tmp_path / "new" / "both")])
    png, page = (Path(line) for line in capsys.readouterr().out.split("\n")[:2])
    assert (png.name, page.name) == ("both.png", "both.html")
    with Image.open(png) as picture:
        assert picture.width > 1000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 20

    text = page.read_text()
    assert "<b>" not in text
    assert "two &lt;b&gt;" in text
    assert not re.search(r"https?://|<script|<link", text)
    inside = [
        base64.b64decode(found)
        for found in re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    ]
    assert inside[0] == png.read_bytes()
    with Image.open(io.BytesIO(inside[1])) as grid:
        assert grid.getpixel((0, 0)) == (0, 255, 0)  # the newest grid
    assert "<tr><td>grad_norm</td><td>2</td><td>1</td></tr>" in text


def test_the_curves_are_the_logged_values(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def noted(self: Axes, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noted)
    points = [{"step": s, "loss": 1 / s, "val_loss": 2 / s, "fid": None} for s in (1, 2)]
    _plot.draw([_plot.read_run(log(tmp_path, points))])
    assert drawn == {"training": ([1, 2], [1.0, 0.5]), "validation": ([1, 2], [2.0, 1.0])}


def test_runs_of_one_name_are_told_apart(tmp_path) -> None:
    folders = [log(tmp_path / part / "run", POINTS) for part in ("a", "b")]
    names = [run.name for run in _plot.read_runs(folders)]
    assert names == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    ("rest", "message"),
    [(None, "does not exist; give the folder of a run"), ("torn\n", "holds no point yet")],
)
def test_bad_input_is_refused(tmp_path, rest: str | None, message: str) -> None:
    if rest is not None:
        log(tmp_path, [], rest)
    with pytest.raises(SystemExit, match=message):
        cli.main(["plot", str(tmp_path)])


def test_a_log_without_a_number_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match="has a field to draw"):
        cli.main(["plot", str(log(tmp_path, [{"step": 1, "loss": None}]))])
