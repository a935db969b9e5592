"""Every op, forward and backward, under compute-sanitizer: `make memcheck`.

    PYTHONPATH=.:kernels python3 tests/kernels/memcheck.py [--tool memcheck] [--only TEXT]

Without the allocator's cache every tensor is an allocation of its own, so that an access beyond its
end is one beyond an allocation, which the tool sees. `--tool racecheck` looks for races in shared
memory, `--tool initcheck` for reads of memory that nobody wrote, `--tool synccheck` for barriers
that not all threads reach. `--plain` runs the calls without the tool.

Exit status: 0 no error; 1 the tool reported errors, or a call failed; 2 no tool or no GPU.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # exit status of the tool where it reported errors
HOW_TO_GET_IT = (
    "memcheck: compute-sanitizer is not here. It is part of the CUDA toolkit (on Debian and "
    "Ubuntu: apt install cuda-sanitizer-13-0, after NVIDIA's repository was added; in conda: "
    "conda install -c nvidia cuda-sanitizer-api). COMPUTE_SANITIZER names its place."
)


def sanitizer() -> str | None:
    """The tool: named by COMPUTE_SANITIZER, on the path, in a CUDA toolkit, or in a package."""
    named = os.environ.get("COMPUTE_SANITIZER")
    if named:
        return shutil.which(named)
    if found := shutil.which("compute-sanitizer"):
        return found
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")]
    folders = [home for home in homes if home] + sorted(glob.glob("/usr/local/cuda*"), reverse=True)
    # NVIDIA's packages of Python lie in site-packages/nvidia.
    folders += [f for place in sys.path for f in glob.glob(os.path.join(place, "nvidia", "*"))]
    for folder in folders:
        for part in ("bin", "compute-sanitizer", "extras/compute-sanitizer", ""):
            if found := shutil.which(str(Path(folder, part, "compute-sanitizer"))):
                return found
    return None


def under_the_tool(tool: str, arguments: Sequence[str]) -> int:
    """Run this program again, with --plain, under the tool."""
    found = sanitizer()
    if found is None:
        print(HOW_TO_GET_IT, file=sys.stderr)
        return 2
    command = [found, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
    command += ["--launch-timeout", "0", sys.executable, __file__, "--plain", *arguments]
    print("memcheck:", " ".join(command), flush=True)
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    status = subprocess.run(command, env={**os.environ, **settings}).returncode
    if status == FOUND:
        print(f"memcheck: {tool} reported errors, see above", file=sys.stderr)
        return 1
    return status


def cases() -> Iterator[tuple[str, object]]:
    """Names and calls: windows of 7 and 8 at head widths of 16, 32, 64; odd sizes elsewhere."""
    import torch
    from every_op import attention, ffn, gelu, group_norm, layer_norm, noise

    for d in (16, 32, 64):
        for window in (7, 8):
            size = 2 * window
            name = f"window_attention d={d} w={window}"
            yield name, attention(d, window, 0, size=(size, size), heads=2)
            yield f"{name} shifted", attention(d, window, window // 2, size=(size, size))
            odd = (size - 3, window + 2)
            yield f"{name} padded", attention(d, window, window // 2, size=odd, heads=2)
            yield f"{name} padded values", attention(d, window, window // 2, size=odd, value=True)
    for grid, prefix, C in (((5, 7), 1, 33), ((16, 16), 2, 64), ((33, 3), 0, 72), ((1, 1), 3, 5)):
        yield f"dwconv_gelu {grid} prefix={prefix} C={C}", gelu(grid, prefix, C)
    yield "dwconv_ffn", ffn((5, 3), 1, 24, 40)
    for layout in (torch.contiguous_format, torch.channels_last):
        for C, groups, size in ((24, 4, (5, 7)), (192, 32, (16, 16)), (36, 4, (33, 31))):
            for skip in (False, True):
                name = f"group_norm_silu C={C} groups={groups} {size} {layout} skip={skip}"
                yield name, group_norm(C, groups, size, layout, skip)
    for tokens, D in ((5, 33), (17, 384), (257, 72)):
        for residual in (True, False):
            yield f"layer_norm D={D} residual={residual}", layer_norm(tokens, D, residual)
    yield "philox_normal", noise((3, 5, 7))


def run(only: str, device: str) -> int:
    """Every case in every dtype; what fails does not stop the rest."""
    import torch
    from every_op import Case, results_and_gradients

    from fastdiff_kernels import backend

    failed = calls = 0
    started = time.perf_counter()
    with backend("triton"):
        for name, case in cases():
            assert isinstance(case, Case)
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                full = f"{name} {str(dtype)[6:]}"
                if only not in full or (dtype is torch.float16 and not case.differentiable):
                    continue
                try:
                    results_and_gradients(case.call, case.inputs(device, dtype, batch=3))
                    if device == "cuda":
                        torch.cuda.synchronize()
                    word = "ok"
                except Exception as error:
                    word, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
                    traceback.print_exc()
                calls += 1
                print(f"[{time.perf_counter() - started:6.1f} s] {full}: {word}", flush=True)
    print(f"memcheck: {calls} calls, {failed} failed", flush=True)
    return 1 if failed or not calls else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS, default="memcheck", help="what to look for")
    parser.add_argument("--only", default="", help="calls whose name has this text: 'd=64'")
    parser.add_argument("--plain", action="store_true", help="run the calls without the tool")
    args = parser.parse_args(arguments)
    if not args.plain:
        return under_the_tool(args.tool, ["--only", args.only] if args.only else [])
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    import torch

    if not interpreted and not torch.cuda.is_available():
        print(f"memcheck: no CUDA device for torch {torch.__version__}", file=sys.stderr)
        return 2
    return run(args.only, "cpu" if interpreted else "cuda")


if __name__ == "__main__":
    sys.exit(main())
