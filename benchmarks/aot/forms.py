"""A specialisation of a kernel as text, whichever Triton will compile it.

Triton compiles a kernel anew for each combination of dtypes, constants, launch options, and of what
it reads off the arguments' values: integers that are 1 or multiples of 16, pointers that are
multiples of 16, tensors of less than 2 GiB (AMD only). A `Form` keeps exactly these. So launches of
one form share machine code, and a compiler in another process, without the tensors, binds the form
as a real launch would be bound.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TWO_GIB = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """One specialisation.

    Attributes:
        text: canonical JSON of the kernel's module and name, of each argument, of the launch's
            options. It is the form's identity.
    """

    text: str

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def module(self) -> str:
        return str(self.data["kernel"]).partition(":")[0]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.data["kernel"]).partition(":")[2]

    @property
    def op(self) -> str:
        """The folder that the kernel lies in."""
        return self.module.split(".")[-2] if "." in self.module else self.module

    @property
    def num_warps(self) -> int:
        return int(self.data["num_warps"])

    @property
    def case(self) -> str:
        """Its constants, in short; with them a reader finds the row in the tuning table."""
        constants = {n: a[1] for n, a in self.data["arguments"].items() if a[0] == "constant"}
        absent = {n for n, a in self.data["arguments"].items() if a[0] == "none"}
        return " ".join(
            f"{k}={int(v) if isinstance(v, bool) else v}"
            for k, v in constants.items()
            if k not in absent
        )

    @property
    def types(self) -> str:
        """The pointers' dtypes, in short, and the arguments that are None."""
        short = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int64": "i64"}
        arguments = self.data["arguments"]
        pointers = [(n, a) for n, a in arguments.items() if a[0] == "pointer"]
        parts = [f"{n}:{short.get(a[1], a[1])}{'' if a[2] else '!'}" for n, a in pointers]
        absent = [f"-{n}" for n, a in arguments.items() if a[0] == "none"]
        return " ".join(parts + absent)

    def kernel(self) -> Any:
        """The `triton.jit` function, imported."""
        return getattr(importlib.import_module(self.module), self.name)

    def near(self) -> Form:
        """With all tensors of less than 2 GiB: what a compiler for NVIDIA sees."""
        data = json.loads(self.text)
        for argument in data["arguments"].values():
            if argument[0] == "pointer":
                argument[3] = True
        return Form(_text(data))


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, separators=(",", ":"))


def form_of(
    kernel: Any,
    arguments: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    options: Mapping[str, Any] | None = None,
) -> Form:
    """The form of a launch.

    Args:
        kernel: a `triton.jit` function.
        arguments: its own, by name. Those that are none of its own are options.
        num_warps, num_stages: as in the launch.
        options: further options of the launch.

    Raises:
        TypeError: an argument of a kind that Triton is not known to specialise on here.
    """
    known = {p.name: p for p in kernel.params}
    described = {name: _described(p, arguments[name]) for name, p in known.items()}
    extra = {name: value for name, value in arguments.items() if name not in known}
    return Form(
        _text(
            {
                "kernel": f"{kernel.fn.__module__}:{kernel.fn.__name__}",
                "arguments": described,
                "num_warps": num_warps,
                "num_stages": num_stages,
                "options": dict(sorted((extra | dict(options or {})).items())),
            }
        )
    )


def _described(parameter: Any, value: Any) -> list[Any]:
    if value is None:
        return ["none"]
    if parameter.is_constexpr:
        if not isinstance(value, (bool, int, float, str)):
            raise TypeError(f"form_of: constant {parameter.name} is {type(value).__name__}")
        return ["constant", value]
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return ["pointer", dtype, _aligned(value), value.untyped_storage().nbytes() <= TWO_GIB]
    if isinstance(value, bool):
        return ["bool"]
    if isinstance(value, int):
        return ["int", _integer(value, not parameter.do_not_specialize)]
    if isinstance(value, float):
        return ["float"]
    raise TypeError(f"form_of: {parameter.name} is {type(value).__name__}")


def _aligned(tensor: Tensor) -> bool:
    """True for an address that 16 divides; of a meta tensor, whose storage begins at such."""
    if tensor.device.type == "meta":
        return tensor.storage_offset() * tensor.element_size() % 16 == 0
    return tensor.data_ptr() % 16 == 0


def _integer(value: int, specialised: bool) -> int:
    """The representative of all integers that Triton does not tell from this one."""
    base = 0 if -(2**31) <= value < 2**31 else 2**40
    if base == 0 and specialised and value == 1:
        return 1
    return base + (16 if specialised and value % 16 == 0 else 3)


class _Pointer:
    """Stands for a tensor where Triton reads dtype, address and size off it."""

    def __init__(self, dtype: str, aligned: bool, near: bool) -> None:
        self.dtype = getattr(torch, dtype)
        self._address, self._size = (0 if aligned else 2), (0 if near else TWO_GIB + 1)

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._size


def _value(described: list[Any]) -> Any:
    kind, *rest = described
    if kind == "pointer":
        return _Pointer(*rest)
    return {"none": None, "bool": True, "float": 0.5}[kind] if not rest else rest[0]


def target_of(name: str) -> GPUTarget:
    """The target of a family: "sm_90", "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def bind(form: Form, target: GPUTarget, kernel: Any = None) -> tuple[Any, Any, Any, Any]:
    """(options, signature, constants, attributes) as a launch on the chip would have them."""
    kernel = kernel or form.kernel()
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    data = form.data
    arguments = {name: _value(described) for name, described in data["arguments"].items()}
    options = {
        "num_warps": data["num_warps"],
        "num_stages": data["num_stages"],
        "enable_fp_fusion": True,
        **data["options"],
    }
    # What JITFunction.run adds to every launch, where this version knows it.
    options |= {"debug": False}
    if hasattr(triton.knobs.compilation, "instrumentation_mode"):
        options["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
    bound, specialization, rest = binder(**arguments, **options)
    packed = kernel._pack_args(backend, rest, bound, specialization, rest)
    return packed[0], packed[1], packed[2], packed[3]


def source_of(kernel: Any) -> str:
    """Source of a kernel and of all device functions that it calls, with the globals they read.

    Not their places in the files: moving a kernel does not change it.
    """
    parts: dict[str, str] = {}
    _gather(kernel, parts)
    return "\n".join(parts[name] for name in sorted(parts))


def source_hash(kernel: Any) -> str:
    return hashlib.sha256(source_of(kernel).encode()).hexdigest()


def _gather(function: Any, parts: dict[str, str]) -> None:
    plain = function.fn
    name = f"{plain.__module__}:{plain.__name__}"
    if name in parts:
        return
    parts[name] = inspect.getsource(plain)
    names = _names(plain.__code__)
    for known in sorted(names & set(plain.__globals__)):
        value = plain.__globals__[known]
        if isinstance(value, JITFunction):
            _gather(value, parts)
        elif isinstance(value, (int, float, str, tuple, tl.constexpr)):
            parts[f"{name}:{known}"] = repr(value)
        elif isinstance(value, FunctionType) and not value.__module__.startswith("triton"):
            parts[f"{name}:{known}"] = inspect.getsource(value)
        elif isinstance(value, ModuleType) and not value.__name__.startswith("triton"):
            for member in sorted(names & set(vars(value))):
                if isinstance(vars(value)[member], JITFunction):
                    _gather(vars(value)[member], parts)


def _names(code: CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found
