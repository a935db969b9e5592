"""A few steps of training on the back end under test give the losses of the reference's."""

from __future__ import annotations

import os

import pytest
from conformance import BACKEND, DEVICE

from benchmarks import convergence


@pytest.mark.skipif(DEVICE == "cuda", reason="there `python -m benchmarks.convergence` trains long")
@pytest.mark.skipif("FASTDIFF_RECORD" in os.environ, reason="launches that are recorded do nothing")
@pytest.mark.parametrize("family", convergence.FAMILIES)
def test_first_losses_are_the_reference_s(family, tmp_path):
    options = "--families", family, "--steps", "12", "--batch", "1", "--out", str(tmp_path)
    convergence.main([BACKEND, "reference", *options])
    assert list(tmp_path.glob("*.json"))
