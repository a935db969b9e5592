"""Compile every Triton kernel for GPUs that are not here, and judge what the compiler made of it.

    python -m benchmarks.aot_report            # all presets, sm_80 and sm_90
    python -m benchmarks.aot_report --quick    # a few forms of every kernel: what CI runs
    python -m benchmarks.aot_report --full     # sm_100, float32 and float16 as well
    python -m benchmarks.aot_report --write    # and store the table in benchmarks/results/aot.md

The launches are those of one training step of each of the paper's presets, recorded on the meta
device with the launcher's own block sizes and specialisation. Exit status 1 on a spill, on more
shared memory than the chip has, or where a large tensor is read or written in narrow pieces: by
threads of less than 16 bytes each, unless the 32 of a warp cover whole lines of 128.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastdiff import ops
from fastdiff.models import create_model
from fastdiff_kernels import _launch

try:  # the name moved within the versions we support; both take the same arguments
    from triton.runtime.jit import create_function_from_signature
except ImportError as error:  # pragma: no cover
    raise SystemExit(f"aot_report: triton {triton.__version__} has no binder to use") from error

RESULTS = Path(__file__).with_name("results") / "aot.md"

# The paper's presets, and the batch of one GPU (it only decides grids and whether 16 divides it).
PRESETS = {
    "iuvit_cifar10": 128,
    "iuvit_celeba128": 32,
    "iuvit_church256": 32,
    "iuvit_church256_wide": 32,
    "iuvit_church256_p8": 32,
    "iuvit_cc12m64": 64,
    "ascend_cifar10": 64,
    "ascend_celeba64": 32,
    "ascend_256": 8,
    "ascend_t2i_128": 16,
}

# These launch every kernel.
QUICK = ("iuvit_cifar10", "iuvit_cc12m64", "ascend_t2i_128")
QUICK_FORMS = 3  # of each: the first, the last and one between

# Per streaming multiprocessor: registers, warps, blocks, bytes of shared memory.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
SHARED = {"sm_80": 167_936, "sm_90": 233_472, "sm_100": 233_472}


@dataclass
class Kernel:
    """One specialisation of a kernel: what the compiler gets, and where it is used."""

    launch: _launch.Launch
    users: set[str] = field(default_factory=set)
    launches: int = 0

    @property
    def op(self) -> str:
        """The folder that the kernel lies in."""
        return str(self.launch.kernel.fn.__module__).split(".")[-2]

    @property
    def name(self) -> str:
        return str(self.launch.kernel.fn.__name__)

    @property
    def case(self) -> str:
        """Its constants, in short; with them a reader finds the row in the tuning table."""
        names = {p.name for p in self.launch.kernel.params if p.is_constexpr}
        known = {k: v for k, v in self.launch.arguments.items() if k in names}
        return " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in known.items())


@dataclass
class Compiled:
    """What the compiler made of it for one chip."""

    registers: int
    spilled: int
    shared: int
    widths: dict[str, int]
    spans: dict[str, int]
    seconds: float

    def narrow(self) -> list[str]:
        """The large tensors that neither a thread nor a warp takes in whole pieces."""
        return [n for n, width in self.widths.items() if width < 16 and self.spans.get(n, 0) < 128]

    def resident(self, family: str, num_warps: int) -> int:
        """Warps of this kernel that one multiprocessor can hold."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (per_warp * num_warps)
        by_shared = SHARED[family] // (self.shared + 1024)
        return min(by_registers, by_shared, BLOCKS, WARPS // num_warps) * num_warps


def keep_channels_last(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What a convolution does on a GPU, and forgets on the meta device."""
    last = inputs[0].is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if last else out


def training_step(name: str, dtype: torch.dtype, batch: int) -> None:
    """Forward and backward of a preset on the meta device."""
    with torch.device("meta"):
        # Figure 9c is the only IU-ViT on a larger grid, 32 x 32.
        figure_9c = name == "iuvit_church256_p8"
        model = create_model("iuvit_church256", patch_size=8) if figure_9c else create_model(name)
        config = model.to(dtype).config
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(keep_channels_last)
        x = torch.empty(batch, config.in_channels, *config.image_size, dtype=dtype)
        t = torch.empty(batch, dtype=torch.int64)
        context = None
        if config.context_dim is not None:
            context = torch.empty(batch, 256, config.context_dim, dtype=dtype)
        model(x.to(memory_format=torch.channels_last), t, context).sum().backward()


def collect(family: str, presets: Iterable[str], dtypes: Sequence[torch.dtype]) -> list[Kernel]:
    """The kernels that training the presets launches on a chip, each specialisation once."""
    found: dict[Any, Kernel] = {}
    backend = make_backend(GPUTarget("cuda", int(family[3:]), 32))
    for name in presets:
        for dtype in dtypes:
            chip = _launch.pretend(_launch.CHIPS[family])
            with chip, _launch.recording() as launches, ops.backend("triton"):
                training_step(name, dtype, PRESETS[name])
            for launch in launches:
                bound = bind(launch, backend)
                key = (launch.kernel.fn, launch.num_warps, launch.num_stages, str(bound[1:]))
                kernel = found.setdefault(key, Kernel(launch))
                kernel.users.add(name)
                kernel.launches += 1
    order = ("window_attention", "dwconv_ffn", "group_norm_silu", "layer_norm_modulate")
    return sorted(found.values(), key=lambda k: (order.index(k.op), k.name, k.case))


def few(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Of each kernel at most QUICK_FORMS specialisations, evenly spread."""
    forms: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        forms.setdefault((kernel.op, kernel.name), []).append(kernel)
    kept = []
    for some in forms.values():
        last, count = len(some) - 1, min(len(some), QUICK_FORMS)
        kept += [some[last * i // max(count - 1, 1)] for i in range(count)]
    return kept


def bind(launch: _launch.Launch, backend: Any) -> tuple[Any, Any, Any, Any]:
    """(options, signature, constants, attributes) as a launch on the chip would have them."""
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
    bound, specialization, rest = binder(**launch.arguments, **options)
    packed = kernel._pack_args(backend, rest, bound, specialization, rest)
    return packed[0], packed[1], packed[2], packed[3]


_work: list[Kernel] = []  # inherited by the forked compilers: kernels do not pickle


def compile_one(job: tuple[int, str]) -> Compiled:
    """Compile one of `_work` for a chip."""
    index, family = job
    launch = _work[index].launch
    target = GPUTarget("cuda", int(family[3:]), 32)
    options, signature, constants, attributes = bind(launch, make_backend(target))
    started = time.perf_counter()
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
    registers, spilled = resources(made.asm["cubin"])
    tensors = [n for n, kind in signature.items() if kind != "constexpr"]
    widths = accesses(made.asm["ptx"], tensors)
    large = large_tensors(launch)
    return Compiled(
        registers,
        spilled,
        made.metadata.shared,
        {name: widths[name] for name in tensors if name in large and name in widths},
        warp_spans(made.asm["ttgir"]),
        time.perf_counter() - started,
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its local memory) by cuobjdump, which triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def large_tensors(launch: _launch.Launch) -> set[str]:
    """Names of the tensors that make up the traffic: activations, and workspaces as large as they.

    That is an eighth of the largest at least; half of it for another dtype than the largest has.
    """
    tensors = {n: value for n, value in launch.arguments.items() if isinstance(value, Tensor)}
    largest = max(tensors.values(), key=lambda t: t.numel() * t.element_size())
    whole = largest.numel() * largest.element_size()
    return {
        name
        for name, t in tensors.items()
        if t.numel() * t.element_size() * (8 if t.dtype is largest.dtype else 2) >= whole
    }


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
    layout tells how many lanes of a warp lie side by side along the dimension that is contiguous.
    """
    layouts: dict[str, dict[str, list[int]]] = {}
    origins: dict[str, set[str]] = {}
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
            span = 0 if pointers is None else _span(pointers, layouts)
            for name in origins.get(access[1], ()):
                least[name] = min(least.get(name, span), span)
        else:
            for inner, start in re.findall(r"(%\w+) = (%\w+)", line):  # what a loop carries
                origins.setdefault(inner, set()).update(origins.get(start, ()))
            if made := re.match(r"(%\w+)(?::\d+)? = (.*)", line):
                used = re.findall(r"%\w+", made[2])
                found = set().union(*(origins.get(value, set()) for value in used))
                origins.setdefault(made[1], set()).update(found)
    return least


def _span(pointers: re.Match[str], layouts: dict[str, dict[str, list[int]]]) -> int:
    shape = [int(n) for n in pointers[1].split("x")]
    layout = layouts.get(pointers[3])
    if layout is None:  # a slice or what the compiler made itself: not known to be whole lines
        return 0
    fast = layout["order"][0]
    lanes = layout["sizePerThread"][fast] * layout["threadsPerWarp"][fast]
    return min(lanes, shape[fast]) * int(pointers[2]) // 8


def faults(kernel: Kernel, made: Compiled, family: str) -> list[str]:
    """Why this kernel does not pass."""
    found = []
    if made.spilled:
        found.append(f"spills {made.spilled} bytes")
    if made.shared > _launch.CHIPS[family].shared:
        found.append(f"{made.shared} bytes of shared memory; {family} has room for less")
    if not made.resident(family, kernel.launch.num_warps):
        found.append("does not fit a multiprocessor")
    if narrow := made.narrow():
        pieces = (f"{n} {made.widths[n]} B ({made.spans.get(n, 0)} a warp)" for n in narrow)
        found.append(f"narrow accesses: {', '.join(pieces)}")
    return found


def row(kernel: Kernel, made: Compiled, family: str, wrong: list[str]) -> str:
    """One line of the table."""
    width = min(made.widths.values(), default=0)
    lines = width < 16 and not made.narrow()
    cells = [
        f"`{kernel.name}`",
        kernel.case,
        f"{len(kernel.users)}",
        f"{kernel.launch.num_warps}",
        f"{made.registers}",
        f"{made.spilled}",
        f"{made.shared / 1024:.1f}",
        f"{made.resident(family, kernel.launch.num_warps)}",
        f"{width or '-'}{', whole lines' if width and lines else ''}",
        "; ".join(wrong) or "ok",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| kernel | constants | presets | warps | registers | spills B | shared KiB "
    "| resident warps | access B | |\n|---|---|---|---|---|---|---|---|---|---|"
)


def report(
    families: Sequence[str],
    presets: Iterable[str],
    dtypes: Sequence[torch.dtype],
    quick: bool = False,
) -> tuple[str, int]:
    """Compile everything, or a few forms; the Markdown and how many kernels do not pass."""
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "One training step of each preset, bfloat16, compiled ahead of time with no GPU",
        f"(triton {triton.__version__}; `python -m benchmarks.aot_report --write`).",
        "*Resident warps* of one multiprocessor follow from registers and shared memory. *Access*",
        "is the widest load or store of a thread, for the large tensor that has the narrowest;",
        "*whole lines* where it is of less than 16 bytes, but a warp's lies on whole lines of 128.",
    ]
    bad = 0
    for family in families:
        _work[:] = collect(family, presets, dtypes)
        if quick:
            _work[:] = few(_work)
        jobs = [(index, family) for index in range(len(_work))]
        with ProcessPoolExecutor(
            os.cpu_count(), mp_context=multiprocessing.get_context("fork")
        ) as pool:
            made = []
            for index, one in enumerate(pool.map(compile_one, jobs)):
                made.append(one)
                if (index + 1) % 20 == 0 or index + 1 == len(jobs):
                    print(f"{family}: {index + 1} of {len(jobs)} kernels", file=sys.stderr)
        op = ""
        for kernel, one in zip(_work, made, strict=True):
            if kernel.op != op:
                op = kernel.op
                lines += ["", f"## {op}, {family}", "", HEAD]
            wrong = faults(kernel, one, family)
            bad += bool(wrong)
            lines.append(row(kernel, one, family, wrong))
    return "\n".join(lines) + "\n", bad


def main() -> None:
    """Print the table; fail if a kernel does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few forms of every kernel")
    parser.add_argument("--full", action="store_true", help="sm_100, float32 and float16 too")
    parser.add_argument("--write", action="store_true", help=f"store the table in {RESULTS.name}")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("aot_report: unset TRITON_INTERPRET: the interpreter compiles nothing")
    families = ["sm_80", "sm_90"] + ["sm_100"] * args.full
    dtypes = [torch.bfloat16] + [torch.float32, torch.float16] * args.full
    presets = QUICK if args.quick else tuple(PRESETS)
    text, bad = report(families, presets, dtypes, args.quick)
    print(text)
    if args.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)
    if bad:
        raise SystemExit(f"aot_report: {bad} kernels do not pass")


if __name__ == "__main__":
    main()
