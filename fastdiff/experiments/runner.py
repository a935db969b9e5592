"""Runs rows, each in a process of its own; started again it goes on.

In the grid's folder: `results.jsonl` (a line a finished row), `runs/` (what the trainer writes),
`data/`, `features/`, `pictures/`, `logs/`. Each line names the commit, the versions and the hashes
that its numbers come from.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from fastdiff._show_config import cpu_kernels, processor_name
from fastdiff.experiments.grid import DEFAULT, FULL, Row, Scale, parameters, rows, settings_of

RESULTS = "results.jsonl"
ROOT = Path(__file__).resolve().parents[2]
LOCK_PATIENCE_S = 60
POLL_S = 0.2


def read_results(file: Path) -> list[dict[str, Any]]:
    """Finished rows, the newest of each row and settings; a line that was cut off is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
                key = result["row"], result["settings"]
                found.pop(key, None)  # so that the newest come last
                found[key] = result
            except (ValueError, KeyError, TypeError):
                continue
    return list(found.values())


def append_result(file: Path, result: dict[str, Any]) -> None:
    """Add a line; one that a kill cut off is ended first."""
    with file.open("ab+") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
            if opened.read(1) != b"\n":
                opened.write(b"\n")
        opened.write(json.dumps(result).encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())


def commit() -> str:
    """The checkout's commit, "+" where files differ from it; "unknown" outside of one."""
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(ROOT), *command], check=True, capture_output=True, text=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told[0] + ("+" if told[1] else "")


def run_row(row: Row, scale: Scale, out: Path) -> dict[str, Any]:
    """Train a row, from its last checkpoint if there is one, and measure it.

    Returns:
        The line for `results.jsonl`.
    """
    import torch

    from fastdiff.experiments.evaluate import train_and_measure

    if scale.threads is not None:
        torch.set_num_threads(scale.threads)
    found = train_and_measure(row, scale, out)
    cuda = torch.cuda.is_available()
    return {
        "row": row.id,
        "experiment": row.experiment,
        "name": row.name,
        "title": row.title,
        "seed": row.seed,
        "task": row.task,
        "side": row.side,
        "paper": row.paper,
        "settings": settings_of(row, scale),
        "steps": row.steps,
        "batch_size": scale.batch_size,
        "parameters": parameters(row.model),
        "commit": commit(),
        "torch": torch.__version__,
        "machine": (
            torch.cuda.get_device_name() if cuda else f"{processor_name()}, {cpu_kernels()}"
        ),
        "threads": torch.get_num_threads(),
        **found,
    }


class Stopped(SystemExit):
    """A signal asked the runner to stop; the run in flight has saved its checkpoint."""


class Runner:
    """Runs what is missing.

    Args:
        wanted: The rows.
        scale: The budget.
        arguments: Of the command line, which a row's process is given too.
        out: The grid's folder; locked while this or a row's process lives.
        jobs: Rows at a time; each GPU takes its share of them. What a row tells while it runs goes
            to `logs/` when there are several.
    """

    def __init__(
        self,
        wanted: Sequence[Row],
        scale: Scale,
        arguments: Sequence[str],
        out: Path,
        jobs: int = 1,
    ) -> None:
        self.wanted, self.scale, self.arguments, self.out = wanted, scale, arguments, out
        self.jobs = jobs
        out.mkdir(parents=True, exist_ok=True)
        self._lock = (out / ".lock").open("a")
        self._take_lock()
        self._running: dict[int, tuple[Row, subprocess.Popen[bytes]]] = {}  # by slot
        self._signal: int | None = None

    def _take_lock(self) -> None:
        # A row's process holds the lock, too: after a kill -9 of the runner it first saves.
        for waited in range(LOCK_PATIENCE_S + 1):
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waited == 0:
                    print(f"{self.out} is in use; waiting for {LOCK_PATIENCE_S} s", file=sys.stderr)
                time.sleep(1)
        sys.exit(f"{self.out} is in use by another runner")

    def run(self) -> int:
        """Run; the number of rows that failed.

        Raises:
            Stopped: After SIGINT or SIGTERM.
        """
        file = self.out / RESULTS
        done = {(r["row"], r["settings"]) for r in read_results(file)}
        left = [r for r in self.wanted if (r.id, settings_of(r, self.scale)) not in done]
        print(
            f"{len(self.wanted) - len(left)} of {len(self.wanted)} rows are done", file=sys.stderr
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        failed, finished, started = 0, 0, time.monotonic()
        waiting = list(left)
        while (waiting and self._signal is None) or self._running:
            while waiting and len(self._running) < self.jobs and self._signal is None:
                row, rest = waiting.pop(0), ""
                if finished:
                    minutes = (time.monotonic() - started) / 60 / finished
                    rest = f", about {minutes * (len(left) - finished):.0f} min left"
                count = len(left) - len(waiting)
                print(f"[{count}/{len(left)}] {row.id}: {row.title}{rest}", file=sys.stderr)
                self._start(row)
            row, result = self._next_to_end()
            finished += 1
            if result is not None:
                append_result(file, result)
            elif self._signal is None:
                failed += 1
                print(f"{row.id} failed; the others go on{self._where(row)}", file=sys.stderr)
        if self._signal is not None:
            raise Stopped(128 + self._signal)
        return failed

    def _start(self, row: Row) -> None:
        self._answer(row).unlink(missing_ok=True)
        slot = next(s for s in range(self.jobs) if s not in self._running)
        command = [sys.executable, "-m", "fastdiff.experiments.runner", *self.arguments]
        log = None
        if self.jobs > 1:
            self._log(row).parent.mkdir(exist_ok=True)
            log = self._log(row).open("ab")
        # A session of its own: Ctrl-C reaches the runner alone, which tells it on. Its standard
        # input closes when the runner is gone, however that came.
        child = subprocess.Popen(
            [*command, "--run", row.id],
            stdin=subprocess.PIPE,
            stderr=log,
            pass_fds=(self._lock.fileno(),),
            start_new_session=True,
            env={**os.environ, **_gpu_of(slot)},
        )
        if log is not None:
            log.close()
        self._running[slot] = row, child
        if self._signal is not None:
            child.terminate()

    def _next_to_end(self) -> tuple[Row, dict[str, Any] | None]:
        while True:
            for slot, (row, child) in self._running.items():
                code = child.poll()
                if code is not None:
                    del self._running[slot]
                    assert child.stdin is not None
                    child.stdin.close()
                    answer = self._answer(row)
                    whole = code == 0 and answer.is_file()
                    return row, json.loads(answer.read_text()) if whole else None
            time.sleep(POLL_S)

    def _answer(self, row: Row) -> Path:
        return self.out / "answers" / f"{row.id.replace('/', '-')}.json"

    def _log(self, row: Row) -> Path:
        return self.out / "logs" / f"{row.id.replace('/', '-')}.txt"

    def _where(self, row: Row) -> str:
        return f"; see {self._log(row)}" if self.jobs > 1 else ""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        for _, child in list(self._running.values()):
            if child.poll() is None:
                child.terminate()


def _gpu_of(slot: int) -> dict[str, str]:
    """The environment that gives a slot its GPU, in turn; nothing where there is one or none."""
    import torch

    n = torch.cuda.device_count()
    if n < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(n)]
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]}


def _stop_with_the_runner() -> None:
    """End this process as SIGTERM does once its standard input is closed."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def make_scale(options: argparse.Namespace) -> Scale:
    """The budget that a command line asks for."""
    scale = FULL if options.full else DEFAULT
    small: dict[str, Any] = {}
    if options.steps is not None:
        names = ("steps", "figure1_steps", "caption_steps", "extractor_steps")
        small |= dict.fromkeys(names, options.steps)
        small["snapshots"] = tuple(sorted({max(1, options.steps // 4), options.steps}))
    if options.samples is not None:
        n = options.samples
        small |= {"samples": n, "figure1_samples": n, "held_out": n, "real": 4 * n}
    if options.pictures is not None:
        small["pictures"] = options.pictures
    if options.batch_size is not None:
        small["batch_size"] = options.batch_size
    return dataclasses.replace(scale, **small)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train/experiments.py",
        description="The paper's experiments again, on the embedded scenes, at equal budgets.",
    )
    parser.add_argument("--list", action="store_true", help="show the rows and what is done")
    parser.add_argument(
        "--only", action="append", metavar="ROW", help="rows by name, * allowed; may be repeated"
    )
    parser.add_argument(
        "--all", action="store_true", help="the figures' rows, too; without it Tables 3 and 4"
    )
    parser.add_argument("--full", action="store_true", help="the budget of a GPU, three seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="FOLDER")
    parser.add_argument("--report", type=Path, metavar="FILE.md", help="write the report instead")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps of a row")
    parser.add_argument("--samples", type=int, metavar="N", help="pictures of every measurement")
    parser.add_argument("--pictures", type=int, metavar="N", help="of the training set")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    parser.add_argument("--run", metavar="ROW", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("steps", "samples", "pictures", "batch_size", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.samples is not None and options.samples < 2:
        parser.error(f"--samples {options.samples}: a variance needs at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """What `train/experiments.py` does."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    scale, out = make_scale(options), options.out
    every = rows(scale)
    if options.run is not None:
        return _run_one(next(row for row in every if row.id == options.run), scale, out)
    if options.report is not None:
        from fastdiff.experiments.report import write_report

        try:
            print(write_report(out, options.report))
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"train/experiments.py: {error}")
        return None
    patterns = options.only or (["*"] if options.all or options.list else ["table*"])
    wanted = [r for r in every if any(fnmatch(r.id, p) for p in patterns)]
    unknown = [p for p in patterns if not any(fnmatch(r.id, p) for r in every)]
    if unknown:
        sys.exit(f"train/experiments.py: no row {unknown[0]!r}; --list shows them")
    if options.list:
        done = {(r["row"], r["settings"]) for r in read_results(out / RESULTS)}
        for row in wanted:
            state = "done" if (row.id, settings_of(row, scale)) in done else "-"
            size = f"{parameters(row.model) / 1e6:6.2f}M"
            print(f"{row.id:36s} {row.side:3d} px  {size}  {state:5s} {row.title}")
        return None
    failed = Runner(wanted, scale, arguments, out, options.jobs).run()
    if failed:
        sys.exit(f"train/experiments.py: {failed} of {len(wanted)} rows failed")
    return None


def _run_one(row: Row, scale: Scale, out: Path) -> None:
    from fastdiff.training.cli import log_to_stderr

    log_to_stderr()
    _stop_with_the_runner()
    answer = out / "answers" / f"{row.id.replace('/', '-')}.json"
    result = run_row(row, scale, out)
    answer.parent.mkdir(parents=True, exist_ok=True)
    beside = answer.with_suffix(".partial")
    beside.write_text(json.dumps(result))
    beside.replace(answer)


if __name__ == "__main__":
    main()
