"""The wheel: what it holds, what it is called, and what comes out where something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fastdiff
import fastdiff_kernels

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "fastdiff_kernels/libfastdiff_cpu.so"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, without anything that was built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copy(ROOT / "README.md", copy)
    built = shutil.ignore_patterns("__pycache__", "*.so", "native_absent.txt")
    for name in ("fastdiff", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    return copy


def pip_wheel(checkout: Path, *options: str, **environment: str) -> tuple[zipfile.ZipFile, str]:
    folder = checkout / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), *options]
    done = subprocess.run(
        [*command, "."],
        cwd=checkout,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel), done.stdout


def in_wheel(wheel: zipfile.ZipFile, folder: Path, code: str) -> str:
    """Runs code with the wheel's packages, outside every checkout."""
    wheel.extractall(folder)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def symbols(*arguments: object) -> list[str]:
    command = ["nm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="this machine has no C++ compiler"
)
def test_a_wheel_holds_both_packages_and_the_library(checkout: Path, tmp_path: Path) -> None:
    wheel, _ = pip_wheel(checkout, "--no-build-isolation")
    assert wheel.filename is not None
    name = Path(wheel.filename).name
    assert re.fullmatch(rf"fastdiff-{fastdiff.__version__}-py3-none-(linux|macosx)_\w+\.whl", name)

    held = {n for n in wheel.namelist() if ".dist-info/" not in n}
    modules = {
        str(path.relative_to(base))
        for base, package in ((checkout, "fastdiff"), (checkout / "kernels", "fastdiff_kernels"))
        for path in (base / package).rglob("*.py")
    }
    data = {"fastdiff/py.typed", "fastdiff_kernels/py.typed", "fastdiff_kernels/_tuning.json"}
    assert held == modules | data | {LIBRARY}

    unpacked = tmp_path / "unpacked"
    code = "import fastdiff; from fastdiff_kernels import _native as n; n.load(); print(n.LIBRARY)"
    assert in_wheel(wheel, unpacked, code) == f"{unpacked / LIBRARY}\n"

    # The stable ABI: torch's C functions only, no C++ of it, and nothing of Python.
    asked = [line.split(maxsplit=1)[1] for line in symbols("-DCu", unpacked / LIBRARY)]
    assert {"torch_library_impl", "torch_parallel_for"} <= set(asked)
    assert not [
        s for s in asked if re.match(r"_?Py[A-Z_]", s) or re.search(r"\b(at|c10|torch)::", s)
    ]

    # One copy of a weak function serves all levels, and it may be one that uses AVX-512.
    objects = list((checkout / "build" / "native").glob("CMakeFiles/kernels_*.dir/**/*.o"))
    assert objects
    for path in objects:
        weak = [line for line in symbols(path) if line.split()[-2] in "WwVvu"]
        assert not weak, f"{path.relative_to(checkout)}: {weak}"


def test_without_a_compiler_the_installation_succeeds_and_says_why(
    checkout: Path, tmp_path: Path
) -> None:
    wheel, output = pip_wheel(checkout, "--no-build-isolation", CXX="no-such-compiler")
    assert wheel.filename is not None
    assert wheel.filename.endswith(f"fastdiff-{fastdiff.__version__}-py3-none-any.whl")
    assert LIBRARY not in wheel.namelist()
    reason = "no C++ compiler was found (no-such-compiler)"
    assert f"fastdiff: installing without the compiled CPU kernels: {reason}" in output
    code = "import fastdiff; from fastdiff_kernels import _native as n; print(n.why_absent())"
    assert f"not built: {reason}. To build it: " in in_wheel(wheel, tmp_path / "unpacked", code)


def test_a_compile_error_is_the_reason_and_no_failure(checkout: Path) -> None:
    source = checkout / "kernels" / "fastdiff_kernels" / "native" / "probe.cpp"
    source.write_text("#error this machine is special\n")
    wheel, _ = pip_wheel(checkout, "--no-build-isolation")
    reason = wheel.read("fastdiff_kernels/native_absent.txt").decode()
    assert "did not build" in reason
    assert "this machine is special" in reason


@pytest.mark.slow  # fetches setuptools, cmake and ninja
def test_build_isolation_finds_the_headers_of_the_installed_torch(checkout: Path) -> None:
    wheel, output = pip_wheel(checkout)
    assert LIBRARY in wheel.namelist()
    assert "Collecting torch" not in output


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fastdiff_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    return module


@pytest.fixture
def fake_torch(tmp_path: Path) -> Callable[[str, int, int], Path]:
    def make(prefix: str, major: int, minor: int) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        root = tmp_path / prefix / "lib" / version / "site-packages" / "torch"
        header = root / "include" / "torch" / "headeronly" / "version.h"
        header.parent.mkdir(parents=True)
        header.write_text(
            f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n"
        )
        return root

    return make


def test_torch_is_found_where_the_import_system_hides_it(
    setup: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = setup.find_torch()
    assert (expected / "include" / "torch" / "csrc" / "stable" / "library.h").is_file()
    monkeypatch.setattr(setup.PathFinder, "find_spec", lambda name: None)
    assert setup.find_torch() == expected


def test_torch_is_found_by_the_activated_environment(
    setup: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fake_torch: Callable[[str, int, int], Path],
) -> None:
    torch = fake_torch("environment", 2, 10)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "environment"))
    real = setup.site_folders
    inside = str(tmp_path)
    monkeypatch.setattr(
        setup, "site_folders", lambda: (f for f in real() if str(f).startswith(inside))
    )
    assert setup.find_torch() == torch


def test_a_torch_that_is_too_old_or_absent_is_said(
    setup: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    fake_torch: Callable[[str, int, int], Path],
) -> None:
    monkeypatch.setattr(setup, "site_folders", lambda: [fake_torch("old", 2, 9).parent])
    with pytest.raises(RuntimeError, match=r"no torch >= 2\.10 .*\(torch 2\.9 is too old\)"):
        setup.find_torch()
    monkeypatch.setattr(setup, "site_folders", list)
    with pytest.raises(RuntimeError, match=r"no torch >= 2\.10 was installed when"):
        setup.find_torch()


def test_one_version_stands_everywhere() -> None:
    assert fastdiff.__version__ == fastdiff_kernels.__version__
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == fastdiff.__version__
