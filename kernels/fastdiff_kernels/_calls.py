"""Calls of an op that were seen before: checks, choice of back end and layout are not made again.

All of these depend on the kind of a call only: shapes, strides, dtypes and devices of its tensors,
its other arguments, the back end that is asked for, autograd's and autocast's state. `kind` says
it as a key; `Known` keeps, for each kind, a function of the tensors that is left to call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastdiff_kernels import _launch

_CONSTANTS = {int, float, bool, str, type(None)}
_SIZES, _NUMBERS = {tuple, torch.Size}, {int, bool}

MOST = 1024  # kinds of calls of an op; beyond, all are forgotten

_state = threading.local()
_enabled = True

# (again, differentiable, arguments, results) of the kernels that a call ran; see `_kernel.kernel`.
Again = Callable[[bool, tuple[Any, ...], dict[str, Any]], None]
Noted = list[tuple[Again, bool, tuple[Any, ...], Any]]


def kind(asked: str, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a call's course depends on; None where that is more than a key can say.

    Args:
        asked: the choice of back end in force.
        args: of the call.
    """
    if (
        not _enabled
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or _launch.watched()
    ):
        return None
    key: list[Any] = [asked, _launch.generation()]
    first, needs = None, False
    for arg in args:
        cls = type(arg)
        if cls is Tensor or cls is Parameter:
            if first is None:
                first = arg
            needs = needs or arg.requires_grad
            # A row of one, whose stride means nothing, is contiguous whatever its stride.
            key += (arg.shape, arg.is_contiguous() or arg.stride(), arg.dtype, arg.get_device())
        elif cls in _CONSTANTS or (cls in _SIZES and all(type(n) in _NUMBERS for n in arg)):
            key.append(arg)
        else:
            return None  # a subclass of Tensor, what cannot be a key, what the op will refuse
    if first is None or first.is_meta:
        return None
    key.append(needs and torch.is_grad_enabled())
    if torch._C._is_any_autocast_enabled():
        device = first.device.type
        if torch.is_autocast_enabled(device):
            key += (torch.get_autocast_dtype(device), device)
    return tuple(key)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Check and plan every call, as if its kind was new; process-wide. For tests and benchmarks."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def noting() -> Iterator[Noted]:
    """Collect the kernels that calls in this thread run."""
    before = getattr(_state, "noted", None)
    noted: Noted = []
    _state.noted = noted
    try:
        yield noted
    finally:
        _state.noted = before


def note(
    again: Again,
    differentiable: bool,
    args: tuple[Any, ...],
    results: Any,
) -> None:
    """Tell `noting` of a kernel's call."""
    noted = getattr(_state, "noted", None)
    if noted is not None:
        noted.append((again, differentiable, args, results))


class Known:
    """What is left to do of each kind of call of an op."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def get(self, key: tuple[Any, ...]) -> Callable[..., Any] | None:
        return self._calls.get(key)

    def learn(self, key: tuple[Any, ...], noted: Noted, args: Sequence[Any], results: Any) -> None:
        """Keep the one kernel that a call came down to, if it did.

        Args:
            key: the call's kind.
            noted: what it ran.
            args: its own arguments; those of the kernel must be among them, or no tensors.
            results: its own; they must be the kernel's, or arguments.
        """
        if len(noted) != 1:
            return
        again, differentiable, kernel_args, kernel_results = noted[0]
        places = {id(arg): i for i, arg in enumerate(args) if isinstance(arg, Tensor)}
        if len(places) < sum(isinstance(arg, Tensor) for arg in args):
            return  # one tensor twice: which is which, another call cannot tell
        names: dict[str, Any] = {}
        taken = []
        for i, arg in enumerate(kernel_args):
            if isinstance(arg, Tensor):
                if id(arg) not in places:
                    return  # made on the way: a cast, a copy
                taken.append(f"a{places[id(arg)]}")
            else:
                names[f"c{i}"] = arg
                taken.append(f"c{i}")
        given = _results(results, kernel_results, places)
        if given is None:
            return
        again(differentiable, kernel_args, names)
        call = "apply(memo, " if differentiable else "run("
        lines = [f"r = {call}{', '.join(taken)})", f"return {given}"]
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if torch.is_autocast_enabled(device):
            # The cast policy was applied; inside, autocast would undo float32 statistics.
            names |= {"switch": torch.set_autocast_enabled, "device": device}
            lines = [
                "switch(device, False)",
                *("try:", f"    {lines[0]}", "finally:", "    switch(device, True)"),
                lines[1],
            ]
        parameters = ", ".join(f"a{i}" for i in range(len(args)))
        body = "\n    ".join(lines)
        source = f"def call({parameters}):\n    {body}\n"
        exec(compile(source, "<fastdiff call>", "exec"), names)
        if len(self._calls) >= MOST:
            self._calls.clear()
        self._calls[key] = names["call"]


def _results(results: Any, of_kernel: Any, places: dict[int, int]) -> str | None:
    """The op's results in terms of the kernel's, `r`, and of the arguments."""
    if results is of_kernel:
        return "r"
    if not isinstance(results, tuple):
        return None
    of = of_kernel if isinstance(of_kernel, tuple) else (of_kernel,)
    texts = []
    for result in results:
        at = next((i for i, made in enumerate(of) if made is result), None)
        if at is not None:
            texts.append(f"r[{at}]" if isinstance(of_kernel, tuple) else "r")
        elif id(result) in places:
            texts.append(f"a{places[id(result)]}")
        else:
            return None
    return f"({', '.join(texts)},)"
