"""Both families, for tests of what they share."""

from __future__ import annotations

import pytest
from builders import make_ascend, make_iuvit


@pytest.fixture(params=[make_iuvit, make_ascend], ids=["iuvit", "ascend"])
def make(request):
    return request.param
