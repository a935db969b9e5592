"""Fill the table of block sizes for the GPU of this machine.

    python -m benchmarks.tune                       # every kernel at the paper's presets
    python -m benchmarks.tune --minutes 10 --presets ascend_t2i_128 iuvit_cifar10
    python -m benchmarks.tune --dry                 # what would be tried; needs no GPU

Takes the ops' calls of a training step of each preset, and for every kernel and key that such a
call asks the table for, times the call with each candidate of the kernel's `TUNABLE`. What beats
the launcher's default by 2 % goes into `_tuning.json`, written after every key, so it can be
stopped at any time. Nothing is tuned when the library runs: the table is part of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.aot_report import PRESETS, training_step
from fastdiff import ops
from fastdiff_kernels import _launch, _register

MODULES = ("window_attention", "dwconv_ffn", "group_norm_silu", "layer_norm_modulate")
GAIN = 0.98
SECONDS = 0.5

Form = tuple[Any, ...]


def calls(presets: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Form]]:
    """The different calls of the ops in a training step, with meta tensors."""
    seen = set()
    found: list[tuple[str, Form]] = []

    def note(op: str, form: Form) -> Any:
        key = (op, *(_described(a) if isinstance(a, Tensor) else a for a in form))
        if key not in seen:
            seen.add(key)
            found.append((op, form))
        return _register._OPS[op]._reference(*form)

    for name in presets:
        with _register.stand_in(note):
            training_step(name, dtype, PRESETS[name])
    yield from found


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def real(form: Form, device: torch.device) -> Form:
    """The same call with data."""

    def filled(tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        ).normal_()
        return made.requires_grad_()

    return tuple(filled(a) if isinstance(a, Tensor) else a for a in form)


def job_of(op: str, form: Form) -> Callable[[], Any]:
    """Forward and backward of a call."""
    call = _register._OPS[op]
    leaves = [a for a in form if isinstance(a, Tensor)]

    def job() -> Any:
        with ops.backend("triton"):
            results = call._choose(form)(*form)
        results = results if isinstance(results, tuple) else (results,)
        results = [r for r in results if not any(r is leaf for leaf in leaves)]
        return torch.autograd.grad(
            results, leaves, [torch.ones_like(r) for r in results], allow_unused=True
        )

    return job


def candidates() -> dict[str, list[_launch.Config]]:
    """Every kernel's candidates, by its name in the table."""
    found: dict[str, list[_launch.Config]] = {}
    for name in MODULES:
        found |= importlib.import_module(f"fastdiff_kernels.{name}.triton_kernels").TUNABLE
    return found


def tune(
    job: Callable[[], Any],
    kernel: str,
    key: str,
    options: list[_launch.Config],
    device: torch.device,
) -> tuple[_launch.Config | None, float]:
    """The candidate that makes the call fastest, None for the default; and what it gains."""

    def with_config(config: _launch.Config) -> Callable[[], Any]:
        def run() -> Any:
            with _launch.override(kernel, key, config):
                return job()

        return run

    jobs = {-1: job} | {i: with_config(config) for i, config in enumerate(options)}
    times = harness.measure(jobs, device, rounds=7, seconds=SECONDS)
    fine = {i: t.seconds for i, t in times.items() if isinstance(t, harness.Timing)}
    if -1 not in fine:
        raise RuntimeError(f"tune: {kernel} [{key}] does not run as it is: {times[-1]}")
    best = min(fine, key=fine.__getitem__)
    gain = fine[best] / fine[-1]
    return (options[best], gain) if best >= 0 and gain < GAIN else (None, 1.0)


def main() -> None:
    """Tune within the time given, most important preset first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--dry", action="store_true", help="list the work; needs no GPU")
    args = parser.parse_args()
    first = ["ascend_t2i_128", "iuvit_cifar10", "iuvit_cc12m64"]
    presets = args.presets or [*first, *(name for name in PRESETS if name not in first)]
    tunable = candidates()
    if args.dry:
        for op, form in calls(presets, torch.bfloat16):
            print(op, *(_described(a)[0] if isinstance(a, Tensor) else a for a in form))
        print({kernel: len(options) for kernel, options in tunable.items()})
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune: there is no GPU here; --dry shows what would be tried")

    device = torch.device("cuda", torch.cuda.current_device())
    family, started, done = _launch.chip(device).family, time.perf_counter(), set()
    for op, form in calls(presets, torch.bfloat16):
        job = job_of(op, real(form, device))
        with _launch.consulting() as asked:
            job()
        for kernel, key in asked:
            if (kernel, key) in done or kernel not in tunable:
                continue
            if time.perf_counter() - started > 60 * args.minutes:
                raise SystemExit(f"tune: {args.minutes:g} minutes are over; what was found is kept")
            done.add((kernel, key))
            config, gain = tune(job, kernel, key, tunable[kernel], device)
            print(f"{kernel} [{key}]: {config or 'default'} {gain:.3f}", flush=True)
            table = json.loads(_launch.TABLE.read_text())
            kept = table.setdefault(family, {}).setdefault(kernel, {})
            kept.pop(key, None)
            if config is not None:
                kept[key] = config
            _launch.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            _launch._table.cache_clear()


if __name__ == "__main__":
    main()
