"""Compile one form for one chip, with the Triton that this process imported.

    python -m benchmarks.aot.compile

As a program it reads a job a line from standard input, {"form": ..., "target": ...}, and answers
each with a line of JSON, a `Verdict`. `store` runs several: a compiler that crashes takes only its
own process along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.compiler import ASTSource

from benchmarks import sass
from benchmarks.aot import machine
from benchmarks.aot.forms import Form, bind, target_of

LIMIT = 600  # seconds of one compile; none takes a tenth of it


@dataclass
class Verdict:
    """What the compiler made of a form, for one chip.

    Attributes:
        error: why there is no machine code; everything else is empty then.
        registers: of a thread.
        spilled: bytes of a thread's local memory.
        shared: bytes of shared memory of a block.
        widths: for each pointer, bytes of its widest access by one thread (NVIDIA only).
        spans: for each pointer, bytes in a row that a warp covers (NVIDIA only).
        seconds: of the processor, to compile it.
    """

    error: str = ""
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    widths: dict[str, int] = field(default_factory=dict)
    spans: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def narrow(self, among: set[str]) -> list[str]:
        """The tensors that neither a thread nor a warp takes in whole pieces."""
        widths = {name: width for name, width in self.widths.items() if name in among}
        return [n for n, width in widths.items() if width < 16 and self.spans.get(n, 0) < 128]


def compile_form(form: Form, family: str, kernel: Any = None) -> Verdict:
    """Compile a form for a chip. A compiler that crashes takes this process along.

    Args:
        form: the specialisation.
        family: "sm_90", "gfx942".
        kernel: the function, where no module of the form's name holds it.
    """
    before = _seconds()
    said: list[str] = []
    try:
        target = target_of(family)
        kernel = kernel or form.kernel()
        options, signature, constants, attributes = bind(form, target, kernel)
        source = ASTSource(kernel, signature, constants, attributes)
        # A compile from Triton's own cache would be silent.
        with triton.knobs.compilation.scope(), heard() as said:
            triton.knobs.compilation.always_compile = True
            made = triton.compile(source, target=target, options=options.__dict__)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Verdict(error=brief([*said, *text.splitlines()]), seconds=_seconds() - before)
    # LLVM prints that it could not assemble a line, and goes on without it.
    if any(line.startswith("error:") for line in said):
        return Verdict(error=brief(said), seconds=_seconds() - before)
    shared = made.metadata.shared
    if family.startswith("gfx"):
        registers, spilled = machine.amd_resources(made.asm["amdgcn"])
        return Verdict("", registers, spilled, shared, seconds=_seconds() - before)
    registers, spilled = sass.resources(made.asm["cubin"])
    pointers = [n for n, kind in signature.items() if kind != "constexpr"]
    widths = machine.accesses(made.asm["ptx"], pointers)
    spans = machine.warp_spans(made.asm["ttgir"])
    return Verdict("", registers, spilled, shared, widths, spans, _seconds() - before)


def _seconds() -> float:
    """Processor time of this process and of the tools that it ran."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextlib.contextmanager
def heard(path: str | None = None) -> Iterator[list[str]]:
    """Gather the lines that a compiler, which is no Python, writes to standard error."""
    lines: list[str] = []
    path = path or _heard
    with open(path, "w+b") if path else tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


# Where a process that may crash leaves what its compiler writes.
_heard: str | None = None


def brief(lines: Sequence[str]) -> str:
    """The line of an error that says most, without places on this machine."""
    for mark in ("Assertion", "error:", "Error"):
        if told := [line for line in lines if mark in line]:
            text = told[0] if mark != "Assertion" else "Assertion" + told[0].split(mark)[-1]
            return re.sub(r"/\S*/", "", text).strip()[:300]
    return lines[0][:300] if lines else "no reason given"


def main() -> None:
    """Answer jobs until there are no more."""
    global _heard
    _heard = sys.argv[1] if len(sys.argv) > 1 else None
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        signal.alarm(LIMIT)
        verdict = compile_form(Form(job["form"]), job["target"])
        signal.alarm(0)
        print(json.dumps(dataclasses.asdict(verdict)), file=answers)


if __name__ == "__main__":
    main()
