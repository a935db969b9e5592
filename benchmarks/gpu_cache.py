"""Compile the kernels for a GPU that is not here, into a cache that can be carried to it.

    make gpu-cache                # sm_90, into build/gpu-cache/sm_90.tar.xz
    make gpu-cache CHIP=sm_80

On a GPU the first call of each form of a kernel makes Triton compile it, for seconds, and makes it
build a launcher in C. `prepare` unpacks the archive there and returns the folder that the variable
TRITON_CACHE_DIR should name before Triton is imported. What the archive lacks is compiled as ever.

It holds, of each form of the presets, the benchmarks and the tests that are not slow, the machine
code and its description, and the compiled launchers; not the intermediate code. Triton finds them
by a hash of the kernel's source (and the line that it begins at), the form, the options, the
version of ptxas, and all files of Triton itself. So archive and machine need the same checkout, the
same build of Triton and the same Python: Triton 3.6.0 and Python 3.12. No path is in the hash; the
paths in Triton's group files are written by `prepare`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-cache"
MOST = 30 << 20  # bytes that can be carried


def prepare(folder: str | os.PathLike[str] = FOLDER) -> str:
    """Unpack the archives of a folder, once; the folder for TRITON_CACHE_DIR.

    Without an archive that is a folder with nothing in it, and everything is compiled. It lies
    beside the archives, or where that cannot be written in the system's place for temporary files.
    """
    folder = Path(folder).resolve()
    archives = sorted(folder.glob("*.tar.xz"))
    digest = hashlib.sha256(str(folder).encode())
    for archive in archives:
        digest.update(hashlib.sha256(archive.read_bytes()).digest())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = folder if os.access(folder, os.W_OK) else None
    except OSError:
        base = None
    base = base or Path(tempfile.gettempdir())
    made = base / f"unpacked-{digest.hexdigest()[:16]}"
    if made.is_dir():
        return str(made)
    fresh = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=base))
    for archive in archives:
        with tarfile.open(archive) as tar:
            tar.extractall(fresh, filter="data")
    for description in fresh.glob("*/*.json"):
        files = [f.name for f in description.parent.iterdir()]
        paths = {name: str(made / description.parent.name / name) for name in files}
        group = description.with_name(f"__grp__{description.name}")
        group.write_text(json.dumps({"child_paths": paths}))
    try:
        fresh.rename(made)
    except OSError:  # another process was first
        shutil.rmtree(fresh)
    return str(made)


# --- Making it: with the Triton and the Python of the GPU's machine ---


def stub_of_the_driver(folder: Path) -> None:
    """A libcuda.so.1 with nothing in it, for launchers to be linked against."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        source = folder / "stub.c"
        source.write_text("static int nothing;\n")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", str(source)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(library)], check=True)


def compile_into_the_cache(text: str, chip: str) -> tuple[list[str], str]:
    """Compile a form and its launcher; the names of their folders in the cache, or why not."""
    import triton
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import ASTSource
    from triton.runtime import build
    from triton.runtime.cache import _base32

    from benchmarks.aot.forms import Form, bind, target_of

    folders: list[str] = []

    def only_note(name: str, path: str) -> Any:  # instead of loading: there is no driver here
        folders.append(Path(path).parent.name)
        return SimpleNamespace(launch=None)

    build._load_module_from_path = only_note
    form, target = Form(text), target_of(chip)
    try:
        kernel = form.kernel()
        options, signature, constants, attributes = bind(form, target, kernel)
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=target, options=options.__dict__)
        CudaLauncher(source, made.metadata)
    except Exception as error:
        return [], f"{form.name} [{form.case}]: {type(error).__name__}"
    return [_base32(made.hash), *folders], ""


def compile_the_utilities() -> list[str]:
    """Build the module by which Triton loads machine code; its folder in the cache."""
    from triton.backends.nvidia import driver
    from triton.runtime import build

    folders: list[str] = []

    def only_note(name: str, path: str) -> Any:
        folders.append(Path(path).parent.name)
        return SimpleNamespace(launch=None)

    driver.compile_module_from_src.__globals__["_load_module_from_path"] = only_note
    build._load_module_from_path = only_note
    driver.compile_module_from_src(
        src=(Path(driver.dirname) / "driver.c").read_text(),
        name="cuda_utils",
        library_dirs=driver.library_dirs(),
        include_dirs=driver.include_dirs,
        libraries=driver.libraries,
    )
    return folders


def pack(cache: Path, folders: Iterable[str], archive: Path) -> int:
    """Write the folders' machine code, descriptions and launchers; the bytes of the archive."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f".{archive.name}")
    with tarfile.open(temporary, "w:xz", preset=6) as tar:
        paths = [path for folder in set(folders) for path in (cache / folder).iterdir()]
        # One kernel's forms behind each other: what they share is stored once.
        for path in sorted(paths, key=lambda path: (path.suffix, path.name, path.parent)):
            keep = path.suffix in (".cubin", ".json", ".so")
            if keep and not path.name.startswith("__grp__"):
                entry = tarfile.TarInfo(f"{path.parent.name}/{path.name}")
                data = path.read_bytes()
                entry.size, entry.mode = len(data), 0o644
                tar.addfile(entry, io.BytesIO(data))
    os.replace(temporary, archive)
    return archive.stat().st_size


def forms(chip: str, tests: Sequence[str], quick: bool) -> list[str]:
    """The forms that the presets, the benchmarks and the tests launch on a chip."""
    from benchmarks import aot_report
    from benchmarks.aot.record import record_tests

    sources = ("presets",) if quick else ("presets", "autocast", "benchmarks")
    names = ("iuvit_cifar10",) if quick else tuple(aot_report.PRESETS)
    found = {form.text: None for form in aot_report.collect(chip, names, sources).uses.found}
    if tests:
        recorded, _ = record_tests([chip], tests)
        found |= {f.text: None for f, source in recorded[chip].items() if source == "tests"}
    return list(found)


def main() -> None:
    """Compile, and pack what was compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="sm_90", choices=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--tests", nargs="*", default=["tests/kernels/backends"])
    parser.add_argument("--quick", action="store_true", help="one preset: to try this script")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    started = time.time()
    cache, stub = args.out.resolve() / "work", args.out.resolve() / "stub"
    stub_of_the_driver(stub)
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(stub)}
    import triton

    if not triton.__version__.startswith("3.6.") or sys.version_info[:2] != (3, 12):
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"gpu_cache: triton {triton.__version__} and Python {version}; only they will use it")
    todo = forms(args.chip, args.tests, args.quick)
    print(
        f"gpu_cache: {len(todo)} forms for {args.chip}, {time.time() - started:.0f} s", flush=True
    )
    folders, failed = compile_the_utilities(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        made = pool.map(compile_into_the_cache, todo, [args.chip] * len(todo), chunksize=4)
        for count, (some, why) in enumerate(made, 1):
            folders += some
            failed += [why] * bool(why)
            if count % 100 == 0 or count == len(todo):
                print(
                    f"gpu_cache: {count} of {len(todo)}, {time.time() - started:.0f} s", flush=True
                )
    size = pack(cache, folders, args.out / f"{args.chip}.tar.xz")
    for why in failed:
        print(f"gpu_cache: left out: {why}")
    print(
        f"gpu_cache: {args.out.name}/{args.chip}.tar.xz, {size / 2**20:.1f} MiB, "
        f"{len(set(folders))} entries, {time.time() - started:.0f} s"
    )
    if size > MOST:
        raise SystemExit(f"gpu_cache: {size} bytes are more than can be carried")


if __name__ == "__main__":
    main()
