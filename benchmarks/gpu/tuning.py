"""What the workers of `make bench-gpu-tune` run: candidates compiled, timed, and checked.

An item is a kernel and a key of its table, "group_norm_silu_apply [192,2]"; it is tuned on the
largest of the calls that ask for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff_kernels import _launch, _register

from .. import bench_ops, harness
from ..harness import Refused, Row, Timing

# The furthest from their goals first.
ORDER = ("dwconv_gelu", "group_norm_silu", "window_attention", "layer_norm_modulate")
MODULES = ("window_attention", "dwconv_ffn", "group_norm_silu", "layer_norm_modulate")
GAIN = 0.98  # of the default's time, at most
SECONDS = 0.5
CHECKED = 3  # candidates that are checked before a key keeps its default

Form = tuple[Any, ...]


@dataclass(frozen=True)
class Asked:
    """A kernel and key, the call that asks for it, and whether its forward does."""

    kernel: str
    key: str
    op: str
    form: Form
    forward: bool

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.key}]"


def candidates() -> dict[str, list[_launch.Config]]:
    """Every kernel's candidates, by its name in the table."""
    found: dict[str, list[_launch.Config]] = {}
    for name in MODULES:
        found |= importlib.import_module(f"fastdiff_kernels.{name}.triton_kernels").TUNABLE
    return found


def calls(presets: Sequence[str], dtype: torch.dtype) -> list[tuple[str, Form]]:
    """The different calls of the ops in a training step, with meta tensors."""
    from ..aot_report import PRESETS, training_step

    seen = set()
    found: list[tuple[str, Form]] = []

    def note(op: str, form: Form) -> Any:
        result = _register._OPS[op]._reference(*form)
        if op == "dwconv_ffn":  # without the products, that would hide the kernel's gain
            x, fc1_weight, _, weight, bias, *_, grid, prefix = form
            z = x.new_empty(*x.shape[:2], fc1_weight.shape[0])
            op, form = "dwconv_gelu", (z, weight, bias, grid, prefix)
        key = (op, *(described(a) if isinstance(a, Tensor) else a for a in form))
        if key not in seen:
            seen.add(key)
            found.append((op, form))
        return result

    for name in presets:
        with _register.stand_in(note):
            training_step(name, dtype, PRESETS[name])
    return found


def tiny_calls() -> list[tuple[str, Form]]:
    """The benchmarks' smallest, for the interpreter."""
    found = []
    for case in bench_ops.TINY:
        if case.op in ORDER:
            problem = bench_ops.Problem(case, torch.device("cpu"))
            found.append((case.op, problem.form(problem.inputs)))
    return found


def described(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def real(form: Form, device: torch.device) -> Form:
    """The same call with data."""
    generator = torch.Generator(device).manual_seed(0)

    def filled(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        ).normal_(generator=generator)
        return made.requires_grad_()

    return tuple(filled(a) if isinstance(a, Tensor) else a for a in form)


def call_of(op: str, form: Form) -> tuple[Callable[..., Any], list[Tensor]]:
    """An op's call as a function of its tensors, and the tensors."""
    places = [i for i, a in enumerate(form) if isinstance(a, Tensor)]

    def call(*tensors: Tensor | None) -> Any:
        full = list(form)
        for place, tensor in zip(places, tensors, strict=True):
            full[place] = tensor
        results = _register._OPS[op]._choose(tuple(full))(*full)
        # Without a residual the second result of the layer norm is its input.
        pair = isinstance(results, tuple)
        return results[0] if pair and any(results[1] is t for t in tensors) else results

    return call, [form[i] for i in places]


def jobs(op: str, form: Form) -> dict[str, Callable[[], Any]]:
    """ "forward", and "both" directions, of a call."""
    call, tensors = call_of(op, form)
    with torch.no_grad():
        results = harness.as_tuple(call(*tensors))
    dys = [torch.randn_like(r) for r in results]

    def forward() -> Any:
        with torch.no_grad():
            return call(*tensors)

    return {
        "forward": forward,
        "both": lambda: harness.differentiate(call, tensors, dys),
    }


def asked(found: Sequence[tuple[str, Form]], chip: _launch.Chip) -> list[Asked]:
    """What the calls ask the table for, each kernel and key once, in the order of `ORDER`.

    Args:
        found: calls with meta tensors.
        chip: that the launches are planned for.
    """
    best: dict[tuple[str, str], tuple[int, Asked]] = {}
    tunable = candidates()
    for op, form in found:
        meta = tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta").requires_grad_()
            if isinstance(a, Tensor)
            else a
            for a in form
        )
        with _launch.pretend(chip), _launch.recording(), ops.backend("triton"):
            made = jobs(op, meta)
            with _launch.consulting() as forward:
                made["forward"]()
            with _launch.consulting() as both:
                made["both"]()
        size = form[0].numel()
        for kernel, key in {**forward, **both}:
            if kernel not in tunable or best.get((kernel, key), (-1,))[0] >= size:
                continue
            one = Asked(kernel, key, op, form, (kernel, key) in forward)
            best[kernel, key] = (size, one)
    ranked = sorted(best.values(), key=lambda pair: (ORDER.index(pair[1].op), -pair[0]))
    return [one for _, one in ranked]


@functools.lru_cache(maxsize=1)
def work(presets: tuple[str, ...], device: torch.device, dry: bool) -> dict[str, Asked]:
    """All items by name."""
    found = tiny_calls() if dry else calls(presets, torch.bfloat16)
    return {one.name: one for one in asked(found, _launch.chip(device))}


def items(device: torch.device, given: Mapping[str, Any], dry: bool) -> list[str]:
    return list(work(tuple(given["presets"]), device, dry))


def options_of(one: Asked, dry: bool) -> list[_launch.Config]:
    return candidates()[one.kernel][: 2 if dry else None]


def ready(
    name: str, device: torch.device, given: Mapping[str, Any], dry: bool
) -> tuple[Asked, Form, Callable[[], Any]]:
    """An item, its call with data, and what is timed of it."""
    one = work(tuple(given["presets"]), device, dry)[name]
    form = real(one.form, device)
    return one, form, jobs(one.op, form)["forward" if one.forward else "both"]


def compile_all(name: str, device: torch.device, given: Mapping[str, Any], dry: bool) -> Row:
    """Run every candidate once: triton keeps what it compiled."""
    with ops.backend("triton"):
        one, _, job = ready(name, device, given, dry)
        options = options_of(one, dry)
        for config in options:
            overridden(one, config, job)()
    harness.synchronize(device)
    return {"notes": [], "compiled": len(options)}


def overridden(one: Asked, config: _launch.Config, job: Callable[[], Any]) -> Callable[[], Any]:
    """The job with another configuration of the kernel."""

    def run() -> Any:
        with _launch.override(one.kernel, one.key, config):
            return job()

    return run


def tune(name: str, device: torch.device, given: Mapping[str, Any], dry: bool) -> Row:
    """Time every candidate, and check the fastest that gains; what was chosen, and its gain."""
    with ops.backend("triton"):
        one, form, job = ready(name, device, given, dry)
        options = options_of(one, dry)
        seen(one, options[0], job)
        timed = harness.measure(
            {-1: job, **{i: overridden(one, c, job) for i, c in enumerate(options)}},
            device,
            rounds=3 if dry else 7,
            seconds=0.05 if dry else SECONDS,
        )
        fine = {i: t.seconds for i, t in timed.items() if isinstance(t, Timing)}
        if -1 not in fine:
            raise RuntimeError(f"the default does not run: {timed[-1]}")
        found: Row = {
            "kernel": one.kernel,
            "key": one.key,
            "op": one.op,
            "shape": list(form[0].shape),
            "direction": "forward" if one.forward else "forward+backward",
            "default_us": 1e6 * fine[-1],
            "times_us": {str(options[i]): 1e6 * s for i, s in fine.items() if i >= 0},
            "family": _launch.chip(device).family,
            "config": None,
            "gain": 1.0,
            "wrong": [],
        }
        ranked = sorted((i for i in fine if i >= 0), key=fine.__getitem__)
        for i in [i for i in ranked if fine[i] < GAIN * fine[-1]][:CHECKED]:
            try:
                found["margin"] = checked(one, options[i], form)
            except Refused as error:
                found["wrong"].append(f"{options[i]}: {error}")
                continue
            found |= {"config": options[i], "gain": fine[-1] / fine[i], "us": 1e6 * fine[i]}
            break
    return {"tuned": found}


def seen(one: Asked, config: _launch.Config, job: Callable[[], Any]) -> None:
    """Make sure that an override reaches the launcher, or every candidate is the default.

    Raises:
        RuntimeError: it does not.
    """
    with _launch.consulting() as found:
        overridden(one, config, job)()
    got = found.get((one.kernel, one.key), {})
    if any(got.get(name) != value for name, value in config.items()):
        raise RuntimeError(f"{one.name}: the launcher does not take the candidate {config}")


def checked(one: Asked, config: _launch.Config, form: Form) -> float:
    """Hold the call with a configuration to the numerics rule, values and gradients."""
    call, tensors = call_of(one.op, form)
    dys = [torch.randn_like(r) for r in harness.as_tuple(call(*tensors))]
    truth = harness.exact(call, tensors, dys)
    with _launch.override(one.kernel, one.key, config):
        return harness.check(call, tensors, dys, truth)
