"""Calls traced once and replayed: what a launcher's Python decides, it decides for a kind of call.

A launcher chooses block sizes, allocates workspaces and launches kernels, and all of it follows
from the shapes, strides and dtypes of its arguments. `trace` runs it once and notes allocations,
PyTorch operators and launches; of the note it makes a function of Python source in which
everything but the tensors is a constant. Workspaces that only kernels use become parts of one
allocation, and views of tensors that only kernels use become addresses.

A launcher must therefore look at metadata only, never at data.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

# What a replay returns when it did nothing: its arguments are not aligned as those traced were, or
# somebody listens to launches. The caller then takes the long way.
MISS = object()

_ALIGNMENT = 16  # of pointers, which Triton compiles into a kernel
_APART = 256  # bytes, of workspaces within their one allocation

_ALLOCATIONS = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
}

# What PyTorch hands the caller of an operator under a dispatch mode is such an alias of its result.
_SAME = {"aten::detach", "aten::alias", "aten::lift_fresh"}

_current = threading.local()


class _Opaque(Exception):
    """Something that a replay could not do again."""


@dataclass
class _Value:
    """A tensor of the trace.

    Attributes:
        tensor: itself, kept so that its identity stays its own.
        root: the value whose memory it lies in; itself unless it is a view.
        argument: its place among the arguments of the call, None for what was made.
        maker: the step that made it, None for an argument.
        needed: a tensor is needed, as a result or for an operator, and not only an address.
    """

    tensor: Tensor
    root: _Value | None = None
    argument: int | None = None
    maker: _Step | None = None
    needed: bool = False

    @property
    def base(self) -> _Value:
        return self if self.root is None else self.root


@dataclass
class _Step:
    """An allocation (no function), an operator or a launch."""

    function: Any
    inputs: list[Any] = field(default_factory=list)  # flat, tensors as _Value
    spec: Any = None
    outputs: list[_Value] = field(default_factory=list)
    launch: bool = False
    several: bool = False  # the operator returns a sequence, of one tensor or more

    @property
    def fresh(self) -> list[_Value]:
        """What it made, and not an argument that it wrote to."""
        return [value for value in self.outputs if value.maker is self]

    @property
    def left_out(self) -> bool:
        """A view of which only the address is wanted."""
        fresh = self.fresh
        view = bool(fresh) and all(value.root is not None for value in fresh)
        return view and not any(value.needed for value in fresh)


class _Recorder(TorchDispatchMode):
    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        self.values: dict[int, _Value] = {}
        self.kept: list[Any] = []  # so that no other tensor gets the identity of one seen
        self.steps: list[_Step] = []
        self.opaque = ""
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor):
                if id(arg) in self.values:
                    self.opaque = "a tensor is given twice"
                self.values[id(arg)] = _Value(arg, argument=place)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            self._note(func, args, kwargs, out)
        except _Opaque as why:
            self.opaque = str(why)
        return out

    def _known(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) not in self.values:
            raise _Opaque("a tensor that is no argument")
        return self.values[id(item)]

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name + (f".{func._schema.overload_name}").rstrip(".")
        flat, spec = tree_flatten((args, kwargs))
        self.kept.append((flat, out))
        if name in _SAME and self._known(args[0]).argument is None:
            self.values[id(out)] = self._known(args[0])
            return
        step = _Step(func)
        if name in _ALLOCATIONS:
            step.function = None
        else:
            step.inputs, step.spec = [self._known(item) for item in flat], spec
        step.several = isinstance(out, (tuple, list))
        for made in out if step.several else (out,):
            if isinstance(made, Tensor) and id(made) in self.values:
                step.outputs.append(self.values[id(made)])  # out= and in-place operators
                continue
            if not isinstance(made, Tensor):
                raise _Opaque(f"{name} returns {type(made).__name__}")
            root = self._root(made, step.inputs)
            self.values[id(made)] = value = _Value(made, root, maker=step)
            step.outputs.append(value)
        self.steps.append(step)

    @staticmethod
    def _root(made: Tensor, inputs: Sequence[Any]) -> _Value | None:
        storage = made.untyped_storage()._cdata
        for value in inputs:
            if isinstance(value, _Value) and value.tensor.untyped_storage()._cdata == storage:
                return value.base
        return None

    def launched(self, bound: Any, arguments: Iterable[Any]) -> None:
        """Note a launch: its function, and the kernel's arguments in their order."""
        try:
            inputs = [self._known(item) for item in arguments]
        except _Opaque as why:
            self.opaque = str(why)
            return
        self.steps.append(_Step(bound, inputs, launch=True))


def recorder() -> Any:
    """The trace that is being made in this thread, or None."""
    return getattr(_current, "recorder", None)


def trace(
    function: Callable[..., Any], args: Sequence[Any]
) -> tuple[Any, Callable[..., Any] | None]:
    """Call a function, and make its replay.

    Args:
        function: takes `args`; returns tensors, arguments and None in tuples and lists.
        args: tensors and constants.

    Returns:
        What the function returned; and a function that takes other tensors of the same kind and
        does the same or returns `MISS`, None where the call launches nothing of Triton's or cannot
        be replayed.
    """
    before = recorder()
    _current.recorder = made = _Recorder(args)
    try:
        with made:
            results = function(*args)
    finally:
        _current.recorder = before
    if made.opaque or before is not None or not any(step.launch for step in made.steps):
        return results, None
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    try:
        return results, _Source(made, args, results, device).compiled()
    except _Opaque:
        return results, None


class Replay:
    """A function of tensors and constants of one kind, traced in its first call and then replayed.

    Args:
        function: as `trace` takes it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._replay: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._replay is None:
            results, replay = trace(self._function, args)
            self._replay = replay or self._function
            return results
        results = self._replay(*args)
        return self._function(*args) if results is MISS else results


class _Source:
    """The source of a replay."""

    def __init__(self, made: _Recorder, args: Sequence[Any], results: Any, on: torch.device):
        self.made, self.on = made, on
        self.names: dict[str, Any] = {
            "empty_strided": torch.empty_strided,
            "empty": torch.empty,
            "MISS": MISS,
        }
        self.count = itertools.count()
        self.lines: list[str] = []
        self.addresses: dict[int, str] = {}  # of roots, by the id of their tensor
        self.tensors: dict[int, str] = {}
        self.parameters = [f"a{i}" for i in range(len(args))]
        self.results = results

    def constant(self, value: Any) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        name = f"k{next(self.count)}"
        self.names[name] = value
        return name

    def compiled(self) -> Callable[..., Any]:
        flat, spec = tree_flatten(self.results)
        returned = [self._returned(item) for item in flat]
        self._checks()
        self._workspace()
        self._stream()
        for step in self.made.steps:
            self._step(step)
        texts = [
            self.tensor(item) if isinstance(item, _Value) else self.constant(item)
            for item in returned
        ]
        self.lines.append(f"return {self._shaped(texts, spec)}")
        body = "\n    ".join(self.lines)
        source = f"def replay({', '.join(self.parameters)}):\n    {body}\n"
        exec(compile(source, "<fastdiff replay>", "exec"), self.names)
        replay: Callable[..., Any] = self.names["replay"]
        return replay

    def _stream(self) -> None:
        from fastdiff_kernels import _bound

        self.names["entered"], self.names["left"] = _bound.hooks()
        first = ["if entered or left: return MISS"]
        stream = "0"
        if self.on.type == "cuda":
            # Launches go to the current device; the long way changes it where needed.
            self.names["current_device"] = torch.cuda.current_device
            first.append(f"if current_device() != {self.on.index}: return MISS")
            self.names["current_stream"] = _bound.current_stream()
            stream = f"current_stream({self.on.index})"
        self.lines = [*first, *self.lines, f"stream = {stream}"]

    def _returned(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        value: _Value | None = self.made.values.get(id(item))
        if value is None:
            raise _Opaque("a result that nothing made")
        value.needed = True
        return value

    def _shaped(self, texts: list[str], spec: Any) -> str:
        """The results in the tuples and lists that the function returned them in."""
        holder = tree_unflatten(texts, spec)

        def text(item: Any) -> str:
            if isinstance(item, str):
                return item
            inner = ", ".join(map(text, item))
            if isinstance(item, list):
                return f"[{inner}]"
            return f"({inner},)" if len(item) == 1 else f"({inner})"

        return text(holder)

    def _checks(self) -> None:
        """Addresses of the arguments that kernels read or write; all aligned, or a miss."""
        used = {
            id(value.base.tensor): value.base
            for step in self.made.steps
            if step.launch
            for value in step.inputs
            if isinstance(value, _Value) and value.base.argument is not None
        }
        for key, value in used.items():
            if value.tensor.data_ptr() % _ALIGNMENT:
                raise _Opaque("an address that is not aligned")
            name = self.addresses[key] = f"p{value.argument}"
            self.lines.append(f"{name} = a{value.argument}.data_ptr()")
        if used:
            together = " | ".join(self.addresses[key] for key in used)
            self.lines.append(f"if ({together}) & {_ALIGNMENT - 1}: return MISS")

    def _workspace(self) -> None:
        """One allocation for all that only kernels use."""
        for step in reversed(self.made.steps):
            if not step.launch and step.function is not None and not step.left_out:
                for value in step.inputs:
                    if isinstance(value, _Value):
                        value.needed = True
        offset, device = 0, None
        places: list[tuple[_Value, int]] = []
        for step in self.made.steps:
            if step.function is None and not step.outputs[0].needed:
                value = step.outputs[0]
                tensor = value.tensor
                if device not in (None, tensor.device):
                    raise _Opaque("workspaces on two devices")
                device = tensor.device
                places.append((value, offset))
                size = tensor.untyped_storage().nbytes()
                offset += -(-size // _APART) * _APART
        if not places:
            return
        where = self.constant(device)
        self.names["uint8"] = torch.uint8
        self.lines.append(f"w = empty({max(offset, 1)}, dtype=uint8, device={where})")
        self.lines.append("pw = w.data_ptr()")
        for value, at in places:
            self.addresses[id(value.tensor)] = f"pw + {at}" if at else "pw"

    def address(self, value: _Value) -> str:
        base = value.base
        if id(base.tensor) not in self.addresses:
            name = f"p_{next(self.count)}"
            self.lines.append(f"{name} = {self.tensor(base)}.data_ptr()")
            self.addresses[id(base.tensor)] = name
        delta = value.tensor.data_ptr() - base.tensor.data_ptr() if value.tensor.numel() else 0
        text = self.addresses[id(base.tensor)]
        return f"{text} + {delta}" if delta else text

    def tensor(self, value: _Value) -> str:
        if value.argument is not None:
            return f"a{value.argument}"
        return self.tensors[id(value.tensor)]

    def _step(self, step: _Step) -> None:
        if step.launch:
            args = [
                self.address(item) if isinstance(item, _Value) else self.constant(item)
                for item in step.inputs
            ]
            name = self.constant(step.function)
            self.lines.append(f"{name}(stream, ({', '.join(args)},))")
            return
        if step.function is None:
            value = step.outputs[0]
            if value.needed:
                self._bind(value, self._allocation(value.tensor))
            return
        if step.left_out:
            return
        fresh = step.fresh
        texts = [
            self.tensor(item) if isinstance(item, _Value) else self.constant(item)
            for item in step.inputs
        ]
        positional, named = tree_unflatten(texts, step.spec)
        inner = [self._nested(item) for item in positional]
        inner += [f"{key}={self._nested(item)}" for key, item in named.items()]
        call = f"{self.constant(step.function._op)}({', '.join(inner)})"
        if step.several and len(fresh) == len(step.outputs):
            names = [f"t{next(self.count)}" for _ in fresh]
            self.tensors |= {id(v.tensor): name for v, name in zip(fresh, names, strict=True)}
            self.lines.append(f"{', '.join(names)}, = {call}")
        elif len(step.outputs) == 1 and fresh:
            self._bind(fresh[0], call)
        elif fresh:
            raise _Opaque("an operator that returns what it was given beside new tensors")
        else:
            self.lines.append(call)

    def _allocation(self, made: Tensor) -> str:
        size, stride = map(self.constant, (tuple(made.shape), made.stride()))
        for value in self.made.values.values():
            like = value.tensor
            if value.argument is not None and (like.dtype, like.device) == (
                made.dtype,
                made.device,
            ):
                return f"a{value.argument}.new_empty_strided({size}, {stride})"
        kind, where = map(self.constant, (made.dtype, made.device))
        return f"empty_strided({size}, {stride}, dtype={kind}, device={where})"

    def _nested(self, item: Any) -> str:
        if isinstance(item, str):
            return item
        inner = ", ".join(map(self._nested, item))
        return f"[{inner}]"

    def _bind(self, value: _Value, text: str) -> None:
        name = f"t{next(self.count)}"
        self.tensors[id(value.tensor)] = name
        self.lines.append(f"{name} = {text}")
