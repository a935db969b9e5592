"""A few steps of training on the back end under test give the losses of the reference's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conformance import BACKEND, DEVICE

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(DEVICE == "cuda", reason="there `python -m benchmarks.convergence` trains long")
@pytest.mark.skipif("FASTDIFF_RECORD" in os.environ, reason="launches that are recorded do nothing")
@pytest.mark.parametrize("family", ["iuvit", "ascend"])
def test_first_losses_are_the_reference_s(family, tmp_path):
    options = "--families", family, "--steps", "12", "--batch", "1", "--out", str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.convergence", BACKEND, "reference", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(tmp_path.glob("*.json"))
