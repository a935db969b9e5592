"""Compile every Triton kernel for GPUs that are not here, and judge what the compiler made of it.

    python -m benchmarks.aot_report            # all presets, sm_80 and sm_90
    python -m benchmarks.aot_report --quick    # a few forms of every kernel: what CI runs
    python -m benchmarks.aot_report --full     # sm_100, float32 and float16 as well
    python -m benchmarks.aot_report --write    # and store the table in benchmarks/results/aot.md

The launches are those of one training step of each of the paper's presets, recorded on the meta
device with the launcher's own block sizes and specialisation. Exit status 1 on a spill, on more
shared memory than the chip has, or where a large tensor is read or written in narrow pieces: by
threads of less than 16 bytes each, unless the 32 of a warp have 128 bytes in a row.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastdiff import ops, roofline
from fastdiff.models import create_model
from fastdiff_kernels import _launch, _register

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
class Pass:
    """Forward or backward of one call of an op.

    Attributes:
        op: its name.
        backward: which of the two.
        activation: bytes of its activation, of which each traffic's floor is a multiple.
        floor: bytes it has to move at least, by `fastdiff.roofline`.
        launches: what it launches.
    """

    op: str
    backward: bool
    activation: int
    floor: float
    launches: list[_launch.Launch] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Bytes moved for each of the floor."""
        return sum(map(moved, self.launches)) / self.floor


@dataclass
class Kernel:
    """One specialisation of a kernel: what the compiler gets, and where it is used.

    Attributes:
        launch: the first.
        activation: bytes of the activation of the op's call that makes it.
        users: the presets.
        share: bytes it moves for each of the floor of its pass, at most; those of a pass add up.
    """

    launch: _launch.Launch
    activation: int
    users: set[str] = field(default_factory=set)
    share: float = 0.0

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


@contextlib.contextmanager
def passes() -> Iterator[list[Pass]]:
    """Collect what each call of an op launches, forward and backward, for tensors on meta."""
    found: list[Pass] = []
    with _launch.recording() as launches:

        def run(op: str, form: tuple[Any, ...]) -> Any:
            triton_kernels = _register._OPS[op]
            if why := triton_kernels._why_not("triton", form):
                raise RuntimeError(f"aot_report: {op} has no Triton kernel for this call: {why}")
            call = triton_kernels._backends["triton"].call
            assert call is not None
            activation, cost = price(op, form)
            result = call(*form)
            keep(Pass(op, False, activation, cost.forward.bytes))
            node = (result[0] if isinstance(result, tuple) else result).grad_fn
            if node is not None:
                # The Linears around dwconv_gelu launch nothing of ours: all that is new is its.
                node.register_hook(lambda *_: keep(Pass(op, True, activation, cost.backward.bytes)))
            return result

        def keep(made: Pass) -> None:
            made.launches += launches
            launches.clear()
            found.append(made)

        with _register.stand_in(run):
            yield found


def price(op: str, form: tuple[Any, ...]) -> tuple[int, roofline.OpCost]:
    """Bytes of the activation that an op's kernels work on, and the cost of the call."""
    if op == "dwconv_ffn":
        x, fc1_weight, _, weight, bias, *_, grid, prefix = form
        z = x.new_empty(*x.shape[:2], fc1_weight.shape[0])
        op, form = "dwconv_gelu", (z, weight, bias, grid, prefix)
    x = form[0]
    numel = x.numel() // 3 if op == "window_attention" else x.numel()
    return numel * x.element_size(), roofline.op_cost(op, form)


def moved(launch: _launch.Launch) -> float:
    """Bytes that a launch moves: each tensor once, and again what two of its programs read.

    Not what only caches move: vectors per channel, and the parts that every program adds up.
    """
    args, name = launch.arguments, str(launch.kernel.fn.__name__)
    times: dict[str, float] = {}
    if name in ("dwconv_gelu_forward", "dwconv_gelu_backward"):
        H, W, rows = args["H"], args["W"], args["BANDS"] * args["ROWS"]
        reach = {"z": 1} if name == "dwconv_gelu_forward" else {"z": 2, "dy": 1}
        times = {n: _halo(H, rows, k) * _halo(W, args["span"], k) for n, k in reach.items()}
    elif name.startswith("group_norm_silu_") and "first" in args:
        # A launch takes a few images of its tensors.
        tensors = {n: t for n, t in args.items() if isinstance(t, Tensor) and t.dim() > 1}
        C = args["C1"] + args["C2"]
        if "GT" in args:
            across = _launch.cdiv(C // args["CPG"], args["GT"]) * args["CS"]
        else:
            across = args.get("tiles", _launch.cdiv(C, args["BC"]))
        images = launch.grid[0] / (args["chunks"] * across)
        times = {n: images / t.shape[0] for n, t in tensors.items()}
    return sum(
        t.numel() * t.element_size() * times.get(name, 1.0)
        for name, t in args.items()
        if isinstance(t, Tensor)
    )


def _halo(length: int, piece: int, reach: int) -> float:
    """How often an axis is read by pieces that reach so far into their neighbours."""
    starts = range(0, length, piece)
    read = (min(at + piece + reach, length) - max(at - reach, 0) for at in starts)
    return sum(read) / max(length, 1)


def collect(
    family: str, presets: Iterable[str], dtypes: Sequence[torch.dtype]
) -> tuple[list[Kernel], list[Pass]]:
    """The kernels that training the presets launches on a chip, each specialisation once; and the
    passes that launch them."""
    found: dict[Any, Kernel] = {}
    every: list[Pass] = []
    backend = make_backend(GPUTarget("cuda", int(family[3:]), 32))
    for name in presets:
        for dtype in dtypes:
            chip = _launch.pretend(_launch.CHIPS[family])
            with chip, ops.backend("triton"), passes() as made:
                training_step(name, dtype, PRESETS[name])
            every += made
            for one in made:
                shares: dict[Any, float] = defaultdict(float)
                for launch in one.launches:
                    bound = bind(launch, backend)
                    key = (launch.kernel.fn, launch.num_warps, launch.num_stages, str(bound[1:]))
                    found.setdefault(key, Kernel(launch, one.activation)).users.add(name)
                    shares[key] += moved(launch) / one.floor
                for key, share in shares.items():
                    found[key].share = max(found[key].share, share)
    order = ("window_attention", "dwconv_ffn", "group_norm_silu", "layer_norm_modulate")
    return sorted(found.values(), key=lambda k: (order.index(k.op), k.name, k.case)), every


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
    if launch.launch_pdl:
        options["launch_pdl"] = True
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
    large = large_tensors(_work[index])
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


def large_tensors(kernel: Kernel) -> set[str]:
    """Names of the tensors that make up the traffic: activations, and workspaces as large as they.

    That is an eighth of the activation of the op's call at least.
    """
    tensors = {n: t for n, t in kernel.launch.arguments.items() if isinstance(t, Tensor)}
    return {n for n, t in tensors.items() if 8 * t.numel() * t.element_size() >= kernel.activation}


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
        if len(known) == len(steps) and operation == "arith.muli" and factor is not None:
            return sum(known) * factor  # the constant's own step is 0
        return None


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
        f"{kernel.share:.2f}",
        "; ".join(wrong) or "ok",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| kernel | constants | presets | warps | registers | spills B | shared KiB "
    "| resident warps | access B | moved / floor | |\n" + "|---" * 11 + "|"
)


def traffic(made: Sequence[Pass]) -> list[str]:
    """The table of what passes move against their floors."""
    ratios: dict[tuple[str, bool], list[float]] = {}
    for one in made:
        ratios.setdefault((one.op, one.backward), []).append(one.ratio)
    lines = ["| pass | calls | moved / floor, least | most |", "|---|---|---|---|"]
    for (op, backward), some in sorted(ratios.items()):
        name = f"`{op}`, {'backward' if backward else 'forward'}"
        lines.append(f"| {name} | {len(some)} | {min(some):.2f} | {max(some):.2f} |")
    return lines


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
        "*whole lines* where it is of less than 16 bytes, but a warp has 128 or more in a row.",
        "*Moved / floor*: what the kernel moves, in units of the floor of its op's forward or",
        "backward (`fastdiff.roofline`); of all the calls, the worst. Kernels of a pass add up to:",
    ]
    bad = 0
    for family in families:
        kernels, made_passes = collect(family, presets, dtypes)
        lines += ["", f"## Bytes, {family}", "", *traffic(made_passes)]
        _work[:] = few(kernels) if quick else kernels
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
