"""Builds the wheel: two packages and one compiled library, which an installation can do without.

The library needs a C++20 compiler, cmake and the headers of a torch that is already there (torch is
a run-time dependency, never a build requirement: pip would download a second one). Where something
is missing or the build fails, the installation goes on and the reason is left in the package, where
`fastdiff info` shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("fastdiff_kernels/libfastdiff_cpu.so")
REASON = "native_absent.txt"  # beside the library; read by fastdiff_kernels/_native.py
OLDEST_TORCH = (2, 10)


def site_folders() -> Iterator[Path]:
    """Where the target environment's torch may lie.

    Under build isolation pip runs this file with the target environment's interpreter but hides its
    packages from the import system, so the folders are computed. Front ends that build in an
    environment of their own leave VIRTUAL_ENV or CONDA_PREFIX to go by.
    """
    spec = PathFinder.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parents[1]
    yield Path(sysconfig.get_paths()["platlib"])
    yield from map(Path, site.getsitepackages([sys.prefix, sys.base_prefix]))
    if site.ENABLE_USER_SITE:
        yield Path(site.getusersitepackages())
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            yield from map(Path, site.getsitepackages([prefix]))


def find_torch() -> Path:
    """The installed torch package with headers of a version that has what the library uses."""
    older = ""
    for folder in site_folders():
        header = folder / "torch/include/torch/headeronly/version.h"
        if not header.is_file():
            continue
        found = re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text())
        if tuple(map(int, found)) >= OLDEST_TORCH:
            return folder / "torch"
        older = f" (torch {'.'.join(found)} is too old)"
    wanted = ".".join(map(str, OLDEST_TORCH))
    raise RuntimeError(f"no torch >= {wanted} was installed when fastdiff was built{older}")


def find_program(*names: str) -> str | None:
    """A program on PATH or beside the running interpreter, where pip puts cmake and ninja."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    return next(
        (found for name in names if name and (found := shutil.which(name, path=path))), None
    )


def compile_library(build: Path, target: Path) -> None:
    """Runs cmake; raises RuntimeError with a sentence for the user where that is impossible."""
    torch = find_torch()
    asked = os.environ.get("CXX", "")
    compiler = find_program(asked) if asked else find_program("c++", "g++", "clang++")
    if compiler is None:
        raise RuntimeError(f"no C++ compiler was found ({asked or 'c++, g++ or clang++'})")
    cmake, ninja = find_program("cmake"), find_program("ninja")
    if cmake is None:
        raise RuntimeError("cmake was not found")
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(build)),
        f"-DTORCH_ROOT={torch}",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build.resolve() / 'out'}",
    ]
    if ninja:  # named each time: the cached one may have lived in a build environment now gone
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", str(build), "--parallel"]):
        print("+", *command, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="", flush=True)
        if done.returncode:
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise RuntimeError(f"the compiled part did not build: {' | '.join(errors[:3])}")
    # In one step: a process that has the old file loaded keeps it whole.
    fresh = target.with_name(f"{target.name}.new")
    shutil.copy2(build / "out" / target.name, fresh)
    os.replace(fresh, target)


class BuildLibrary(build_ext):
    """Builds the library through cmake instead of a Python extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(LIBRARY)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build writes into the source tree at once."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        folder = (ROOT / "kernels" if inplace else Path(self.build_lib)) / LIBRARY.parent
        folder.mkdir(parents=True, exist_ok=True)
        library, reason = folder / LIBRARY.name, folder / REASON
        try:
            compile_library(ROOT / "build" / "native", library)
            reason.unlink(missing_ok=True)
        except (RuntimeError, OSError) as error:
            library.unlink(missing_ok=True)
            reason.write_text(f"{error}\n")
            self.distribution.library_absent = True
            print(
                f"fastdiff: installing without the compiled CPU kernels: {error}", file=sys.stderr
            )


class Wheel(bdist_wheel):
    """The library holds no Python symbols: one wheel per platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        absent = getattr(self.distribution, "library_absent", False)
        return ("py3", "none", "any" if absent else super().get_tag()[2])


if __name__ == "__main__":  # the tests import this file
    setup(
        packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), *find_packages("kernels")],
        package_dir={"fastdiff": "fastdiff", "fastdiff_kernels": "kernels/fastdiff_kernels"},
        ext_modules=[Extension("fastdiff_kernels.libfastdiff_cpu", sources=[])],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    )
