"""Why a form does not pass: it does not compile, spills, does not fit, or reads in small pieces."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.aot.compile import Verdict
from benchmarks.aot.record import Use
from fastdiff_kernels import _launch

# Per streaming multiprocessor: registers, warps, blocks, bytes of shared memory.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
SHARED = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}


def resident(verdict: Verdict, family: str, num_warps: int) -> int:
    """Warps of a kernel that one multiprocessor can hold (NVIDIA only)."""
    per_warp = -(-verdict.registers * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * num_warps)
    by_shared = SHARED[family] // (verdict.shared + 1024)
    return min(by_registers, by_shared, BLOCKS, WARPS // num_warps) * num_warps


def faults(use: Use, made: Verdict, family: str, triton: str = "") -> list[str]:
    """Why this form does not pass. Narrow accesses count where a preset or benchmark has them.

    A known spill of this version of Triton is no fault.
    """
    if made.error:
        return [made.error]
    found = []
    if made.spilled and not known(use, made, family, triton):
        found.append(f"spills {made.spilled} bytes")
    if made.shared > _launch.CHIPS[family].shared:
        found.append(f"{made.shared} bytes of shared memory; {family} has room for less")
    if family.startswith("sm_"):
        if not resident(made, family, use.form.num_warps):
            found.append("does not fit a multiprocessor")
        if narrow := made.narrow(use.large):
            pieces = (f"{n} {made.widths[n]} B ({made.spans.get(n, 0)} a warp)" for n in narrow)
            found.append(f"narrow accesses: {', '.join(pieces)}")
    return found


@dataclass(frozen=True)
class Known:
    """A spill that no change of the kernel mended; the gate prints it where it compiles its forms.

    Attributes:
        triton: the version that spills.
        families: of chips.
        kernel: its name.
        constants: that its forms have, as in `Form.case`.
        spilled: bytes a thread, at most.
        why: what is known of it.
    """

    triton: str
    families: tuple[str, ...]
    kernel: str
    constants: tuple[str, ...]
    spilled: int
    why: str

    def covers(self, use: Use, family: str, triton: str) -> bool:
        """Whether the form is one of those meant, spilling or not."""
        constants = use.form.case.split()
        return (
            (self.triton, self.kernel) == (triton, use.form.name)
            and family in self.families
            and all(constant in constants for constant in self.constants)
        )


KNOWN = (
    Known(
        "3.9.0",
        ("sm_90",),
        "dwconv_gelu_backward",
        ("ROWS=16", "SUMS=11"),
        8,
        "the program's number, stored before the loop and loaded after it; 3.6.0 does not spill",
    ),
)


def known(use: Use, made: Verdict, family: str, triton: str) -> Known | None:
    """The known spill that a form has, where it spills no more than that."""
    for one in KNOWN:
        if one.covers(use, family, triton) and 0 < made.spilled <= one.spilled:
            return one
    return None
