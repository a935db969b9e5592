"""What the workers run: the cases of each step, and the loop around them.

A case is a function of its name; what it returns becomes one event. An exception costs that case
alone, a broken context of the GPU the process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastdiff import ops

from .. import bench_models, bench_ops, harness
from ..bench_ops import Options
from ..harness import DeviceLost, Refused, Row, Timing
from . import profiling, training
from .workers import LOST, ROOT, environment, python

GOAL_OPS = 9  # the first of the ops' cases, which KERNELS.md sets goals for
PHILOX = "philox_normal 64x3x256x256 float32"
PHILOX_TINY = "philox_normal 2x3x4x4 float32"
HOST = "host time of a call"
COUNTERS = "counters of the worst kernels"
CEILINGS = "copy and product"
MEMORY = "out of memory"
# Memory that a compiler beside the tests may take, as a share of the GPU's.
WARM_MEMORY = 0.15


@dataclass(frozen=True)
class Context:
    """What every case gets besides its name.

    Attributes:
        device: where it runs.
        dry: on a CPU, tiny.
        also: parts that are left out by default and were asked for.
        given: what the parent wrote for the step: checks, ceilings, kernels, ...
    """

    device: torch.device
    dry: bool
    also: frozenset[str]
    given: Mapping[str, Any]

    def options(self, rounds: int, seconds: float) -> Options:
        """How the benchmarks run a case; the dry ones compile nothing."""
        if self.dry:
            return Options(compile=False, rounds=3, seconds=0.2)
        return Options(True, "max-autotune" in self.also, rounds, seconds)


Run = Callable[[str, Context], Row]
Items = Callable[[Context], Sequence[str]]


@dataclass(frozen=True)
class Task:
    """A step: the names of its cases, and what runs one."""

    items: Items
    run: Run


# Cases


def op_cases(context: Context) -> dict[str, bench_ops.Case]:
    """The ops' cases by name, the most important first."""
    some = bench_ops.TINY if context.dry else bench_ops.GPU
    single = context.dry or "float32" in context.also
    return {c.name: c for c in some if single or c.dtype is not torch.float32}


def model_cases(context: Context) -> dict[str, bench_models.Case]:
    """Blocks and models by name."""
    return {c.name: c for c in (bench_models.TINY if context.dry else bench_models.GPU)}


def every_op(context: Context) -> list[str]:
    return [*op_cases(context), PHILOX_TINY if context.dry else PHILOX]


def goal_ops(context: Context) -> list[str]:
    return list(op_cases(context))[:GOAL_OPS]


def blocks(context: Context) -> list[str]:
    names = list(model_cases(context))
    return names[2:3] if context.dry else [name for name in names if " block," in name]


def ascend(context: Context) -> list[str]:
    if context.dry:
        return list(model_cases(context))[1:2]
    return [c.name for c in model_cases(context).values() if ascend_eager(c)]


def ascend_eager(case: bench_models.Case) -> bool:
    return case.preset == ("ascend_t2i_128", 16) and case.compiled is False


def rest(context: Context) -> list[str]:
    """What the other steps leave out, and what was asked for."""
    names = list(op_cases(context))[GOAL_OPS:]
    for name, case in model_cases(context).items():
        whole = case.preset is not None and not ascend_eager(case)
        wanted = "ascend-compiled" if case.compiled else "models"
        if (context.dry and name.startswith("iuvit")) or (
            not context.dry and whole and wanted in context.also
        ):
            names.append(name)
    return names


# Ops


@functools.cache
def back_end(dry: bool) -> str:
    """The back end that is checked: Triton's kernels, interpreted on a CPU where that works."""
    if not dry:
        return "triton"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "auto"
    import triton

    def version(module: Any) -> tuple[int, ...]:
        return tuple(int(part) for part in module.__version__.split(".")[:2])

    # The interpreter of triton 3.6 makes integers of arrays, which NumPy 2.4 refuses.
    broken = version(triton) < (3, 7) and version(numpy) >= (2, 4)
    return "auto" if broken else "triton"


def check(name: str, context: Context) -> Row:
    """Values and gradients of an op against float64."""
    with ops.backend(back_end(context.dry)):
        if name in (PHILOX, PHILOX_TINY):
            margin = check_philox(name, context.device)
        else:
            margin = bench_ops.check_case(op_cases(context)[name], context.device)
    return {"check": {"margin": margin, "backend": back_end(context.dry)}}


def philox_shape(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split()[1].split("x")))


def check_philox(name: str, device: torch.device) -> float:
    """Bits as the definition has them, and normal numbers within two units in the last place.

    Returns:
        The largest difference over these two.

    Raises:
        Refused: they are others.
    """
    pictures, *shape = philox_shape(name)
    pictures = min(pictures, 8)  # the definition works in 64-bit integers
    seeds = torch.arange(pictures, device=device) * 0x1E3779B97F4A7C15 % 2**62

    def draw() -> tuple[Tensor, Tensor]:
        found = [f(seeds, 7, tuple(shape)) for f in (ops.philox_bits, ops.philox_normal)]
        return found[0], found[1]

    bits, normal = draw()
    with ops.backend("reference"):
        true_bits, true_normal = draw()
    if not torch.equal(bits, true_bits):
        raise Refused(f"{int((bits != true_bits).sum())} of {bits.numel()} words differ")
    apart = (normal.view(torch.int32) - true_normal.view(torch.int32)).abs().max()
    if not (normal.isfinite().all() and int(apart) <= 2):
        raise Refused(f"normal numbers differ by {int(apart)} units in the last place")
    return float(apart) / 2


def ours(name: str, context: Context) -> Row:
    """An op timed against a copy; checked here where the step before had no time for it."""
    verdict = context.given.get("checks", {}).get(name)
    if isinstance(verdict, str) and MEMORY in verdict:
        verdict = None  # six processes share the memory there, and here is one
    if isinstance(verdict, str):
        return {"notes": []}  # that has failed already, and a wrong op has no time
    found: Row = {} if verdict is not None else check(name, context)
    verdict = verdict or found["check"]
    if name in (PHILOX, PHILOX_TINY):
        return {**found, "rows": time_philox(name, context)}
    options = context.options(rounds=11, seconds=0.8)
    case = op_cases(context)[name]
    with ops.backend("auto" if context.dry else "triton"):
        rows = bench_ops.time_case(case, context.device, options)
    for row in rows:
        row["margin"] = verdict["margin"]
    return {**found, "rows": rows}


def time_philox(name: str, context: Context) -> list[Row]:
    """Normal noise against torch's, and against writing as many bytes."""
    pictures, *shape = philox_shape(name)
    device = context.device
    seeds = torch.arange(pictures, device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)
    source = torch.randn(pictures, *shape, device=device)
    target = torch.empty_like(source)
    jobs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ops.philox_normal(seeds, step, tuple(shape)),
        "copy": lambda: target.copy_(source),
        "randn": lambda: torch.randn(pictures, *shape, device=device),
    }
    options = context.options(rounds=11, seconds=0.8)
    timed = harness.measure(jobs, device, rounds=options.rounds, seconds=options.seconds)
    copied = timed.pop("copy")
    row = harness.race_row(
        name, "forward", timed, op="philox_normal", shape=name.split()[1], dtype="float32"
    )
    row["bytes"] = target.numel() * 4
    if isinstance(copied, Timing):
        row["floor_us"] = 1e6 * copied.seconds / 2  # a copy reads as much as it writes
        row["of_floor"] = row["floor_us"] / row["us"]
        row["copy_gbs"] = 2 * row["bytes"] / copied.seconds / 1e9
    return [row]


def ceilings(name: str, context: Context) -> Row:
    """What this GPU reaches: a large copy, and a large product of random matrices in bf16."""
    device = context.device
    numbers, side = (2**22, 256) if context.dry else (2**29, 8192)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    jobs: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: a @ b,
    }
    found = harness.measure(jobs, device, seconds=0.2 if context.dry else 1.0)
    values = {}
    for what, amount in (("copy", 2 * numbers * 4), ("product", 2 * side**3)):
        timing = found[what]
        if isinstance(timing, Timing):
            values[what] = amount / timing.seconds
    if len(values) < 2:
        raise RuntimeError(f"no ceiling: {found}")
    return {"ceilings": values}


def race(name: str, context: Context) -> Row:
    """An op or a model against its rivals."""
    if name in op_cases(context):
        options = context.options(rounds=11, seconds=1.5)
        return {"rows": bench_ops.run_case(op_cases(context)[name], context.device, options)}
    options = context.options(rounds=7, seconds=3.0)
    return {"rows": bench_models.run_case(model_cases(context)[name], context.device, options)}


def warm(name: str, context: Context) -> Row:
    """Compile what a race will run. Inductor keeps its work on disk."""
    if context.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(WARM_MEMORY)
    options = context.options(rounds=3, seconds=0.1)
    if name == HOST:  # its kernels have keys of their own
        measure_host(context, seconds=0.05, limit=75.0)
    elif name in op_cases(context):
        bench_ops.warm(op_cases(context)[name], context.device, options)
    else:
        bench_models.warm(model_cases(context)[name], context.device, options)
    return {}


# Global attention

ATTENTION = {
    "global attention 128x257x8x64": (128, 257, 257, 8, 64),
    "global attention 16x256x12x64": (16, 256, 256, 12, 64),
    "cross attention 64x257x257x16x64": (64, 257, 256, 16, 64),
}
PACKAGES = {"flash-attn": ("flash_attn", "flash"), "xformers": ("xformers", "xformers")}


def attention_items(context: Context) -> list[str]:
    return list(ATTENTION)[: 1 if context.dry else None]


def attention(name: str, context: Context) -> Row:
    """SDPA, flash-attn and xformers: parity with float64, and time."""
    from fastdiff.nn import attention as layers

    B, L, S, heads, d = ATTENTION[name]
    if context.dry:
        B, L, S = 1, 8, 8
    dtype = torch.float32 if context.dry else torch.bfloat16
    generator = torch.Generator(context.device).manual_seed(0)

    def draw(tokens: int) -> Tensor:
        made = torch.randn(B, tokens, heads, d, generator=generator, device=context.device)
        return made.to(dtype).requires_grad_()

    inputs = [draw(L), draw(S), draw(S)]
    mask = None
    if name.startswith("cross"):
        lengths = torch.arange(B, device=context.device) % S + 1
        mask = torch.arange(S, device=context.device) < lengths[:, None]

    def call(by: str) -> Callable[..., Tensor]:
        return lambda q, k, v: layers.attention(q, k, v, mask, implementation=by)

    dys = [torch.randn(B, L, heads, d, generator=generator, device=context.device).to(dtype)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = harness.exact(call("sdpa"), inputs, dys)
    jobs: dict[tuple[str, str], Callable[[], Any]] = {}
    absent: dict[str, str] = {}

    def forward(by: str) -> Callable[[], Any]:
        def job() -> Any:
            with torch.no_grad():
                return call(by)(*inputs)

        return job

    for title, by in {"ours (SDPA)": "sdpa", **{k: v[1] for k, v in PACKAGES.items()}}.items():
        if title in PACKAGES and (why := harness.installed(PACKAGES[title][0])):
            absent[title] = why
            continue
        try:
            got = harness.values_and_gradients(call(by), inputs, dys)
            harness.check_rival(got, truth, allowed=0.02)
        except Exception as error:
            absent[title] = harness.reason(error, context.device)
            continue
        jobs[title, "forward"] = forward(by)
        jobs[title, "forward+backward"] = functools.partial(
            harness.differentiate, call(by), inputs, dys
        )
    options = context.options(rounds=11, seconds=0.8)
    timed = harness.measure(jobs, context.device, rounds=options.rounds, seconds=options.seconds)
    rows = []
    for way in ("forward", "forward+backward"):
        mine: dict[str, Timing | str] = {n: t for (n, w), t in timed.items() if w == way}
        rows.append(
            harness.race_row(
                *(name, way, {**mine, **absent}), mine="ours (SDPA)", dtype=str(dtype)[6:]
            )
        )
    return {"rows": rows}


# Host


def host_items(context: Context) -> list[str]:
    """One case, where this version has the benchmark."""
    return [HOST] if (ROOT / "benchmarks" / "bench_host.py").is_file() else []


def measure_host(context: Context, *, seconds: float, limit: float) -> Any:
    """What the benchmark of its own finds, in so many seconds for each op."""
    file = Path(context.given["folder"]) / f"host-{os.getpid()}.json"
    command = python("-m", "benchmarks.bench_host", "--json", str(file))
    command += ["--seconds", f"{seconds:g}"]
    profiling.run_tool(command, environment(OMP_NUM_THREADS="1"), seconds=limit)
    return json.loads(file.read_text(encoding="utf-8"))


def host(name: str, context: Context) -> Row:
    """Time of a call on the host."""
    return {"host": measure_host(context, seconds=0.2 if context.dry else 0.5, limit=28.0)}


def warm_items(context: Context) -> list[str]:
    hosts = [] if context.dry else host_items(context)
    return [*goal_ops(context), *blocks(context), *hosts]


# Training

TRAINED = {"train ascend": "ascend_t2i_128", "train iuvit": "iuvit_cifar10"}


def train(preset: str) -> tuple[Items, Run]:
    """Cases of a preset's training step, and what runs one."""
    return (
        lambda context: training.items(preset),
        lambda name, context: training.run(name, context.device, context.dry, context.given),
    )


# Tuning


def tuning_items(context: Context) -> list[str]:
    from . import tuning  # imports triton

    return tuning.items(context.device, context.given, context.dry)


def compile_candidates(name: str, context: Context) -> Row:
    from . import tuning

    return tuning.compile_all(name, context.device, context.given, context.dry)


def tune(name: str, context: Context) -> Row:
    from . import tuning

    return tuning.tune(name, context.device, context.given, context.dry)


TASKS: dict[str, Task] = {
    "check": Task(every_op, check),
    "ceilings": Task(lambda context: [CEILINGS], ceilings),
    "ours": Task(every_op, ours),
    "warm": Task(warm_items, warm),
    "rivals": Task(goal_ops, race),
    "host": Task(host_items, host),
    "plan": Task(
        lambda context: training.plan_items(),
        lambda name, context: training.plan(name, context.dry, context.given["environment"]),
    ),
    "blocks": Task(blocks, race),
    "attention": Task(attention_items, attention),
    "ascend": Task(ascend, race),
    "kernels": Task(
        goal_ops,
        lambda name, context: profiling.kernel_times(
            name, op_cases(context)[name], context.device, 1 if context.dry else 5
        ),
    ),
    "counters": Task(
        lambda context: [COUNTERS] if profiling.worst(context.given) else [],
        lambda name, context: profiling.counters(context.given, context.dry),
    ),
    **{name: Task(*train(preset)) for name, preset in TRAINED.items()},
    "rest": Task(rest, race),
    # Of `benchmarks.tune`.
    "tune-compile": Task(tuning_items, compile_candidates),
    "tune": Task(tuning_items, tune),
}
STATED = ("rivals", "blocks", "ascend", "ceilings", *TRAINED)


def items_of(step: str, dry: bool, also: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """The names of a step's cases."""
    device = torch.device("cpu" if dry else "cuda")
    return list(TASKS[step].items(Context(device, dry, frozenset(also), given)))


def target(names: Sequence[str], dry: bool, also: Sequence[str]) -> int:
    """Forward and backward of some ops' cases, twice: what a profiler of kernels looks at."""
    device = torch.device("cpu" if dry else "cuda")
    cases = op_cases(Context(device, dry, frozenset(also), {}))
    for name in names:
        problem = bench_ops.Problem(cases[name], device)
        job = problem.both(problem.ours, problem.inputs)
        for _ in range(2):
            job()
        harness.synchronize(device)
    return 0


# The worker


@contextlib.contextmanager
def settings(step: str) -> Iterator[None]:
    """cuDNN's search for the fastest convolution: part of a fair race, else a waste of time."""
    with harness.cudnn(enabled=True, benchmark=step not in ("check", "ours", "ceilings")):
        yield


def worker(step: str, work: Path, events: Path, dry: bool, also: Sequence[str], gpu: bool) -> int:
    """Run the cases that the parent names, and write a line of JSON for each event.

    Everything is imported and the GPU's context made before the parent lets it begin.
    """
    device = torch.device("cpu" if dry else "cuda")
    if step in ("warm", "tune-compile"):
        os.nice(5)  # the tests come first
    if gpu and not dry:
        torch.zeros(1, device=device)
    if not sys.stdin.readline():
        return 0  # the parent is gone
    given = json.loads(work.read_text(encoding="utf-8"))
    os.environ.update(given.get("variables", {}))
    context = Context(device, dry, frozenset(also), given)
    with events.open("a", encoding="utf-8") as file, settings(step):

        def tell(**event: Any) -> None:
            file.write(json.dumps(finite(event)) + "\n")
            file.flush()

        for name in given["items"]:
            if time.time() > given["until"]:
                break
            tell(begin=name)
            started = time.perf_counter()
            try:
                found = TASKS[step].run(name, context)
                state = harness.gpu_state() if step in STATED and not dry else {}
                tell(name=name, took=time.perf_counter() - started, state=state, **found)
            except DeviceLost as error:
                tell(name=name, failed=f"the GPU's context broke: {error}")
                return LOST
            except Refused as error:
                tell(name=name, failed=f"wrong result: {error}")
            except Exception as error:
                text = harness.clean(traceback.format_exc())[-4000:]
                try:
                    why = harness.reason(error, device) if gpu else repr(error)[:300]
                except DeviceLost:
                    tell(name=name, failed=f"the GPU's context broke: {error}", log=text)
                    return LOST
                tell(name=name, failed=why.removeprefix("n/a: "), log=text)
            harness.free(device)
    return 0


def finite(value: Any) -> Any:
    """The same for JSON, which has neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
