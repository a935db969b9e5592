"""Everything that a GPU has to say, in one command and in minutes: `make bench-gpu`.

    PYTHONPATH=.:kernels python3 -m benchmarks.run_gpu [--minutes 8] [--out FOLDER]

Prints its order list first: every step with its planned start and seconds. By second 90 the
ceilings are measured, and every op is checked against float64 and timed against a copy. Then come
the tests on all cores, the rivals, time and hardware counters of single kernels, and a training
step. Every step runs in processes of its own: a case that hangs, crashes or breaks the GPU's
context costs that case alone. A shorter run keeps what matters most.

FOLDER gets three files, rewritten as rows arrive: NAME.json has everything, NAME.md is to be read
first, NAME-logs.tar.gz has the output of the processes. The summary is printed last.

Exit status: 0 all tests passed and every case that was begun is right and has its numbers; 1 not
so; 2 no GPU. Needs torch, triton, numpy, einops, pytest, hypothesis and what the tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .gpu import results as found
from .gpu import timetable
from .gpu.pytests import TestRun, processes
from .gpu.results import Results
from .gpu.timetable import Slot, Step
from .gpu.workers import ROOT, Event, Process, StepRun, environment, python

PREPARED = ROOT / "build" / "gpu-cache"
ALSO = ("float32", "max-autotune", "models", "ascend-compiled")
# Of these folders, those that there are.
TESTS = ("tests/kernels/backends", "tests/kernels/cuda", "tests/kernels/gpu", "tests/cuda")
# Interpreted, in seconds.
DRY_TESTS = ["tests/kernels/backends/test_philox_normal_backend.py", "-k", "shape0 or shape1"]
PATIENCE = 15.0  # seconds for the prepared cache


class Run:
    """One run of all steps, and its clock. It never touches the GPU itself."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(tempfile.mkdtemp(prefix="fastdiff-bench-"))
        self.results = Results(Path(args.out), args.minutes, args.dry)
        self.started = self.results.started
        self.variables: dict[str, str] = {}
        self.ready: dict[str, StepRun] = {}
        self.asked: dict[str, Process] = {}
        self.begun: set[str] = set()
        self.cached: set[str] = set()
        self.live: list[tuple[Slot, StepRun | TestRun]] = []
        self.slots, dropped = timetable.plan(self.steps(), 60 * args.minutes)
        names = {slot.step.name for slot in self.slots}
        if not names & {"rivals", "blocks"}:  # nothing to compile for
            self.slots = [slot for slot in self.slots if slot.step.name != "warm"]
        self.results.tested = any(slot.step.name == "tests" for slot in self.slots)
        why = [(step, "no time") for step in dropped] + self.absent
        self.results.plan = timetable.order_list(self.slots, why)

    def steps(self) -> list[Step]:
        """The steps that this machine can make."""
        find_spec = importlib.util.find_spec
        packages = any(find_spec(name) for name in ("flash_attn", "xformers"))
        self.absent: list[tuple[Step, str]] = []
        made = []
        for step in timetable.STEPS:
            why = ""
            if self.args.dry:  # a slow machine is given more time for the same
                step = timetable.stretched(step, max(1.0, self.args.minutes / 8))
            if step.name == "attention" and not packages and not self.args.dry:
                why = "neither flash-attn nor xformers is installed"
            if step.name == "host" and not (ROOT / "benchmarks" / "bench_host.py").is_file():
                why = "this version has no benchmarks/bench_host.py"
            if step.name == "counters" and not has_profiler():
                why = "there is no ncu on this machine"
            if step.name == "warm" and self.args.cold:
                why = "--cold"
            if why:
                self.absent.append((step, why))
            else:
                made.append(step)
        return made

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:5.0f} s] {text}", flush=True)

    # The beginning

    def prepare(self, step: Step) -> None:
        """Start a step's processes: they import what they need, and wait."""
        if step.name == "tests" or step.name in self.ready:
            return
        command = python("-m", "benchmarks.run_gpu", "--step", step.name)
        command += ["--dry"] * self.args.dry + ["--cpu"] * (not step.gpu)
        for part in self.args.also:
            command += ["--also", part]
        variables = environment(**self.variables)
        if step.name == "warm":
            variables["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
        if self.args.dry:
            variables["CUDA_VISIBLE_DEVICES"] = ""
            if step.name == "check":
                variables["TRITON_INTERPRET"] = "1"
        shards = min(2, step.shards) if self.args.dry else step.shards
        run = StepRun(*(step, self.folder, command, variables, self.take_of(step)), shards=shards)
        run.prepare()
        self.ready[step.name] = run

    def begin(self) -> None:
        """Describe the machine, and unpack the kernels that were compiled beforehand."""
        code = "import json, torch; from benchmarks import harness; "
        code += f"device = torch.device('{'cpu' if self.args.dry else 'cuda'}'); "
        code += "print(json.dumps(harness.environment(device)))"
        self.ask("environment", code)
        if PREPARED.exists() and not self.args.dry:
            code = "from pathlib import Path; from benchmarks import gpu_cache; "
            self.ask("cache", f"{code}print(gpu_cache.prepare(Path({str(PREPARED)!r})))")
        # The first kernels are compiled with the prepared cache, if it comes at all.
        until = time.time() + PATIENCE
        while "cache" in self.asked and time.time() < until:
            self.answers()
            time.sleep(0.05)
        self.cached = kernels_in(self.cache_folder())
        self.results.cache = {"prepared": len(self.cached), "compiled": 0}

    def ask(self, name: str, code: str) -> None:
        """Run a line of Python in a process of its own; its last line of output is the answer."""
        log = self.folder / f"{name}.log"
        self.asked[name] = Process(python("-c", code), environment(), log)

    def answers(self) -> None:
        """Take what the asked processes have answered."""
        for name, child in list(self.asked.items()):
            if not child.ended():
                continue
            status = child.stop()
            del self.asked[name]
            lines = child.output.read_text(errors="replace").strip().splitlines()
            try:
                if status or not lines:
                    raise ValueError(lines[-1] if lines else f"status {status}")
                if name == "cache":
                    self.variables["TRITON_CACHE_DIR"] = lines[-1]
                else:
                    self.results.environment = json.loads(lines[-1])
                    where = self.results.environment
                    self.say(", ".join(f"{k} {v}" for k, v in where.items()))
            except ValueError as error:
                self.results.notes.append(f"{name}: {error}"[:300])

    def cache_folder(self) -> Path:
        """Where triton keeps what it compiled."""
        home = Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"
        name = "TRITON_CACHE_DIR"
        return Path(self.variables.get(name) or os.environ.get(name) or home)

    # The steps

    def run(self) -> None:
        """All steps, one behind the other."""
        main = [slot for slot in self.slots if not slot.step.beside]
        self.begin()
        for index, slot in enumerate(main):
            beside = [s for s in self.slots if s.step.beside == slot.step.name]
            for one in (slot, *beside):
                try:
                    self.launch(one)
                except Exception as error:
                    self.lost(one.step, error)
            for later in main[index + 1 : index + 2]:
                self.prepare(later.step)
            self.watch(slot)
        for one, _ in list(self.live):
            self.finish(one)

    def launch(self, slot: Slot) -> None:
        """Begin a step's work."""
        step, until = slot.step, self.started + slot.end
        self.begun.add(step.name)
        if step.name == "tests":
            tests = self.tests()
            tests.go(until)
            self.live.append((slot, tests))
            what = f"{'xdist' if tests.xdist else 'own shards'}, {tests.count} processes"
            self.say(f"{step.name}: begun ({what})")
            return
        self.prepare(step)
        run = self.ready.pop(step.name)
        given = self.given()
        items = self.items(step, given)
        run.go(items, given, until)
        self.live.append((slot, run))
        pids = ", ".join(map(str, run.pids()))
        self.say(f"{step.name}: begun, {len(items)} cases, until {slot.end:.0f} s (process {pids})")

    def items(self, step: Step, given: Event) -> list[str]:
        from .gpu import steps

        return steps.items_of(step.name, self.args.dry, self.args.also, given)

    def given(self) -> Event:
        """What a worker may need of the results so far."""
        names = ("environment", "checks", "ceilings", "rows", "kernels", "plans")
        values = {name: getattr(self.results, name) for name in names}
        return {**values, "folder": str(self.folder), "variables": self.variables}

    def tests(self) -> TestRun:
        dry = self.args.dry
        variables = dict(self.variables)
        if dry:
            variables |= {"TRITON_INTERPRET": "1", "FASTDIFF_TEST_BACKEND": "triton"}
            variables |= {"CUDA_VISIBLE_DEVICES": ""}
        here = [path for path in TESTS if (ROOT / path).exists()]
        paths = self.args.tests or (DRY_TESTS if dry else here)
        count = 2 if dry else processes()
        xdist = False if self.args.no_xdist else None
        return TestRun(paths, self.folder, count=count, xdist=xdist, variables=variables,
                       seconds=60.0)  # fmt: skip

    def watch(self, slot: Slot) -> None:
        """Wait for a step, and for what uses the GPU beside it."""
        kept = time.time()
        while any(one is slot or one.step.gpu for one, _ in self.live):
            self.answers()
            for one, run in list(self.live):
                try:
                    over = run.poll()
                except Exception as error:
                    self.lost(one.step, error)
                    over = True
                if over or time.time() > self.started + one.end:
                    self.finish(one)
                elif isinstance(run, TestRun) and time.time() > kept + 10:
                    kept, self.results.tests = time.time(), run.result()
                    self.save()
            time.sleep(0.1)

    def lost(self, step: Step, error: Exception) -> None:
        """A fault of this process costs the step alone."""
        why = f"{type(error).__name__}: {error}"
        self.results.failed[step.name] = {"failed": why, "log": traceback.format_exc()}
        self.say(f"{step.name}: FAILED: {why}")

    def finish(self, slot: Slot) -> None:
        """End a step, and keep what it found."""
        for one, run in list(self.live):
            if one is not slot:
                continue
            self.live.remove((one, run))
            run.stop()
            if isinstance(run, TestRun):
                self.results.tests = run.result()
                self.say(f"tests: {self.results.tests['summary']}")
            elif run.left() and not slot.step.beside:
                self.results.skipped[slot.step.name] = run.left()
                self.say(f"{slot.step.name}: no time for {len(run.left())} cases")
        compiled = kernels_in(self.cache_folder()) - self.cached
        self.results.cache["compiled"] = len(compiled)
        self.save()

    def take_of(self, step: Step) -> Callable[[Event], None]:
        def take(event: Event) -> None:
            self.results.take(event, extra=step.extra)
            self.say(f"{step.name}: {event.get('name', '')}: {found.progress(event)}")
            self.save()

        return take

    # The end

    def save(self) -> None:
        """Write what there is; not before the machine's name is known, which the files bear."""
        if self.results.environment or time.time() > self.started + 60:
            self.results.save()

    def close(self) -> None:
        """Stop what still runs, write everything, print the summary."""
        self.answers()
        for process in (*(run for _, run in self.live), *self.ready.values(), *self.asked.values()):
            process.stop()
        for slot in self.slots:
            if slot.step.name not in self.begun:
                self.results.skipped[slot.step.name] = ["everything"]
        self.results.save(closing=True)
        with contextlib.suppress(OSError):
            self.results.save_logs(sorted(self.folder.glob("*.log")))
        print()
        print("\n".join(self.results.summary()), flush=True)


def has_profiler() -> bool:
    """Whether Nsight Compute is here; asked without importing torch."""
    import glob
    import shutil

    places = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
    return shutil.which("ncu") is not None or any(glob.glob(place) for place in places)


def kernels_in(folder: Path) -> set[str]:
    """Our kernels in a cache of triton: those that Inductor did not make."""
    return {
        f"{path.parent.name}/{path.name}"
        for path in folder.glob("*/__grp__*.json")
        if not path.name.startswith("__grp__triton_")
    }


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A polite end from outside still writes the results."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    made.add_argument("--out", default=str(ROOT / "benchmarks" / "results"), help="folder")
    made.add_argument("--tests", nargs="*", help="files of tests, in place of the kernels'")
    made.add_argument(
        *("--also",), action="append", default=[], choices=ALSO, metavar="PART",
        help=f"a part that is left out by default, of {', '.join(ALSO)}; may be repeated",
    )  # fmt: skip
    made.add_argument("--cold", action="store_true", help="compile nothing beside the tests")
    made.add_argument("--no-xdist", action="store_true", help="share the tests out without xdist")
    made.add_argument("--dry", action="store_true", help="on the CPU, tiny: to try this script")
    for hidden in ("--step", "--work", "--events"):
        made.add_argument(hidden, help=argparse.SUPPRESS)
    made.add_argument("--target", action="append", help=argparse.SUPPRESS)
    made.add_argument("--cpu", action="store_true", help=argparse.SUPPRESS)
    return made


def gpu_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status."""
    args = parser().parse_args(arguments)
    if args.step or args.target:
        from .gpu import steps

        if args.target:
            return steps.target(args.target, args.dry, args.also)
        files = Path(args.work), Path(args.events)
        status = steps.worker(args.step, *files, args.dry, args.also, gpu=not args.cpu)
        sys.stdout.flush()
        os._exit(status)  # the next step waits: no time to take a context apart
    run = Run(args)
    run.prepare(run.slots[0].step)  # it imports torch while this process does
    if not args.dry and not gpu_is_here():
        run.ready[run.slots[0].step.name].stop()
        print("run_gpu: torch sees no GPU here; --dry tries the script on the CPU")
        return 2
    print("\n".join(run.results.plan), flush=True)
    try:
        with terminated_as_interrupted():
            run.run()
    except KeyboardInterrupt:
        run.results.failed["run"] = {"failed": "interrupted"}
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        run.results.failed["run"] = {"failed": why, "log": traceback.format_exc()}
    finally:
        run.close()
    return 0 if run.results.good() else 1


if __name__ == "__main__":
    sys.exit(main())
