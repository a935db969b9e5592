"""A pytest plugin that records the launches of the back ends' tests for chips that are not here.

    FASTDIFF_RECORD=forms.json FASTDIFF_RECORD_FAMILIES=sm_80,sm_90 FASTDIFF_TEST_BACKEND=triton \\
      pytest tests/kernels/backends -p benchmarks.aot.recorder

Every call of an op is made once for each family of chips with that family's plan, forward and
backward, on the tests' own tensors: so addresses are aligned as they will be. No kernel runs. The
results that the test sees are zeros, on the back end under test and on the reference: nearly every
comparison holds and nothing is computed, so the whole suite takes seconds. What a test asserts
beyond that says nothing here, and a test that fails so has launched what it launches before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.aot.record import launched
from fastdiff_kernels import _launch, _register

FAMILIES = os.environ.get("FASTDIFF_RECORD_FAMILIES", "sm_90").split(",")
# For each family, by the form's text: only slow tests launch it.
_forms: dict[str, dict[str, bool]] = {family: {} for family in FAMILIES}
_slow = False


@contextlib.contextmanager
def _planned(family: str) -> Iterator[None]:
    """Record under the plan of a family, or of the chip that the test itself pretends.

    A test that pretends a chip of another family runs on that family's GPUs only.
    """
    chip = _launch._pretended or _launch.CHIPS[family]
    with _launch.pretend(chip), _launch.recording() as launches:
        yield
    for launch in launches if chip.family in (family, "default") else ():
        text = launched(launch, family).text
        _forms[family][text] = _slow and _forms[family].get(text, True)


class _Call:
    """One call of an op, for every family."""

    def __init__(self, op: str, form: tuple[Any, ...]) -> None:
        triton = _register._OPS[op]._backends["triton"]
        _register._load(op, "triton")
        assert triton.call is not None
        self.call, self.form = triton.call, form
        self.why: dict[str, str] = {}
        for family in FAMILIES:
            with _launch.pretend(_launch._pretended or _launch.CHIPS[family]):
                why = triton.supports(*form) if triton.supports is not None else None
            if why is not None:
                self.why[family] = why
        self.places = [i for i, a in enumerate(form) if isinstance(a, Tensor)]
        self.graphs: dict[str, tuple[tuple[Tensor, ...], list[Tensor]]] = {}

    def forward(self, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = ()
        for family in FAMILIES:
            if family in self.why:
                continue
            leaves = [
                self.form[place].detach().requires_grad_(need)
                for place, need in zip(self.places, needs, strict=True)
            ]
            form = list(self.form)
            for place, leaf in zip(self.places, leaves, strict=True):
                form[place] = leaf
            with _planned(family), torch.enable_grad():
                made = self.call(*form)
            results = made if isinstance(made, tuple) else (made,)
            self.graphs[family] = results, leaves
        return results

    def backward(self, needs: tuple[bool, ...], dys: tuple[Tensor | None, ...]) -> None:
        for family, (results, leaves) in self.graphs.items():
            pairs = [(r, dy) for r, dy in zip(results, dys, strict=True) if dy is not None]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            if pairs and wanted:
                outputs, weights = zip(*pairs, strict=True)
                with _planned(family):
                    torch.autograd.grad(
                        outputs, wanted, weights, allow_unused=True, retain_graph=True
                    )


class _Zeros(torch.autograd.Function):
    """Results and gradients of zeros; the launches of a call are recorded on the way."""

    @staticmethod
    def forward(ctx: Any, call: _Call, record: bool, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.record = call, record
        ctx.inputs = tensors
        if record:
            results = call.forward(tuple(ctx.needs_input_grad[2:]))
        else:
            results = _reference(call)
        made = tuple(torch.zeros_like(r) for r in results)
        return made if len(made) > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        needs = tuple(ctx.needs_input_grad[2:])
        if ctx.record:
            ctx.call.backward(needs, dys)
        grads = [torch.zeros_like(t) if n else None for t, n in zip(ctx.inputs, needs, strict=True)]
        if torch.is_grad_enabled():
            grads = [None if g is None else _Refused.apply(g, *ctx.inputs) for g in grads]
        return (None, None, *grads)


class _Refused(torch.autograd.Function):
    """A gradient of which there is no gradient in the call's tensors, as of our kernels."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("double backward is not implemented")


def _reference(call: _Call) -> tuple[Tensor, ...]:
    """The shapes of the reference's results; on meta, so nothing is computed."""
    form = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in call.form]
    op = next(o for o in _register._OPS.values() if o._backends["triton"].call is call.call)
    with torch.no_grad():
        made = op._reference(*form)
    results = made if isinstance(made, tuple) else (made,)
    return tuple(
        torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=call.form[0].device)
        for r in results
    )


def _answer(op: str, form: tuple[Any, ...]) -> Any:
    call = _Call(op, form)
    asked = _register._asked
    if _launch.planning():  # the test records for itself
        return call.call(*form)
    record = asked != "reference"
    if record and len(call.why) == len(FAMILIES):
        raise RuntimeError(
            f"{op}: back end {asked!r} was asked for and cannot run this call: "
            f"{call.why[FAMILIES[0]]}"
        )
    tensors = [form[place] for place in call.places]
    results = _Zeros.apply(call, record, *tensors)
    if op == "layer_norm_modulate" and form[5] is None:
        return results[0], form[0]  # r is x itself
    return results


def _opcheck(operator: Any, arguments: tuple[Any, ...], *_: Any, **__: Any) -> None:
    """The launches of an operator's check: forward and backward."""
    for family in FAMILIES:
        with _planned(family):
            made = operator(*arguments)
            results = [r for r in (made if isinstance(made, tuple) else (made,)) if r.grad_fn]
            leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            if results and leaves:
                dys = [torch.zeros_like(r) for r in results]
                torch.autograd.grad(results, leaves, dys, allow_unused=True)


def pytest_configure(config: pytest.Config) -> None:
    torch.library.opcheck = _opcheck  # type: ignore[assignment]
    torch.testing.assert_close = lambda *_, **__: None
    torch.compile = lambda function=None, **_: function or (lambda f: f)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _recorded(request: pytest.FixtureRequest) -> Iterator[None]:
    global _slow
    _slow = request.node.get_closest_marker("slow") is not None
    with _register.stand_in(_answer):
        yield


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["FASTDIFF_RECORD"]).write_text(json.dumps(_forms))
