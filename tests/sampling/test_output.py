"""Files: whole, each once, in the layouts that the readers of data and metrics take."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from fastdiff.data import open_dataset
from fastdiff.metrics import open_pictures
from fastdiff.sampling import Output, draw_all, prompts_of

SETTINGS = {"sampler": "ddim", "steps": 5, "size": (4, 6)}
CAPTIONS = [f"picture {i}, ä" for i in range(7)]


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def draw(indices, drawn=None):
    if drawn is not None:
        drawn.append(list(indices))
    pixels = torch.from_numpy(np.stack([picture(i) for i in indices]))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("name", ["out", "out.tar", "out.npz"])
def test_all_pictures_in_every_layout(tmp_path, name):
    path = tmp_path / "new" / name
    output = Output(path, SETTINGS, 7, CAPTIONS)
    draw_all(draw, output, batch_size=3)
    assert output.complete
    assert output.finish() == path
    pictures = open_pictures(path)
    assert len(pictures) == 7
    for i in range(7):
        assert np.array_equal(pictures[i], picture(i))
    if name == "out.npz":
        assert np.load(path)["arr_0"].shape == (7, 4, 6, 3)
    else:
        dataset = open_dataset(path if name == "out" else path.parent)
        assert [dataset[i].caption for i in range(7)] == CAPTIONS
    about = path / "settings.json" if name == "out" else path.with_name(name + ".json")
    assert json.loads(about.read_text()) == {**SETTINGS, "size": [4, 6]}
    assert not list(path.parent.glob("*.parts"))
    assert not list(path.parent.rglob("*.partial"))


@pytest.mark.parametrize("name", ["out", "out.tar", "out.npz"])
def test_an_interrupted_drawing_goes_on_and_a_complete_one_is_left(tmp_path, name):
    path, drawn = tmp_path / name, []

    def fails(indices):
        if 6 in indices:
            raise KeyboardInterrupt
        return draw(indices, drawn)

    with pytest.raises(KeyboardInterrupt):
        draw_all(fails, Output(path, SETTINGS, 7), batch_size=2)
    assert drawn == [[0, 1], [2, 3], [4, 5]]
    folder = path if name == "out" else tmp_path / (name + ".parts")
    (folder / "000003.png").unlink()
    (folder / ".000003.png.77.partial").write_bytes(b"half")
    kept = {p.name: p.stat().st_ino for p in folder.glob("*.png")}

    drawn.clear()
    output = Output(path, SETTINGS, 7)
    assert output.missing(range(7)) == [3, 6]
    with pytest.raises(ValueError, match=r"2 of 7 pictures are missing in .*000003\.png first"):
        output.finish()
    draw_all(lambda indices: draw(indices, drawn), output, batch_size=2)
    assert drawn == [[2, 3], [6]]
    assert kept.items() <= {p.name: p.stat().st_ino for p in folder.glob("*.png")}.items()
    output.finish()
    assert not list(tmp_path.rglob("*.partial"))
    assert np.array_equal(open_pictures(path)[3], picture(3))

    before = path.stat().st_mtime_ns
    again = Output(path, SETTINGS, 7)
    draw_all(lambda indices: pytest.fail("drawn again"), again, batch_size=2)
    again.finish()
    assert path.stat().st_mtime_ns == before


def test_a_crash_between_packing_and_cleaning_up(tmp_path):
    output = Output(tmp_path / "out.npz", SETTINGS, 2)
    draw_all(draw, output, batch_size=2)
    output._pack(["000000.png", "000001.png"])
    assert (tmp_path / "out.npz.parts").is_dir()
    Output(tmp_path / "out.npz", SETTINGS, 2).finish()
    assert not (tmp_path / "out.npz.parts").exists()


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_other_settings_are_refused_and_nothing_changes(tmp_path, name):
    path = tmp_path / name
    output = Output(path, SETTINGS, 2)
    draw_all(draw, output, batch_size=2)
    for finished in (False, True):
        if finished:
            output.finish()
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(FileExistsError, match=r"steps=5, asked 6; eta=None, asked 0\.5; cho"):
            Output(path, {**SETTINGS, "steps": 6, "eta": 0.5}, 2)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_what_is_no_drawing_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    (tmp_path / "b.npz").write_text("mine")
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine exists and holds no settings\.json"):
        Output(tmp_path / "mine", SETTINGS, 2)
    with pytest.raises(FileExistsError, match=r"b\.npz exists, and its settings cannot be read"):
        Output(tmp_path / "b.npz", SETTINGS, 2)
    with pytest.raises(FileExistsError, match="c exists and holds no"):
        Output(tmp_path / "c", SETTINGS, 2)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "b.npz", "c", "mine"]


def test_ranks_share_the_batches(tmp_path):
    drawn: dict[int, list] = {0: [], 1: [], 2: []}
    outputs = {rank: Output(tmp_path / "out", SETTINGS, 7) for rank in drawn}
    for rank, output in outputs.items():
        mine = drawn[rank]
        draw_all(lambda i, m=mine: draw(i, m), output, batch_size=2, rank=rank, world=3)
    assert drawn == {0: [[0, 1], [6]], 1: [[2, 3]], 2: [[4, 5]]}
    outputs[1].finish()


def test_a_write_that_fails_leaves_nothing_behind_the_name(tmp_path, monkeypatch):
    output = Output(tmp_path / "out", SETTINGS, 2)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        draw_all(draw, output, batch_size=2)
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "out").glob("*.png"))
    assert Output(tmp_path / "out", SETTINGS, 2).missing(range(2)) == [0, 1]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="count=0"):
        Output(tmp_path / "a", SETTINGS, 0)
    with pytest.raises(ValueError, match="count=3, captions=7"):
        Output(tmp_path / "a", SETTINGS, 3, CAPTIONS)
    output = Output(tmp_path / "a", SETTINGS, 3)
    with pytest.raises(ValueError, match=r"float32 of shape \(1, 4, 6, 3\); expected uint8"):
        output.write([0], picture(0)[None].astype(np.float32))
    with pytest.raises(ValueError, match="batch_size=0"):
        draw_all(draw, output, batch_size=0)
    with pytest.raises(ValueError, match="not finite"):
        draw_all(lambda i: draw(i) * torch.nan, output, batch_size=2)


def test_prompt_files(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content.encode())
        return tmp_path / name

    assert prompts_of(written("a.txt", "\ufeffa red disc\r\n\n  a blue bar \n")) == [
        "a red disc",
        "a blue bar",
    ]
    drawbench = 'Prompts,Category\n"A red car, parked.",Colors\nA dog.,Counting\n,None\n'
    assert prompts_of(written("d.csv", drawbench)) == ["A red car, parked.", "A dog."]
    assert prompts_of(written("p.tsv", "id\tcaption\n1\tA cat, asleep\n")) == ["A cat, asleep"]
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\]; expected one of \('prompts'"):
        prompts_of(written("bad.csv", "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="no prompts"):
        prompts_of(written("empty.txt", " \n"))
