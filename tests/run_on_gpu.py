"""The Triton kernels' tests on this machine's GPU: `make test-gpu`.

    PYTHONPATH=.:kernels python3 tests/run_on_gpu.py [what pytest takes]

Needs torch, triton, numpy, einops and pytest; says what else is missing and goes on without it.
Exit status: pytest's; 2 where the tests cannot begin.
"""

from __future__ import annotations

import importlib.util
import os
import sys

NEEDED = ("torch", "triton", "numpy", "einops", "pytest")
OPTIONAL = {
    "hypothesis": "property tests are skipped",
    "xdist": "one process runs all tests (pip install pytest-xdist)",
    "transformers": "the comparison with its Swin layer fails",
}
TESTS = ("tests/kernels/backends", "tests/models/test_cuda_models.py")


def main(arguments: list[str]) -> int:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"test-gpu: missing: {names} (pip install {names})", file=sys.stderr)
        return 2
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import pytest
    import torch

    if not interpreted and not torch.cuda.is_available():
        print(
            f"test-gpu: no CUDA device for torch {torch.__version__}; TRITON_INTERPRET=1 runs the "
            "kernels on the CPU",
            file=sys.stderr,
        )
        return 2
    where = "Triton's interpreter" if interpreted else torch.cuda.get_device_name()
    print(f"test-gpu: torch {torch.__version__} on {where}", flush=True)
    absent = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    for name in absent:
        print(f"test-gpu: without {name}: {OPTIONAL[name]}", flush=True)
    # Warnings of other versions of torch than the developers' fail nothing here.
    command = ["-W", "default", "-o", "addopts=-q -rfEs"]
    if "-m" not in arguments:
        command += ["-m", "not slow"]
    processes = min(14, (os.cpu_count() or 1) - 2)
    if "xdist" not in absent and "-n" not in arguments and not interpreted and processes > 1:
        command += ["-n", str(processes)]  # most of the time goes into compiling kernels
    if not any(not a.startswith("-") and os.path.exists(a.split("::")[0]) for a in arguments):
        command += TESTS
    return int(pytest.main([*command, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
