"""One set of tests for every back end that stands in for the references.

    TRITON_INTERPRET=1 pytest tests/kernels/backends          # triton, interpreted: no GPU
    pytest tests/kernels/backends                             # triton, on a GPU

Each file tests one op, on the back end and the device that conformance.py chose; where there is
none to test, nothing is collected.
"""

from __future__ import annotations

from collections.abc import Iterator

import conformance
import pytest
import torch

from fastdiff_kernels import backend

collect_ignore_glob = [] if conformance.BACKEND else ["test_*.py"]


@pytest.fixture(autouse=True)
def on_the_back_end() -> Iterator[None]:
    """Every call takes the back end under test, or raises why it cannot."""
    torch.manual_seed(0)
    with backend(conformance.BACKEND):
        yield
