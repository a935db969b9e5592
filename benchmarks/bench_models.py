"""Blocks and whole models, forwards and in training, against eager, torch.compile and the floor.

    pytest benchmarks/ --benchmark-only

*training* is forward and backward, no optimiser. *floor* is the same module with only its products,
dense convolutions, attention, residual adds and reshapes left (`rivals.floor`), in the same rounds;
*x floor* is our time over it. *roofline* is the time that the bytes and FLOPs of a preset take at
the rates of a copy and a product measured here, over ours. *eager* is the model with each op as a
user would write it, in the dtype of the weights. *peak* is the memory at the worst moment of
training beyond weights, inputs and gradients; *GPU GiB* is what NVML counts on the whole GPU then.
*MFU* is the counted FLOPs of the model over the data sheet's bf16 rate. *diffusers* and
*transformers* are those libraries' own code for the same function on the same weights
(`twins.py`); *removed* is (theirs - ours) / (theirs - floor). Ours counts compiled or not,
whichever is faster; `times_us` has both.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import ops, roofline
from fastdiff.models import create_model
from fastdiff.models.ascend import ASCEND
from fastdiff.models.iuvit import Block, IUViTConfig, block_class
from fastdiff.nn import PlainSwinLayer, ResBlock, SwinBlock, channels_last_
from fastdiff.ops import backend
from fastdiff_kernels import _numerics

from . import harness, rivals, twins
from .bench_ops import Options, mib, share, verdict
from .harness import FLOOR, Job, Refused, Row, Timing

BF16, F32 = torch.bfloat16, torch.float32
Draw = Callable[..., Tensor]
Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One module at one batch size.

    Attributes:
        name: the module and its batch.
        build: makes it and its arguments, given a function of sizes that makes random tensors.
        dtype: of weights and activations.
        compiled: True: against torch.compile alone, which takes long; False: against the others;
            None: all at once.
        directions: of "forward" and "training".
        preset: the model's name and batch, where its FLOPs can be counted.
        goals: by direction and rival: our speed over it; for the floor our time over its.
    """

    name: str
    build: Callable[[Draw], Built]
    dtype: torch.dtype = BF16
    compiled: bool | None = None
    directions: tuple[str, ...] = ("forward", "training")
    preset: tuple[str, int] | None = None
    goals: dict[str, dict[str, float]] = field(default_factory=dict)


def block(
    name: str,
    batch: int,
    goals: dict[str, dict[str, float]],
    dtype: torch.dtype = BF16,
    **config: Any,
) -> Case:
    """A transformer block of IU-ViT on its 16 x 16 grid, with text where the model has it."""
    values = IUViTConfig(image_size=32, patch_size=2, **config)

    def build(draw: Draw) -> Built:
        text = None
        if values.context_dim is not None:
            mask = draw(batch, 256).ge(-10)
            text = (draw(batch, 256, values.context_dim), mask)
        tokens = draw(batch, 257, values.dim).requires_grad_()
        return block_class(values)(values), (tokens, (16, 16), 1, text)

    return Case(f"{name} block, batch {batch}", build, dtype=dtype, goals=goals)


class Level(nn.Module):
    """The blocks of one resolution of an encoder, behind each other."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x (B, C, H, W), emb (B, E): (B, C', H', W')."""
        for block in self.blocks.children():
            x = block(x, emb, None)
        return x


def level(
    preset: str,
    index: int,
    batch: int,
    goals: dict[str, dict[str, float]],
    dtype: torch.dtype = BF16,
) -> Case:
    """One level of a preset's encoder, with the down-sampling that ends it."""

    def build(draw: Draw) -> Built:
        model = create_model(preset)
        assert isinstance(model, ASCEND)
        made = Level(model.encoder.levels[index])
        config = model.config
        side = config.image_size[0] >> index
        channels = config.level_channels[max(index - 1, 0)]
        x = draw(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        emb = draw(batch, 4 * config.channels)
        return made, (x.requires_grad_(), emb)

    return Case(f"{preset} level {index}, batch {batch}", build, dtype=dtype, goals=goals)


def res_block(
    batch: int, channels: int, side: int, goals: dict[str, dict[str, float]], dtype: torch.dtype
) -> Case:
    """A residual block against diffusers' `ResnetBlock2D`."""

    def build(draw: Draw) -> Built:
        x = draw(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        emb = draw(batch, 4 * channels)
        return ResBlock(channels, channels, 4 * channels), (x.requires_grad_(), emb)

    return Case(f"ResBlock {batch}x{channels}x{side}x{side}", build, dtype=dtype, goals=goals)


def swin_layer(
    batch: int, channels: int, side: int, goals: dict[str, dict[str, float]], dtype: torch.dtype
) -> Case:
    """A shifted Swin layer with a plain FFN against transformers' `SwinLayer`."""

    def build(draw: Draw) -> Built:
        head_dim = 64 if channels % 64 == 0 else 32
        layer = PlainSwinLayer(channels, window=8, shift=4, head_dim=head_dim, ffn="mlp")
        return layer, (draw(batch, side, side, channels).requires_grad_(), None)

    return Case(f"SwinLayer {batch}x{side}x{side}x{channels}", build, dtype=dtype, goals=goals)


def model(
    preset: str,
    batch: int,
    *,
    text: int = 256,
    overrides: Mapping[str, Any] | None = None,
    note: str = "",
    **case: Any,
) -> Case:
    """A whole preset."""

    def build(draw: Draw) -> Built:
        made = create_model(preset, **(overrides or {})).train()
        config = made.config
        x = draw(batch, config.in_channels, *config.image_size)
        context = None
        if config.context_dim is not None:
            context = draw(batch, text, config.context_dim)
        times = torch.arange(batch, device=x.device) * 999 // batch
        return made, (x, times, context)

    counted = None if overrides else (preset, batch)
    return Case(f"{preset}, batch {batch}{note}", build, preset=counted, **case)


_CIFAR = {"forward": {"compile": 1.15, FLOOR: 1.42}, "training": {"compile": 1.15, FLOOR: 1.36}}
_CC12M = {"forward": {"compile": 1.08, FLOOR: 1.22}, "training": {"compile": 1.08, FLOOR: 1.18}}
_STEP = {"training": {"eager NCHW": 1.5, FLOOR: 1.18, "memory": 0.8}}

# In the order of importance.
GPU = [
    block("IU-ViT CIFAR", 128, _CIFAR, dim=512, layers=13),
    block("IU-ViT CC12M", 64, _CC12M, dim=1024, layers=17, context_dim=1024),
    model("ascend_t2i_128", 16, compiled=False, goals=_STEP),
    model(
        "ascend_t2i_128",
        16,
        note=", compiled",
        compiled=True,
        directions=("training",),
        goals={"training": {"compile": 1.1}},
    ),
    model("iuvit_cifar10", 128, compiled=False, goals={"training": {"memory": 0.8}}),
    model("iuvit_cc12m64", 64, compiled=False, goals={"training": {"memory": 0.8}}),
]
CPU = [
    model("iuvit_cifar10", 4, overrides={"dim": 128, "layers": 5}, dtype=F32),
    model("ascend_cifar10", 1, overrides={"channels": 64, "depth": 1}, dtype=F32),
    model("unet_cifar10", 1, overrides={"channels": 64, "depth": 1}, dtype=F32),
    res_block(2, 128, 32, {}, F32),
    swin_layer(2, 96, 32, {}, F32),
]
_CPU_F32 = {"forward": {FLOOR: 1.1}, "training": {FLOOR: 1.1, "memory": 0.8}}
_CPU_BF16 = {"forward": {FLOOR: 1.2}, "training": {FLOOR: 1.15, "memory": 0.8}}
_AHEAD = {"eager": 1.0, "eager NCHW": 1.0, "compile": 1.0}
_MODEL_F32, _MODEL_BF16 = (
    {
        "forward": {FLOOR: most, **_AHEAD},
        "training": {FLOOR: most, **_AHEAD, "memory": 0.8},
    }
    for most in (1.12, 1.22)
)
_TWIN = {way: {"diffusers": 1.0, "transformers": 1.0, "removed": 0.6} for way in _MODEL_F32}
CPU_FULL = [
    block("IU-ViT CIFAR", 16, _CPU_F32, dim=512, layers=13, dtype=F32),
    block("IU-ViT CIFAR", 16, _CPU_BF16, dim=512, layers=13),
    level("ascend_celeba64", 1, 4, _CPU_F32, dtype=F32),
    level("ascend_celeba64", 1, 4, _CPU_BF16),
    *(
        model(preset, batch, dtype=dtype, goals=goals)
        for preset, batch in (("iuvit_cifar10", 16), ("ascend_celeba64", 4))
        for dtype, goals in ((F32, _MODEL_F32), (BF16, _MODEL_BF16))
    ),
    model("unet_64", 2, dtype=F32, goals=_TWIN),
    res_block(4, 384, 32, _TWIN, F32),
    swin_layer(4, 384, 32, _TWIN, F32),
]
_SMALL = {"channels": 16, "depth": 1, "multipliers": (1, 2), "attention_resolutions": (16,)}
_SMALL |= {"head_dim": 16, "groups": 8, "window": 4, "context_dim": 8}
TINY = [
    model("iuvit_cifar10", 1, overrides={"dim": 64, "layers": 1}, dtype=F32),
    model("ascend_cifar10", 1, text=3, overrides=_SMALL, dtype=F32),
    res_block(1, 32, 4, {}, F32),
]


def cases(device: torch.device, full: bool = False) -> list[Case]:
    """What is measured on a device; on a CPU `full` adds blocks of the paper's sizes."""
    if device.type == "cuda":
        return GPU
    return CPU_FULL if full else CPU


@dataclass
class Contestant:
    """A module and the ops it runs on."""

    module: Callable[..., Tensor]
    ops: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    weights: nn.Module | None = None


def as_nchw(module: nn.Module) -> nn.Module:
    """A copy whose images are NCHW from the first convolution on, as code without a layout has it.

    The models themselves ask for channels_last at their door, and Swin blocks give it.
    """
    made = copy.deepcopy(module).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for part in made.modules():
        if isinstance(part, SwinBlock):
            part.register_forward_hook(lambda _, inputs, out: out.contiguous())
        elif isinstance(part, nn.Conv2d) and part.groups == 1:
            part.register_forward_pre_hook(lambda _, inputs: tuple(t.contiguous() for t in inputs))
    return made


class Problem:
    """A case with its module and tensors, ready to run."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return drawn.to(case.dtype)

        with torch.device(device):
            module, self.arguments = case.build(draw)
        with torch.no_grad():
            for p in module.parameters():
                if not p.any():  # what starts at zero would leave most gradients zero
                    p.normal_(std=0.02, generator=generator)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # so that results compare
        self.module = module.to(case.dtype)
        if device.type == "cuda":  # as training and sampling have them
            channels_last_(self.module)
        self.inputs = [a for a in self.arguments if isinstance(a, Tensor) and a.requires_grad]
        with torch.no_grad():
            out = self.module(*self.arguments)
        self.dy = torch.empty_like(out).normal_(generator=generator)

    def contestants(self, options: Options) -> dict[str, Contestant]:
        """Ours, the rivals and the floor; the compiled ones after the eager ones."""
        found = {"ours": Contestant(self.module)}
        if self.case.compiled is not True:
            found["eager"] = Contestant(self.module, rivals.plain)
            if any(isinstance(part, nn.Conv2d) for part in self.module.modules()):
                nchw = as_nchw(self.module)
                found["eager NCHW"] = Contestant(nchw, lambda: rivals.plain(nchw=True), nchw)
            found |= self.twin()
            found[FLOOR] = Contestant(self.module, rivals.floor)
        if options.compile and self.case.compiled is not False:
            with rivals.plain(), torch.no_grad():
                self.module(*self.arguments)  # makes Swin's masks outside of any trace
            compiled = torch.compile(self.module, dynamic=False)
            found["compile"] = Contestant(compiled, rivals.plain)
            found["ours, compiled"] = Contestant(compiled)
            if options.max_autotune:
                most = torch.compile(self.module, dynamic=False, mode="max-autotune-no-cudagraphs")
                found["compile max-autotune"] = Contestant(most, rivals.plain)
        return found

    def twin(self) -> dict[str, Contestant]:
        """The other library's module on these weights, where there is one and it agrees.

        Raises:
            Refused: it computes something else.
        """
        try:
            found = twins.twin(self.module)
        except ImportError:
            return {}
        if found is None:
            return {}
        name, theirs = found
        with torch.no_grad(), rivals.plain():
            pair = theirs(*self.arguments), self.module(*self.arguments)
        apart = float(_numerics.rms(pair[0].double() - pair[1].double()))
        if not apart <= 1e-2 * float(_numerics.rms(pair[1].double())):
            raise Refused(f"{name} computes something else: RMS {apart:.2g}")
        return {name: Contestant(theirs, weights=theirs)}

    def absent(self, options: Options) -> dict[str, str]:
        """Rivals that are not tried, and why."""
        found = {}
        if not options.compile and self.case.compiled is not False:
            found["compile"] = "n/a: asked for by --compile"
        library = twins.TWINS.get(type(self.module), ("",))[0]
        if library and (why := harness.installed(library)):
            found[library] = why
        return found

    def wanted(self, one: Contestant) -> list[Tensor]:
        """What the training direction differentiates by."""
        return [*(one.weights or self.module).parameters(), *self.inputs]

    def forward(self, one: Contestant) -> Job:
        def job() -> Tensor:
            with torch.no_grad(), one.ops():
                return one.module(*self.arguments)

        return job

    def training(self, one: Contestant) -> Job:
        wanted = self.wanted(one)

        def job() -> tuple[Tensor | None, ...]:
            with one.ops():
                out = one.module(*self.arguments)
            return torch.autograd.grad(out, wanted, self.dy, allow_unused=True)

        return job

    def activations(self, one: Contestant) -> int:
        """Peak memory of training beyond weights, inputs and gradients."""
        wanted = self.wanted(one)
        for tensor in wanted:
            tensor.grad = torch.zeros_like(tensor)

        def job() -> None:
            with one.ops():
                out = one.module(*self.arguments)
            out.backward(self.dy)

        try:
            return harness.peak_memory(job, self.device)
        finally:
            for tensor in wanted:
                tensor.grad = None

    def check(self) -> float:
        """Hold our output to 1.5 times the RMS error of eager, and gradients to being eager's.

        Returns:
            Our error over what is allowed.

        Raises:
            Refused: it is larger, or a gradient is not finite or far from eager's.
        """
        ours, eager = Contestant(self.module), Contestant(self.module, rivals.plain)
        mine, plain = (self.forward(one)().double() for one in (ours, eager))
        # Of a whole model in float32.
        small = isinstance(self.module, Block)
        wide = torch.float64 if small else torch.float32
        exact = copy.deepcopy(self.module).to(wide)
        cudnn = harness.cudnn(enabled=not small, benchmark=False)
        with backend("reference"), cudnn, harness.no_tf32(), torch.no_grad():
            truth = exact(*_widened(self.arguments, wide)).double()
        del exact
        unit = _numerics.UNIT[self.case.dtype]
        allowed = 1.5 * _numerics.rms(plain - truth) + unit * _numerics.rms(truth)
        if wide is self.case.dtype:
            allowed = allowed + 16 * unit * _numerics.rms(truth)  # the truth is no better
        ratio = float(_numerics.rms(mine - truth) / allowed)
        if not ratio <= 1:
            raise Refused(f"error is {ratio:.2f} times what is allowed")
        grads = zip(self.training(ours)(), self.training(eager)(), strict=True)
        error, size = 0.0, 0.0
        for a, b in grads:
            if (a is None) != (b is None):
                raise Refused("a gradient is missing")
            if a is not None and b is not None:
                error += float((a.double() - b.double()).square().sum())
                size += float(b.double().square().sum())
        apart = (error / size) ** 0.5 if size else float("nan")
        if not apart <= (0.2 if self.case.dtype is BF16 else 1e-3):
            raise Refused(f"gradients are {apart:.2g} away from eager's")
        return ratio


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_widened(item, dtype) for item in value)
    return (
        value.detach().to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def warm(case: Case, device: torch.device, options: Options) -> None:
    """Compile and run everything of a case once."""
    torch._dynamo.reset()
    problem = Problem(case, device)
    for one in problem.contestants(options).values():
        for direction in case.directions:
            try:
                getattr(problem, direction)(one)()
            except Exception as error:
                harness.reason(error, device)
    harness.synchronize(device)


def run_case(case: Case, device: torch.device, options: Options) -> list[Row]:
    """Check a case, time it, and make a row for each direction.

    Raises:
        Refused: our result is wrong.
        harness.DeviceLost: the GPU's context broke.
    """
    torch._dynamo.reset()
    problem = Problem(case, device)
    margin = problem.check()
    contestants = problem.contestants(options)
    candidates = {
        (name, direction): getattr(problem, direction)(one)
        for name, one in contestants.items()
        for direction in case.directions
    }
    timings = harness.measure(candidates, device, rounds=options.rounds, seconds=options.seconds)
    memory: dict[str, float | None] = {}
    used: float | None = None
    if case.compiled is not True:
        for name, one in contestants.items():
            if name != FLOOR:
                try:
                    memory[name] = mib(problem.activations(one))
                except Exception as error:
                    harness.reason(error, device)
            if name == "ours":
                used = gpu_used_gib(device)
    rows = []
    for direction in case.directions:
        timed: dict[str, Timing | str] = {
            **{name: timings[name, direction] for name in contestants},
            **problem.absent(options),
        }
        row = make_row(case, direction, timed, memory, device)
        row["margin"] = margin
        if direction == "training" and used is not None:
            row["gpu_used_gib"] = used
        rows.append(row)
    return rows


def gpu_used_gib(device: torch.device) -> float | None:
    """GiB in use on the whole GPU by NVML; None without it, or without what training needs."""
    try:
        from fastdiff.training.sensors import Sensors
    except ImportError:  # of Pillow, for one
        return None
    return Sensors(device).read().get("gpu_used_gib")


def utilisation(flops: float, seconds: float, dtype: torch.dtype, gpu: str) -> float | None:
    """The model's own FLOPs over what the GPU's data sheet allows in the time, in bf16."""
    try:
        from fastdiff.training.sensors import peak_flops
    except ImportError:
        return None
    peak = peak_flops(gpu) if dtype is BF16 else None
    return None if peak is None else flops / seconds / peak


def backend_of(device: torch.device) -> str:
    """The back end that calls of the layer norm take on a device."""
    x = torch.zeros(1, 8, device=device)
    return ops.explain(ops.layer_norm_modulate, x).backend or "none"


def make_row(
    case: Case,
    direction: str,
    timed: Mapping[str, Timing | str],
    memory: Mapping[str, float | None],
    device: torch.device,
) -> Row:
    """One row: ours against each rival and the floor."""
    mine = {n: t.seconds for n, t in timed.items() if n[:4] == "ours" and isinstance(t, Timing)}
    if not mine:
        raise Refused(f"{direction} could not be timed: {timed['ours']}")
    winner = min(mine, key=mine.__getitem__)
    row = harness.race_row(
        case.name,
        direction,
        timed,
        mine=winner,
        dtype=str(case.dtype)[6:],
        backend=winner.replace("ours", backend_of(device)),
    )
    us, numbers = row["us"], {n: t for n, t in row["times_us"].items() if isinstance(t, float)}
    others = {n: t for n, t in numbers.items() if harness.is_rival(n)}
    ratios = {n: (t / us, True) for n, t in others.items()}
    if FLOOR in numbers:
        ratios[FLOOR] = (row["over_floor"], False)
        for library in {name for name, _ in twins.TWINS.values()} & numbers.keys():
            gap = numbers[library] - numbers[FLOOR]
            if gap > 0.05 * numbers[library]:  # of less, noise would make any share
                row["removed"] = (numbers[library] - us) / gap
                ratios["removed"] = (row["removed"], True)
    if direction == "training":
        row["memory"], row["peak_mib"] = dict(memory), memory.get("ours")
        least = min((m for n, m in memory.items() if n.startswith("eager") and m), default=None)
        own = memory.get("ours")
        if least and own is not None:
            row["peak_over_eager"] = own / least
            ratios["memory"] = (own / least, False)
    if case.preset is not None:
        name, batch = case.preset
        # The optimiser's step is counted, and is no part of what is timed.
        found = roofline.count(name, batch, training=direction == "training", dtype=case.dtype)
        found.calls = [call for call in found.calls if not call.kind.startswith("optimizer")]
        row["tflops"] = found.flops / us / 1e6
        row["images_per_second"] = 1e6 * batch / us
        row["flops"], row["preset"], row["batch"] = found.flops, name, batch
        if device.type == "cuda":
            gpu = torch.cuda.get_device_name(device)
            row["mfu"] = utilisation(found.flops, us / 1e6, case.dtype, gpu)
        bandwidth, rate = harness.ceilings(device, case.dtype)
        chip = roofline.Chip("here", bandwidth, rate, rate)
        row["of_roofline"] = 1e6 * found.seconds(chip) / us
    goals = case.goals.get(direction, {})
    compared = [(n, ratios[n][0], aim, ratios[n][1]) for n, aim in goals.items() if n in ratios]
    if compared:
        row["goal"], row["goal_share"] = verdict(compared), share(compared)
    return row


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        some = cases(device, metafunc.config.getoption("--full"))
        metafunc.parametrize("case", some, ids=[case.name.replace(" ", "-") for case in some])


def test_model(case: Case, benchmark: Any, bench_options: Options, results: list[Row]) -> None:
    """One case: its rows, and our training as pytest-benchmark sees it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_case(case, device, bench_options)
    results += rows
    benchmark.extra_info["rows"] = rows
    problem = Problem(case, device)
    job = problem.training(Contestant(problem.module))

    def timed() -> None:
        job()
        harness.synchronize(device)

    benchmark.pedantic(timed, rounds=2, warmup_rounds=1)
