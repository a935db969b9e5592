"""The back end under test, and the checks every op's test makes; the rule is in `_numerics`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastdiff_kernels import _launch, _numerics, backend
from fastdiff_kernels._numerics import UNIT

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not _INTERPRETED else "cpu"
BACKEND = os.environ.get("FASTDIFF_TEST_BACKEND") or (
    "triton" if DEVICE == "cuda" or _INTERPRETED else ""
)
if BACKEND == "native":
    DEVICE = "cpu"

DTYPES = tuple(UNIT)


def only_as(family: str) -> None:
    """Skip a test that pretends a chip of this family, where there is a GPU of another one."""
    if DEVICE == "cuda" and (here := _launch.chip(torch.device(DEVICE)).family) != family:
        pytest.skip(f"pretends {family}, and the GPU here is {here}")


Call = Callable[..., Tensor | tuple[Tensor, ...]]


def run(call: Call, inputs: Sequence[Tensor | None], dys: Sequence[Tensor]) -> list[Tensor | None]:
    """Results of a call, then the gradient for each input that requires one."""
    results = call(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return list(results)
    pairs = [(r, dy.to(r.dtype)) for r, dy in zip(results, dys, strict=True) if r.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
    return [*(r.detach() for r in results), *grads]


def check_numerics(
    call: Call,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    keep: Sequence[int] = (),
    draws: int = 1,
) -> None:
    """Hold a call to the numerics rule (`_numerics`), values and every gradient.

    Args:
        call: takes the inputs; made on the back end under test, and on the reference.
        inputs: floating tensors on the CPU in any dtype, or None. All get a gradient.
        dtype: of the call.
        keep: positions of inputs that stay float32 (parameters beside low-precision activations).
        draws: of the results' gradients; the rule holds for all draws taken together. More than one
            where a gradient has so few numbers that one draw's largest error is a matter of luck.
    """
    rounded: list[Tensor | None] = [
        None
        if t is None
        else t.detach().to(DEVICE, torch.float32 if i in keep else dtype).requires_grad_()
        for i, t in enumerate(inputs)
    ]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in rounded]
    with torch.no_grad(), backend("reference"):
        results = call(*exact)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    runs = []
    for _ in range(draws):
        dys = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
            for r in results
        ]
        with backend("reference"):
            reference = run(call, rounded, dys), run(call, exact, dys)
        runs.append((run(call, rounded, dys), *reference))
    got, eager, truth = map(_together, zip(*runs, strict=True))
    _numerics.check(got, eager, truth)


def _together(draws: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """What each draw gave, stacked."""
    return [
        None if same[0] is None else torch.stack(same)  # type: ignore[arg-type]
        for same in zip(*draws, strict=True)
    ]


def check_repeats(call: Call, inputs: Sequence[Tensor | None]) -> None:
    """Two runs, values and gradients, are bit-identical."""
    moved = [None if t is None else t.detach().to(DEVICE).requires_grad_() for t in inputs]
    with torch.no_grad():
        results = call(*moved)
    results = results if isinstance(results, tuple) else (results,)
    dys = [torch.randn_like(r) for r in results]
    for a, b in zip(run(call, moved, dys), run(call, moved, dys), strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
