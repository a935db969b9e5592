"""Find the forms that users run: by running their launches, recorded instead of made.

Three sources, for each family of chips with its own plan: one training step of each of the paper's
presets and the cases of the benchmarks, on the meta device; and the tests of the back ends, whose
launches `recorder` catches in a pytest process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.aot.forms import Form, form_of
from fastdiff import ops, roofline
from fastdiff.models import create_model
from fastdiff_kernels import _launch, _register

ROOT = Path(__file__).resolve().parents[2]

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


@dataclass
class Pass:
    """Forward or backward of one call of an op.

    Attributes:
        op: its name.
        backward: which of the two.
        activation: bytes of its activation, of which each traffic's floor is a multiple.
        floor: bytes it has to move at least, by `fastdiff.roofline`; 0 without a formula.
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
class Use:
    """Where a form is launched.

    Attributes:
        form: the specialisation.
        sources: where it was recorded: "presets", "tests", and so on.
        presets: those that launch it, in bfloat16.
        large: tensors that make up the traffic of a user other than the tests: activations, and
            workspaces of an eighth of an activation at least.
        share: bytes it moves for each of the floor of its pass, at most; those of a pass add up.
    """

    form: Form
    sources: set[str] = field(default_factory=set)
    presets: set[str] = field(default_factory=set)
    large: set[str] = field(default_factory=set)
    share: float = 0.0


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
def passes(float_parameters: bool = False, refused: set[str] | None = None) -> Iterator[list[Pass]]:
    """Collect what each call of an op launches, forward and backward, for tensors on meta.

    Args:
        float_parameters: parameters reach the ops in float32, as under autocast.
        refused: gets what `supports` of an op says against a call, which the reference then takes.

    Raises:
        RuntimeError: (within) an op has no kernel for a call, and `refused` is None.
    """
    found: list[Pass] = []
    with _launch.recording() as launches:

        def run(op: str, form: tuple[Any, ...]) -> Any:
            if float_parameters:
                form = tuple(a.float() if isinstance(a, nn.Parameter) else a for a in form)
            triton_kernels = _register._OPS[op]
            if why := triton_kernels._why_not("triton", form):
                if refused is not None:
                    refused.add(f"{op}: {why}")
                    return triton_kernels._reference(*form)
                raise RuntimeError(f"aot_report: {op} has no Triton kernel for this call: {why}")
            call = triton_kernels._backends["triton"].call
            assert call is not None
            activation, cost = price(op, form)
            result = call(*form)
            keep(Pass(op, False, activation, cost.forward.bytes if cost else 0))
            node = (result[0] if isinstance(result, tuple) else result).grad_fn
            if node is not None:
                # The Linears around dwconv_gelu launch nothing of ours: all that is new is its.
                bytes_back = cost.backward.bytes if cost else 0
                node.register_hook(lambda *_: keep(Pass(op, True, activation, bytes_back)))
            return result

        def keep(made: Pass) -> None:
            made.launches += launches
            launches.clear()
            found.append(made)

        with _register.stand_in(run):
            yield found


def price(op: str, form: tuple[Any, ...]) -> tuple[int, roofline.OpCost | None]:
    """Bytes of the activation that an op's kernels work on, and the cost of the call."""
    if op in ("philox_normal", "philox_bits"):
        return 4 * form[0].shape[0] * torch.Size(form[2]).numel(), None
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


def launched(launch: _launch.Launch, family: str) -> Form:
    """The form of a recorded launch, for a family of chips."""
    form = form_of(
        launch.kernel,
        launch.arguments,
        launch.num_warps,
        launch.num_stages,
        getattr(launch, "options", None),
    )
    return form if family.startswith("gfx") else form.near()


class Uses:
    """The forms of one family, each once, with all that launch it.

    Attributes:
        launches: how many were recorded.
        refused: for AMD, what its kernels do not take and why. For NVIDIA that is an error.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.found: dict[Form, Use] = {}
        self.launches = 0
        self.refused: set[str] | None = set() if family.startswith("gfx") else None

    def add(self, made: Pass, source: str, preset: str = "") -> None:
        shares: dict[Form, float] = defaultdict(float)
        for launch in made.launches:
            use = self._use(launched(launch, self.family), source)
            use.presets |= {preset} - {""}
            tensors = {n: t for n, t in launch.arguments.items() if isinstance(t, Tensor)}
            use.large |= {
                n for n, t in tensors.items() if 8 * t.numel() * t.element_size() >= made.activation
            }
            if made.floor:
                shares[use.form] += moved(launch) / made.floor
        for form, share in shares.items():
            self.found[form].share = max(self.found[form].share, share)

    def add_form(self, form: Form, source: str) -> None:
        self._use(form, source)

    def _use(self, form: Form, source: str) -> Use:
        self.launches += 1
        use = self.found.setdefault(form, Use(form))
        use.sources.add(source)
        return use


def record_presets(
    uses: Uses, names: Iterable[str], dtype: torch.dtype, float_parameters: bool = False
) -> list[Pass]:
    """Add the forms of a training step of each preset; the passes that launch them.

    Their source is "presets"; "autocast" where parameters reach the ops in float32, beside
    activations that do not; "other dtypes" in float32 and float16.
    """
    every: list[Pass] = []
    plain = dtype is torch.bfloat16 and not float_parameters
    source = "autocast" if float_parameters else "presets" if plain else "other dtypes"
    for name in names:
        chip = _launch.pretend(_launch.CHIPS[uses.family])
        with chip, ops.backend("triton"), passes(float_parameters, uses.refused) as made:
            training_step(name, dtype, PRESETS[name])
        for one in made:
            uses.add(one, source, name if plain else "")
        every += made
    return every


def record_benchmarks(uses: Uses) -> None:
    """Add the forms of the benchmarks' cases on a GPU, and of the sampler's noise.

    Of the models' cases only the blocks: whole models are presets.
    """
    from benchmarks import bench_models, bench_ops

    def make(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def step(call: Callable[[], Any], leaves: Iterable[Tensor]) -> None:
        with torch.no_grad():
            call()
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        # An op's second result may be its input.
        outputs = [r for r in results if r.grad_fn is not None]
        dys = list(map(torch.empty_like, outputs))
        torch.autograd.grad(outputs, list(leaves), dys, allow_unused=True)

    with (
        _launch.pretend(_launch.CHIPS[uses.family]),
        ops.backend("triton"),
        torch.device("meta"),
        passes(refused=uses.refused) as made,
    ):
        for case in bench_ops.GPU:
            inputs = case.inputs(lambda *s, std=1.0: make(*s, dtype=case.dtype))  # noqa: B023
            inputs = {n: t.requires_grad_() for n, t in inputs.items()}
            op = getattr(ops, case.op)
            step(lambda: op(**inputs, **case.constants), inputs.values())  # noqa: B023
        for block in bench_models.GPU:
            if block.preset is None and block.name.split()[0] not in PRESETS:
                module, arguments = block.build(lambda *s: make(*s, dtype=block.dtype))  # noqa: B023
                module = module.to(block.dtype)
                step(lambda: module(*arguments), module.parameters())  # noqa: B023
        seeds = torch.empty(64, dtype=torch.int64)
        for shape in ((3, 32, 32), (4, 32, 32), (3, 256, 256)):
            ops.philox_normal(seeds, 1, shape)
        ops.philox_bits(seeds, 1, (3, 32, 32))
        # A window of several tiles, and padding that takes part: kernels that no case above needs.
        for window, side in ((16, 64), (8, 60)):
            dtype = torch.bfloat16
            given: dict[str, Any] = {
                "qkv": make(16, side, side, 3 * 384, dtype=dtype),
                "bias_table": make((2 * window - 1) ** 2, 6, dtype=dtype),
                "pad_qkv": make(3 * 384, dtype=dtype),
            }
            given = {name: tensor.requires_grad_() for name, tensor in given.items()}
            how: dict[str, Any] = {
                "heads": 6,
                "window_size": window,
                "shift": 4,
                "pad_mode": "value",
            }
            step(lambda: ops.window_attention(**given, **how), given.values())  # noqa: B023
    for one in made:
        uses.add(one, "benchmarks")


def record_tests(
    families: Sequence[str], tests: Sequence[str] = ("tests/kernels/backends",)
) -> tuple[dict[str, dict[Form, str]], str]:
    """The forms that the tests of the back ends launch on each family, and how the tests ended.

    Returns:
        For each family the forms, each with its source: "tests", or "slow tests" where no others
        launch it; and the last line that pytest wrote.

    Raises:
        RuntimeError: a test's launches could not be recorded, or the tests could not be collected.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "forms.json"
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        variables |= {
            "FASTDIFF_TEST_BACKEND": "triton",
            "FASTDIFF_RECORD": str(out),
            "FASTDIFF_RECORD_FAMILIES": ",".join(families),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        # -O and plain assertions: without values they say nothing, and would end tests early.
        command = [sys.executable, "-O", "-m", "pytest", "--assert=plain", *tests]
        command += [
            "-p",
            "benchmarks.aot.recorder",
            "-q",
            "-o",
            "addopts=",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            "--tb=line",
        ]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode or not out.exists():
            raise RuntimeError(f"the tests' launches could not be recorded:\n{log[-4000:]}")
        found: Mapping[str, Any] = json.loads(out.read_text())
    forms = {
        family: {Form(text): "slow tests" if slow else "tests" for text, slow in some.items()}
        for family, some in found.items()
    }
    return forms, log.strip().splitlines()[-1]
