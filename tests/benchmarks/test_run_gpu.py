"""The commands for the GPU from end to end, rehearsed on a CPU.

They run where `make bench-gpu` will: in Python 3.12 with torch, triton 3.6, NumPy, einops,
transformers, pytest, pytest-benchmark and hypothesis, and nothing else. FASTDIFF_PY312 names such
an interpreter; else `make py312` makes one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import bench_ops, harness, run_gpu
from benchmarks.gpu import steps, timetable

MINUTES = 24.0  # of a dry run, at most; it takes three on two idle cores
OPS = {case.name for case in bench_ops.TINY} | {steps.PHILOX_TINY}


@functools.cache
def bare_python() -> str:
    """An interpreter as a machine with a GPU has it."""
    if named := os.environ.get("FASTDIFF_PY312"):
        return named
    made = harness.ROOT / "build" / "py312" / "bin" / "python"
    made.parents[2].mkdir(exist_ok=True)
    with (made.parents[2] / "py312.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            command = ["make", "--no-print-directory", "py312"]
            subprocess.run(command, cwd=harness.ROOT, check=False, timeout=1800)
    if not made.exists():
        pytest.skip("no Python 3.12 to rehearse in: FASTDIFF_PY312 is not set, and none was made")
    return str(made)


def environment(folder: Path) -> dict[str, str]:
    """Nothing of the tests' own environment."""
    left_out = ("PYTHONPATH", "TRITON_INTERPRET", "FASTDIFF_TEST_BACKEND", "FASTDIFF_BACKEND")
    kept = {k: v for k, v in os.environ.items() if k not in left_out and "PYTEST" not in k}
    (folder / "tmp").mkdir(exist_ok=True)
    cache = str(folder / "triton")
    return kept | {"TMPDIR": str(folder / "tmp"), "TRITON_CACHE_DIR": cache, "MAKEFLAGS": ""}


def kill_in_the_middle(folder: Path, step: str, killed: list[str]) -> None:
    """Wait until a step's worker is in a case, and kill it there."""
    until = time.time() + 60 * MINUTES
    while time.time() < until:
        for path in folder.glob(f"fastdiff-bench-*/{step}-0.events"):
            lines = [json.loads(line) for line in path.read_text().splitlines() if line[-1] == "}"]
            if len(lines) < 3 or "begin" not in lines[-1]:
                continue  # the first case is left alone
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if str(path) in (process / "cmdline").read_text():
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(lines[-1]["begin"])
                        return
        time.sleep(0.002)


def bench_gpu(folder: Path, *flags: str) -> tuple[int, str, dict, list[Path]]:
    """`make bench-gpu`, dry: its exit status, output, results and files."""
    out = folder / "out"
    bench = ["--dry", "--minutes", f"{MINUTES:g}", "--out", str(out), *flags]
    done = subprocess.run(
        ["make", "bench-gpu", f"PYTHON={bare_python()}", f"BENCH={' '.join(bench)}"],
        cwd=harness.ROOT,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * MINUTES + 60,
    )
    files = sorted(out.iterdir())
    assert len(files) <= 8
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert [path.suffix for path in files] == [".gz", ".json", ".md"]
    return done.returncode, done.stdout, json.loads(files[1].read_text()), files


def check_output(text: str, found: dict) -> None:
    """The order list first; then a table, last, that names every op, whatever failed."""
    assert text.splitlines()[0].split() == ["start", "seconds", "step"]
    assert all(f" {step.name}: " in text for step in timetable.STEPS)
    tail = text[-12_000:]
    assert "Furthest from its goal: " in tail
    table = tail[tail.index("Furthest from its goal") :]
    assert all(name.removesuffix(" bfloat16") in table for name in OPS)
    assert {row["case"] for row in found["rows"]} >= OPS
    assert set(found["checks"]) == OPS
    assert set(found["ceilings"]) == {"copy", "product"}
    directions = {row["direction"] for row in found["rows"]}
    assert {"forward", "backward", "training", "training step, eager"} <= directions
    assert found["kernels"]
    assert found["tests"]["counts"]["passed"] > 5


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    status, text, found, files = bench_gpu(tmp_path)
    assert status == 0, text
    check_output(text, found)
    assert found["good"] is True
    assert not found["failed"]
    assert not any(names for names in found["skipped"].values())
    assert found["environment"]["python"].startswith("3.12")
    assert "everything that ran is right" in text.splitlines()[-1]
    assert "# CPU" in files[2].read_text()
    backends = {check["backend"] for check in found["checks"].values()}
    # In an environment of somebody's own NumPy may be too new for triton's interpreter.
    assert backends == {"triton"} or (backends == {"auto"} and "FASTDIFF_PY312" in os.environ)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_case_alone(tmp_path: Path) -> None:
    killed: list[str] = []
    killer = threading.Thread(
        target=kill_in_the_middle, args=(tmp_path / "tmp", "rivals", killed), daemon=True
    )
    (tmp_path / "tmp").mkdir()
    killer.start()
    status, text, found, _ = bench_gpu(tmp_path, "--no-xdist")
    (case,) = killed
    assert status != 0
    assert "Error 1" in text  # make's own status is 2
    check_output(text[: text.rindex("make: ***")], found)
    assert found["good"] is False
    assert found["failed"].keys() == {f"rivals: {case}"}
    assert found["failed"][f"rivals: {case}"]["failed"] == "the process was ended by SIGKILL"
    assert f"FAILED rivals: {case}: the process was ended by SIGKILL" in text[-12_000:]
    # Rivals of the cases behind it, and the steps behind.
    raced = {row["case"] for row in found["rows"] if row["step"] == "rivals"}
    assert raced == {c.name for c in bench_ops.TINY} - {case}
    assert {row["step"] for row in found["rows"]} >= {"ours", "blocks", "ascend", "train iuvit"}
    assert found["tests"]["good"] is True


@pytest.mark.slow
def test_tuning_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.tune", "--dry", "--minutes", f"{MINUTES:g}"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=harness.ROOT,
        env=environment(tmp_path) | {"PYTHONPATH": ".:kernels"},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES + 60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "tuning.json").read_text())
    kernels = [one["kernel"] for one in found["keys"]]
    assert kernels[0].startswith("dwconv_gelu")
    assert kernels.index("group_norm_silu_whole_forward") < kernels.index(
        "window_attention_forward"
    )
    table = json.loads((tmp_path / "_tuning.json").read_text())
    for one in found["keys"]:
        kept = table[one["family"]][one["kernel"]]
        assert kept.get(one["key"]) == one["config"]
        assert one["gain"] >= 1
        assert one["config"] is None or one["margin"] <= 1
    assert "keys gained" in done.stdout.splitlines()[-1]


def test_without_a_gpu_both_commands_say_so() -> None:
    for module in ("run_gpu", "tune"):
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}"],
            cwd=harness.ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert "no GPU here" in done.stdout


def test_parts_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_gpu, "has_profiler", lambda: False)
    args = run_gpu.parser().parse_args(["--out", str(tmp_path), "--cold"])
    run = run_gpu.Run(args)
    assert any("counters: not made: there is no ncu on this machine" in x for x in run.results.plan)
    assert any("warm: not made: --cold" in line for line in run.results.plan)
    assert not any(slot.step.name == "counters" for slot in run.slots)


def test_a_prepared_cache_is_taken_and_a_fault_of_it_is_noted(tmp_path: Path) -> None:
    run = run_gpu.Run(run_gpu.parser().parse_args(["--out", str(tmp_path), "--dry"]))
    run.ask("cache", f"print('unpacked'); print({str(tmp_path)!r})")
    run.ask("environment", "raise ValueError('no driver')")
    until = time.time() + 30
    while run.asked and time.time() < until:
        run.answers()
        time.sleep(0.02)
    assert run.variables == {"TRITON_CACHE_DIR": str(tmp_path)}
    assert run.cache_folder() == tmp_path
    assert run.results.notes == ["environment: ValueError: no driver"]
    assert run.given()["variables"] == run.variables


def test_a_fault_of_the_parent_costs_one_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = run_gpu.parser().parse_args(["--out", str(tmp_path), "--dry", "--minutes", "1"])
    run = run_gpu.Run(args)
    monkeypatch.setattr(run, "begin", lambda: None)
    monkeypatch.setattr(run, "prepare", lambda step: None)
    seen: list[str] = []

    def launch(slot: timetable.Slot) -> None:
        seen.append(slot.step.name)
        raise RuntimeError("no items")

    monkeypatch.setattr(run, "launch", launch)
    run.run()
    assert len(seen) == len(run.slots)
    assert run.results.failed["check"]["failed"] == "RuntimeError: no items"
    assert not run.results.good()
