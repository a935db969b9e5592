"""Both model families, forwards and in a training step, at widths that a CPU runs in seconds.

    pytest benchmarks/ --benchmark-only

Each case checks that its output is finite before it is timed. Times of different runs on a shared
machine do not compare; ratios within one run do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.models import Backbone, create_model

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "iuvit-32px": ("iuvit_cifar10", {"dim": 128, "layers": 5}, 8),
    "ascend-32px": ("ascend_cifar10", {"channels": 64, "depth": 1}, 2),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Backbone, torch.Tensor, torch.Tensor]:
    """A model, noised images and times, on the GPU if there is one."""
    name, overrides, batch = CASES[request.param]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = create_model(name, **overrides).to(device)
    x = torch.randn(batch, 3, 32, 32, device=device)
    return model, x, torch.randint(0, 1000, (batch,), device=device)


def synchronized(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`run`, ended by a wait for the GPU if there is one."""

    def timed() -> torch.Tensor:
        out = run()
        if out.is_cuda:
            torch.cuda.synchronize()
        return out

    return timed


def test_forward(
    case: tuple[Backbone, torch.Tensor, torch.Tensor], benchmark: Callable[..., torch.Tensor]
) -> None:
    """One call of the network without gradients."""
    model, x, t = case
    model.eval()
    with torch.no_grad():
        assert bool(model(x, t).isfinite().all())
        benchmark(synchronized(lambda: model(x, t)))


def test_training_step(
    case: tuple[Backbone, torch.Tensor, torch.Tensor], benchmark: Callable[..., torch.Tensor]
) -> None:
    """Forward, backward and AdamW."""
    model, x, t = case
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> torch.Tensor:
        loss = (model(x, t) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    assert bool(step().isfinite())
    benchmark(synchronized(step))
