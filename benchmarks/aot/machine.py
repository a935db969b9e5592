"""What the compiler's texts say of a kernel: AMD's resources, and how it goes to memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def amd_resources(assembly: str) -> tuple[int, int]:
    """(vector registers of a lane, bytes of scratch memory of a lane) by the code's metadata.

    A spilled vector register goes to scratch memory; one that went to an accumulation register
    instead is counted as 4 bytes, too.
    """
    fields = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s*(\d+)$", assembly, re.M)}
    scratch = fields["private_segment_fixed_size"]
    return fields["vgpr_count"], max(scratch, 4 * fields.get("vgpr_spill_count", 0))


_ACCESS = re.compile(r"^(?:@\S+\s+)?(ld|st)\.global\S*?((?:\.v\d)?)\.[busf](\d+)\s+(.*);")
_COPY = re.compile(
    r"^(?:@\S+\s+)?cp\.async\.c[ag]\.shared\.global\S*\s+\[.*?\],\s*\[(.*?)\],\s*(\w+)"
)
_MOVE = re.compile(r"^(?:@\S+\s+)?[\w.]+\s+(%rd\d+)\s*,\s*(.*);")


def accesses(ptx: str, names: Sequence[str]) -> dict[str, int]:
    """For each pointer argument, the width in bytes of its widest access by one thread.

    Follows the 64-bit registers from the kernel's parameters to its loads, stores and asynchronous
    copies.
    """
    origins: dict[str, set[int]] = {}
    moves: list[tuple[str, list[str]]] = []
    uses: list[tuple[str, int]] = []
    for line in map(str.strip, ptx.splitlines()):
        if parameter := re.match(r"ld\.param\.[bu]64\s+(%rd\d+),\s*\[\w+_param_(\d+)\]", line):
            origins[parameter[1]] = {int(parameter[2])}
        elif copy := _COPY.match(line):
            uses += [(register, int(copy[2], 0)) for register in re.findall(r"%rd\d+", copy[1])]
        elif access := _ACCESS.match(line):
            address = re.search(r"\[([^\]]*)\]", access[4])
            count = int(access[2][2:] or 1) if access[2] else 1
            width = count * int(access[3]) // 8
            if address:
                uses += [(register, width) for register in re.findall(r"%rd\d+", address[1])]
        elif move := _MOVE.match(line):
            moves.append((move[1], re.findall(r"%rd\d+", move[2])))
    changed = True
    while changed:
        changed = False
        for target, sources in moves:
            known = origins.setdefault(target, set())
            new = set().union(*(origins.get(source, set()) for source in sources)) - known
            if new:
                known |= new
                changed = True
    widest: Counter[str] = Counter()
    for register, width in uses:
        for index in origins.get(register, ()):
            if index < len(names):
                widest[names[index]] = max(widest[names[index]], width)
    return dict(widest)


_LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>")
_POINTERS = re.compile(r"tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)\S*>, ([^>]*(?:<.*>)?)>")
_MEMORY = re.compile(r"(?:%\S+ = )?(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local) (%\w+)")


def warp_spans(ttgir: str) -> dict[str, int]:
    """For each pointer argument, the bytes in a row that a warp covers by one access, at least.

    Follows the values from the arguments to loads, stores and asynchronous copies; of these the
    layout tells how many lanes of a warp lie side by side along its fastest dimension. Addresses
    must be seen to grow by one element along it: what is not understood counts for nothing.
    """
    layouts: dict[str, dict[str, list[int]]] = {}
    origins: dict[str, set[str]] = {}
    steps = _Steps()
    least: dict[str, int] = {}
    for line in map(str.strip, ttgir.splitlines()):
        if layout := _LAYOUT.match(line):
            fields = re.findall(r"(\w+) = \[([\d, ]+)\]", layout[2])
            layouts[layout[1]] = {name: [int(n) for n in text.split(",")] for name, text in fields}
        elif line.startswith("tt.func"):
            for name in re.findall(r"%(\w+): !tt\.ptr", line):
                origins[f"%{name}"] = {name}
        elif access := _MEMORY.match(line):
            pointers = _POINTERS.search(line)
            span = 0
            if pointers is not None and pointers[3] in layouts:
                span = _span(pointers, layouts[pointers[3]], steps.of(access[1]))
            for name in origins.get(access[1], ()):
                least[name] = min(least.get(name, span), span)
        else:
            # Regions side by side use the same numbers again: the latest definition holds.
            for inner, start in re.findall(r"(%\w+) = (%\w+)", line):  # what a loop carries
                origins[inner] = origins.get(start, set())
                steps.known[inner] = steps.of(start)
            if made := re.match(r"(%\w+)(?::\d+)? = (.*)", line):
                used = re.findall(r"%\w+", made[2]) if "!tt.ptr" in made[2] else []
                origins[made[1]] = set().union(*(origins.get(value, set()) for value in used))
                steps.known[made[1]] = steps.after(made[1], made[2])
    return least


def _span(pointers: re.Match[str], layout: dict[str, list[int]], steps: _Step) -> int:
    shape = [int(n) for n in pointers[1].split("x")]
    fast = layout["order"][0]
    if steps is None or steps[fast] != 1:
        return 0
    lanes = layout["sizePerThread"][fast] * layout["threadsPerWarp"][fast]
    return min(lanes, shape[fast]) * int(pointers[2]) // 8


_Step = tuple[int | None, ...] | None


class _Steps:
    """By how much a value of TTGIR grows from one index to the next, in each dimension.

    None in a dimension, or for the whole value, where that is not understood.
    """

    def __init__(self) -> None:
        self.known: dict[str, _Step] = {}
        self.constants: dict[str, int] = {}

    def of(self, value: str) -> _Step:
        return self.known.get(value)

    def after(self, name: str, text: str) -> _Step:
        """Of what an operation gives, which has this name from here on."""
        operation, values = text.split()[0], re.findall(r"%\w+", text.split(" : ")[0])
        shape = re.findall(r"tensor<((?:\d+x)+)", text)
        rank = shape[-1].count("x") if shape else 0
        self.constants.pop(name, None)
        if operation == "arith.constant":
            if constant := re.search(r"dense<(-?\d+)>", text):
                self.constants[name] = int(constant[1])
                return (0,) * rank
            return None
        if operation == "tt.make_range":
            return (1,)
        if operation == "tt.splat":
            return (0,) * rank
        steps = [step for step in map(self.of, values) if step is not None]
        if not steps or len(steps) < len(values):
            return None
        if operation == "tt.expand_dims" and (axis := re.search(r"axis = (\d+)", text)):
            return (*steps[0][: int(axis[1])], 0, *steps[0][int(axis[1]) :])
        if operation in ("tt.broadcast", "ttg.convert_layout", "arith.extsi"):
            return steps[0]
        if not operation.startswith(("arith.", "tt.addptr")):
            return None
        factor = next((self.constants[v] for v in values if v in self.constants), None)
        return tuple(
            self._step(operation, list(along), factor) for along in zip(*steps, strict=True)
        )

    @staticmethod
    def _step(operation: str, steps: list[int | None], factor: int | None) -> int | None:
        """Along one dimension, of a pointwise operation."""
        if not any(step != 0 for step in steps):
            return 0
        known = [step for step in steps if step is not None]
        if len(known) == len(steps) and operation in ("arith.addi", "tt.addptr"):
            return sum(known)
        if len(known) == len(steps) and operation == "arith.subi":
            return known[0] - sum(known[1:])
        if len(known) == len(steps) and operation == "arith.muli" and factor is not None:
            return sum(known) * factor  # the constant's own step is 0
        return None
