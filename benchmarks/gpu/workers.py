"""The processes of a run as its parent sees them: started, watched, ended, begun anew.

A worker writes a line of JSON to its file of events for every case that it begins and ends. A case
in which the process dies or hangs has failed; the next process takes the cases behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .timetable import Step

ROOT = Path(__file__).resolve().parents[2]
LOST = 3  # exit status of a worker that has reported a broken context
Event = dict[str, Any]


def environment(**extra: str) -> dict[str, str]:
    """Variables of the children: the checkout's packages, output at once, repeatable cuBLAS."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONUNBUFFERED": "1"}
    variables.setdefault("OMP_NUM_THREADS", "2")
    return variables | extra


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, however that happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class Process:
    """A child in a process group of its own, so that its children end with it.

    Attributes:
        command, variables: what runs, in which environment.
        output: file that its output is appended to.
        waits: it has a pipe as its input, and starts its work at the first line (`go`).
    """

    command: Sequence[str]
    variables: dict[str, str]
    output: Path
    waits: bool = False

    def __post_init__(self) -> None:
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.variables,
                stdin=subprocess.PIPE if self.waits else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                bufsize=0,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def go(self) -> None:
        """Let it begin; nothing where it has died already."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def status(self) -> int | None:
        return self.process.poll()

    def stop(self) -> int:
        """End it if it runs: first asked, then made; its exit status."""
        stop_all([self])
        return self.process.poll() or 0

    def send(self, sign: signal.Signals) -> None:
        """To its whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, sign)


def stop_all(processes: Sequence[Process], patience: float = 2.0) -> None:
    """End processes, all at once: together they have so many seconds before they are made to."""
    for sign, seconds in ((signal.SIGINT, patience), (signal.SIGKILL, 5.0)):
        running = [process for process in processes if not process.ended()]
        for process in running:
            process.send(sign)
        until = time.time() + seconds
        while time.time() < until and not all(process.ended() for process in running):
            time.sleep(0.02)
    for process in processes:
        process.send(signal.SIGKILL)  # what it started and left
        if process.process.stdin is not None:
            process.process.stdin.close()


def ending(status: int | None) -> str:
    """How a process ended, in words."""
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


@dataclass
class Worker:
    """One share of a step's cases, and the process that runs them at the moment.

    Attributes:
        step: whose cases they are.
        name: of its files in `folder`.
        command: of the worker; the names of its files are added.
        variables: of its environment.
        take: is handed every event.
    """

    step: Step
    name: str
    folder: Path
    command: Sequence[str]
    variables: dict[str, str]
    take: Callable[[Event], None]
    items: list[str] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    process: Process | None = None
    current: str = ""
    since: float = 0.0
    until: float = 0.0
    finished: bool = False

    def __post_init__(self) -> None:
        files = (self.folder / f"{self.name}.{kind}" for kind in ("work", "events", "log"))
        self.work, self.events, self.log = files
        self.given: Event = {}
        self.read, self.deaths = 0, 0

    def prepare(self) -> None:
        """Start the process, which imports what it needs and waits for `go`."""
        self.events.touch()
        arguments = ["--work", str(self.work), "--events", str(self.events)]
        self.process = Process([*self.command, *arguments], self.variables, self.log, waits=True)

    def go(self, items: Sequence[str], given: Event, until: float) -> None:
        """Begin the cases.

        Args:
            items: their names.
            given: whatever else the worker needs to know.
            until: no case begins behind this time, and none runs on.
        """
        self.items, self.given, self.until = list(items), given, until
        self._begin()

    def _begin(self) -> None:
        left = [item for item in self.items if item not in self.done]
        if not left:
            self.finished = True
            self.stop()
            return
        work = {**self.given, "items": left, "until": self.until}
        self.work.write_text(json.dumps(work), encoding="utf-8")
        if self.process is None or self.process.ended():
            self.stop()  # what the last one left
            with self.events.open("a") as file:
                file.write("\n")  # it may have died within a line
            self.prepare()
        assert self.process is not None
        self.since = time.time()
        self.process.go()

    def poll(self) -> None:
        """Read what happened, and act on a process that died or on a case that takes too long."""
        if self.finished or self.process is None:
            return
        over = self.process.ended()  # asked before the events are read, so that none is missed
        self._read()
        if over:
            self._ended(self.process.stop())
        elif time.time() > self.until:
            self.stop()
            self.current, self.finished = "", True  # one more without a number
        elif self.current and time.time() - self.since > self.step.cap:
            self.process.stop()
            self._fail(f"stopped after the {self.step.cap:.0f} s it may take")
            self._begin()

    def _read(self) -> None:
        with self.events.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self.read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # half a line, of a process that was killed there
            if "begin" in event:
                self.current, self.since = event["begin"], time.time()
                continue
            if "name" in event:
                self.done.add(event["name"])
                self.current = ""
            self.take({**event, "step": self.step.name})

    def _ended(self, status: int) -> None:
        if self.current:
            self._fail(ending(status))
        elif status == 0:
            self.finished = True
            return
        elif status != LOST:
            self.deaths += 1
            if self.deaths >= 2:  # twice outside of any case
                self.finished = True
                self._fail(ending(status))
                return
        self._begin()

    def _fail(self, why: str) -> None:
        tail = self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""
        name, self.current = self.current, ""
        self.done.add(name)
        self.take({"step": self.step.name, "name": name, "failed": why, "log": tail})

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()

    def left(self) -> list[str]:
        """Cases that were not begun, or had no time to end."""
        return [item for item in self.items if item not in self.done]


class StepRun:
    """A step's workers, together."""

    def __init__(
        self,
        step: Step,
        folder: Path,
        command: Sequence[str],
        variables: dict[str, str],
        take: Callable[[Event], None],
        shards: int | None = None,
    ) -> None:
        slug = step.name.replace(" ", "-")
        self.step = step
        self.workers = [
            Worker(step, f"{slug}-{i}", folder, command, variables, take)
            for i in range(shards or step.shards)
        ]

    def prepare(self) -> None:
        for worker in self.workers:
            worker.prepare()

    def go(self, items: Sequence[str], given: Event, until: float) -> None:
        count = len(self.workers)
        for index, worker in enumerate(self.workers):
            worker.go(items[index::count], given, until)

    def pids(self) -> list[int]:
        return [w.process.pid for w in self.workers if w.process and not w.process.ended()]

    def poll(self) -> bool:
        """True where nothing runs any more."""
        for worker in self.workers:
            worker.poll()
        return all(worker.finished for worker in self.workers)

    def stop(self) -> None:
        stop_all([worker.process for worker in self.workers if worker.process is not None])

    def left(self) -> list[str]:
        return [item for worker in self.workers for item in worker.left()]


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]
