"""One set of tests for every back end that stands in for the references.

    TRITON_INTERPRET=1 pytest tests/kernels/backends          # triton, interpreted: no GPU
    pytest tests/kernels/backends                             # triton, on a GPU

Each file tests one op, on the back end and the device that conformance.py chose; where there is
none to test, nothing is collected. FASTDIFF_PLAN=sm_90 lets the launchers choose block sizes as for
that family of GPUs: interpreted they would else be seen with those for the interpreter only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import conformance
import hypothesis
import hypothesis.internal.conjecture.providers as providers
import pytest
import torch

from fastdiff_kernels import _launch, backend

collect_ignore_glob = [] if conformance.BACKEND else ["test_*.py"]

# On a GPU an example of a new form compiles kernels. So there the examples are always the same,
# those whose kernels `benchmarks.aot` has recorded; neither do they follow the constants that
# Hypothesis finds in the modules that are loaded.
if conformance.DEVICE == "cuda" or "FASTDIFF_RECORD" in os.environ:
    hypothesis.settings.register_profile("recorded", derandomize=True, database=None)
    hypothesis.settings.load_profile("recorded")
    providers.is_local_module_file = lambda path: False


@pytest.fixture(autouse=True)
def on_the_back_end() -> Iterator[None]:
    """Every call takes the back end under test, or raises why it cannot."""
    torch.manual_seed(0)
    plan = os.environ.get("FASTDIFF_PLAN")
    chip = _launch.pretend(_launch.CHIPS[plan]) if plan else contextlib.nullcontext()
    with backend(conformance.BACKEND), chip:
        yield
