"""What the tests set for a GPU, and the command that runs them there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def test_float32_is_not_rounded_to_tf32() -> None:
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_cublas_is_deterministic() -> None:
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


TEST = """
import os

def test_settings():
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""


def command(*arguments: str, absent: tuple[str, ...] = (), **variables: str):
    """tests/run_on_gpu.py in a process of its own, in which some packages are absent."""
    hidden = f"import runpy, sys; sys.modules.update(dict.fromkeys({list(absent)!r}))\n"
    run = f"sys.argv[1:] = {list(arguments)!r}; runpy.run_path({str(SCRIPT)!r}, None, '__main__')"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {
        **{k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"},
        **{"PYTHONPATH": path, "TRITON_INTERPRET": "", "FASTDIFF_TEST_BACKEND": "", **variables},
    }
    return subprocess.run(
        [sys.executable, "-c", hidden + run],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


SCRIPT = ROOT / "tests" / "run_on_gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    done = command()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_the_command_names_what_is_missing() -> None:
    done = command(absent=("einops",), TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "missing: einops (pip install einops)" in done.stderr


def test_the_command_runs_without_hypothesis_and_xdist(tmp_path: Path) -> None:
    (tmp_path / "test_settings.py").write_text(TEST)
    absent = ("hypothesis", "xdist", "transformers")
    settings = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = command(str(tmp_path), absent=absent, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("without hypothesis:", "without xdist:", "without transformers:"):
        assert line in done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.slow
def test_property_tests_are_skipped_without_hypothesis() -> None:
    path = "tests/kernels/backends/test_layer_norm_modulate_backend.py"
    # The package's plugin of pytest stays out, too.
    settings = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = command(path, "-k", "any_shape", absent=("hypothesis", "xdist"), **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
