"""Verdicts by content, and the compilers that make those which are missing.

A verdict is kept under a hash of everything it follows from: the kernel's source with the device
functions it calls, the form, the chip, Triton's version, and the code that reads the machine code.
So nothing is ever stale: what changed has another hash, and is compiled anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.aot.compile import Verdict, brief
from benchmarks.aot.forms import Form, source_hash

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "build" / "aot-cache"


@dataclass(frozen=True)
class Triton:
    """A version of Triton.

    Attributes:
        version: as it names itself.
        folder: where it lies; None for the one that this Python imports.
    """

    version: str
    folder: Path | None = None

    @classmethod
    def current(cls) -> Triton:
        import triton

        return cls(triton.__version__)

    @classmethod
    def at(cls, folder: Path) -> Triton:
        """The one that `pip install --target` put into a folder.

        Raises:
            FileNotFoundError: there is none.
        """
        found = sorted(folder.glob("triton-*.dist-info"))
        if not (folder / "triton").is_dir() or not found:
            raise FileNotFoundError(
                f"no triton in {folder}: pip install --no-deps --target {folder} triton==VERSION"
            )
        return cls(found[-1].name.removeprefix("triton-").removesuffix(".dist-info"), folder)


@dataclass(frozen=True)
class Job:
    """One form, for one chip, by one Triton."""

    form: Form
    target: str
    triton: Triton


@dataclass
class Counts:
    """How many of the jobs asked for were compiled now, and how many verdicts were at hand."""

    compiled: int = 0
    kept: int = 0
    seconds: float = 0.0


_sources: dict[str, str] = {}


def _source(form: Form) -> str:
    name = form.data["kernel"]
    if name not in _sources:
        _sources[name] = source_hash(form.kernel())
    return _sources[name]


def _reader() -> str:
    """Hash of the code that turns machine code into a verdict."""
    text = "".join(
        Path(str(importlib.import_module(f"benchmarks.{name}").__file__)).read_text()
        for name in ("aot.compile", "aot.forms", "aot.machine", "sass")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(job: Job, reader: str = "") -> str:
    """The name under which a job's verdict is kept."""
    parts = (_source(job.form), job.form.text, job.target, job.triton.version, reader or _reader())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read(folder: Path, key: str) -> Verdict | None:
    """The verdict kept under this name; None where there is none, or half of one."""
    try:
        return Verdict(**json.loads((folder / key[:2] / key).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write(folder: Path, key: str, verdict: Verdict) -> None:
    """Keep a verdict; it appears as a whole or not at all."""
    path = folder / key[:2] / key
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(dataclasses.asdict(verdict)))
    os.replace(temporary, path)


class Compiler:
    """A process that compiles with one Triton, started again where a job brought it down."""

    def __init__(self, by: Triton, path: Sequence[str] = ()) -> None:
        self.by, self.path = by, path
        self.process: subprocess.Popen[str] | None = None
        self.cache = tempfile.TemporaryDirectory(prefix="aot-")
        self.heard = Path(self.cache.name) / "heard"

    def start(self) -> subprocess.Popen[str]:
        first = [] if self.by.folder is None else [str(self.by.folder)]
        path = [*first, str(ROOT), str(ROOT / "kernels"), *self.path]
        variables = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        variables |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": self.cache.name}
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.aot.compile", str(self.heard)],
            cwd=ROOT,
            env=variables | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def compile(self, form: Form, target: str) -> Verdict:
        if self.process is None:
            self.process = self.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(json.dumps({"form": form.text, "target": target}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if answer:
            return Verdict(**json.loads(answer))
        status = self.end()
        said = self.heard.read_text(errors="replace") if self.heard.exists() else ""
        why = brief(said.splitlines())
        return Verdict(error=f"the compiler ended with status {status}: {why}"[:300])

    def end(self) -> int:
        """Let the process end, where there is one; its exit status."""
        if self.process is None:
            return 0
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        status, self.process = self.process.wait(), None
        return status

    def close(self) -> None:
        self.end()
        self.cache.cleanup()


def verdicts(
    jobs: Iterable[Job],
    folder: Path = STORE,
    workers: int | None = None,
    path: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[dict[Job, Verdict], Counts]:
    """The verdict on every job: those kept, and the others compiled now and kept.

    Args:
        jobs: what to judge.
        folder: of the verdicts.
        workers: compilers at a time; as many as there are processors.
        path: further folders that hold the kernels' modules.
        tell: gets a line of progress now and then.
    """
    reader = _reader()
    found: dict[Job, Verdict] = {}
    missing: dict[str, list[Job]] = {}
    for job in dict.fromkeys(jobs):
        key = key_of(job, reader)
        kept = read(folder, key)
        if kept is None:
            missing.setdefault(key, []).append(job)
        else:
            found[job] = kept
    counts = Counts(kept=len(found))
    # One after another those of one Triton: a compiler lives long.
    todo: queue.SimpleQueue[tuple[str, Job]] = queue.SimpleQueue()
    for key, same in sorted(missing.items(), key=lambda item: item[1][0].triton.version):
        todo.put((key, same[0]))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        compiler: Compiler | None = None
        try:
            while not errors:
                key, job = todo.get_nowait()
                if compiler is None or compiler.by != job.triton:
                    if compiler is not None:
                        compiler.close()
                    compiler = Compiler(job.triton, path)
                verdict = compiler.compile(job.form, job.target)
                write(folder, key, verdict)
                with lock:
                    for same in missing[key]:
                        found[same] = verdict
                    counts.compiled += 1
                    counts.seconds += verdict.seconds
                    if counts.compiled % 50 == 0 or counts.compiled == len(missing):
                        tell(f"{counts.compiled} of {len(missing)} compiled")
        except queue.Empty:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            if compiler is not None:
                compiler.close()

    threads = [
        threading.Thread(target=work)
        for _ in range(min(workers or os.cpu_count() or 1, len(missing)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found, counts
