"""Both layouts: reading, the shard index, and rotten samples, shards and folders."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdiff.data import BadSample, open_dataset, scenes, shard_index, shards
from fastdiff.data.folder import FolderDataset
from fastdiff.data.shard_index import INDEX_SUFFIX, ShardIndex, index_shard, load_index
from fastdiff.data.shards import ShardDataset
from fastdiff.data.writers import encode_image

GOOD = encode_image(np.full((8, 8, 3), 200, np.uint8))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def animated() -> bytes:
    buffer = io.BytesIO()
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(buffer, "PNG", save_all=True, append_images=[blue])
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (7200, 7200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written")
    scenes.write_folder(root / "folder", n=50, resolution=16, seed=3)
    scenes.write_shards(root / "shards", n=50, resolution=16, seed=3, shard_size=20)
    return root


def test_both_layouts_hold_the_same_samples(written: Path) -> None:
    folder, tars = open_dataset(written / "folder"), open_dataset(written / "shards")
    assert isinstance(folder, FolderDataset)
    assert isinstance(tars, ShardDataset)
    assert len(folder) == len(tars) == 50
    for i in range(50):
        a, b = folder[i], tars[i]
        assert a.caption == b.caption
        assert a.image.mode == b.image.mode == "RGB"
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
    assert tars[20].key == "000010000"
    for dataset in (folder, tars):
        for index in (50, -1):
            with pytest.raises(IndexError, match=r"expected 0\.\.49"):
                dataset[index]


def test_one_tar_is_a_data_set(written: Path) -> None:
    assert len(open_dataset(written / "shards" / "00002.tar")) == 10


def test_data_sets_can_be_pickled(written: Path) -> None:
    for name in ("folder", "shards"):
        dataset = open_dataset(written / name)
        before = dataset[31].caption
        copy = pickle.loads(pickle.dumps(dataset))
        assert copy[31].caption == before
        assert copy.fingerprint == dataset.fingerprint


def test_few_files_are_open_at_once(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardDataset(list((written / "shards").glob("*.tar")))
    for i in (0, 25, 45, 3, 44):
        assert dataset[i].key == f"{i // 20:05d}{i % 20:04d}"
        assert len(os.listdir("/proc/self/fd")) == before + 1
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert dataset[7].key == "000000007"


def test_a_forked_child_opens_its_own_files(written: Path) -> None:
    dataset = open_dataset(written / "shards")
    dataset[0]
    inherited = dict(dataset._opened)
    child = os.fork()
    if child == 0:
        good = dataset[0].key == "000000000" and dataset._opened[0] is not inherited[0]
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert dataset[0].key == "000000000"


# Rotten samples: members of the tar, and the reason told.
ROTTEN = {
    "garbage": ([("k.jpg", b"no picture"), ("k.txt", b"a")], "not JPEG"),
    "truncated": ([("k.png", GOOD[:-20]), ("k.txt", b"a")], "does not decode"),
    "bomb": ([("k.png", bomb()), ("k.txt", b"a")], "at most 50 million"),
    "animated": ([("k.png", animated()), ("k.txt", b"a")], "animated"),
    "pickle": ([("k.png", pickle.dumps([1])), ("k.txt", b"a")], "not JPEG"),
    "caption not UTF-8": ([("k.png", GOOD), ("k.txt", b"caf\xe9")], "not UTF-8"),
    "caption empty": ([("k.png", GOOD), ("k.txt", b" ")], "caption is empty"),
    "caption missing": ([("k.png", GOOD)], "caption is missing"),
    "no caption in JSON": ([("k.png", GOOD), ("k.json", b'{"url": ""}')], "no 'caption'"),
    "rotten JSON": ([("k.png", GOOD), ("k.json", b"{")], "not JSON"),
    "picture missing": ([("k.txt", b"a")], "picture is missing"),
    "repeated": ([("k.png", GOOD), ("k.jpg", GOOD), ("k.txt", b"a")], "occurs twice"),
    "caption too long": ([("k.png", GOOD), ("k.txt", b"a" * (2 << 20))], "at most 1048576"),
}


@pytest.mark.parametrize("key", ["../../evil", "a/../../evil", "/etc/evil"])
def test_keys_that_lead_out_of_the_shard_are_refused(key: str, tmp_path: Path) -> None:
    # Nothing is extracted, but a key may become a file's name elsewhere.
    members = [(f"{key}.png", GOOD), (f"{key}.txt", b"a"), ("b.png", GOOD), ("b.txt", b"fine")]
    dataset = open_dataset(write_tar(tmp_path / "0.tar", members))
    with pytest.raises(BadSample, match="leads out of the shard") as caught:
        dataset[0]
    assert caught.value.key == key
    assert dataset[1].caption == "fine"


@pytest.mark.parametrize("kind", ROTTEN)
def test_a_rotten_sample_of_a_shard_costs_itself_only(kind: str, tmp_path: Path) -> None:
    members, reason = ROTTEN[kind]
    good = [("good.webp.png", b""), ("z.PNG", GOOD), ("z.txt", b"fine")]
    path = write_tar(tmp_path / "0.tar", members + good)
    dataset = open_dataset(path)
    assert len(dataset) == 2
    with pytest.raises(BadSample, match=reason) as caught:
        dataset[0]
    assert (caught.value.key, caught.value.shard) == ("k", str(path))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert dataset[1].caption == "fine"


def test_caption_comes_from_json_without_txt_and_other_members_are_ignored(tmp_path: Path) -> None:
    members = [
        ("k.pkl", pickle.dumps(1)),
        ("k.json", b'{"caption": "from json"}'),
        ("k.jpg", GOOD),
        ("sub/k.jpeg", GOOD),
        ("sub/k.json", b"no json"),
        ("sub/k.txt", b"from txt"),
    ]
    dataset = open_dataset(write_tar(tmp_path / "0.tar", members))
    assert [dataset[i].caption for i in range(2)] == ["from json", "from txt"]
    assert [dataset[i].key for i in range(2)] == ["k", "sub/k"]
    assert {p.name for p in tmp_path.iterdir()} == {"0.tar", "0.tar" + INDEX_SUFFIX}


def test_links_in_a_tar_are_ignored(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.raises(ValueError, match="no picture or caption"):
        open_dataset(tmp_path)


def test_rotten_shards_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [(f"{i:03d}.{e}", d) for i in range(9) for e, d in (("png", GOOD), ("txt", b"a"))]
    whole = write_tar(tmp_path / "3_good.tar", members).read_bytes()
    with tarfile.open(tmp_path / "3_good.tar") as tar:
        headers = [member.offset for member in tar]
    rotten = {
        "0_garbage.tar": (b"this is not a tar" * 100, "not a tar"),
        "1_empty.tar": (b"", "empty"),
        "2_gzip.tar": (gzip.compress(whole), "not a tar"),
        "4_cut_in_member.tar": (whole[: headers[10] + 520], "truncated"),
        "5_cut_at_boundary.tar": (whole[: headers[10]], "truncated or damaged at byte"),
        "6_cut_in_header.tar": (whole[: headers[10] + 100], "truncated"),
        "7_no_samples.tar": (bytes(10240), "no picture or caption"),
        "8_damaged_header.tar": (
            whole[: headers[4]] + b"\x07" * 512 + whole[headers[4] + 512 :],
            "truncated or damaged",
        ),
    }
    for name, (data, _) in rotten.items():
        (tmp_path / name).write_bytes(data)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(tmp_path)
    assert isinstance(dataset, ShardDataset)
    assert len(dataset) == 9
    assert dataset[8].key == "008"
    told = {Path(bad.path).name: bad.reason for bad in dataset.bad_shards}
    assert told.keys() == rotten.keys()
    for name, (_, reason) in rotten.items():
        assert reason in told[name], name
        assert name in caplog.text
    assert "8 of 9 shards are left out" in caplog.text
    (tmp_path / "3_good.tar").unlink()
    with pytest.raises(ValueError, match=r"none of 8 tar shards can be read: .*0_garbage\.tar"):
        open_dataset(tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(512, 20_000),
)
def test_damaged_tars_index_or_raise_value_error(
    tmp_path: Path, damage: list[tuple[int, int]], length: int
) -> None:
    members = [(f"{i}.{e}", d) for i in range(2) for e, d in (("png", GOOD), ("txt", b"a"))]
    data = bytearray(write_tar(tmp_path / "fuzz.tar", members).read_bytes()[:length])
    for place, value in damage:
        data[place % len(data)] = value
    (tmp_path / "fuzz.tar").write_bytes(data)
    try:
        index = index_shard(tmp_path / "fuzz.tar")
    except ValueError:
        return
    assert len(index.rows) == len(index.keys) > 0


def test_index_is_reused_until_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.txt", b"one")])
    first = load_index(path)
    calls: list[Path] = []

    def counted(path: Path) -> ShardIndex:
        calls.append(path)
        return index_shard(path)

    monkeypatch.setattr(shard_index, "index_shard", counted)
    again = load_index(path)
    assert not calls
    assert np.array_equal(again.rows, first.rows)
    assert np.array_equal(again.keys, first.keys)

    write_tar(path, [("a.png", GOOD), ("a.txt", b"one"), ("b.png", GOOD), ("b.txt", b"two")])
    assert len(load_index(path).rows) == 2
    assert len(calls) == 1
    os.utime(path, ns=(0, 12345))
    load_index(path)
    assert len(calls) == 2
    load_index(path)
    assert len(calls) == 2


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_rotten_or_malicious_index_is_made_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.txt", b"one")])
    stored = Path(f"{path}{INDEX_SUFFIX}")
    stamp = shard_index._stamp(path)
    evil = np.array([Evil(tmp_path / "ran")], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, stamp=stamp, keys=evil, rows=evil)
    whole = index_shard(path)
    good = io.BytesIO()
    np.savez(good, stamp=stamp, keys=whole.keys, rows=whole.rows)
    for data in (b"", b"rotten", buffer.getvalue(), pickle.dumps(evil[0]), good.getvalue()[:300]):
        stored.write_bytes(data)
        assert open_dataset(path)[0].caption == "one"
        assert stored.read_bytes() != data
    assert not (tmp_path / "ran").exists()


def test_an_index_that_cannot_be_stored_stays_in_memory(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.txt", b"one")])
    Path(f"{path}{INDEX_SUFFIX}").mkdir()
    assert open_dataset(path)[0].caption == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar", "0.tar" + INDEX_SUFFIX]


def write_metadata(root: Path, lines: list[bytes]) -> Path:
    (root / "good.png").write_bytes(GOOD)
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return root


def test_rotten_lines_of_a_folder_cost_themselves_only(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "outside.png").write_bytes(GOOD)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "bad.png").write_bytes(GOOD[:-20])
    (root / "code.pkl").write_bytes(pickle.dumps(1))
    (root / "folder.png").mkdir()

    def line(name: object, text: object = "a") -> bytes:
        return json.dumps({"file_name": name, "text": text}).encode()

    rotten = [
        (line("../outside.png"), "leads out of the folder"),
        (line(str(tmp_path / "outside.png")), "leads out of the folder"),
        (line("link.png"), "leads out of the folder"),
        (line("absent.png"), "no such file"),
        (line("folder.png"), "no such file"),
        (line("bad.png"), "does not decode"),
        (line("code.pkl"), "expected .jpg"),
        (line("good.png", ""), "caption is empty"),
        (line("good.png", None), "caption is missing"),
        (line("good.png", ["a"]), "caption is list"),
        (line(None), "no 'file_name'"),
        (line("a\0.png"), "null"),
        (b'{"file_name": "good.png", "text": "caf\xe9"}', "not UTF-8"),
        (b'{"file_name": "good.png"', "not JSON"),
        (b"[]", "line is list"),
        (line("good.png", "a" * (2 << 20)), "at most 1048576"),
    ]
    lines = [data for data, _ in rotten]
    dataset = open_dataset(write_metadata(root, [*lines, b"", line("good.png", "fine"), b"\n"]))
    assert len(dataset) == len(rotten) + 1
    for i, (_, reason) in enumerate(rotten):
        with pytest.raises(BadSample, match=reason) as caught:
            dataset[i]
        assert caught.value.shard == str(root / "metadata.jsonl")
    assert dataset[len(rotten)].caption == "fine"


def test_missing_and_empty_paths_say_what_is_expected(tmp_path: Path) -> None:
    layouts = r"metadata\.jsonl .*\*\.tar shards as img2dataset"
    with pytest.raises(FileNotFoundError, match=rf"absent does not exist; expected .*{layouts}"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(ValueError, match=rf"the folder is empty; .*{layouts}"):
        open_dataset(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=rf"found 1 entries \(a\.parquet\); .*{layouts}"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=rf"is a \.parquet file; .*{layouts}"):
        open_dataset(tmp_path / "a.parquet")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"metadata\.jsonl is empty"):
        open_dataset(tmp_path)
    write_tar(tmp_path / "0.tar", [("a.png", GOOD)])
    with pytest.raises(ValueError, match=r"holds both metadata\.jsonl and 1 tar"):
        open_dataset(tmp_path)


def test_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [("a.png", GOOD), ("a.txt", b"one")])
    before = open_dataset(tmp_path).fingerprint
    assert open_dataset(tmp_path).fingerprint == before
    write_tar(tmp_path / "1.tar", [("b.png", GOOD), ("b.txt", b"two")])
    assert open_dataset(tmp_path).fingerprint != before
    assert open_dataset(path).fingerprint == before
