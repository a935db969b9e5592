"""Count the instructions of a kernel's main loop in its machine code.

    python -m benchmarks.sass x.cubin --elements 16 --bytes 6

The main loop is the backward branch that spans most instructions; `loops` has the others. A
kernel without a loop counts as a whole. Every instruction between the branch's target and the
branch counts, predicated ones and both sides of a condition as well.

The issue ceiling is the traffic of a kernel that issues an instruction every cycle on each of the
four schedulers of all multiprocessors of an H100 or H200, and waits for nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

# Of an H100 or H200: warp instructions a second, with boost clock.
PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.98e9

# The first prefix that an operation starts with names its class.
CLASSES = {
    "FFMA": ("FFMA",),
    "FMUL/FADD": ("FMUL", "FADD"),
    "other float": ("FSEL", "FSETP", "FMNMX", "FSET", "FCHK", "FSWZADD"),
    "half": ("HFMA2", "HADD2", "HMUL2", "HSET", "HMNMX"),
    "MMA": ("HGMMA", "HMMA", "WARPGROUP", "UTC", "LDTM", "STTM"),
    "MUFU": ("MUFU",),
    "convert": ("F2F", "F2I", "I2F", "PRMT"),
    "load": ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"),
    "store": ("STG", "UTMASTG"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "local": ("LDL", "STL"),
    "constant": ("LDC", "ULDC", "LDCU"),
    "shuffle": ("SHFL", "REDUX", "VOTE", "R2UR"),
    "IMAD": ("IMAD", "UIMAD"),
    "IADD": ("IADD", "UIADD", "LEA", "ULEA", "VIADD"),
    "other integer": ("SHF", "USHF", "LOP", "ULOP", "SEL", "USEL", "ISETP", "UISETP", "IMNMX"),
    "move": ("MOV", "UMOV", "CS2R", "S2R", "S2UR", "P2R", "R2P", "PLOP3", "UPLOP3"),
    "control": ("BRA", "BSSY", "BSYNC", "BAR", "WARPSYNC", "EXIT", "CALL", "RET", "NOP", "SYNCS"),
}

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    name: str
    operands: str

    @property
    def kind(self) -> str:
        """The class it counts to."""
        for kind, names in CLASSES.items():
            if any(self.name.split(".")[0] == n for n in names):
                return kind
        for kind, names in CLASSES.items():
            if self.name.startswith(names):
                return kind
        return "other"


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop's body, in order."""

    body: Sequence[Instruction]

    @property
    def kinds(self) -> Counter[str]:
        """Instructions of each class."""
        return Counter(i.kind for i in self.body)

    @property
    def names(self) -> Counter[str]:
        """Instructions of each name, as the machine code has it."""
        return Counter(i.name for i in self.body)

    def __len__(self) -> int:
        return len(self.body)

    def ceiling(self, bytes_a_thread: float) -> float:
        """Bytes a second at most, of so many that a thread moves in one iteration."""
        issued = PROCESSORS * SCHEDULERS * CLOCK
        return 32 * bytes_a_thread * issued / len(self.body)


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel.

    Attributes:
        instructions: all, but the padding behind the end.
        registers: of a thread.
        stack: bytes of local memory of a thread; of a kernel that calls no function, spills.
    """

    instructions: Sequence[Instruction]
    registers: int
    stack: int

    @property
    def loops(self) -> list[Loop]:
        """By size, the largest first."""
        found = []
        places = {i.address: at for at, i in enumerate(self.instructions)}
        for at, i in enumerate(self.instructions):
            if i.name.split(".")[0] != "BRA":
                continue
            target = re.search(r"0x([0-9a-f]+)\s*$", i.operands.strip())
            if target and (start := places.get(int(target[1], 16), at)) < at:
                found.append(Loop(self.instructions[start : at + 1]))
        return sorted(found, key=len, reverse=True)

    @property
    def main(self) -> Loop:
        """The largest loop, or the whole."""
        return next(iter(self.loops), Loop(self.instructions))

    @property
    def spilled(self) -> int:
        """Loads and stores of local memory in the loop that has most; in all, if there is none."""
        return max(loop.kinds["local"] for loop in self.loops or [self.main])


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its local memory) of a cubin's kernel."""
    used = _RESOURCES.search(_cuobjdump("-res-usage", cubin))
    assert used is not None
    return int(used[1]), int(used[2]) + int(used[4])


def read(cubin: bytes) -> Code:
    """Take a cubin of one kernel apart."""
    registers, stack = resources(cubin)
    code = _cuobjdump("-sass", cubin)
    lines = (_LINE.match(line) for line in code.splitlines())
    found = [Instruction(int(m[1], 16), m[3], m[4]) for m in lines if m]
    # The end is a branch to itself, and then NOPs.
    while found and (
        found[-1].name == "NOP" or f"{found[-1].address:#x}" == found[-1].operands.strip()
    ):
        found.pop()
    return Code(found, registers, stack)


def _cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def describe(code: Code, elements: float, bytes_an_element: float) -> str:
    """A paragraph for people.

    Args:
        elements: of a thread in one iteration of the main loop.
        bytes_an_element: that the kernel moves for each.
    """
    loop = code.main
    kinds = ", ".join(f"{kind} {count}" for kind, count in loop.kinds.most_common())
    return (
        f"{len(loop)} instructions, {len(loop) / elements:.1f} an element; "
        f"issue ceiling {loop.ceiling(elements * bytes_an_element) / 1e12:.2f} TB/s; "
        f"{code.registers} registers, {code.stack} bytes of stack, "
        f"{code.spilled} spill instructions in a loop\n{kinds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cubin", type=Path, nargs="+")
    parser.add_argument("--elements", type=float, default=1.0, help="of a thread in an iteration")
    parser.add_argument("--bytes", type=float, default=0.0, help="that an element moves")
    parser.add_argument("--names", action="store_true", help="count by name, not by class alone")
    chosen = parser.parse_args()
    for path in chosen.cubin:
        code = read(path.read_bytes())
        print(f"{path.name}: {describe(code, chosen.elements, chosen.bytes)}")
        print("loops:", ", ".join(str(len(loop)) for loop in code.loops) or "none")
        if chosen.names:
            print(", ".join(f"{name} {count}" for name, count in code.main.names.most_common()))


if __name__ == "__main__":
    main()
