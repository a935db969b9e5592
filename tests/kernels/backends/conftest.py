"""One set of tests for every back end that stands in for the references.

    TRITON_INTERPRET=1 pytest tests/kernels/backends          # triton, interpreted: no GPU
    pytest tests/kernels/backends                             # triton, on a GPU

Each file tests one op, on the back end and the device that conformance.py chose; where there is
none to test, nothing is collected.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import conformance
import pytest
import torch

from fastdiff_kernels import backend


def without_hypothesis() -> types.ModuleType:
    """What stands in for the package where it is absent: every property test is skipped."""

    def given(*_: Any, **__: Any) -> Callable[[Any], Any]:
        def decorate(test: Any) -> Any:
            @pytest.mark.skip("hypothesis is not installed")
            def skipped() -> None:  # what hypothesis would draw are no fixtures
                pass

            return skipped

        return decorate

    module, strategies = (types.ModuleType(f"hypothesis{part}") for part in ("", ".strategies"))
    strategies.data = lambda: None
    module.given, module.strategies = given, strategies
    module.settings = lambda **_: lambda test: test
    module.HealthCheck = types.SimpleNamespace(too_slow=None)
    return module


if importlib.util.find_spec("hypothesis") is None:
    sys.modules["hypothesis"] = without_hypothesis()
    sys.modules["hypothesis.strategies"] = sys.modules["hypothesis"].strategies

collect_ignore_glob = [] if conformance.BACKEND else ["test_*.py"]


@pytest.fixture(autouse=True)
def on_the_back_end() -> Iterator[None]:
    """Every call takes the back end under test, or raises why it cannot."""
    torch.manual_seed(0)
    with backend(conformance.BACKEND):
        yield
