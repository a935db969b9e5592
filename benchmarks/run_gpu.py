"""Everything that a GPU has to say, in one command and in minutes: `make bench-gpu`.

    PYTHONPATH=.:kernels python3 -m benchmarks.run_gpu [--minutes 8] [--out FOLDER]

First the kernels' tests run, and beside them the compilers of all that will be timed, so that they
find their work done later. Then the benchmarks run one after another, the most important first,
each in a time of its own; what there is no time for is listed. A case that breaks the GPU's context
costs that case alone: the rest runs in a new process. FOLDER/<gpu>-<date>.json has everything, the
.md beside it what one reads first; both are rewritten as rows arrive.

Exit status: 0 all tests passed and every case that was begun has numbers; 1 not so; 2 no GPU.
Needs torch, triton, numpy, einops, pytest, pytest-benchmark and what the tests import.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import bench_models, bench_ops, harness
from .bench_ops import Options
from .harness import DeviceLost, Refused, Row

ROOT = harness.ROOT
LOST = 3  # exit status of a worker whose context broke
# Seconds that one case may take, and at the end to write everything down.
CAP, CAP_MODEL, CAP_COMPILED, CLOSING = 45.0, 110.0, 150.0, 8.0


@dataclass(frozen=True)
class Job:
    """One case with its name, and the seconds it may take."""

    name: str
    case: bench_ops.Case | bench_models.Case
    cap: float

    def options(self, args: argparse.Namespace) -> Options:
        model = isinstance(self.case, bench_models.Case)
        seconds = 0.2 if args.dry else (5.0 if model else 1.5)
        rounds = 3 if args.dry else 11
        return Options(
            compile=not args.dry,
            max_autotune=args.max_autotune,
            rounds=rounds,
            seconds=seconds,
        )

    def run(self, device: torch.device, args: argparse.Namespace) -> list[Row]:
        if isinstance(self.case, bench_models.Case):
            return bench_models.run_case(self.case, device, self.options(args))
        return bench_ops.run_case(self.case, device, self.options(args))

    def warm(self, device: torch.device, args: argparse.Namespace) -> None:
        if isinstance(self.case, bench_models.Case):
            bench_models.warm(self.case, device, self.options(args))
        else:
            bench_ops.warm(self.case, device, self.options(args))


def jobs(dry: bool) -> list[Job]:
    """All cases, in the order in which they matter."""

    def cap(case: bench_models.Case) -> float:
        return CAP_COMPILED if case.compiled else CAP_MODEL

    ops = [Job(c.name, c, CAP) for c in (bench_ops.TINY if dry else bench_ops.GPU)]
    models = [Job(c.name, c, cap(c)) for c in (bench_models.TINY if dry else bench_models.GPU)]
    return [*ops[:9], *models[:3], *ops[9:16], *models[3:4], *ops[16:], *models[4:]]


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if args.dry else "cuda")


# The workers: processes of their own.


def worker(args: argparse.Namespace) -> int:
    """Run the cases that are not done yet, and write a line of JSON for each event."""
    device = device_of(args)
    torch.backends.cudnn.benchmark = True
    done = set(json.loads(Path(args.done).read_text()))
    with open(args.worker, "a", encoding="utf-8") as file:

        def tell(**event: Any) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        if not args.dry and "ceilings" not in done:
            tell(begin="ceilings")
            tell(name="ceilings", ceilings=ceilings(device))
        for job in jobs(args.dry):
            if job.name in done:
                continue
            if time.time() > args.until:
                break
            tell(begin=job.name)
            started = time.perf_counter()
            try:
                rows = job.run(device, args)
                took = time.perf_counter() - started
                tell(name=job.name, rows=rows, took=took, state=harness.gpu_state())
            except DeviceLost as error:
                tell(name=job.name, failed=f"the GPU's context broke: {error}")
                return LOST
            except Refused as error:
                tell(name=job.name, failed=f"refused, wrong result: {error}")
            except Exception as error:
                text = harness.clean(traceback.format_exc())
                try:
                    why = harness.reason(error, device)
                except DeviceLost:
                    tell(name=job.name, failed=f"the GPU's context broke: {error}", traceback=text)
                    return LOST
                tell(name=job.name, failed=why, traceback=text)
            harness.free(device)
    return 0


def ceilings(device: torch.device) -> Row:
    """What this GPU reaches: a large copy, and a large product of random matrices."""
    source = torch.randn(2**29, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = harness.measure(
        {"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, seconds=1
    )
    row: Row = {}
    for name, work in (("copy", 2 * source.numel() * 4), ("product", 2 * 8192**3)):
        timing = found[name]
        if isinstance(timing, harness.Timing):
            row[f"{name}_tera_per_second"] = work / timing.seconds / 1e12
    return row


def warm(args: argparse.Namespace) -> int:
    """Compile one share of the cases: the rivals' compilers take most of the time."""
    device = device_of(args)
    torch.backends.cudnn.benchmark = True
    os.nice(5)  # the tests come first
    part, parts = map(int, args.warm.split("/"))
    everything = jobs(args.dry)
    heavy = [j for j in everything if isinstance(j.case, bench_models.Case) and j.case.compiled]
    models = [
        j for j in everything if isinstance(j.case, bench_models.Case) and j.case.compiled is None
    ]
    ops = [j for j in everything if isinstance(j.case, bench_ops.Case)]
    shares = [heavy, models, *(ops[i :: parts - 2] for i in range(parts - 2))]
    for job in shares[part]:
        with contextlib.suppress(Exception):
            job.warm(device, args)
        harness.free(device)
    return 0


# The parent: starts them, watches the clock, writes the results. It never touches the GPU.


class Run:
    """One run of everything, and its clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.time()
        self.end = self.started + 60 * args.minutes
        self.folder = Path(tempfile.mkdtemp(prefix="fastdiff-bench-"))
        self.tests: Row = {"summary": "not run"}
        self.rows: list[Row] = []
        self.done: dict[str, str] = {}
        self.failed: dict[str, Row] = {}
        self.took: dict[str, float] = {}
        self.ceilings: Row = {}
        self.states: dict[str, Row] = {}
        self.environment = self.describe()
        device = self.environment.get("gpu", "cpu" if args.dry else "gpu")
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        date = time.strftime("%Y-%m-%d", time.gmtime())
        self.out = Path(args.out) / f"{slug}-{date}.json"

    def describe(self) -> Row:
        """`harness.environment`, in a process of its own."""
        code = "import json, torch; from benchmarks import harness; "
        code += f"print(json.dumps(harness.environment(torch.device('{device_of(self.args)}'))))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"failed": harness.clean(done.stderr[-2000:])}
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found

    def left(self) -> float:
        return self.end - time.time()

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:5.0f} s] {text}", flush=True)

    def start(self, *arguments: str, output: Path | None = None, **extra: str) -> Process:
        command = [sys.executable, *arguments]
        return Process(command, environment(**extra), output or self.folder / "log")

    # Tests, and beside them the compilers.

    def test_and_warm(self, seconds: float) -> None:
        args, flags = self.args, ["--dry"] * self.args.dry
        until = time.time() + seconds
        log = self.folder / "tests"
        command = ["-m", "pytest", *args.tests, "-o", "addopts=", "-W", "default", "-v"]
        command += ["--tb=short", "-p", "no:cacheprovider", "-m", "not slow"]
        if not args.dry and importlib.util.find_spec("xdist"):
            command += ["-n", "8"]
        # cuBLAS needs a fixed workspace to be deterministic, which the tests ask for.
        tests = self.start(*command, output=log, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        parts = 0 if args.dry or args.cold else 6
        module = ["-m", "benchmarks.run_gpu", *flags, *["--max-autotune"] * args.max_autotune]
        warmers = [
            self.start(*module, "--warm", f"{i}/{parts}", TORCHINDUCTOR_COMPILE_THREADS="4")
            for i in range(parts)
        ]
        self.say(f"tests, and {parts} compilers beside them")
        told = False
        try:
            while time.time() < until:
                over = tests.ended()
                if over and not told:
                    told = True
                    self.tests = judge(log.read_text(errors="replace"), tests.status())
                    self.say(f"tests: {self.tests['summary']}")
                if over and all(process.ended() for process in warmers):
                    break
                time.sleep(0.3)
        finally:
            running = sum(not process.ended() for process in warmers)
            if running:
                self.say(f"{running} compilers had no time to finish")
            for process in [tests, *warmers]:
                process.stop()
            if not told:
                self.tests = judge(log.read_text(errors="replace"), None)
                self.say(f"tests: {self.tests['summary']}")
        self.save()

    # The benchmarks.

    def benchmark(self, until: float) -> None:
        caps = {job.name: job.cap for job in jobs(self.args.dry)} | {"ceilings": 60.0}
        events, done, output = (self.folder / name for name in ("events", "done", "output"))
        seen = 0
        while time.time() < until and set(caps) - set(self.done) - {"ceilings"}:
            done.write_text(json.dumps(sorted(self.done)))
            events.touch()
            flags = ["--dry"] * self.args.dry + ["--max-autotune"] * self.args.max_autotune
            command = ["-m", "benchmarks.run_gpu", *flags, "--worker", str(events)]
            command += ["--done", str(done), "--until", str(until)]
            process = self.start(*command, output=output)
            current, since = "", time.time()
            stopped = ""
            while not stopped:
                over = process.ended()
                text = events.read_text()
                lines = text[: text.rfind("\n") + 1].splitlines()  # one may be half written
                for line in lines[seen:]:
                    event = json.loads(line)
                    if "begin" in event:
                        current, since = event["begin"], time.time()
                    else:
                        self.take(event)
                        current = ""
                seen = len(lines)
                if over:
                    break
                if current and time.time() - since > caps[current]:
                    stopped = f"stopped after the {caps[current]:.0f} s it may take"
                elif time.time() > until + CLOSING / 2:
                    stopped, current = "the time is over", ""  # one more without a number
                time.sleep(0.2)
            status = process.stop()
            log = harness.clean(output.read_text(errors="replace")[-1500:])
            if current:
                why = stopped or f"the process ended with status {status}"
                self.take({"name": current, "failed": why, "traceback": log})
            elif status != 0 and status != LOST and not stopped:
                self.failed["the benchmarks' process"] = {"failed": f"status {status}: {log}"}
                break
            elif status == 0:
                break

    def take(self, event: Row) -> None:
        """One event of a worker."""
        name = event["name"]
        if "failed" in event:
            self.done[name] = "failed"
            self.failed[name] = event
            self.say(f"{name}: {event['failed']}")
        else:
            self.done[name] = "ok"
            self.ceilings |= event.get("ceilings", {})
            self.rows += event.get("rows", [])
            self.took[name] = event.get("took", 0.0)
            self.states[name] = event.get("state", {})
            self.say(f"{name}: {line_of(event)}")
        self.save()

    # The results.

    def skipped(self) -> list[str]:
        return [job.name for job in jobs(self.args.dry) if job.name not in self.done]

    def good(self) -> bool:
        return bool(self.tests.get("good")) and not self.failed and bool(self.rows)

    def save(self) -> None:
        found = {
            "environment": self.environment,
            "ceilings": self.ceilings,
            "tests": self.tests,
            "good": self.good(),
            "rows": self.rows,
            "failed": self.failed,
            "skipped": self.skipped(),
            "took": self.took,
            "states": self.states,
            "seconds": time.time() - self.started,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.out, json.dumps(found, indent=1) + "\n"),
            (self.out.with_suffix(".md"), self.markdown()),
        ):
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)

    def markdown(self) -> str:
        where = self.environment
        state = ", ".join(f"{k} {v}" for k, v in where.items() if k not in ("date", "commit"))
        ops = [row for row in self.rows if "op" in row]
        models = [row for row in self.rows if "op" not in row]
        text = [
            f"# {where.get('gpu', 'CPU')}, {where.get('date', '')}",
            "",
            f"Commit {where.get('commit')}; {state}.",
            "",
            f"Ceilings: {', '.join(f'{k} {v:.3f}' for k, v in self.ceilings.items()) or '-'}.",
            f"Tests: {self.tests['summary']}.",
            "Made by `make bench-gpu`; what the columns mean stands in `benchmarks/bench_ops.py`",
            "and `benchmarks/bench_models.py`. Times are medians of the GPU's, without Python's.",
        ]
        for title, rows in (("Ops", ops), ("Models", models)):
            if rows:
                text += ["", f"## {title}", "", harness.table(rows, markdown=True)]
        absent = Counter(
            f"{name}: {value[5:]}"
            for row in self.rows
            for name, value in row.get("times_us", {}).items()
            if isinstance(value, str)
        )
        lists = {
            "Rivals without a number": [f"{why} ({n} rows)" for why, n in absent.items()],
            "Without a number": [f"{n}: {event['failed']}" for n, event in self.failed.items()],
            "No time for": self.skipped(),
            "Tests that failed": self.tests.get("failed", []),
        }
        for title, items in lists.items():
            if items:
                text += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(text) + "\n"


@dataclass
class Process:
    """A child in a process group of its own, so that its children end with it."""

    command: Sequence[str]
    variables: dict[str, str]
    output: Path

    def __post_init__(self) -> None:
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def status(self) -> int | None:
        return self.process.poll()

    def stop(self) -> int:
        """End it if it runs: first asked, then made; its exit status."""
        for sign, seconds in ((signal.SIGINT, 3.0), (signal.SIGKILL, 5.0)):
            if self.ended():
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it started and left
        return self.process.poll() or 0


def environment(**extra: str) -> dict[str, str]:
    """Variables of the children: the checkout's packages, no interpreter, output at once."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **extra}
    variables.setdefault("OMP_NUM_THREADS", "2")
    return variables


_RESULT = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:(\S+::.*?) )?(PASSED|FAILED|ERROR|SKIPPED)\b(.*)"
)


def judge(log: str, status: int | None) -> Row:
    """What pytest's verbose output says; it may have been cut off.

    Args:
        log: the output.
        status: pytest's exit status, None where it was stopped.
    """
    outcomes: dict[str, str] = {}
    body = log.split("short test summary info")[0]
    for line in body.splitlines():
        match = _RESULT.match(line)
        if match is None:
            continue
        test = (match[1] or match[3]).strip().split(" [ ")[0]
        if "::" in test and outcomes.get(test) not in ("FAILED", "ERROR"):
            outcomes[test] = match[2]
    counts = Counter(outcomes.values())
    failed = sorted(test for test, what in outcomes.items() if what in ("FAILED", "ERROR"))
    parts = [f"{n} {what.lower()}" for what, n in sorted(counts.items())] or ["none ran"]
    if status is None:
        parts.append("stopped for time")
    elif status not in (0, 1):
        parts.append(f"pytest's exit status {status}")
    found: Row = {
        "summary": ", ".join(parts),
        "good": status == 0 and counts["PASSED"] > 0,
        "counts": dict(counts),
        "failed": failed,
        "status": status,
    }
    if status != 0:
        found["log"] = harness.clean(log[-8000:])
    return found


def line_of(event: Row) -> str:
    """A case in one line."""
    parts = []
    for row in event.get("rows", []):
        if row["direction"] == "forward+backward":
            continue
        text = f"{row['direction']} {row['us']:.1f} us"
        if "of_floor" in row:
            text += f", {row['of_floor']:.0%} of floor"
        if "over_floor" in row:
            text += f", {row['over_floor']:.2f} x floor"
        if "over_best" in row:
            text += f", {row['over_best']:.2f} x {row['best']}"
        if row.get("goal"):
            text += f" ({row['goal']})"
        parts.append(text)
    if "ceilings" in event:
        parts.append(", ".join(f"{k} {v:.3f}" for k, v in event["ceilings"].items()))
    return "; ".join(parts)


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
    made.add_argument("--tests", nargs="*", default=["tests/kernels/backends"])
    made.add_argument("--max-autotune", action="store_true", help="one more rival; slow")
    made.add_argument("--cold", action="store_true", help="do not compile ahead")
    made.add_argument("--dry", action="store_true", help="on the CPU, tiny: to try this script")
    for hidden in ("--worker", "--done", "--warm"):
        made.add_argument(hidden, help=argparse.SUPPRESS)
    made.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; the exit status."""
    args = parser().parse_args(arguments)
    if args.worker:
        return worker(args)
    if args.warm:
        return warm(args)
    if not args.dry and not torch.cuda.is_available():
        print("run_gpu: torch sees no GPU here; --dry tries the script on the CPU")
        return 2
    run = Run(args)
    run.say(", ".join(f"{k} {v}" for k, v in run.environment.items()))
    try:
        with terminated_as_interrupted():
            # The tests and compilers may have three eighths of the time, not more.
            run.test_and_warm(0.375 * run.left())
            run.benchmark(run.end - CLOSING)
    except KeyboardInterrupt:
        run.failed["run"] = {"failed": "interrupted"}
    finally:
        run.save()
    run.say(f"{len(run.rows)} rows in {harness.clean(str(run.out))}")
    if run.skipped():
        run.say(f"no time for: {'; '.join(run.skipped())}")
    for name, event in run.failed.items():
        run.say(f"no number: {name}: {event['failed']}")
    run.say(f"tests: {run.tests['summary']}; {'all good' if run.good() else 'NOT all good'}")
    return 0 if run.good() else 1


if __name__ == "__main__":
    raise SystemExit(main())
