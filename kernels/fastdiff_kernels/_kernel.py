"""A kernel's forward and backward as one differentiable callable, registered with PyTorch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastdiff_kernels import _calls, _replay

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
            None for one that needs no gradient, which should cost nothing. Vectors and matrices
            are contiguous, whatever the strides of their argument; others have its strides. A
            result that was not used has the gradient None; the others come with any strides.
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

    # `rest` is (gradients of the returned results, saved, constants), as `backward` takes them.
    def empty_gradients(rest: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
        return [
            _gradient_like(rest[returned + at]) if need else None
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

    impl, backward_impl = Replayed(impl), Replayed(backward_impl)

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

    def differentiate(
        needs_of: Sequence[bool],
        grads: Sequence[Any],
        saved: Sequence[Any],
        constants: Sequence[Any],
        by: Callable[..., Any],
    ) -> tuple[Any, ...]:
        grads = grads[:returned]
        if all(grad is None for grad in grads):
            return (None,) * len(spec.types)
        needs = [needs_of[at] for at in tensor_at]
        for twin, other in twins.items():
            needs[twin], needs[other] = False, needs[twin] or needs[other]
        filled = by((*grads, *saved, *constants), needs)
        for twin, other in twins.items():
            filled[twin] = filled[other]
        return spread(filled)

    def spread(filled: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        every: list[Tensor | None] = [None] * len(spec.types)
        for at, tensor in zip(tensor_at, filled, strict=True):
            every[at] = tensor
        return tuple(every)

    picked = ", ".join(
        f"results[{r}]" if a is None else f"args[{a}]"
        for a, r in zip(saved_argument_at, saved_result_at, strict=True)
    )
    # Written out, because it runs in every forward.
    pick: Callable[..., tuple[Any, ...]] = eval(f"lambda args, results: ({picked},)")

    def remember(ctx: Any, args: Sequence[Any], results: Sequence[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*pick(args, results))
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
        lambda ctx, *grads: differentiate(
            ctx.needs_input_grad, grads, ctx.saved_tensors, ctx.constants, operator_backward
        ),
        setup_context=setup_context,
    )
    torch.library.register_autograd(backward_operator, refuse)

    class Function(torch.autograd.Function):
        """Takes a `_Memo` (None for a kind of call that is new), then the arguments."""

        @staticmethod
        def forward(ctx: Any, memo: _Memo | None, *args: Any) -> Any:
            if memo is None:
                results = run(*args)
                remember(ctx, args, results)
            else:
                results = memo.run(*args)
                ctx.set_materialize_grads(False)
                ctx.save_for_backward(*pick(args, results))
            ctx.memo = memo
            return results[0] if returned == 1 else results[:returned]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs, saved, memo = ctx.needs_input_grad, ctx.saved_tensors, ctx.memo
            if memo is not None and not torch.is_grad_enabled():
                return memo.run_backward(needs, grads, saved)
            # With create_graph, the operator: it records a node that refuses.
            by = operator_backward if torch.is_grad_enabled() else run_backward
            constants = ctx.constants if memo is None else memo.constants
            return None, *differentiate(needs[1:], grads, saved, constants, by)

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
        differentiable = needs and torch.is_grad_enabled()
        made = Function.apply(None, *args) if differentiable else visible(run(*args))
        _calls.note(again, differentiable, args, made)
        return made

    def visible(results: Any) -> Any:
        if isinstance(results, Tensor):
            return results
        return results[0] if returned == 1 else tuple(results[:returned])

    def plain(*args: Any) -> Any:
        return visible(run(*args))

    def again(differentiable: bool, args: Sequence[Any], names: dict[str, Any]) -> None:
        """What a call of a kind that was seen before comes down to: apply(memo, *args) to
        differentiate, else run(*args); `_calls.Known` writes it out with these names.
        """
        if differentiable:

            def gradients(needs: Sequence[bool], *tensors: Tensor | None) -> tuple[Any, ...]:
                dys, saved = tensors[:returned], tensors[returned:]
                return None, *differentiate(needs[1:], dys, saved, constants, run_backward)

            constants = [args[at] for at in constant_at]
            names["memo"] = _Memo(run, gradients, constants)
            # Past torch.autograd.Function.apply, whose checks for torch.func were made already.
            names["apply"] = super(torch.autograd.Function, Function).apply
            return

        names["run"] = _replay.Replay(plain)  # unseen results become parts of the workspace

    return call


class Replayed:
    """A function of tensors and constants of any kind; a kind that comes again is replayed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._replays: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, *args: Any) -> Any:
        key = _calls.kind("", [tuple(a) if type(a) is list else a for a in args])
        if key is None:
            return self._function(*args)
        replay = self._replays.get(key)
        if replay is not None:
            return replay(*args)
        if key in self._replays:
            self._replays[key] = replay = _replay.Replay(self._function)
            return replay(*args)
        if len(self._replays) >= _calls.MOST:
            self._replays.clear()
        self._replays[key] = None
        return self._function(*args)


class _Memo:
    """Replays of one kind of call that is differentiated.

    Args:
        run: the forward.
        gradients: the backward; takes (needs_input_grad, *gradients of results, *saved).
        constants: the arguments that are no tensors.
    """

    def __init__(
        self, run: Callable[..., Any], gradients: Callable[..., Any], constants: Sequence[Any]
    ) -> None:
        self.run = _replay.Replay(run)
        self.constants = constants
        self._gradients = gradients
        self._backward: dict[Any, _replay.Replay] = {}

    def run_backward(
        self,
        needs: tuple[bool, ...],
        grads: tuple[Tensor | None, ...],
        saved: tuple[Tensor | None, ...],
    ) -> Any:
        """What `gradients` returns."""
        # Shapes and dtypes follow from the forward's. Saved tensors have its strides, too, unless
        # somebody kept them elsewhere meanwhile.
        layout = [None if t is None else t.is_contiguous() or t.stride() for t in (*grads, *saved)]
        key = (needs, *layout)
        replay = self._backward.get(key)
        if replay is None:
            gradients = functools.partial(self._gradients, needs)
            self._backward[key] = replay = _replay.Replay(gradients)
        return replay(*grads, *saved)


def _gradient_like(tensor: Tensor) -> Tensor:
    """To be filled with its gradient: a map in the tensor's format, vectors in whole rows."""
    if tensor.dim() > 2:
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _define(schema: str, name: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Exact strides: the kernels' layout follows their inputs', and the fake saw the traced ones.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastdiff, name).default
