"""Choice of a back end: written once, used by every op.

`Op` holds one op's back ends and picks one for a call; `backend` and `explain` are its public face.
`kernel`, in `_kernel.py`, makes a differentiable callable of a back end's kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff_kernels import _calls, _launch
from fastdiff_kernels._kernel import kernel

__all__ = ["BACKENDS", "Explanation", "Op", "backend", "explain", "kernel", "stand_in"]

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
        self._known = _calls.Known()
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
        if torch.compiler.is_compiling() or kwargs or _stand_in is not None:
            return self._decide(*args, **kwargs)
        kind = _calls.kind(_asked, args)
        if kind is None:
            return self._decide(*args)
        known = self._known.get(kind)
        if known is not None:
            return known(*args)
        with _calls.noting() as noted:
            results = self._decide(*args)
        self._known.learn(kind, noted, args, results)
        return results

    def _decide(self, *args: Any, **kwargs: Any) -> Any:
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
        planned = planned or (device == "cpu" and _launch.takes_cpu())
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
