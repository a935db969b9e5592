"""Fill the table of block sizes for the GPU of this machine: `make bench-gpu-tune`.

    python -m benchmarks.tune                       # four minutes: dwconv and group norm first
    python -m benchmarks.tune --minutes 20 --presets ascend_t2i_128 iuvit_cifar10
    python -m benchmarks.tune --dry --out FOLDER    # on a CPU, interpreted, tiny: to try it

Takes the ops' calls of a training step of each preset. For every kernel and key that such a call
asks the table for, each candidate of the kernel's `TUNABLE` is compiled, on all cores, and then the
call is timed with each, alone on the GPU. A candidate that beats the launcher's default by 2 % and
passes the numerics rule goes into `_tuning.json`, written after every key. FOLDER gets a copy of
it, and tuning.json and tuning.md with the gain of each key. Nothing is tuned when the library runs:
the table is part of it.

Exit status: 0; 1 where a key could not be tuned; 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastdiff_kernels import _launch

from .gpu import results
from .gpu.pytests import processes
from .gpu.timetable import Step
from .gpu.workers import ROOT, Event, StepRun, environment, python

FIRST = ("ascend_t2i_128", "iuvit_cifar10", "iuvit_cc12m64")
COMPILE = 0.45  # of the time, at most
CLOSING = 4.0


class Tuning:
    """A run: its clock, its processes, its table."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.time()
        self.end = self.started + 60 * args.minutes - CLOSING
        self.folder = Path(tempfile.mkdtemp(prefix="fastdiff-tune-"))
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.table_path = self.out / "_tuning.json" if args.dry else _launch.TABLE
        self.table = json.loads(_launch.TABLE.read_text(encoding="utf-8"))
        self.found: list[Event] = []
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []
        self.left: list[str] = []
        self.items: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:5.0f} s] {text}", flush=True)

    def step(self, name: str, shards: int) -> StepRun:
        """The processes of a step, started and waiting."""
        step = Step(name, "", 0, 0, 1, 60.0, shards=shards)
        command = python("-m", "benchmarks.run_gpu", "--step", name, *["--dry"] * self.args.dry)
        variables = environment()
        if self.args.dry:
            variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = StepRun(step, self.folder, command, variables, self.take)
        run.prepare()
        return run

    def take(self, event: Event) -> None:
        """One event of a worker."""
        name = event.get("name", "")
        if "failed" in event:
            # The compilers only make things ready: what matters of their failures comes again.
            place = self.notes if event["step"] == "tune-compile" else None
            if place is not None:
                place.append(f"{name}: {event['failed']}")
            else:
                self.failed[name or "tune"] = event["failed"]
            self.say(f"{event['step']}: {name}: FAILED: {event['failed']}")
        elif "tuned" in event:
            self.found.append(event["tuned"])
            self.say(line_of(event["tuned"]))
            self.save()

    def run(self) -> None:
        """Compile on all cores, then time alone."""
        compilers = self.step("tune-compile", 2 if self.args.dry else processes())
        timer = self.step("tune", 1)
        try:
            self.items = self.names()
            given = {"presets": self.args.presets}
            self.say(f"{len(self.items)} keys, in this order: {', '.join(self.items)}")
            until = self.started + COMPILE * 60 * self.args.minutes
            compilers.go(self.items, given, until)
            self.wait(compilers, until)
            self.say(f"compiled, {len(compilers.left())} keys left to do; now timing")
            timer.go(self.items, given, self.end)
            self.wait(timer, self.end)
            self.left = timer.left()
        finally:
            for run in (compilers, timer):
                run.stop()

    def wait(self, run: StepRun, until: float) -> None:
        while not run.poll() and time.time() < until + 1:
            time.sleep(0.1)
        run.stop()

    def names(self) -> list[str]:
        from .gpu import steps

        return steps.items_of("tune", self.args.dry, [], {"presets": self.args.presets})

    def save(self) -> None:
        """Write the table in its place, and everything into the folder."""
        for one in self.found:
            kept = self.table.setdefault(one["family"], {}).setdefault(one["kernel"], {})
            kept.pop(one["key"], None)
            if one["config"] is not None:
                kept[one["key"]] = one["config"]
        text = json.dumps(self.table, indent=1, sort_keys=True) + "\n"
        for path in {self.table_path, self.out / "_tuning.json"}:
            results.write(path, text.encode())
        facts = {"keys": self.found, "failed": self.failed, "notes": self.notes, "left": self.left}
        results.write(self.out / "tuning.json", json.dumps(facts, indent=1).encode() + b"\n")
        page = ["# Tuning", "", *(f"- {line}" for line in self.summary(limit=10**6))]
        results.write(self.out / "tuning.md", "\n".join(page).encode() + b"\n")

    def summary(self, limit: int = 90) -> list[str]:
        """Gains, the largest first; what failed; what had no time."""
        ranked = sorted(self.found, key=lambda one: -one["gain"])
        gained = [one for one in ranked if one["config"] is not None]
        lines = [line_of(one) for one in ranked][:limit]
        lines += [f"WRONG {one['kernel']} [{one['key']}] {w}"[:200]
                  for one in self.found for w in one["wrong"]]  # fmt: skip
        lines += [f"FAILED {name}: {why}"[:200] for name, why in self.failed.items()]
        if self.left:
            lines.append(f"No time for {len(self.left)} keys: {', '.join(self.left)[:400]}")
        lines.append(f"{len(gained)} of {len(self.found)} keys gained; {len(self.failed)} failed.")
        return lines


def line_of(one: Event) -> str:
    """A key in one line."""
    name = f"{one['kernel']} [{one['key']}]"
    if one["config"] is None:
        return f"{name}: default, {one['default_us']:.1f} us {one['direction']}"
    return (
        f"{name}: {one['default_us']:.1f} -> {one['us']:.1f} us {one['direction']}, "
        f"{one['gain']:.3f} times as fast with {one['config']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune within the time given, most important kernels first; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(FIRST), metavar="PRESET")
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything (4)")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="folder")
    parser.add_argument("--dry", action="store_true", help="interpreted on the CPU, tiny")
    args = parser.parse_args(arguments)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        print("tune: torch sees no GPU here; --dry tries the script on the CPU")
        return 2
    tuning = Tuning(args)
    with contextlib.suppress(KeyboardInterrupt):
        tuning.run()
    tuning.save()
    print()
    print("\n".join(tuning.summary()), flush=True)
    return 1 if tuning.failed or not tuning.found else 0


if __name__ == "__main__":
    sys.exit(main())
