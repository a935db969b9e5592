"""The compiled CPU library: its loading, its instruction sets, what is said where it is absent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastdiff_kernels import _native

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler"
)


def at_level(level: str) -> subprocess.CompletedProcess[str]:
    code = """
import torch
from fastdiff_kernels import _native
_native.load()
x = torch.randn(100_003)
assert torch.equal(torch.ops.fastdiff_native.probe(x), x.relu() ** 2)
print(_native.cpu_level(), torch.ops.fastdiff_native.has_amx())
"""
    environment = {**os.environ, "FASTDIFF_CPU_LEVEL": level}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@needs_compiler
def test_the_library_is_built_and_loads() -> None:
    assert _native.why_absent() is None
    assert _native.available()
    _native.load()
    assert _native.cpu_level() in _native.LEVELS


@needs_compiler
@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (3, 5, 7), (300_001,)])
def test_probe(shape: tuple[int, ...]) -> None:
    _native.load()
    x = torch.randn(shape)
    assert torch.equal(torch.ops.fastdiff_native.probe(x), x.relu() ** 2)


@needs_compiler
def test_probe_refuses_what_it_cannot_read() -> None:
    _native.load()
    for x in (torch.ones(4, dtype=torch.float64), torch.ones(4, 4).t()[1:]):
        with pytest.raises(RuntimeError, match="probe: expected a contiguous float32 tensor"):
            torch.ops.fastdiff_native.probe(x)


@needs_compiler
@pytest.mark.parametrize("level", _native.LEVELS)
def test_every_level_of_this_cpu_runs_and_a_higher_one_is_refused(level: str) -> None:
    best = _native.LEVELS.index(_native.cpu_level())
    done = at_level(level)
    if _native.LEVELS.index(level) <= best:
        assert done.stdout.split()[0] == level, done.stderr
        assert done.stdout.split()[1] == "False" or level == "avx512_bf16"
    else:
        assert f"FASTDIFF_CPU_LEVEL={level}: this CPU and this build go up to" in done.stderr


@needs_compiler
def test_the_level_is_what_the_operating_system_reports() -> None:
    info = Path("/proc/cpuinfo")
    if not info.is_file() or os.uname().machine != "x86_64":
        pytest.skip("needs /proc/cpuinfo of an x86-64 machine")
    line = next(line for line in info.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split())
    wanted = ["avx2 fma bmi1 bmi2 f16c movbe abm", "avx512f avx512bw avx512cd avx512dq avx512vl"]
    has = [set(names.split()) <= flags for names in [*wanted, "avx512_bf16"]]
    expected = next((i for i, present in enumerate(has) if not present), len(has))
    assert at_level("").stdout.split()[0] == _native.LEVELS[expected]


@needs_compiler
def test_an_unknown_level_is_refused_by_name() -> None:
    done = at_level("sse9")
    assert done.returncode == 1
    assert "FASTDIFF_CPU_LEVEL=sse9: expected portable, x86-64-v3" in done.stderr


def test_an_absent_library_says_why_and_how_to_get_it(tmp_path: Path) -> None:
    library = tmp_path / "libfastdiff_cpu.so"
    reason = _native._load(library)
    assert reason is not None
    assert "libfastdiff_cpu.so is not there" in reason
    assert "pip install" in reason
    (tmp_path / "native_absent.txt").write_text("no C++ compiler was found\n")
    reason = _native._load(library)
    assert reason is not None
    assert "not built: no C++ compiler was found. To build it" in reason


def test_a_file_that_is_no_library_gives_a_reason(tmp_path: Path) -> None:
    library = tmp_path / "libfastdiff_cpu.so"
    library.write_bytes(b"not a library")
    reason = _native._load(library)
    assert reason is not None
    assert "do not load with torch" in reason


@needs_compiler
def test_a_library_of_an_incompatible_torch_gives_a_reason(tmp_path: Path) -> None:
    source, library = tmp_path / "x.cpp", tmp_path / "libfastdiff_cpu.so"
    source.write_text('extern "C" void torch_of_next_year(); void call() { torch_of_next_year(); }')
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    reason = _native._load(library)
    assert reason is not None
    assert "torch_of_next_year" in reason


def test_an_older_torch_gives_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libfastdiff_cpu.so"
    library.touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert _native._load(library) == (
        "the compiled CPU kernels need torch >= 2.10, this is 2.9.1+cpu."
    )


def test_threads_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def slow_load(library: Path) -> str:
        calls.append(library)
        time.sleep(0.05)
        return "a reason"

    monkeypatch.setattr(_native, "_tried", False)
    monkeypatch.setattr(_native, "_reason", None)
    monkeypatch.setattr(_native, "_load", slow_load)
    seen: list[str | None] = []
    threads = [threading.Thread(target=lambda: seen.append(_native.why_absent())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [_native.LIBRARY]
    assert seen == ["a reason"] * 8
    with pytest.raises(RuntimeError, match="a reason"):
        _native.load()
