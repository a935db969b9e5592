"""Choice of a back end, and registration of kernels with PyTorch: written once, used by every op.

Two parts. `Op` holds one op's back ends and picks one for a call; `backend` and `explain` are its
public face. `kernel` turns a forward and a backward that fill given tensors into one differentiable
callable: a plain `autograd.Function` in eager mode, a registered operator wherever PyTorch traces.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "native", "triton")

# Read once: triton decides at the import of a kernel whether it interprets.
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

_OPS: dict[str, Op] = {}


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


class backend:  # noqa: N801  (used like torch.set_grad_enabled)
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
                `supports`, which is imported when a call first asks for it and not before.
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
        if name == "triton" and device != "cuda" and not interprets:
            cure = "" if _INTERPRETS else "; TRITON_INTERPRET=1 lets it take cpu tensors"
            return f"it runs on cuda tensors, and these are on {device}{cure}"
        absent = _absent(name) or self._load(name)
        if absent:
            return absent
        supports = self._backends[name].supports
        return None if supports is None else supports(*form)

    def _load(self, name: str) -> str:
        if self._backends[name].call is not None:
            return ""
        return _import(self.name, name)


# torch.compile runs the next two while tracing and keeps their answers, which do not change in a
# process; it cannot trace an import.
@torch.compiler.assume_constant_result
@functools.cache
def _absent(name: str) -> str:
    """Why a back end cannot run on this machine at all, or an empty string."""
    if name == "native":
        native = importlib.import_module("fastdiff_kernels._native")
        return native.why_absent() or ""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return ""


@torch.compiler.assume_constant_result
def _import(op: str, name: str) -> str:
    entry = _OPS[op]._backends[name]
    assert entry.module is not None
    module = importlib.import_module(entry.module)
    entry.call, entry.supports = module.call, module.supports
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
