"""Whole models under torch.compile(fullgraph=True), torch.export and ONNX, for any batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from builders import make_ascend, make_iuvit, make_unet, randomize
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff import ops

BATCHES = (3, 5)
CONDITIONS = {"context_dim": 12, "num_classes": 7}
CASES = {
    "iuvit": lambda: make_iuvit(**CONDITIONS),
    "iuvit fused": lambda: make_iuvit(text_attention="fused", **CONDITIONS),
    "ascend": lambda: make_ascend(**CONDITIONS),
    "unet": lambda: make_unet(**CONDITIONS),
}


def inputs(B: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    mask = torch.ones(B, 7, dtype=torch.bool)
    mask[0, 4:], mask[1] = False, False
    x, t, context = torch.randn(B, 3, 16, 16), torch.rand(B) * 999, torch.randn(B, 7, 12)
    return (x, t, context), {"context_mask": mask, "y": torch.arange(B) % 8}


def step(call, model, args, kwargs) -> list[Tensor]:
    """The output, and the gradient of every parameter and of the image."""
    out = call(*args, **kwargs)
    loss = (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [args[0], *model.parameters()])]


def some_slow(quick: list[str], slow: list[str]) -> pytest.MarkDecorator:
    """U-Nets are made of parts that the others have."""
    return pytest.mark.parametrize(
        "case", [*quick, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]
    )


@some_slow(["iuvit checkpointing", "ascend"], ["iuvit", "unet"])
def test_one_graph_for_any_batch(case):
    torch.manual_seed(0)
    torch._dynamo.reset()
    name, _, checkpointing = case.partition(" ")
    model = randomize(CASES[name]())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    model.set_checkpointing(bool(checkpointing))
    with ops.backend("reference"):
        for B in BATCHES:
            args, kwargs = inputs(B)
            args[0].requires_grad_()
            for tensor in (*args, *kwargs.values()):
                torch._dynamo.mark_dynamic(tensor, 0)
            mine = step(compiled, model, args, kwargs)
            for a, b in zip(mine, step(model, model, args, kwargs), strict=True):
                scale = max(1.0, b.abs().max().item())
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * scale)
            assert counter.frame_count == 1
    torch._dynamo.reset()


def dynamic(args, kwargs) -> dict[str, dict[int, torch.export.Dim]]:
    batch = torch.export.Dim("batch", min=1, max=64)
    return {name: {0: batch} for name in ("x", "t", "context", *kwargs)}


@torch.no_grad()
@some_slow(["iuvit fused", "ascend"], ["iuvit", "unet"])
def test_an_exported_model_takes_any_batch(case):
    model = randomize(CASES[case]()).eval()
    args, kwargs = inputs(3)
    with ops.backend("reference"):
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic(args, kwargs), strict=False
        )
        for B in (2, 5):
            args, kwargs = inputs(B)
            torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))


@torch.no_grad()
@some_slow(["iuvit"], ["iuvit fused", "ascend", "unet"])
def test_an_onnx_file_gives_the_same_outputs(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "fastdiff[dev]"')
    pytest.importorskip("onnxscript", reason='pip install "fastdiff[dev]"')
    model = randomize(CASES[case]()).eval()
    args, kwargs = inputs(3)
    with ops.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            model,
            args,
            tmp_path / "model.onnx",
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=dynamic(args, kwargs),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    args, kwargs = inputs(5)
    names = [i.name for i in session.get_inputs()]
    feed = {n: v.numpy() for n, v in zip(names, (*args, *kwargs.values()), strict=True)}
    (out,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(out), model(*args, **kwargs), rtol=1e-4, atol=1e-5)
