"""A cache of compiled kernels that was carried is found by a just-in-time compile elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import aot_report, gpu_cache
from benchmarks.aot.store import ROOT


def cache_of(folder: Path) -> Path:
    """A cache as Triton writes one, of one kernel and one launcher."""
    kernel, launcher = folder / "KERNEL", folder / "LAUNCHER"
    for made in (kernel, launcher):
        made.mkdir(parents=True)
    for name in ("copy.cubin", "copy.json", "copy.ttir", "copy.ptx"):
        (kernel / name).write_text(name)
    (kernel / "__grp__copy.json").write_text('{"child_paths": {"copy.json": "/elsewhere"}}')
    (launcher / "launcher.so").write_text("launcher.so")
    return folder


def test_what_is_packed_is_unpacked_with_paths_of_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    gpu_cache.pack(cache_of(tmp_path / "work"), ["KERNEL", "LAUNCHER"], out / "sm_90.tar.xz")
    made = Path(gpu_cache.prepare(out))
    assert made.parent == out
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    kernel = {f"KERNEL/{name}" for name in ("copy.cubin", "copy.json", "__grp__copy.json")}
    assert files == kernel | {"LAUNCHER/launcher.so"}
    paths = json.loads((made / "KERNEL" / "__grp__copy.json").read_text())["child_paths"]
    assert set(paths) == {"copy.cubin", "copy.json"}
    assert all(Path(path).is_file() for path in paths.values())


def test_it_is_unpacked_once_and_anew_when_the_archive_or_its_place_changes(tmp_path) -> None:
    cache, out = cache_of(tmp_path / "work"), tmp_path / "out"
    gpu_cache.pack(cache, ["KERNEL"], out / "sm_90.tar.xz")
    first = gpu_cache.prepare(out)
    mark = Path(first) / "compiled later"
    mark.touch()
    assert gpu_cache.prepare(out) == first
    assert mark.exists()
    moved = out.rename(tmp_path / "moved")
    assert Path(gpu_cache.prepare(moved)).parent == moved
    assert Path(gpu_cache.prepare(moved)).name != Path(first).name
    gpu_cache.pack(cache, ["LAUNCHER"], moved / "sm_90.tar.xz")
    assert not (Path(gpu_cache.prepare(moved)) / "KERNEL").exists()


def test_without_an_archive_there_is_an_empty_folder(tmp_path) -> None:
    assert list(Path(gpu_cache.prepare(tmp_path / "absent")).iterdir()) == []


def test_an_archive_writes_nowhere_else(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out" / "sm_90.tar.xz", "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("../escaped"))
    with pytest.raises(tarfile.FilterError):
        gpu_cache.prepare(tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


# What JITFunction.run does up to the launch itself, on a machine with this chip.
JUST_IN_TIME = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import build, driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

driver.set_active(Driver())
hits = []
triton.knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
build._load_module_from_path = lambda name, path: type("module", (), {"launch": None})

from benchmarks.aot import record
from fastdiff_kernels import _launch
from fastdiff import ops

with _launch.pretend(_launch.CHIPS["sm_90"]), ops.backend("triton"), record.passes() as made:
    record.training_step("iuvit_cifar10", torch.bfloat16, 128)
launches = [launch for one in made for launch in one.launches]
for launch in launches:
    kernel = launch.kernel.run(
        grid=launch.grid, warmup=True, num_warps=launch.num_warps, num_stages=launch.num_stages,
        enable_fp_fusion=True, **launch.arguments,
    )
    CudaLauncher(kernel.src, kernel.metadata)
print(json.dumps([len(launches), hits]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not aot_report.FOLDER.is_dir(), reason="make build/triton-3.6.0/.stamp")
def test_a_just_in_time_compile_hits_and_builds_no_launcher(tmp_path) -> None:
    path = os.pathsep.join(map(str, (aot_report.FOLDER, ROOT, ROOT / "kernels")))
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_cache", "--quick", "--tests", "--workers", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "made")], cwd=ROOT, env=variables, check=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "made" / "sm_90.tar.xz").rename(tmp_path / "there" / "sm_90.tar.xz")
    folder = gpu_cache.prepare(tmp_path / "there")
    # No compiler of C; the driver is there.
    variables |= {"TRITON_CACHE_DIR": folder, "CC": "false"}
    variables["TRITON_LIBCUDA_PATH"] = str(tmp_path / "made" / "stub")
    done = subprocess.run(
        [sys.executable, "-c", JUST_IN_TIME],
        cwd=ROOT,
        env=variables,
        check=True,
        capture_output=True,
        text=True,
    )
    launches, hits = json.loads(done.stdout.splitlines()[-1])
    assert launches > len(hits) > 5
    assert all(hits)
