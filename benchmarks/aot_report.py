"""Compile every Triton kernel for GPUs that are not here, and judge what the compiler made of it.

    python -m benchmarks.aot_report            # the presets, bfloat16, sm_80 and sm_90
    python -m benchmarks.aot_report --quick    # a few forms of every kernel: what CI runs
    python -m benchmarks.aot_report --full     # every form, two versions of Triton, AMD as well
    python -m benchmarks.aot_report --write    # and store the table in benchmarks/results/aot.md

A form is one specialisation of a kernel: what a launch makes Triton compile. Forms are recorded
with the launchers' own block sizes: of one training step of each of the paper's presets, of the
benchmarks, and of the tests of the back ends (`benchmarks.aot.record`). Verdicts are kept in
build/aot-cache by content, so a second run compiles what changed.

`--full` compiles what `FULL` says: for each version of Triton and chip the forms of the sources
that it names. `OLDEST` is the version that GPU machines have; `make build/triton-3.6.0` puts it
into a folder of its own.

Exit status 1 where a form does not compile, spills (but for `judge.KNOWN`, which it prints), takes
more shared memory than the chip has, or (in presets and benchmarks) reads or writes a large tensor
in narrow pieces: by threads of less than 16 bytes each, unless the 32 of a warp have 128 bytes in a
row.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.aot import judge, store
from benchmarks.aot.compile import Verdict
from benchmarks.aot.forms import Form
from benchmarks.aot.record import (
    PRESETS,
    Pass,
    Use,
    Uses,
    record_benchmarks,
    record_presets,
    record_tests,
    training_step,
)

__all__ = ["PRESETS", "main", "training_step"]

RESULTS = Path(__file__).with_name("results") / "aot.md"
OLDEST = "3.6.0"
FOLDER = store.ROOT / "build" / f"triton-{OLDEST}"

# These launch every kernel.
QUICK_PRESETS = ("iuvit_cifar10", "iuvit_cc12m64", "ascend_t2i_128")

# What a form may come from (`benchmarks.aot.record`).
EVERY = ("presets", "autocast", "benchmarks", "other dtypes", "tests", "slow tests")


@dataclass(frozen=True)
class Cover:
    """What is compiled for one chip by one version of Triton.

    Attributes:
        oldest: by `OLDEST`; else by the version that is installed.
        family: the chip's.
        sources: forms from these.
        few: of each kernel at most so many forms, evenly spread; 0 for all.
    """

    oldest: bool
    family: str
    sources: tuple[str, ...] = EVERY[:1]
    few: int = 0

    def by(self) -> store.Triton:
        return store.Triton.at(FOLDER) if self.oldest else store.Triton.current()


DEFAULT = (Cover(False, "sm_80"), Cover(False, "sm_90"))
QUICK = (
    Cover(True, "sm_90", EVERY[:3], few=3),
    Cover(False, "sm_90", EVERY[:3], few=2),
    Cover(True, "sm_80", EVERY[:3], few=1),
    Cover(False, "gfx942", EVERY[:3], few=1),
)
# The chips of the machines that the tests run on first get all of them; under an hour on two cores.
# AMD by the current version only: 3.6 cannot compile group norms with a skip (see its `supports`).
FULL = (
    Cover(True, "sm_90", EVERY),
    Cover(False, "sm_90", ("presets", "autocast", "benchmarks", "tests")),
    Cover(True, "sm_80", ("presets", "tests")),
    Cover(False, "gfx942", ("presets", "benchmarks")),
    Cover(False, "sm_80", EVERY[:3], few=6),
    Cover(True, "sm_100", EVERY[:3], few=6),
    Cover(False, "sm_100", EVERY[:3], few=6),
    Cover(False, "gfx1100", EVERY[:3], few=6),
    Cover(False, "gfx1201", EVERY[:3], few=6),
)


@dataclass
class Recorded:
    """The forms of a family, and the passes of the presets that launch some of them."""

    uses: Uses
    passes: list[Pass]

    def forms(self, cover: Cover) -> list[Use]:
        """What a cover compiles, sorted by op and kernel."""
        some = [u for u in self.uses.found.values() if u.sources & set(cover.sources)]
        some.sort(key=lambda use: (_order(use.form.op), use.form.name, use.form.case))
        return few(some, cover.few) if cover.few else some


def _order(op: str) -> tuple[int, str]:
    first = ("window_attention", "dwconv_ffn", "group_norm_silu", "layer_norm_modulate")
    return (first.index(op) if op in first else len(first), op)


def collect(
    family: str,
    presets: Iterable[str],
    sources: Iterable[str] = EVERY[:1],
    tests: Mapping[Form, str] | None = None,
) -> Recorded:
    """The forms of a family: those of a training step of the presets, and what else is asked for.

    Args:
        family: of chips.
        presets: their names.
        sources: which forms, besides the tests'.
        tests: the forms of the tests, each with its source.
    """
    uses, presets = Uses(family), list(presets)
    made = record_presets(uses, presets, torch.bfloat16)
    if "autocast" in sources:
        record_presets(uses, presets, torch.bfloat16, float_parameters=True)
    if "benchmarks" in sources:
        record_benchmarks(uses)
    if "other dtypes" in sources:
        record_presets(uses, QUICK_PRESETS, torch.float32)
        record_presets(uses, QUICK_PRESETS, torch.float16)
    for form, source in (tests or {}).items():
        uses.add_form(form, source)
    return Recorded(uses, made)


def few(uses: Sequence[Use], most: int) -> list[Use]:
    """Of each kernel at most so many forms, evenly spread."""
    forms: dict[tuple[str, str], list[Use]] = {}
    for use in uses:
        forms.setdefault((use.form.op, use.form.name), []).append(use)
    kept = []
    for some in forms.values():
        last, count = len(some) - 1, min(len(some), most)
        kept += [some[last * i // max(count - 1, 1)] for i in range(count)]
    return kept


def row(use: Use, made: Verdict, family: str, wrong: list[str]) -> str:
    """One line of the table."""
    widths = {name: width for name, width in made.widths.items() if name in use.large}
    width = min(widths.values(), default=0)
    lines = 0 < width < 16 and not made.narrow(use.large)
    warps = judge.resident(made, family, use.form.num_warps) if made.registers else 0
    cells = [
        f"`{use.form.name}`",
        use.form.case,
        f"{len(use.presets)}",
        f"{use.form.num_warps}",
        f"{made.registers}",
        f"{made.spilled}",
        f"{made.shared / 1024:.1f}",
        f"{warps}",
        f"{width or '-'}{', whole lines' if lines else ''}",
        f"{use.share:.2f}",
        "; ".join(wrong) or "ok",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| kernel | constants | presets | warps | registers | spills B | shared KiB "
    "| resident warps | access B | moved / floor | |\n" + "|---" * 11 + "|"
)
COUNTS = (
    "| triton | chip | forms of | launches recorded | different forms | compiled here "
    "| compiled now | kept | processor s | do not pass |\n" + "|---" * 10 + "|"
)


def traffic(made: Sequence[Pass]) -> list[str]:
    """The table of what passes move against their floors."""
    ratios: dict[tuple[str, bool], list[float]] = {}
    for one in made:
        if one.floor:
            ratios.setdefault((one.op, one.backward), []).append(one.ratio)
    lines = ["| pass | calls | moved / floor, least | most |", "|---|---|---|---|"]
    for (op, backward), some in sorted(ratios.items()):
        name = f"`{op}`, {'backward' if backward else 'forward'}"
        lines.append(f"| {name} | {len(some)} | {min(some):.2f} | {max(some):.2f} |")
    return lines


def preset_report(recorded: dict[str, Recorded], made: dict[store.Job, Verdict]) -> list[str]:
    """The table of the presets' forms by the installed Triton, for the chips of NVIDIA."""
    by = store.Triton.current()
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "One training step of each preset, bfloat16, compiled ahead of time with no GPU",
        f"(triton {by.version}; `python -m benchmarks.aot_report --write`).",
        "*Resident warps* of one multiprocessor follow from registers and shared memory. *Access*",
        "is the widest load or store of a thread, for the large tensor that has the narrowest;",
        "*whole lines* where it is of less than 16 bytes, but a warp has 128 or more in a row.",
        "*Moved / floor*: what the kernel moves, in units of the floor of its op's forward or",
        "backward (`fastdiff.roofline`); of all the calls, the worst. Kernels of a pass add up to:",
    ]
    for family, found in recorded.items():
        if not family.startswith("sm_"):
            continue
        lines += ["", f"## Bytes, {family}", "", *traffic(found.passes)]
        op = ""
        for use in found.forms(Cover(False, family)):
            verdict = made.get(store.Job(use.form, family, by))
            if verdict is None or not use.presets:
                continue
            if use.form.op != op:
                op = use.form.op
                lines += ["", f"## {op}, {family}", "", HEAD]
            lines.append(row(use, verdict, family, judge.faults(use, verdict, family, by.version)))
    return lines


def run(
    covers: Sequence[Cover], recorded: dict[str, Recorded], workers: int | None = None
) -> tuple[dict[store.Job, Verdict], list[str], list[str]]:
    """Compile what the covers say; the verdicts, a table of counts, and every fault."""
    every: dict[store.Job, Verdict] = {}
    table, wrong, known = [COUNTS], [], Counter[judge.Known]()
    for cover in covers:
        by, found = cover.by(), recorded[cover.family]
        uses = found.forms(cover)
        name = f"triton {by.version}, {cover.family}"
        made, counts = store.verdicts(
            [store.Job(use.form, cover.family, by) for use in uses],
            workers=workers,
            tell=lambda text: print(f"{name}: {text}", file=sys.stderr),  # noqa: B023
        )
        every |= made
        bad = 0
        for use in uses:
            verdict = made[store.Job(use.form, cover.family, by)]
            faults = judge.faults(use, verdict, cover.family, by.version)
            bad += bool(faults)
            for one in judge.KNOWN:
                if one.covers(use, cover.family, by.version):
                    known[one] += bool(verdict.spilled)
            if faults:
                of = ", ".join(sorted(use.sources))
                text = f"{use.form.name} [{use.form.case}] ({use.form.types}; {of})"
                wrong.append(f"{name}: {text}: {'; '.join(faults)}")
        of = ", ".join(cover.sources) + (f"; {cover.few} a kernel" if cover.few else "")
        recorded_here = (found.uses.launches, len(found.uses.found), len(uses))
        made_here = (counts.compiled, counts.kept, f"{counts.seconds:.0f}", bad)
        cells = (by.version, cover.family, of, *recorded_here, *made_here)
        table.append(f"| {' | '.join(map(str, cells))} |")
        for refusal in sorted(found.uses.refused or ()):
            print(f"{cover.family} refuses {refusal}", file=sys.stderr)
    for one, count in known.items():
        name = f"triton {one.triton}, {one.kernel} [{' '.join(one.constants)}]"
        if count:
            print(f"{name}: {count} forms spill, as is known: {one.why}", file=sys.stderr)
        else:
            wrong.append(f"{name}: spills no more; take it out of judge.KNOWN")
    return every, table, wrong


def main() -> None:
    """Print the tables; fail if a form does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few forms of every kernel")
    parser.add_argument("--full", action="store_true", help="every form, as FULL says")
    parser.add_argument("--write", action="store_true", help=f"store the table in {RESULTS.name}")
    parser.add_argument("--workers", type=int, help="compilers at a time (one a processor)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("aot_report: unset TRITON_INTERPRET: the interpreter compiles nothing")
    covers = QUICK if args.quick else FULL if args.full else DEFAULT
    sources: dict[str, set[str]] = {cover.family: set() for cover in covers}
    for cover in covers:
        sources[cover.family] |= set(cover.sources)
    tests: dict[str, dict[Form, str]] = {}
    if tested := [family for family, some in sources.items() if "tests" in some]:
        tests, ended = record_tests(tested)
        print(f"recorded the tests: {ended}", file=sys.stderr)
    presets = QUICK_PRESETS if args.quick else tuple(PRESETS)
    recorded = {f: collect(f, presets, some, tests.get(f)) for f, some in sources.items()}
    made, table, wrong = run(covers, recorded, args.workers)
    text = "\n".join(preset_report(recorded, made)) + "\n"
    if not (args.quick or args.full):
        print(text)
    print("\n".join(table))
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
    for line in wrong:
        print(line)
    if wrong:
        raise SystemExit(f"aot_report: {len(wrong)} forms do not pass")


if __name__ == "__main__":
    main()
