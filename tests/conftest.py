"""What every test on a GPU needs: exact float32 products, and a deterministic cuBLAS."""

from __future__ import annotations

import os
from collections.abc import Iterator

# cuBLAS reads it when it starts; `use_deterministic_algorithms` asks for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Convolve and multiply float32 in float32: cuDNN takes TF32 by default, ten bits of fraction.

    By the two older flags: torch knows them from 1.7 to this day, and refuses a mixture with the
    newer `fp32_precision`.
    """
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value
