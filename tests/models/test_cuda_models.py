"""Both families on a GPU: a captured training step, and torch.compile with Inductor.

On a CPU the capture is a stand-in that calls the step again, and Inductor makes C++ (slow).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import pytest
import torch
from builders import make_ascend, make_iuvit, randomize
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {"iuvit": make_iuvit, "ascend": make_ascend}
each_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=list(FAMILIES))
# Inductor on a GPU says that TF32 is off, and more of the kind.
pytestmark = pytest.mark.filterwarnings("default")


def model_and_inputs(make: Callable[..., nn.Module], B: int) -> tuple[nn.Module, list[Tensor]]:
    model = randomize(make(context_dim=12)).to(DEVICE)
    return model, inputs(B)


def inputs(B: int, seed: int = 0) -> list[Tensor]:
    """Image, time, text."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, 3, 16, 16), (B,), (B, 7, 12))
    x, t, context = (torch.rand(shape, generator=generator) for shape in shapes)
    return [tensor.to(DEVICE) for tensor in (2 * x - 1, 999 * t, context)]


def step(call: Callable[..., Tensor], model: nn.Module, args: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of every parameter that it depends on."""
    out = call(*args)
    ramp = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape)
    loss = (out.float() * ramp).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


def close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        size = b.abs().max().item()
        torch.testing.assert_close(
            a,
            b,
            rtol=tolerance,
            atol=tolerance * max(size, 1e-3),
            msg=lambda m, i=index: f"{i}: {m}",
        )


@each_family
def test_a_captured_step_gives_what_eager_gives_for_new_data(make):
    model, static = model_and_inputs(make, 2)
    for _ in range(2):
        results = step(model, model, static)
    if DEVICE == "cuda":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(model, model, static)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step(model, model, static)
    for seed in (1, 2):
        new = inputs(2, seed)
        for old, fresh in zip(static, new, strict=True):
            old.copy_(fresh)
        if DEVICE == "cuda":
            graph.replay()
        else:
            results = step(model, model, static)
        close([r.clone() for r in results], step(model, model, new), 1e-5)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")),
        pytest.param(
            "cpu",
            marks=[pytest.mark.slow, pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")],
        ),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@each_family
def test_inductor_compiles_one_graph_for_any_batch(make, autocast, device):
    torch._dynamo.reset()
    model, _ = model_and_inputs(make, 2)
    compiled = torch.compile(model, fullgraph=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for B in (3, 5, 2):
        args = inputs(B, B)
        for tensor in args:
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            mine, plain = step(compiled, model, args), step(model, model, args)
        # In bfloat16 Inductor leaves out roundings between fused operations.
        close(mine, plain, 0.1 if autocast else 2e-4)
        assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
