"""The kernels' tests on all cores: by xdist where it is installed, else by our own processes."""

from __future__ import annotations

import importlib.util
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pytest_records
from .workers import Process, environment, python, stop_all

# cuBLAS repeats its results with a workspace of a fixed size alone, and the tests ask for that.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
TEXTS = 40  # failures of which the whole text is kept
TRIES = 6  # processes of one shard, at most


def processes() -> int:
    """One for each core, less two for what runs beside."""
    return max(1, (os.cpu_count() or 1) - 2)


class TestRun:
    """A run of pytest in several processes.

    Args:
        paths: files or folders of tests, with pytest's own options.
        folder: for logs and records.
        count: processes.
        xdist: whether xdist shares the tests out; else a process takes every n-th block, and is
            begun anew behind a test that ended it.
        variables: of the environment, besides those of `VARIABLES`.
        seconds: that one test may take.
    """

    __test__ = False

    def __init__(
        self,
        paths: Sequence[str],
        folder: Path,
        *,
        count: int,
        xdist: bool | None = None,
        variables: Mapping[str, str] | None = None,
        seconds: float = 90.0,
    ) -> None:
        self.folder, self.records = folder, folder / "records"
        self.records.mkdir(parents=True, exist_ok=True)
        if xdist is None:
            xdist = importlib.util.find_spec("xdist") is not None
        self.xdist, self.count = xdist, count
        command = ["-m", "pytest", *paths, "-o", "addopts=", "-W", "default", "-q", "--tb=short"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_records"]
        command += ["-m", "not slow"]
        if xdist:
            # Neighbours share kernels: worksteal leaves them together.
            command += ["-n", str(count), "--dist", "worksteal"]
            command += ["--max-worker-restart", str(TRIES * count)]
        else:
            command += ["-p", "no:xdist"]
        self.command = python(*command)
        self.variables = environment(
            **VARIABLES,
            **(variables or {}),
            FASTDIFF_RECORDS=str(self.records),
            FASTDIFF_TEST_SECONDS=str(seconds),
        )
        self.runs: list[Process] = []
        self.tries: Counter[int] = Counter()
        self.statuses: list[int | None] = []
        self.until = 0.0

    @property
    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("tests-*.log"))

    def go(self, until: float) -> None:
        """Start everything."""
        self.until = until
        shards = 1 if self.xdist else self.count
        self.runs = [self._start(index) for index in range(shards)]
        self.statuses = [None] * shards

    def _start(self, index: int) -> Process:
        self.tries[index] += 1
        shard = {} if self.xdist else {"FASTDIFF_SHARD": f"{index}/{self.count}"}
        log = self.folder / f"tests-{index}.log"
        return Process(self.command, self.variables | shard, log)

    def pids(self) -> list[int]:
        return [process.pid for process in self.runs if not process.ended()]

    def poll(self) -> bool:
        """True where nothing runs any more. A shard that a test ended is begun anew."""
        if time.time() > self.until:
            return True
        over = True
        for index, process in enumerate(self.runs):
            if self.statuses[index] is not None:
                continue
            status = process.status()
            if status is None:
                over = False
            elif not self.xdist and status not in (0, 1, 2, 4, 5) and self.tries[index] < TRIES:
                self.runs[index] = self._start(index)
                over = False
            else:
                self.statuses[index] = status
        return over

    def stop(self) -> None:
        stop_all(self.runs)

    def result(self) -> dict[str, Any]:
        """What the tests said so far; see `judge`."""
        texts = [path.read_text(errors="replace") for path in self.logs]
        return judge(pytest_records.read(self.records), self.statuses, texts)


def judge(
    records: Mapping[str, Mapping[str, Any]], statuses: Sequence[int | None], logs: Sequence[str]
) -> dict[str, Any]:
    """Put the records of all processes together.

    Args:
        records: by test, see `pytest_records.read`.
        statuses: exit status of each process; None where it was stopped for time.
        logs: output of each process.
    """
    stopped = any(status is None for status in statuses)
    outcomes = {test: record["outcome"] for test, record in records.items()}
    running = [test for test, outcome in outcomes.items() if outcome == "running"]
    for test in running:
        outcomes[test] = "stopped" if stopped else "crashed"
    counts = Counter(outcomes.values())
    bad = ("failed", "error", "crashed")
    failed = sorted(test for test, outcome in outcomes.items() if outcome in bad)
    parts = [f"{n} {outcome}" for outcome, n in sorted(counts.items())] or ["none ran"]
    if stopped:
        parts.append("stopped for time")
    # 5: a shard without tests of its own.
    odd = sorted({s for s in statuses if s not in (None, 0, 1, 3, 5)}, key=str)
    if odd and not failed:
        parts.append(f"pytest's exit status {', '.join(map(str, odd))}")
    good = not failed and not stopped and not odd and counts["passed"] > 0
    found: dict[str, Any] = {
        "summary": ", ".join(parts),
        "good": good,
        "counts": dict(counts),
        "failed": failed,
        "statuses": list(statuses),
        "texts": {test: records[test]["text"] for test in failed[:TEXTS]},
    }
    if not good and not failed:
        found["log"] = "\n".join(text[-3000:] for text in logs[:3])
    return found
