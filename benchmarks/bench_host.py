"""Host time of a fused op on a GPU: Python, PyTorch's dispatch, Triton's launcher.

    python -m benchmarks.bench_host                    # on any machine
    python -m benchmarks.bench_host --json FILE
    pytest benchmarks/bench_host.py --benchmark-only

Without a GPU the launches go to a stub of the CUDA driver (`benchmarks.stub_driver`): all but the
driver itself runs as on a GPU, with CPU tensors, for the chip that --family names. The shapes are
small: what is measured does not depend on them. Per op, in microseconds a call on one core:

- forward: under `torch.no_grad`.
- recorded: the forward, recorded by autograd.
- both: forward and backward; of CALLS independent calls that one `torch.autograd.grad` answers for,
  as in a model, where the engine is started once a step.
- long: both, when each call is checked and planned anew and launched by `kernel[grid]`.
- node: both of a `torch.autograd.Function` that computes nothing, with the same tensors. Below it
  no differentiable op in Python can come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff_kernels import _calls

from . import harness
from .harness import Row, Timing
from .stub_driver import stub_driver

CALLS = 16
GOALS = {"forward": 10.0, "both": 25.0}  # us, on one core

Make = Callable[..., Tensor]


def cases(make: Make) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op with tensors to call it with; `make` takes sizes."""
    film = [make(64), make(64), make(2, 64), make(2, 64)]
    return {
        "window_attention": (
            lambda qkv, table: ops.window_attention(qkv, table, heads=2, window_size=8, shift=4),
            [make(1, 16, 16, 192), make(225, 2)],
        ),
        "dwconv_gelu": (
            lambda z, w, b: ops.dwconv_gelu(z, w, b, grid=(8, 8), prefix=1),
            [make(2, 65, 64), make(64, 1, 3, 3), make(64)],
        ),
        "group_norm_silu": (
            lambda x, w, b, scale, shift: ops.group_norm_silu(
                x, w, b, num_groups=8, scale=scale, shift=shift
            ),
            [make(2, 64, 8, 8), *film],
        ),
        "group_norm_silu, large": (
            lambda x, w, b, scale, shift: ops.group_norm_silu(
                x, w, b, num_groups=8, scale=scale, shift=shift
            ),
            [make(2, 64, 64, 64), *film],
        ),
        "layer_norm_modulate": (
            lambda x, w, b, residual: ops.layer_norm_modulate(x, w, b, residual=residual)[0],
            [make(2, 17, 64), make(64), make(64), make(2, 17, 64)],
        ),
        "layer_norm_modulate, gated": (
            lambda x, residual, gate, scale, shift: ops.layer_norm_modulate(
                x, None, None, scale=scale, shift=shift, residual=residual, gate=gate
            )[0],
            [make(2, 17, 64), make(2, 17, 64), make(2, 64), make(2, 64), make(2, 64)],
        ),
    }


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.saved_tensors


def rows(device: torch.device, launches: Callable[[], int], seconds: float) -> list[Row]:
    """One row an op, for the back end that is asked for."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()

    every = [cases(make) for _ in range(CALLS)]
    cpu = torch.device("cpu")
    found: list[Row] = []
    for name, (call, inputs) in every[0].items():
        # Tensors of their own for each call: gradients of shared ones would have to be added up.
        sets = [case[name][1] for case in every]
        leaves = [tensor for tensors in sets for tensor in tensors]
        with torch.no_grad():
            dy = torch.ones_like(call(*inputs))

        def forward(call: Any = call, sets: Any = sets) -> Any:
            with torch.no_grad():
                return [call(*tensors) for tensors in sets]

        def recorded(call: Any = call, sets: Any = sets) -> Any:
            return [call(*tensors) for tensors in sets]

        def both(call: Any = call, sets: Any = sets, leaves: Any = leaves, dy: Any = dy) -> Any:
            results = [call(*tensors) for tensors in sets]
            return torch.autograd.grad(results, leaves, [dy] * CALLS)

        def long(both: Any = both) -> Any:
            with _calls.disabled():
                return both()

        def node(sets: Any = sets, leaves: Any = leaves) -> Any:
            results = [_Node.apply(*tensors) for tensors in sets]
            dys = [torch.ones_like(results[0])] * CALLS
            return torch.autograd.grad(results, leaves, dys)

        jobs: dict[str, harness.Job]
        jobs = {"forward": forward, "recorded": recorded, "both": both, "long": long, "node": node}
        for job in jobs.values():  # each kind of call is traced when it comes again
            job()
            job()
        before = launches()
        both()
        count = (launches() - before) / CALLS
        harness.synchronize(device)
        timings = harness.measure(jobs, cpu, rounds=400, seconds=seconds)
        harness.synchronize(device)
        us = {n: 1e6 * t.low / CALLS for n, t in timings.items() if isinstance(t, Timing)}
        row: Row = {"case": name, "launches": count, "host": us}
        missed = [(n, us[n], goal, False) for n, goal in GOALS.items() if us[n] > goal]
        row["goal"] = ", ".join(f"{n} {v:.1f} > {g:g}" for n, v, g, _ in missed) or "met"
        found.append(row)
    return found


def measure(family: str, seconds: float) -> dict[str, Any]:
    """All rows, with what they were measured on; on one thread, in a process of its own."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        with ops.backend("triton"):
            found, how = rows(device, lambda: 0, seconds), "GPU"
    else:
        device = torch.device("cpu")
        with stub_driver(family) as launches, ops.backend("triton"):
            found, how = rows(device, launches, seconds), f"stub of the driver, {family}"
    return {"environment": harness.environment(device), "how": how, "rows": found}


def table(found: dict[str, Any]) -> str:
    """The rows in columns."""
    names = ("forward", "recorded", "both", "long", "node")
    lines = [f"{'us a call':28s}{'launches':>9s}" + "".join(f"{name:>10s}" for name in names)]
    for row in found["rows"]:
        cells = "".join(f"{row['host'].get(name, float('nan')):10.1f}" for name in names)
        lines.append(f"{row['case']:28s}{row['launches']:9.0f}{cells}  {row['goal']}")
    return "\n".join(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bench_ops measures the host there")
def test_host_time(benchmark: Any, results: list[Row]) -> None:
    """All rows, by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "host.json"
        command = [sys.executable, "-m", "benchmarks.bench_host", "--json", str(path)]
        command += ["--seconds", "1"]
        done = benchmark.pedantic(
            lambda: subprocess.run(
                command, cwd=harness.ROOT, capture_output=True, text=True, env=_environment()
            ),
            rounds=1,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(path.read_text())
    benchmark.extra_info["rows"] = found["rows"]
    print(f"\nHost, {found['how']}\n{table(found)}")
    for row in found["rows"]:
        assert row["host"]["both"] < row["host"]["long"]
        for direction in ("forward", "both"):
            results.append(
                {
                    "case": f"host time, {row['case']}",
                    "direction": {"both": "forward+backward"}.get(direction, direction),
                    "backend": "triton",
                    "dtype": "bfloat16",
                    "us": row["host"][direction],
                    "goal": row["goal"],
                }
            )


def _environment() -> dict[str, str]:
    path = os.pathsep.join(map(str, (harness.ROOT, harness.ROOT / "kernels")))
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return variables | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and store it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="sm_90", choices=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each op (3)")
    parser.add_argument("--json", metavar="FILE", help="store everything as JSON")
    args = parser.parse_args(arguments)
    found = measure(args.family, args.seconds)
    print(f"{found['environment'].get('cpu', '')}; {found['how']}")
    print(table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
