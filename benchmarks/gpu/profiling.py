"""Time of each kernel by torch.profiler, and hardware counters of the worst by Nsight Compute."""

from __future__ import annotations

import csv
import glob
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .. import bench_ops, harness
from ..harness import Row
from .workers import ROOT, environment, python

SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"),
    *("SchedulerStats", "WarpStateStats", "InstructionStats"),
)
# What a line of the summary shows, by its name in the profiler's own table.
SHOWN = {
    "Duration": "",
    "DRAM Throughput [%]": "DRAM",
    "Compute (SM) Throughput [%]": "SM",
    "L2 Hit Rate [%]": "L2 hits",
    "Achieved Occupancy [%]": "occupancy",
    "Registers Per Thread [register/thread]": "registers",
}
COUNTED, LAUNCHES = 2, 6  # kernels, and launches of both
OURS = re.compile(r"\w+$")  # Triton's names; those of C++ have brackets and colons
# Where no time is known: what reading the machine code points at.
SUSPECTS = (("dwconv_gelu", "backward"), ("group_norm_silu", "forward"))


def kernel_times(name: str, case: bench_ops.Case, device: torch.device, calls: int) -> Row:
    """Microseconds and launches of every kernel of an op's forward and of its backward."""
    problem = bench_ops.Problem(case, device)
    call, inputs = problem.ours, problem.inputs
    forward = profile(problem.forward(call, inputs), device, calls)
    both = profile(problem.both(call, inputs), device, calls)
    found: list[Row] = []
    for direction, one, less in (("forward", forward, {}), ("backward", both, forward)):
        for kernel, (us, count) in one.items():
            before = less.get(kernel, (0.0, 0.0))
            us, count = us - before[0], count - before[1]
            if count > 0 and us > 0:
                row: Row = {"case": name, "direction": direction, "kernel": kernel, "us": us}
                found.append(row | {"launches": count})
    return {"kernels": sorted(found, key=lambda row: -row["us"])[:40]}


def profile(job: harness.Job, device: torch.device, calls: int) -> dict[str, tuple[float, float]]:
    """(microseconds, launches) of a call by kernel; on a CPU by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    job()
    harness.synchronize(device)
    with profiler(activities=activities) as profiled:
        for _ in range(calls):
            job()
        harness.synchronize(device)
    found = {}
    for event in profiled.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        us = event.self_device_time_total if gpu else event.self_cpu_time_total
        if on_gpu == gpu and us > 0:
            found[event.key] = (us / calls, event.count / calls)
    if not found:
        raise RuntimeError("the profiler saw no kernels")
    return found


def worst(given: Mapping[str, Any]) -> list[dict[str, str]]:
    """The heaviest kernels of the directions that are furthest from their goals.

    Args:
        given: "rows" of the ops and "kernels" of the profiler, as far as there are any.
    """
    passes = [
        (row["goal_share"], row["case"], row["direction"])
        for row in given.get("rows", [])
        if "op" in row and row.get("goal_share") and row["direction"] in ("forward", "backward")
    ]
    suspects = [
        (row["case"], row["direction"])
        for op, direction in SUSPECTS
        for row in given.get("rows", [])
        if row.get("op") == op and row["direction"] == direction
    ]
    found: dict[str, dict[str, str]] = {}
    for case, direction in [*((c, d) for _, c, d in sorted(passes)), *suspects]:
        mine = [
            row
            for row in given.get("kernels", [])
            if (row["case"], row["direction"]) == (case, direction) and OURS.match(row["kernel"])
        ]
        if mine and len(found) < COUNTED:
            kernel = max(mine, key=lambda row: row["us"])["kernel"]
            found.setdefault(kernel, {"kernel": kernel, "case": case, "direction": direction})
    return list(found.values())


def profiler_path() -> str | None:
    """Nsight Compute's command, on the path or where CUDA's installers put it."""
    places = (
        *("/usr/local/cuda/bin/ncu", "/usr/local/cuda-*/bin/ncu"),
        "/opt/nvidia/nsight-compute/*/ncu",
    )
    found = [path for place in places for path in sorted(glob.glob(place), reverse=True)]
    return shutil.which("ncu") or next(iter(found), None)


def command(tool: str, kernels: Sequence[Mapping[str, str]], *, dry: bool = False) -> list[str]:
    """Nsight Compute over the first launches of some kernels. The clocks stay as they are."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    names = "|".join(one["kernel"] for one in kernels)
    cases = [part for one in kernels for part in ("--target", one["case"])]
    return [
        *(tool, "--clock-control", "none", "--target-processes", "all", "--csv"),
        *("--page", "details", *sections, "--kernel-name", f"regex:^({names})$"),
        *("--launch-count", str(LAUNCHES)),
        *python("-m", "benchmarks.run_gpu", *cases, *["--dry"] * dry),
    ]


def counters(given: Mapping[str, Any], dry: bool) -> Row:
    """Hardware counters of the worst kernels, in one run of the profiler: its start is slow.

    Raises:
        RuntimeError: there is no profiler, or it printed no counters.
    """
    kernels = worst(given)
    tool = profiler_path()
    if tool is None:
        raise RuntimeError("there is no ncu on this machine")
    text = run_tool(command(tool, kernels, dry=dry), environment(), seconds=45.0)
    found = parse(text)
    if not found:
        raise RuntimeError(f"ncu printed no counters: {harness.clean(text[-600:])}")
    known = {one["kernel"]: one for one in kernels}
    return {"counters": [{**known.get(one["kernel"], {"case": ""}), **one} for one in found]}


def run_tool(arguments: Sequence[str], variables: dict[str, str], *, seconds: float) -> str:
    """Output of a command.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        tail = harness.clean(done.stdout[-600:].strip())
        raise RuntimeError(f"{arguments[0].rsplit('/')[-1]}: status {done.returncode}: {tail}")
    return done.stdout


def parse(text: str) -> list[Row]:
    """Counters of each launch from Nsight Compute's `--csv --page details`.

    Args:
        text: its output, with what the program printed before.

    Returns:
        For each launch its kernel, id and grid, and "metrics": by name and unit the number, or the
        text where it is none.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    found: dict[str, Row] = {}
    for row in csv.DictReader(lines[start:]):
        metric = row.get("Metric Name")
        if not metric or not row.get("ID", "").isdigit():
            continue  # a rule's advice, or what was printed behind the table
        launch = found.setdefault(
            row["ID"],
            {
                "kernel": row["Kernel Name"],
                "launch": int(row["ID"]),
                "grid": row.get("Grid Size", ""),
                "metrics": {},
            },
        )
        unit = row.get("Metric Unit") or ""
        launch["metrics"][f"{metric} [{unit}]" if unit else metric] = number(row["Metric Value"])
    return list(found.values())


def number(text: str) -> float | str:
    """A value of the table, which writes thousands with commas."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def lines(found: Sequence[Row]) -> Iterator[str]:
    """A line for each launch: time, memory, arithmetic, occupancy."""
    for launch in found:
        parts = []
        for key, title in SHOWN.items():
            for name, value in launch["metrics"].items():
                if name == key or (key == "Duration" and name.startswith("Duration [")):
                    unit = name.partition("[")[2].rstrip("]").split("/")[0]
                    shown = f"{value:g}" if isinstance(value, float) else value
                    unit = "" if title == "registers" else unit
                    parts.append(f"{title} {shown} {unit}".strip())
        yield f"{launch['kernel']}: {', '.join(parts)} ({launch['case']})"
