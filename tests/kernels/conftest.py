"""Fixtures of the op tests: poisoned memory, and one check that every op's compiled form passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

Call = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so an output that nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # switches fill_uninitialized_memory on
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def values_and_gradients(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """Results of a call, then the gradients of a sum that weighs every element differently."""
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    loss = torch.zeros((), dtype=torch.float64)
    for result in results:
        ramp = torch.linspace(-1, 2, max(result.numel(), 1), dtype=torch.float64)[: result.numel()]
        loss = loss + (result.double() * ramp.view(result.shape)).sum()
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [result.detach() for result in results] + list(torch.autograd.grad(loss, wanted))


@pytest.fixture
def differentiate() -> Callable[[Call, list[Tensor]], list[Tensor]]:
    return values_and_gradients


@pytest.fixture
def check_dtypes() -> Callable[..., None]:
    """Compare a call in each dtype with an oracle in float64 on the same rounded inputs."""

    def check(call: Call, oracle: Call, inputs: list[Tensor], tolerance: dict) -> None:
        for dtype, allowed in tolerance.items():
            rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
            exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
            got = values_and_gradients(call, rounded)
            expected = values_and_gradients(oracle, exact)
            for a, b in zip(got, expected, strict=True):
                assert a.dtype is dtype
                torch.testing.assert_close(a.double(), b, rtol=allowed, atol=allowed * _size(b))

    return check


def _size(tensor: Tensor) -> float:
    return max(1.0, tensor.abs().max().item()) if tensor.numel() else 1.0


@pytest.fixture
def check_compiled() -> Iterator[Callable[..., None]]:
    """Forward and backward as one graph; at most one recompile in all over several batch sizes."""

    def check(call: Call, make: Callable[[int], list[Tensor]], batched: int) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        for batch in (3, 5, 2, 1, 7):
            inputs = [tensor.detach().requires_grad_() for tensor in make(batch)]
            for tensor in inputs[:batched] if batch > 1 else []:
                torch._dynamo.mark_dynamic(tensor, 0)
            got = values_and_gradients(compiled, inputs)
            for a, b in zip(got, values_and_gradients(call, inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * _size(b))
            # A batch of 1 is its own graph by PyTorch's rule: the one recompile.
            assert counter.frame_count == (1 if batch > 1 and batch != 7 else 2)

    torch._dynamo.reset()
    yield check
    torch._dynamo.reset()
