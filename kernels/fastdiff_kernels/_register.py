"""Choice of a back end, and registration of kernels with PyTorch: written once, used by every op.

Two parts. `Op` holds one op's back ends and picks one for a call; `backend` and `explain` are its
public face. `kernel` turns a forward and a backward that fill given tensors into one differentiable
callable: a plain `autograd.Function` in eager mode, a registered operator wherever PyTorch traces.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastdiff_kernels import _launch

BACKENDS = ("auto", "reference", "native", "triton")

# Read once: triton decides at the import of a kernel whether it interprets.
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

_OPS: dict[str, Op] = {}

_stand_in: Callable[[str, tuple[Any, ...]], Any] | None = None


def _valid(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown back end {name!r}; expected one of {BACKENDS}")
    return name


_lock = threading.Lock()
_default = _valid(os.environ.get("FASTDIFF_BACKEND") or "auto", "FASTDIFF_BACKEND")
_setter: backend | None = None
_entered: list[backend] = []
# The choice in force. A plain global, because torch.compile guards those: a compiled function
# recompiles when the choice changes. It traces no ContextVar, and does not guard thread-locals.
_asked = _default


class backend:
    """Choose the back end of every op: by a call for good, by a `with` for the block only.

    The choice is process-wide, as PyTorch's own kernel choices are, so it also holds in autograd's
    threads, where checkpointing runs a forward again. Blocks of several threads may interleave:
    the one entered last holds, and none leaves its choice behind. Enter it around a compiled
    function, not inside one; the function recompiles for a new choice.

    Args:
        name: "auto" (CUDA tensors: triton; CPU tensors: native; reference where that cannot run
            the call), or "reference", "native", "triton": that one, or an error that says why not.

    Raises:
        ValueError: the name is none of these four.

    Example:
        >>> with backend("reference"):
        ...     y = model(x, t)
        >>> backend("auto")
        backend('auto')
    """

    def __init__(self, name: str) -> None:
        global _default, _setter
        self.name = _valid(name, "backend")
        with _lock:
            self._before = _default
            _default, _setter = name, self
            _refresh()

    def __enter__(self) -> backend:
        global _default, _setter
        with _lock:
            if _setter is self:
                _default, _setter = self._before, None
            _entered.append(self)
            _refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            _entered.remove(self)
            _refresh()

    def __repr__(self) -> str:
        return f"backend({self.name!r})"


def _refresh() -> None:
    global _asked
    _asked = _entered[-1].name if _entered else _default


@contextlib.contextmanager
def stand_in(call: Callable[[str, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Let `call(op, form)` answer every call of every op instead of a back end.

    For what looks at a model from outside: counting its bytes (`fastdiff.roofline`), or timing it
    with other implementations of the ops. Process-wide, as `backend` is.

    Args:
        call: takes the op's name and the call in normal form (see `Op`), after all checks.
    """
    global _stand_in
    before, _stand_in = _stand_in, call
    try:
        yield
    finally:
        _stand_in = before


@dataclass(frozen=True)
class Explanation:
    """Which back end a call takes, and why it takes none of the others; `print` it.

    Attributes:
        op: the op's name.
        asked: the choice in force: "auto" or a back end's name.
        backend: the one the call takes, or None where the one asked for cannot run it.
        reasons: for each other one, why not.
    """

    op: str
    asked: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        taken = "raises" if self.backend is None else f"takes {self.backend}"
        lines = [f"{self.op} {taken} (asked for: {self.asked})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclass
class _BackEnd:
    call: Callable[..., Any] | None
    supports: Callable[..., str | None] | None
    module: str | None


class Op:
    """One op: its checks, its definition, and the back ends that can stand in for it.

    Args:
        name: the public function's name.
        arguments: checks a call as the user wrote it, casts for autocast, and returns it in normal
            form, a tuple whose first item is the activation. It has the public signature.
        reference: the definition in plain PyTorch; takes the normal form, runs everywhere.
    """

    def __init__(
        self,
        name: str,
        arguments: Callable[..., tuple[Any, ...]],
        reference: Callable[..., Any],
    ) -> None:
        self.name, self._arguments, self._reference = name, arguments, reference
        self._backends: dict[str, _BackEnd] = {}
        _OPS[name] = self

    def add(
        self,
        name: str,
        call: Callable[..., Any] | str,
        supports: Callable[..., str | None] | None = None,
    ) -> None:
        """Register a back end, one line in `op.py`.

        Args:
            name: "native" or "triton".
            call: takes the normal form; or the name of a module with functions `call` and
                `supports`, which is imported when a call first asks for it and not before;
                "module:function" where one module holds several ops.
            supports: takes the normal form; returns None, or why it cannot run the call.
        """
        if name not in BACKENDS[2:]:
            raise ValueError(f"Op.add: back end {name!r}; expected one of {BACKENDS[2:]}")
        module = call if isinstance(call, str) else None
        function = None if isinstance(call, str) else call
        self._backends[name] = _BackEnd(function, supports, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        form = self._arguments(*args, **kwargs)
        call = self._choose(form)
        device = form[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # The cast policy was applied to `form`; inside, autocast would undo float32 statistics.
            with torch.autocast(device, enabled=False):
                return call(*form)
        return call(*form)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Say which back end this call would take; see `explain`."""
        form = self._arguments(*args, **kwargs)
        reasons = {name: self._why_not(name, form) for name in ("triton", "native")}
        if _asked == "auto":
            taken: str | None = next((n for n, why in reasons.items() if why is None), "reference")
        else:
            taken = _asked if reasons.get(_asked) is None else None
        others = {
            name: why or (f"{_asked} was asked for" if _asked != "auto" else f"{taken} comes first")
            for name, why in (reasons | {"reference": None}).items()
            if name != taken
        }
        return Explanation(self.name, _asked, taken, others)

    def _choose(self, form: tuple[Any, ...]) -> Callable[..., Any]:
        if _stand_in is not None:
            return functools.partial(_call_stand_in, self.name)
        if _asked == "reference" or (_asked == "auto" and not self._backends):
            return self._reference
        for name in ("triton", "native") if _asked == "auto" else (_asked,):
            why = self._why_not(name, form)
            if why is None:
                call = self._backends[name].call
                assert call is not None
                return call
            if _asked != "auto":
                raise RuntimeError(
                    f"{self.name}: back end {name!r} was asked for and cannot run this call: {why}"
                )
        return self._reference

    def _why_not(self, name: str, form: tuple[Any, ...]) -> str | None:
        if name not in self._backends:
            return f"not built in this version: {self.name} has no {name} kernel"
        device = form[0].device.type
        if name == "native" and device != "cpu":
            return f"it runs on cpu tensors, and these are on {device}"
        # `auto` never takes triton's interpreter: it is for tests, and orders of magnitude slower.
        interprets = _INTERPRETS and device == "cpu" and _asked != "auto"
        planned = device == "meta" and _launch.planning()
        if name == "triton" and device != "cuda" and not interprets and not planned:
            cure = "" if _INTERPRETS else "; TRITON_INTERPRET=1 lets it take cpu tensors"
            return f"it runs on cuda tensors, and these are on {device}{cure}"
        absent = _absent(name) or _load(self.name, name)
        if absent:
            return absent
        supports = self._backends[name].supports
        return None if supports is None else supports(*form)


def _call_stand_in(op: str, *form: Any) -> Any:
    assert _stand_in is not None
    return _stand_in(op, form)


_absences: dict[str, str] = {}


def _constant(function: Callable[..., str]) -> Callable[..., str]:
    """Let torch.compile run a function while tracing and keep its answer, which never changes.

    What torch.compiler.assume_constant_result does, without the 1.5 s that its import takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant  # it could trace neither an import nor functools.cache
def _absent(name: str) -> str:
    """Why a back end cannot run on this machine at all, or an empty string."""
    if name not in _absences:
        why: str | None = None
        if name == "native":
            why = importlib.import_module("fastdiff_kernels._native").why_absent()
        elif importlib.util.find_spec("triton") is None:
            why = "triton is not installed: pip install triton"
        _absences[name] = why or ""
    return _absences[name]


@_constant
def _load(op: str, name: str) -> str:
    """Import the module of a back end that was registered by its module's name; no reason not to.

    In here even the look whether it is loaded: torch.compile would keep what it saw before.
    """
    entry = _OPS[op]._backends[name]
    if entry.call is None:
        assert entry.module is not None
        name, _, function = entry.module.partition(":")
        module = importlib.import_module(name)
        entry.supports, entry.call = module.supports, getattr(module, function or "call")
    return ""


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which back end a call takes, and why each other one does not; runs nothing.

    Args:
        op: the op, or its name.
        args, kwargs: the call, as it would be made.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        ValueError: there is no such op; or whatever the op itself raises for these arguments.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise ValueError(f"explain: unknown op {name!r}; expected one of {sorted(_OPS)}")
    return _OPS[name].explain(*args, **kwargs)


_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")


@dataclass(frozen=True)
class _Schema:
    """Names of a schema's arguments and results, and the text of each argument's type."""

    name: str
    types: dict[str, str]
    results: list[str]

    @classmethod
    def parse(cls, text: str) -> _Schema:
        match = re.fullmatch(r"(\w+)\((.*?)\) -> \((.*)\)", text)
        fields = [] if match is None else [*match[2].split(", "), *match[3].split(", ")]
        if match is None or not all(re.fullmatch(r"[\w?\[\]]+ \w+", field) for field in fields):
            raise ValueError(
                f"kernel: schema {text!r}; expected 'name(type a, ...) -> (Tensor y, ...)' "
                "with every result named, and neither defaults nor '*'"
            )
        arguments = [field.split(" ") for field in match[2].split(", ")]
        results = [field.split(" ")[1] for field in match[3].split(", ")]
        return cls(match[1], {name: kind for kind, name in arguments}, results)

    @property
    def tensors(self) -> list[str]:
        return [name for name, kind in self.types.items() if kind.startswith("Tensor")]


def kernel(
    schema: str,
    *,
    empty: Callable[..., Tensor | tuple[Tensor, ...]],
    forward: Callable[..., None],
    backward: Callable[..., None],
    saves: Sequence[str],
    grad_like: Mapping[str, str] | None = None,
    grad_same: Mapping[str, str] | None = None,
    returned: int = 1,
) -> Callable[..., Any]:
    """Make one differentiable callable of kernels that fill the tensors they are given.

    In eager mode a call is a plain `autograd.Function` (or, where nothing needs a gradient, just
    `forward`). While PyTorch traces (torch.compile, export, fake tensors, dispatch modes) it is the
    operator `fastdiff::NAME`, whose backward is `fastdiff::NAME_backward`. Results have the memory
    format that tracing was promised, because `empty` makes both the promise and the result.

    Args:
        schema: "name(Tensor x, Tensor? bias, float eps) -> (Tensor y, Tensor rstd)", as in
            `torch.library.define`, with all results named, no defaults and no "*".
        empty: takes the arguments; allocates the results and does nothing else (no data is read:
            it is the fake, too). None of them may be an argument.
        forward: takes (results, *arguments) and fills every result.
        backward: takes (gradients, *gradients of the returned results, *saved, *arguments that are
            no tensors). `gradients` has one tensor to fill for each tensor argument in order, or
            None for one that needs no gradient, which should cost nothing. A result that was
            not used has the gradient None; the others come with any strides.
        saves: arguments and results, by name, that backward reads.
        grad_like: for a tensor argument that is not saved, the saved name that has its shape, dtype
            and memory format.
        grad_same: tensor arguments whose gradient is that of another one, like the terms of a sum:
            one tensor is filled for both, the other's.
        returned: how many results the caller gets; those after them only serve the backward.

    Returns:
        The callable: takes the arguments positionally; returns one tensor, or a tuple.

    Raises:
        ValueError: a schema of another form; an unknown name in `saves`; a tensor argument whose
            gradient has no model in `saves`.
        RuntimeError: (from the callable) double backward.
    """
    spec = _Schema.parse(schema)
    name, tensors = spec.name, spec.tensors
    constants = [n for n in spec.types if n not in tensors]
    unknown = [n for n in saves if n not in tensors and n not in spec.results]
    if unknown:
        raise ValueError(f"kernel: {name} saves {unknown}, which are no tensors of its schema")
    twins = {tensors.index(n): tensors.index(o) for n, o in (grad_same or {}).items()}
    models = [(grad_same or {}).get(n, n) for n in tensors]
    models = [(grad_like or {}).get(n, n) for n in models]
    for n, model in zip(tensors, models, strict=True):
        if model not in saves:
            raise ValueError(f"kernel: {name} does not save {model!r}, the model of {n}'s gradient")
    model_at = [list(saves).index(model) for model in models]
    position = {n: i for i, n in enumerate(spec.types)}
    tensor_at, constant_at = [position[n] for n in tensors], [position[n] for n in constants]
    saved_argument_at = [position.get(n) for n in saves]
    saved_result_at = [None if n in position else spec.results.index(n) for n in saves]

    def run(*args: Any) -> tuple[Tensor, ...]:
        results = empty(*args)
        results = results if isinstance(results, tuple) else (results,)
        forward(results, *args)
        return results

    def saved_of(args: Sequence[Any], results: Sequence[Tensor]) -> list[Any]:
        return [
            results[r] if a is None else args[a]  # type: ignore[index]
            for a, r in zip(saved_argument_at, saved_result_at, strict=True)
        ]

    # `rest` is (gradients of the returned results, saved, constants), as `backward` takes them.
    def empty_gradients(rest: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
        return [
            torch.empty_like(rest[returned + at]) if need else None
            for at, need in zip(model_at, needs, strict=True)
        ]

    def run_backward(rest: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
        filled = empty_gradients(rest, needs)
        backward(tuple(filled), *rest)
        return filled

    def impl(*args: Any) -> Any:
        results = run(*args)
        return results if len(results) > 1 else results[0]

    def backward_impl(*args: Any) -> Any:
        *rest, needs = args
        return pack(run_backward(rest, needs), rest)

    def backward_fake(*args: Any) -> Any:
        *rest, needs = args
        return pack(empty_gradients(rest, needs), rest)

    def pack(filled: Sequence[Tensor | None], rest: Sequence[Any]) -> Any:
        """An operator returns tensors only: an empty one stands for a gradient not needed."""
        some = next(t for t in rest if t is not None)
        full = tuple(some.new_empty(0) if t is None else t for t in filled)
        return full if len(full) > 1 else full[0]

    declarations = [
        *(f"Tensor? grad_{n}" for n in spec.results[:returned]),
        *(f"{spec.types.get(n, 'Tensor')} {n}" for n in saves),
        *(f"{spec.types[n]} {n}" for n in constants),
        "bool[] needs",
    ]
    gradients = ", ".join(f"Tensor d_{n}" for n in tensors)
    backward_schema = f"{name}_backward({', '.join(declarations)}) -> ({gradients})"
    operator = _define(schema, name, impl, empty)
    backward_operator = _define(backward_schema, f"{name}_backward", backward_impl, backward_fake)

    def operator_backward(rest: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
        full = backward_operator(*rest, needs)
        full = full if isinstance(full, (tuple, list)) else (full,)
        return [t if need else None for t, need in zip(full, needs, strict=True)]

    def differentiate(ctx: Any, grads: Sequence[Any], by: Callable[..., Any]) -> tuple[Any, ...]:
        grads = grads[:returned]
        if all(grad is None for grad in grads):
            return (None,) * len(spec.types)
        needs = [ctx.needs_input_grad[at] for at in tensor_at]
        for twin, other in twins.items():
            needs[twin], needs[other] = False, needs[twin] or needs[other]
        filled = by((*grads, *ctx.saved_tensors, *ctx.constants), needs)
        for twin, other in twins.items():
            filled[twin] = filled[other]
        return spread(filled)

    def spread(filled: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        every: list[Tensor | None] = [None] * len(spec.types)
        for at, tensor in zip(tensor_at, filled, strict=True):
            every[at] = tensor
        return tuple(every)

    def remember(ctx: Any, args: Sequence[Any], results: Sequence[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved_of(args, results))
        ctx.constants = [args[at] for at in constant_at]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        remember(ctx, inputs, output if isinstance(output, (tuple, list)) else (output,))

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{name}: double backward is not implemented; "
            "fastdiff.ops.backend('reference') runs the definition, which has it"
        )

    torch.library.register_autograd(
        operator,
        lambda ctx, *grads: differentiate(ctx, grads, operator_backward),
        setup_context=setup_context,
    )
    torch.library.register_autograd(backward_operator, refuse)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = run(*args)
            remember(ctx, args, results)
            return results[0] if returned == 1 else results[:returned]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # With create_graph, the operator: it records a node that refuses.
            by = operator_backward if torch.is_grad_enabled() else run_backward
            return differentiate(ctx, grads, by)

    Function.__name__ = Function.__qualname__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return visible(operator(*args))
        traced, needs = is_in_torch_dispatch_mode(), False
        for at in tensor_at:
            tensor = args[at]
            if tensor is not None:
                # A subclass (fake tensors, say) must see an operator.
                traced = traced or type(tensor) not in (Tensor, torch.nn.Parameter)
                needs = needs or tensor.requires_grad
        if traced:
            return visible(operator(*args))
        if needs and torch.is_grad_enabled():
            return Function.apply(*args)
        return visible(run(*args))

    def visible(results: Any) -> Any:
        if isinstance(results, Tensor):
            return results
        return results[0] if returned == 1 else tuple(results[:returned])

    return call


def _define(schema: str, name: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Exact strides: the kernels' layout follows their inputs', and the fake saw the traced ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastdiff, name).default
