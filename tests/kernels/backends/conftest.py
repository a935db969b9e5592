"""One set of tests for every back end that stands in for the references.

    TRITON_INTERPRET=1 pytest tests/kernels/backends          # triton, interpreted: no GPU
    pytest tests/kernels/backends                             # triton, on a GPU

Each file tests one op, on the back end and the device that conformance.py chose; where there is
none to test, nothing is collected. FASTDIFF_PLAN=sm_90 lets the launchers choose block sizes as for
that family of GPUs: interpreted they would else be seen with those for the interpreter only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import conformance
import pytest
import torch

from fastdiff_kernels import _launch, backend


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


HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
if not HYPOTHESIS:
    sys.modules["hypothesis"] = without_hypothesis()
    sys.modules["hypothesis.strategies"] = sys.modules["hypothesis"].strategies

collect_ignore_glob = [] if conformance.BACKEND else ["test_*.py"]

# On a GPU an example of a new form compiles kernels. So there the examples are always the same,
# those whose kernels `benchmarks.aot` has recorded; neither do they follow the constants that
# Hypothesis finds in the modules that are loaded.
if HYPOTHESIS and (conformance.DEVICE == "cuda" or "FASTDIFF_RECORD" in os.environ):
    import hypothesis
    import hypothesis.internal.conjecture.providers as providers

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
