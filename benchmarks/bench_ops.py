"""Every fused op, forward and backward, against what a user would run instead.

    pytest benchmarks/ --benchmark-only                # small shapes on a CPU, the paper's on a GPU
    pytest benchmarks/ --benchmark-only --compile      # with torch.compile on a CPU, too (slow)
    pytest benchmarks/ --benchmark-only --max-autotune

A case has no number unless our values and gradients pass the numerics rule in the same process,
on the same inputs. *of floor* is the time in which a copy, measured in the same rounds, would move
the bytes that the op has to move. *backward* is forward and backward less forward. *eager* is the
fastest of the eager compositions in the dtype of the case. Goals are those of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops, roofline
from fastdiff_kernels import _register

from . import harness, rivals
from .harness import Call, Job, Refused, Row, Timing

BF16, F32 = torch.bfloat16, torch.float32
Make = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: its name in `fastdiff.ops`.
        shape: what tells the case from others of the op.
        dtype: of activations and parameters.
        inputs: makes the tensors by name, given a function of sizes that makes random ones.
        constants: the other arguments.
        goals: by direction and by what is compared ("floor", "eager", "compile", "flex").
        floored: there is a formula for its bytes; else only rivals to compare with.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[Make], dict[str, Tensor]]
    constants: dict[str, Any] = field(default_factory=dict)
    goals: dict[str, dict[str, float]] = field(default_factory=dict)
    floored: bool = True

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype)[6:]}"


def window(
    B: int, side: int, C: int, heads: int, w: int = 8, shift: int = 4, dtype: torch.dtype = BF16
) -> Case:
    goals: dict[str, dict[str, float]]
    goals = {"forward": {"eager": 4, "flex": 1.5}, "backward": {"eager": 3, "flex": 2}}
    if side >= 32 and w == 8:
        goals["forward"]["floor"], goals["backward"]["floor"] = 0.75, 0.6
    return Case(
        "window_attention",
        f"{B}x{side}x{side}x{C} w{w} s{shift}",
        dtype,
        lambda make: {
            "qkv": make(B, side, side, 3 * C),
            "bias_table": make((2 * w - 1) ** 2, heads),
        },
        {"heads": heads, "window_size": w, "shift": shift},
        goals if side >= 32 else {},
    )


def gelu(B: int, side: int, C: int, prefix: int = 1, dtype: torch.dtype = BF16) -> Case:
    return Case(
        "dwconv_gelu",
        f"{B}x({prefix}+{side}x{side})x{C}",
        dtype,
        lambda make: {
            "z": make(B, prefix + side**2, C),
            "weight": make(C, 1, 3, 3, std=0.3),
            "bias": make(C),
        },
        {"grid": (side, side), "prefix": prefix},
        {"forward": {"floor": 0.85, "eager": 2, "compile": 1.3}, "backward": {"floor": 0.65}},
    )


def ffn(B: int, side: int, D: int, prefix: int = 1, dtype: torch.dtype = BF16) -> Case:
    C = 4 * D
    return Case(
        "dwconv_ffn",
        f"{B}x({prefix}+{side}x{side})x{D}",
        dtype,
        lambda make: {
            "x": make(B, prefix + side**2, D),
            "fc1_weight": make(C, D, std=D**-0.5),
            "fc1_bias": make(C),
            "conv_weight": make(C, 1, 3, 3, std=0.3),
            "conv_bias": make(C),
            "fc2_weight": make(D, C, std=C**-0.5),
            "fc2_bias": make(D),
        },
        {"grid": (side, side), "prefix": prefix},
        {"forward": {"saved": 0.5}},
        floored=False,
    )


def group_norm(
    B: int,
    C: int,
    side: int,
    *,
    skip: int = 0,
    film: bool = False,
    nchw: bool = False,
    dtype: torch.dtype = BF16,
) -> Case:
    layout = torch.contiguous_format if nchw else torch.channels_last
    total = C + skip

    def inputs(make: Make) -> dict[str, Tensor]:
        made = {"x": make(B, C, side, side).contiguous(memory_format=layout)}
        made |= {"weight": make(total), "bias": make(total)}
        if film:
            made |= {"scale": make(B, total, std=0.3), "shift": make(B, total)}
        if skip:
            made["skip"] = make(B, skip, side, side).contiguous(memory_format=layout)
        return made

    width = f"({C}+{skip})" if skip else f"{C}"
    note = f"{' film' if film else ''} {'nchw' if nchw else 'nhwc'}"
    return Case(
        "group_norm_silu",
        f"{B}x{width}x{side}x{side}{note}",
        dtype,
        inputs,
        {"num_groups": 32 if total % 32 == 0 else 8},
        {"forward": {"floor": 0.88}, "backward": {"floor": 0.8}} if side >= 32 else {},
    )


def layer_norm(
    *shape: int,
    residual: bool = False,
    gate: bool = False,
    modulated: bool = False,
    dtype: torch.dtype = BF16,
) -> Case:
    B, C = shape[0], shape[-1]

    def inputs(make: Make) -> dict[str, Tensor]:
        made = {"x": make(*shape)}
        if modulated:
            made |= {"scale": make(B, C, std=0.3), "shift": make(B, C)}
        else:
            made |= {"weight": make(C), "bias": make(C)}
        if residual:
            made["residual"] = make(*shape)
        if gate:
            made["gate"] = make(B, C)
        return made

    parts = ["gate"] * gate + ["residual"] * residual + ["modulated"] * modulated
    return Case("layer_norm_modulate", " ".join(["x".join(map(str, shape)), *parts]), dtype, inputs)


# In the order of importance: when time is short, the last are left out.
GPU = [
    window(16, 64, 384, 6),
    gelu(128, 16, 2048),
    group_norm(16, 192, 128, film=True),
    layer_norm(128, 257, 512, residual=True),
    window(16, 32, 576, 9),
    ffn(128, 16, 512),
    group_norm(16, 192, 128, film=True, nchw=True),
    group_norm(16, 192, 128, skip=192),
    layer_norm(16, 64, 64, 384, residual=True, gate=True, modulated=True),
    gelu(64, 16, 4096),
    group_norm(16, 384, 64, film=True),
    gelu(16, 64, 1536, 0),
    layer_norm(16, 64, 64, 384, modulated=True),
    window(16, 64, 384, 6, shift=0),
    window(16, 64, 384, 6, w=7, shift=3),
    group_norm(16, 576, 32, film=True),
    window(16, 16, 768, 12),
    window(16, 8, 768, 12),
    layer_norm(64, 257, 1024, residual=True),
    group_norm(16, 384, 64, skip=384),
    group_norm(16, 768, 16, film=True),
    gelu(16, 32, 2304, 0),
    gelu(32, 16, 5632),
    group_norm(16, 576, 32, nchw=True),
    layer_norm(128, 257, 512, residual=True, dtype=F32),
    window(16, 64, 384, 6, dtype=F32),
    group_norm(16, 192, 128, dtype=F32),
    gelu(128, 16, 2048, dtype=F32),
]
CPU = [
    window(2, 32, 96, 3, dtype=F32),
    window(2, 32, 96, 3),
    window(2, 20, 96, 3, w=7, shift=3, dtype=F32),
    gelu(4, 16, 256, dtype=F32),
    gelu(4, 16, 256),
    ffn(4, 16, 64, dtype=F32),
    group_norm(2, 96, 64, film=True, dtype=F32),
    group_norm(2, 96, 64, film=True, nchw=True, dtype=F32),
    group_norm(2, 96, 64, film=True),
    group_norm(2, 64, 32, skip=64, dtype=F32),
    layer_norm(8, 257, 128, residual=True, dtype=F32),
    layer_norm(2, 32, 32, 96, residual=True, gate=True, modulated=True, dtype=F32),
    layer_norm(2, 32, 32, 96, modulated=True),
]
CPU = [replace(case, goals={}) for case in CPU]  # too small for any


# On two threads; "silu" is `aten::silu.out` alone, of tensors that fit a cache.
CPU_GOALS: dict[str, dict[str, dict[str, float]]] = {
    "window_attention float32": {"forward": {"eager": 3}, "forward+backward": {"eager": 2}},
    "window_attention bfloat16": {"forward": {"eager": 1.3}},
    "dwconv_gelu": {"forward": {"eager": 2}, "forward+backward": {"eager": 1.5}},
    "group_norm_silu, 16 MB and more": {
        "forward": {"eager": 3, "compile": 2},
        "forward+backward": {"eager": 2},
    },
    "group_norm_silu": {"forward": {"silu": 1 / 1.6}, "forward+backward": {"eager": 1.5}},
    "layer_norm_modulate": {"forward": {"eager": 2}, "forward+backward": {"eager": 1.5}},
}


def cpu_full() -> list[Case]:
    """The shapes of the paper's presets that a CPU can take, for `--full`, with their goals."""
    found = []

    def add(case: Case, note: str = "") -> None:
        goals = CPU_GOALS.get(case.op + note) or CPU_GOALS[f"{case.op} {str(case.dtype)[6:]}"]
        found.append(replace(case, goals=goals))

    for dtype in (F32, BF16):
        for case in (
            window(2, 64, 384, 6, dtype=dtype),
            window(4, 32, 576, 9, dtype=dtype),
            window(8, 16, 768, 12, dtype=dtype),
            gelu(16, 16, 2048, dtype=dtype),
            gelu(8, 16, 4096, dtype=dtype),
            gelu(2, 64, 1536, 0, dtype=dtype),
            gelu(16, 8, 3072, 0, dtype=dtype),
        ):
            add(case)
        for nchw in (True, False):
            for B, C, side in ((2, 192, 128), (4, 384, 64), (2, 512, 32), (2, 768, 16)):
                large = B * C * side**2 * dtype.itemsize >= 16e6
                case = group_norm(B, C, side, film=side >= 64, nchw=nchw, dtype=dtype)
                add(case, ", 16 MB and more" if large else "")
        for case in (
            layer_norm(16, 257, 512, residual=True, dtype=dtype),
            layer_norm(8, 257, 1024, residual=True, dtype=dtype),
            layer_norm(2, 64, 64, 384, residual=True, gate=True, modulated=True, dtype=dtype),
            layer_norm(8, 16, 16, 768, residual=True, gate=True, modulated=True, dtype=dtype),
        ):
            add(case)
    return found


# For the tests of this file, and for the interpreter.
TINY = [
    window(1, 8, 16, 1, w=4, shift=2, dtype=F32),
    gelu(1, 4, 8, dtype=F32),
    ffn(1, 4, 4, dtype=F32),
    group_norm(1, 16, 4, film=True, skip=16, dtype=F32),
    layer_norm(2, 5, 8, residual=True, gate=True, dtype=F32),
]


def cases(device: torch.device, full: bool = False) -> list[Case]:
    """What is measured on a device; on a CPU `full` means the paper's shapes, for many minutes."""
    if device.type == "cuda":
        return GPU
    return cpu_full() if full else CPU


@dataclass(frozen=True)
class Options:
    """How a case is run.

    Attributes:
        compile: time torch.compile and FlexAttention, which take seconds to compile.
        max_autotune: also torch.compile(mode="max-autotune-no-cudagraphs").
        rounds, seconds: as `harness.measure` takes them.
    """

    compile: bool = True
    max_autotune: bool = False
    rounds: int = 11
    seconds: float = 2.0


@dataclass
class Rival:
    """Another way to compute a case: a call of the same inputs, or of inputs of its own."""

    call: Call
    inputs: list[Tensor]
    eager: bool = False
    compiled: bool = False


class Problem:
    """A case with its tensors, ready to run."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        # A generator of its own: a capture that failed leaves the default one unusable.
        generator = torch.Generator(device).manual_seed(0)

        def make(*shape: int, std: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return (std * drawn).to(case.dtype)

        made = {name: t.requires_grad_() for name, t in case.inputs(make).items()}
        self.names, self.inputs = list(made), list(made.values())
        with torch.no_grad():
            results = harness.as_tuple(self.ours(*self.inputs))
        self.dys = [
            torch.empty_like(r).normal_(generator=generator)  # in the layout of the result
            for r in results
        ]

    def arguments(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {**dict(zip(self.names, inputs, strict=True)), **self.case.constants}

    def _only(self, results: Any) -> Any:
        # Without a residual the second result is x itself.
        alone = self.case.op == "layer_norm_modulate" and "residual" not in self.names
        return results[0] if alone else results

    def ours(self, *inputs: Tensor) -> Any:
        return self._only(getattr(ops, self.case.op)(**self.arguments(inputs)))

    def by(self, function: Call, *inputs: Tensor) -> Any:
        """A rival's function of the call in normal form."""
        return self._only(function(*self.form(inputs)))

    def form(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        return _register._OPS[self.case.op]._arguments(**self.arguments(inputs))

    def backend(self) -> str:
        return ops.explain(self.case.op, **self.arguments(self.inputs)).backend or "none"

    def cost(self) -> roofline.OpCost | None:
        if not self.case.floored:
            return None
        return roofline.op_cost(self.case.op, self.form(self.inputs))

    def activation(self) -> int:
        """e: bytes of the result."""
        return self.dys[0].numel() * self.dys[0].element_size()

    def converted(self, layout: torch.memory_format) -> list[Tensor]:
        return [
            t.detach().contiguous(memory_format=layout).requires_grad_() if t.ndim == 4 else t
            for t in self.inputs
        ]

    def rivals(self, options: Options) -> dict[str, Rival]:
        op = self.case.op
        plain = partial(self.by, rivals.PLAIN[op])
        found = {"eager": Rival(plain, self.inputs, eager=True)}
        if op == "window_attention":
            window, shift = self.form(self.inputs)[3:5]
            rivals._made(self.inputs[0], window, shift)  # outside of every trace and capture
            definition = _register._OPS[op]._reference
            found = {
                "eager": Rival(partial(self.by, definition), self.inputs, eager=True),
                "eager SDPA": Rival(plain, self.inputs, eager=True),
            }
        if op in ("dwconv_gelu", "dwconv_ffn"):
            nchw = Rival(partial(self.by, rivals.PLAIN_NCHW[op]), self.inputs, eager=True)
            found = {"eager": nchw, "eager channels_last": replace(found["eager"])}
        if op == "group_norm_silu":
            found = {
                "eager": Rival(plain, self.converted(torch.contiguous_format), eager=True),
                "eager channels_last": Rival(
                    plain, self.converted(torch.channels_last), eager=True
                ),
            }
        if options.compile:
            compiler = partial(torch.compile, dynamic=False, fullgraph=True)
            found["compile"] = Rival(compiler(plain), self.inputs, compiled=True)
            if options.max_autotune:
                most = compiler(plain, mode="max-autotune-no-cudagraphs")
                found["compile max-autotune"] = Rival(most, self.inputs, compiled=True)
            if op == "window_attention" and self.device.type == "cuda":
                flex = compiler(partial(self.by, rivals.window_flex))
                found["flex"] = Rival(flex, self.inputs, compiled=True)
        if op == "group_norm_silu" and self.device.type == "cuda":
            found["apex"] = Rival(
                partial(self.by, rivals.group_norm_apex), self.converted(torch.channels_last)
            )
        if op == "window_attention" and self.device.type == "cuda":
            found["xformers"] = Rival(partial(self.by, rivals.window_xformers), self.inputs)
        return found

    def own(self) -> dict[str, Rival]:
        """Ours, without rivals."""
        return {"ours": Rival(self.ours, self.inputs)}

    def candidates(self, contestants: dict[str, Rival]) -> dict[tuple[str, str], Job]:
        """What is timed: forward and both directions of each, and a copy of the result."""
        found: dict[tuple[str, str], Job] = {}
        for name, rival in contestants.items():
            found[name, "forward"] = self.forward(rival.call, rival.inputs)
            found[name, "both"] = self.both(rival.call, rival.inputs)
        source = self.dys[0]
        target = torch.empty_like(source)
        found["copy", "forward"] = lambda: target.copy_(source)
        if self.case.op == "group_norm_silu":
            found["silu", "forward"] = lambda: torch.ops.aten.silu.out(source, out=target)
        return found

    def absent(self, options: Options) -> dict[str, str]:
        """Rivals that are not tried, and why."""
        found = {}
        if not options.compile:
            found["compile"] = "n/a: asked for by --compile"
        if self.case.op == "window_attention":
            found["flash-attn"] = "n/a: takes no bias and no mask"
            if self.device.type != "cuda":
                found["flex"] = "n/a: its backward needs a GPU"
                found["xformers"] = harness.installed("xformers") or "n/a: needs a GPU"
        if self.case.op == "group_norm_silu" and self.device.type != "cuda":
            found["apex"] = harness.installed("apex") or "n/a: needs a GPU"
        return found

    def forward(self, call: Call, inputs: Sequence[Tensor]) -> Job:
        def job() -> Any:
            with torch.no_grad():
                return call(*inputs)

        return job

    def both(self, call: Call, inputs: Sequence[Tensor]) -> Job:
        return lambda: harness.differentiate(call, inputs, self.dys)


def warm(case: Case, device: torch.device, options: Options) -> None:
    """Compile everything that a case will run, and run it once: the compilers keep their work."""
    torch._dynamo.reset()
    problem = Problem(case, device)
    calls = {"ours": Rival(problem.ours, problem.inputs), **problem.rivals(options)}
    for rival in calls.values():
        for job in (
            problem.forward(rival.call, rival.inputs),
            problem.both(rival.call, rival.inputs),
        ):
            try:
                job()
            except Exception as error:
                harness.reason(error, device)
    harness.synchronize(device)


def check_case(case: Case, device: torch.device) -> float:
    """Hold a case to the numerics rule, values and every gradient; its error over what is allowed.

    Raises:
        Refused: our result is wrong.
    """
    problem = Problem(case, device)
    truth = harness.exact(problem.ours, problem.inputs, problem.dys)
    return harness.check(problem.ours, problem.inputs, problem.dys, truth)


def time_case(case: Case, device: torch.device, options: Options) -> list[Row]:
    """Rows of ours against a copy alone: no check, no rivals."""
    problem = Problem(case, device)
    contestants = problem.own()
    timings = harness.measure(
        problem.candidates(contestants), device, rounds=options.rounds, seconds=options.seconds
    )
    return table_rows(problem, contestants, {}, timings)


def run_case(case: Case, device: torch.device, options: Options) -> list[Row]:
    """Check a case, time it against its rivals, and make its rows.

    Raises:
        Refused: our result is wrong.
        harness.DeviceLost: the GPU's context broke.
    """
    torch._dynamo.reset()
    problem = Problem(case, device)
    truth = harness.exact(problem.ours, problem.inputs, problem.dys)
    margin = harness.check(problem.ours, problem.inputs, problem.dys, truth)

    contestants = problem.own()
    absent = problem.absent(options)
    for name, rival in problem.rivals(options).items():
        try:
            got = harness.values_and_gradients(rival.call, rival.inputs, problem.dys)
            harness.check_rival(got, truth)
            contestants[name] = rival
            del got
        except Exception as error:
            absent[name] = harness.reason(error, device)
    del truth

    candidates = problem.candidates(contestants)
    timings = harness.measure(candidates, device, rounds=options.rounds, seconds=options.seconds)

    memory = {
        name: harness.peak_memory(problem.both(rival.call, rival.inputs), device)
        for name, rival in contestants.items()
    }
    saved = {
        name: harness.saved_bytes(
            partial(rival.call, *rival.inputs), [t for t in rival.inputs if t.ndim < 3]
        )
        for name, rival in contestants.items()
        if not rival.compiled
    }
    rows = table_rows(problem, contestants, absent, timings)
    for row in rows:
        row["margin"] = margin
    last = rows[1]
    last["memory"] = {name: mib(value) for name, value in memory.items()}
    last["saved"] = {name: mib(value) for name, value in saved.items()}
    last["peak_mib"], last["saved_mib"] = mib(memory["ours"]), mib(saved["ours"])
    least = min((s for n, s in saved.items() if contestants[n].eager), default=0)
    if least:
        last["saved_over_eager"] = saved["ours"] / least
        aim = case.goals.get("forward", {}).get("saved")
        if aim is not None:
            compared = [("saved", saved["ours"] / least, aim, False)]
            last["goal"], last["goal_share"] = verdict(compared), share(compared)
    floor = rows[0].get("floor_us")
    if device.type == "cuda" and floor is not None and floor < 20:
        rows[0]["host_us"] = 1e6 * harness.host_overhead(candidates["ours", "forward"], device)
        last["host_us"] = 1e6 * harness.host_overhead(candidates["ours", "both"], device)
    return rows


def mib(value: int | None) -> float | None:
    return None if value is None else value / 2**20


def verdict(compared: Sequence[tuple[str, float, float, bool]]) -> str:
    """ "met", or what is missed: (what, value, goal, more is better)."""
    missed = [
        f"{what} {value:.2f} {'<' if more else '>'} {aim:g}"
        for what, value, aim, more in compared
        if (value < aim if more else value > aim)
    ]
    return f"missed: {', '.join(missed)}" if missed else "met"


def share(compared: Sequence[tuple[str, float, float, bool]]) -> float:
    """How much of the goal is reached, of several the least: 1 and more where it is met."""
    return min((value / aim if more else aim / value) for _, value, aim, more in compared)


# What a goal is called, and the row's field that it is held against; others are rivals' names.
COMPARED = {"floor": "of_floor", "eager": "over_eager", "silu": "over_silu"}


# Figures to beat, as a fraction of a copy: (op, layout, direction). Published, not measured here.
FIGURES = {
    ("group_norm_silu", "nhwc", "forward"): (
        "sglang's group norm: 90 % as published for its NCHW kernel, which the two-pass one for "
        "NHWC (sgl-project/sglang pull request 33451) is taken to reach",
        0.9,
    ),
}


def figure_to_beat(case: Case, direction: str) -> tuple[str, float] | None:
    """The published figure that a row is held against, with its source."""
    return FIGURES.get((case.op, case.shape.split()[-1], direction))


def table_rows(
    problem: Problem,
    contestants: dict[str, Rival],
    absent: dict[str, str],
    timings: dict[tuple[str, str], Timing | str],
) -> list[Row]:
    """Rows for forward, forward and backward, and backward alone as their difference."""
    case, cost = problem.case, problem.cost()
    copied = timings["copy", "forward"]
    bandwidth = None
    if isinstance(copied, Timing):
        bandwidth = 2 * problem.activation() / copied.seconds

    def seconds(name: str, direction: str) -> float | None:
        one = timings.get((name, "forward"))
        two = timings.get((name, "both"))
        if direction == "forward":
            return one.seconds if isinstance(one, Timing) else None
        if not isinstance(two, Timing):
            return None
        if direction == "forward+backward":
            return two.seconds
        less = two.seconds - one.seconds if isinstance(one, Timing) else 0.0
        return less if less > 0 else None  # noise, where it is not

    rows: list[Row] = []
    for direction in ("forward", "forward+backward", "backward"):
        mine = seconds("ours", direction)
        if mine is None and direction == "backward":
            continue
        if mine is None:
            key = ("ours", "forward" if direction == "forward" else "both")
            raise Refused(f"{direction} could not be timed: {timings[key]}")
        times: dict[str, Any] = {"ours": 1e6 * mine, **absent}
        for name in contestants:
            other = seconds(name, direction)
            if other is not None:
                times[name] = 1e6 * other
            else:
                key = (name, "forward" if direction == "forward" else "both")
                lost = timings[key]  # a time, where only the difference to the forward has none
                times[name] = "n/a: lost in noise" if isinstance(lost, Timing) else lost
        row: Row = {
            "case": case.name,
            "op": case.op,
            "shape": case.shape,
            "dtype": str(case.dtype)[6:],
            "direction": direction,
            "backend": problem.backend(),
            "us": 1e6 * mine,
            "times_us": times,
        }
        timed = timings["ours", "forward" if direction == "forward" else "both"]
        if isinstance(timed, Timing) and direction != "backward":
            row |= {"spread": timed.spread, "rounds": timed.rounds, "how": timed.how}
            way = "forward" if direction == "forward" else "both"
            row["samples_us"] = harness.samples_us({n: timings[n, way] for n in contestants})
        numbers = {n: t for n, t in times.items() if n != "ours" and isinstance(t, float)}
        plain = {n: t for n, t in numbers.items() if contestants[n].eager}
        for prefix, some in (("best", numbers), ("eager", plain)):
            if some:
                winner = min(some, key=some.__getitem__)
                row |= {prefix: winner, f"{prefix}_us": some[winner]}
                row[f"over_{prefix}"] = some[winner] / row["us"]
        if cost is not None:
            moved = {"forward": cost.forward.bytes, "backward": cost.backward.bytes}
            moved["forward+backward"] = moved["forward"] + moved["backward"]
            row |= {"bytes": moved[direction], "gbs": moved[direction] / mine / 1e9}
            if bandwidth is not None:
                row["copy_gbs"] = bandwidth / 1e9
                row["floor_us"] = 1e6 * moved[direction] / bandwidth
                row["of_floor"] = row["floor_us"] / row["us"]
        alone = timings.get(("silu", "forward"))
        if direction == "forward" and isinstance(alone, Timing):
            row["over_silu"] = 1e6 * alone.seconds / row["us"]
        goals = case.goals.get(direction, {})
        values = {n: t / row["us"] for n, t in numbers.items()}
        values |= {k: row[v] for k, v in COMPARED.items() if v in row}
        compared = [(k, values[k], aim, True) for k, aim in goals.items() if k in values]
        if compared:
            row["goal"], row["goal_share"] = verdict(compared), share(compared)
        if (figure := figure_to_beat(case, direction)) and "of_floor" in row:
            row["figure"] = [*figure, row["of_floor"] >= figure[1]]
        rows.append(row)
    return rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        some = cases(device, metafunc.config.getoption("--full"))
        metafunc.parametrize("case", some, ids=[case.name.replace(" ", "-") for case in some])


def test_op(case: Case, benchmark: Any, bench_options: Options, results: list[Row]) -> None:
    """One case: all its rows, and our forward and backward as pytest-benchmark sees it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_case(case, device, bench_options)
    results += rows
    benchmark.extra_info["rows"] = rows
    problem = Problem(case, device)
    job = problem.both(problem.ours, problem.inputs)

    def timed() -> None:
        job()
        harness.synchronize(device)

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
