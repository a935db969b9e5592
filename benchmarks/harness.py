"""How the benchmarks measure: correctness first, interleaved rounds, medians, memory, one row each.

On a GPU a candidate is captured into a CUDA graph, so that its time is the GPU's and not Python's,
together with a flush of the second-level cache before each call; the time of the flushes alone,
measured in the same rounds, is taken off. What cannot be captured is timed by events, and says so.
Candidates take turns within a round, so that a drift of clocks meets all of them.

Letters: e = bytes of one activation tensor of the case.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import hashlib
import importlib.util
import itertools
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff._show_config import processor_name
from fastdiff.ops import backend
from fastdiff_kernels import _numerics

ROOT = Path(__file__).resolve().parents[1]

Call = Callable[..., Any]
Job = Callable[[], Any]
Row = dict[str, Any]
K = TypeVar("K")


class Refused(AssertionError):
    """Our result is wrong, so there is no number to print."""


class DeviceLost(RuntimeError):
    """The GPU's context is broken (an illegal access, say): this process can run nothing more."""


@dataclass(frozen=True)
class Timing:
    """Time of one candidate.

    Attributes:
        median, low: seconds over the rounds; their middle, and the lower quartile.
        spread: distance between the quartiles, over the median.
        rounds: how many there were.
        how: "graph", "events" (includes Python's time where that is longer), "cpu", or "clock": a
            GPU's work and Python's, until both are done.
        samples: seconds of each round.
    """

    median: float
    low: float
    spread: float
    rounds: int
    how: str
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float], how: str) -> Timing:
        middle, low, high = statistics.median(samples), *(quartile(samples, n) for n in (1, 3))
        spread = (high - low) / middle if middle > 0 else 0.0
        return cls(middle, low, spread, len(samples), how, tuple(samples))

    @property
    def seconds(self) -> float:
        """What counts: the median; on a CPU the lower quartile, as other processes only ever add,
        and unlike the best it is no lucky one."""
        return self.low if self.how == "cpu" else self.median


def quartile(samples: Sequence[float], n: int) -> float:
    """The first or third quartile, within the samples."""
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=4, method="inclusive")[n - 1]


def measure(
    candidates: Mapping[K, Job], device: torch.device, *, rounds: int = 9, seconds: float = 3.0
) -> dict[K, Timing | str]:
    """Time candidates against each other.

    Args:
        candidates: calls without arguments, by name; each is called a few times first.
        device: where they run.
        rounds: in each, every candidate takes a turn.
        seconds: no round begins after so many, but there are three at least.

    Returns:
        For each name a `Timing`, or why there is none: what the candidate raised.

    Raises:
        DeviceLost: a candidate broke the GPU's context.
    """
    found: dict[K, Timing | str] = {}
    ready: dict[K, _Graph | _Plain] = {}
    flush, pool = None, None
    if device.type == "cuda":
        # Nobody keeps a graph's results, so all of them may use the same memory.
        flush, pool = _flush_graph(device), torch.cuda.graph_pool_handle()
    for name, job in candidates.items():
        try:
            ready[name] = _Plain(job) if flush is None else _Graph(job, device, pool)
        except Exception as error:
            found[name] = reason(error, device)
    found |= _rounds(ready, flush, rounds, seconds)
    ready.clear()
    free(device)  # the graphs' memory
    return {name: found[name] for name in candidates}


def _rounds(
    ready: Mapping[K, _Graph | _Plain], flush: _Graph | None, rounds: int, seconds: float
) -> dict[K, Timing | str]:
    started = time.perf_counter()
    samples: dict[K, list[float]] = {name: [] for name in ready}
    flushes: list[float] = []
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - started > seconds:
            break
        if flush is not None:
            flushes.append(flush.sample())
        for name, one in ready.items():
            samples[name].append(one.sample())
    off = statistics.median(flushes) if flushes else 0.0
    found: dict[K, Timing | str] = {}
    for name, one in ready.items():
        timing = Timing.of([s - off * one.flushed for s in samples[name]], one.how)
        found[name] = timing if timing.seconds > 1e-8 else "n/a: too short to tell from the flush"
    return found


class _Plain:
    """A candidate on the CPU: as many calls a sample as make two milliseconds."""

    how, flushed = "cpu", False

    def __init__(self, job: Job) -> None:
        self.job = job
        job()
        started = time.perf_counter()
        job()
        once = time.perf_counter() - started
        self.calls = min(max(1, math.ceil(2e-3 / max(once, 1e-7))), 200)

    def sample(self) -> float:
        started = time.perf_counter()
        for _ in range(self.calls):
            self.job()
        return (time.perf_counter() - started) / self.calls


class _Graph:
    """A candidate on a GPU: a graph of several calls, each behind a flush; or one call if long."""

    def __init__(
        self, job: Job, device: torch.device, pool: Any = None, *, flush: bool = True
    ) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.job, self.device = job, device
        self.stream = _side_stream(device)
        self.stream.wait_stream(torch.cuda.current_stream())
        # Warm-up off the main stream, as capture wants it: compilation, cuDNN's choice, workspaces.
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                job()
            torch.cuda.synchronize()
            self.events[0].record()
            for _ in range(3):
                job()
            self.events[1].record()
        torch.cuda.synchronize()
        once = self.events[0].elapsed_time(self.events[1]) / 3e3
        # A launch costs some microseconds: spread over many calls where they are short.
        self.calls = 1 if once > 1e-3 else min(max(4, math.ceil(1e-3 / max(once, 1e-6))), 20)
        self.flushed = flush and self.calls > 1
        self.graph: torch.cuda.CUDAGraph | None = None
        try:
            self.graph = self._capture(pool)
            self.how = "graph"
            self.graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            if pool is not None:  # the allocator would wait for the end of this capture
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            reason(error, device)  # raises where the context is lost
            self.graph, self.how, self.calls, self.flushed = None, "events", 1, False

    def _capture(self, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        flush = _flush(self.device) if self.flushed else None
        collecting = gc.isenabled()
        gc.disable()  # a tensor freed now by chance would break the capture
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    for _ in range(self.calls):
                        if flush is not None:
                            flush()
                        self.job()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph

    def sample(self) -> float:
        start, end = self.events
        if self.graph is None:
            _flush(self.device)()
        # With the GPU busy the launch is queued, and its latency hidden.
        _flush(self.device)()
        start.record()
        if self.graph is None:
            self.job()
        else:
            self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.cache
def _flush(device: torch.device) -> Job:
    """Empty the second-level cache: write twice its size, then read as much, to leave it clean."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    written = torch.empty(size, dtype=torch.uint8, device=device)
    read = torch.ones(size // 16384, 4096, device=device)
    largest = torch.empty(size // 16384, device=device)

    def flush() -> None:
        written.zero_()
        torch.amax(read, 1, out=largest)

    return flush


@functools.cache
def _flush_graph(device: torch.device) -> _Graph:
    return _Graph(_flush(device), device, flush=False)


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes per second of a large copy, FLOP per second of a large product, as measured now."""
    gpu = device.type == "cuda"
    source = torch.ones(2**29 if gpu else 2**25, device=device)
    target, side = torch.empty_like(source), 8192 if gpu else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    jobs: dict[str, Job] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    found = measure(jobs, device, rounds=7, seconds=1.0)
    copy, product = found["copy"], found["product"]
    if not isinstance(copy, Timing) or not isinstance(product, Timing):
        raise RuntimeError(f"no ceiling: copy {copy}, product {product}")
    return 2 * 4 * source.numel() / copy.seconds, 2 * side**3 / product.seconds


def host_overhead(job: Job, device: torch.device, calls: int = 100) -> float:
    """Seconds of the CPU that a call takes until it returns, the GPU's work left aside.

    For a call whose GPU time is shorter: else the queue fills and the call waits.
    """
    job()
    synchronize(device)
    samples = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            job()
        samples.append((time.perf_counter() - started) / calls)
        synchronize(device)
    return min(samples)


def free(device: torch.device) -> None:
    """Give the memory back that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after a capture that failed
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reason(error: BaseException, device: torch.device) -> str:
    """One line about what a candidate raised.

    Raises:
        DeviceLost: it broke the GPU's context.
    """
    try:
        synchronize(device)
    except Exception as lost:
        raise DeviceLost(clean(f"{lost}")) from error
    if isinstance(error, torch.cuda.OutOfMemoryError):
        free(device)
        return "n/a: out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"n/a: {clean(f'{type(error).__name__}: {lines[0]}')[:160]}"


def clean(text: str) -> str:
    """A text without the paths of this machine."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", ".../", text)


def peak_memory(job: Job, device: torch.device) -> int:
    """Bytes allocated at the worst moment of a call beyond what was before.

    On a GPU by its allocator, on a CPU from the allocations that torch's profiler records; what a
    library takes past torch's allocators, as oneDNN its scratch memory, is not seen.
    """
    job()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        job()
    records = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def saved_bytes(job: Job, leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that a forward keeps for its backward, each memory once.

    Args:
        job: the forward; returns what keeps the graph alive.
        leave_out: tensors that are there anyway: weights.
    """
    known = {t.untyped_storage().data_ptr() for t in leave_out}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = job()
    del results
    return sum(kept.values())


UNIT, rms = _numerics.UNIT, _numerics.rms


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def leaves(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The inputs that want a gradient."""
    return [t for t in inputs if t is not None and t.requires_grad]


def differentiate(
    call: Call, inputs: Sequence[Tensor | None], dys: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a call for the inputs that want one."""
    pairs = [(r, dy) for r, dy in zip(as_tuple(call(*inputs)), dys, strict=True) if r.requires_grad]
    results, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(results, leaves(inputs), weights, allow_unused=True)


def values_and_gradients(
    call: Call, inputs: Sequence[Tensor | None], dys: Sequence[Tensor]
) -> list[Tensor | None]:
    """Results, then gradients."""
    with torch.no_grad():
        results = as_tuple(call(*inputs))
    dys = [dy.to(r.dtype) for dy, r in zip(dys, results, strict=True)]
    return [*results, *differentiate(call, inputs, dys)]


def exact(
    call: Call, inputs: Sequence[Tensor | None], dys: Sequence[Tensor]
) -> list[Tensor | None]:
    """Values and gradients of the reference in float64 on the same inputs."""
    wide = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs
    ]
    with backend("reference"), cudnn(enabled=False, benchmark=False):
        return values_and_gradients(call, wide, dys)


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Products and convolutions of float32 in float32: cuDNN takes TF32 for them by default."""
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


@contextlib.contextmanager
def cudnn(*, enabled: bool, benchmark: bool) -> Iterator[None]:
    """cuDNN on or off, with or without its search for the fastest convolution.

    That search is part of a fair race, and takes too long where nothing is timed.
    """
    flags = torch.backends.cudnn
    before = flags.enabled, flags.benchmark
    flags.enabled, flags.benchmark = enabled, benchmark
    try:
        yield
    finally:
        flags.enabled, flags.benchmark = before


def check(
    call: Call, inputs: Sequence[Tensor | None], dys: Sequence[Tensor], truth: Sequence[Any]
) -> float:
    """Hold our call to the numerics rule (`fastdiff_kernels._numerics`), values and every gradient.

    Args:
        call: takes the inputs; made on the back end in force, and on the reference.
        inputs: tensors or None, with `requires_grad` as the case has it.
        dys: gradients of the results.
        truth: what `exact` gave.

    Returns:
        The largest error over what is allowed, at most 1.

    Raises:
        Refused: the rule does not hold.
    """
    with no_tf32():
        got = values_and_gradients(call, inputs, dys)
        with backend("reference"):
            plain = values_and_gradients(call, inputs, dys)
    try:
        return _numerics.check(got, plain, truth)
    except AssertionError as error:
        raise Refused(str(error)) from None


def check_rival(got: Sequence[Any], truth: Sequence[Any], allowed: float = 0.1) -> None:
    """Whether a rival computes the same thing at all: RMS error within a tenth.

    Raises:
        ValueError: it does not.
    """
    for index, (a, b) in enumerate(zip(got, truth, strict=True)):
        if a is None or b is None:
            if a is not b:
                raise ValueError(f"tensor {index}: no gradient")
            continue
        error, size = float(_numerics.rms(a.double() - b)), float(_numerics.rms(b))
        if not error <= allowed * size + 1e-12:
            raise ValueError(f"wrong: tensor {index} has relative error {error / (size or 1):.2g}")


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute on so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device) -> Row:
    """What a number depends on besides the code."""
    found: Row = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "sources": sources_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "processors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **gpu_state(),
        }
    return found


def gpu_state() -> Row:
    """Driver, clocks and heat as nvidia-smi reads them now; empty without it."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    fields += ",temperature.gpu,utilization.gpu"
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in (done.stdout.splitlines() or [""])[0].split(",")]
    names = fields.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def sources_hash() -> str:
    """Hash of the sources, for a copy of the tree that has no git beside it."""
    digest = hashlib.sha256()
    for folder in ("kernels", "fastdiff", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".json") and "results" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _triton_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "absent"


FLOOR = "floor"


def is_rival(name: str) -> bool:
    """Whether a candidate is neither ours nor the floor."""
    return name != FLOOR and not name.startswith("ours")


def race_row(
    case: str, direction: str, timed: Mapping[str, Timing | str], *, mine: str = "ours", **more: Any
) -> Row:
    """One row: a candidate, its rivals, and the fastest of them.

    Args:
        case, direction: what was timed.
        timed: by candidate; one called "floor" is no rival, nor are other ones of ours.
        mine: the candidate that counts.
        more: further fields.

    Raises:
        Refused: the candidate has no time.
    """
    timing = timed[mine]
    if not isinstance(timing, Timing):
        raise Refused(f"{direction} could not be timed: {timing}")
    times = {n: 1e6 * t.seconds if isinstance(t, Timing) else t for n, t in timed.items()}
    us = 1e6 * timing.seconds
    row: Row = {
        "case": case,
        "direction": direction,
        "us": us,
        "times_us": times,
        "samples_us": samples_us(timed),
        "spread": timing.spread,
        "rounds": timing.rounds,
        "how": timing.how,
        **more,
    }
    others = {n: t for n, t in times.items() if isinstance(t, float) and is_rival(n)}
    eager = {n: t for n, t in others.items() if n.startswith("eager")}
    for prefix, some in (("best", others), ("eager", eager)):
        if some:
            best = min(some, key=some.__getitem__)
            row |= {prefix: best, f"{prefix}_us": some[best], f"over_{prefix}": some[best] / us}
    floor = times.get(FLOOR)
    if isinstance(floor, float):
        row["over_floor"] = us / floor
    return row


COLUMNS = {
    "case": "case",
    "direction": "direction",
    "backend": "back end",
    "us": "us",
    "spread": "±",
    "gbs": "GB/s",
    "of_floor": "of floor",
    "best": "best rival",
    "best_us": "us",
    "over_best": "x",
    "eager_us": "eager us",
    "over_eager": "x",
    "over_floor": "x floor",
    "removed": "removed",
    "of_roofline": "roofline",
    "mfu": "MFU",
    "images_per_second": "images/s",
    "captions_per_second": "captions/s",
    "peak_mib": "peak MiB",
    "gpu_used_gib": "GPU GiB",
    "saved_mib": "saved MiB",
    "ns_per_pixel": "ns/pixel",
    "growth": "growth",
    "goal": "goal",
}


def cell(key: str, value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if key in ("of_floor", "spread", "of_roofline", "removed", "mfu"):
        return f"{value:.0%}"
    if key.startswith("over") or key == "growth":
        return f"{value:.2f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Rows in columns; those without a number say why below."""
    good = [row for row in rows if "us" in row]
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in good)]
    lines: list[list[str]] = [[COLUMNS[key] for key in keys]]
    lines += [[cell(key, row.get(key)) for key in keys] for row in good]
    text = []
    if good:
        widths = [max(len(line[i]) for line in lines) for i in range(len(keys))]
        left = {"case", "direction", "backend", "best", "goal"}
        for index, line in enumerate(lines):
            cells = [
                value.ljust(width) if key in left else value.rjust(width)
                for key, value, width in zip(keys, line, widths, strict=True)
            ]
            text.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip())
            if markdown and index == 0:
                text.append("|" + "|".join("---" if k in left else "--:" for k in keys) + "|")
    item = "- " if markdown else ""
    for row in rows:
        if "failed" in row:
            text.append(f"{item}{row['case']}: no number: {row['failed']}")
    for (name, why), count in absences(rows).items():
        text.append(f"{item}without {name}: {why} ({count} rows)")
    return "\n".join(text)


def absences(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Rivals that have no number, why, and in how many rows."""
    return Counter(
        (name, time.removeprefix("n/a: "))
        for row in rows
        for name, time in row.get("times_us", {}).items()
        if isinstance(time, str)
    )


def installed(package: str) -> str | None:
    """None, or why a rival's package is absent: "n/a: ... is not installed"."""
    if importlib.util.find_spec(package) is None:
        return f"n/a: {package} is not installed"
    return None


def samples_us(timings: Mapping[K, Timing | str]) -> dict[K, list[float]]:
    """Microseconds of every round, four digits each: what confidence is computed from."""
    return {
        name: [float(f"{1e6 * sample:.4g}") for sample in timing.samples]
        for name, timing in timings.items()
        if isinstance(timing, Timing)
    }
