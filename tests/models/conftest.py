"""All families, for tests of what they share."""

from __future__ import annotations

import pytest
from builders import make_ascend, make_iuvit, make_unet


@pytest.fixture(params=[make_iuvit, make_ascend, make_unet], ids=["iuvit", "ascend", "unet"])
def make(request):
    return request.param
