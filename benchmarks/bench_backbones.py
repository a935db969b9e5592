"""Backbones of one size at one resolution beside each other, ours and diffusers'.

    pytest benchmarks/bench_backbones.py --benchmark-only [--full]

They compute different functions: what is compared is what a researcher chooses between. A rival's
width is searched so that its parameters come within 15 % of the first model's. U-ViT and the
U-Net are ours with every op as a user would write it; diffusers' models are as that library makes
them. *training* is forward and backward; FLOPs are counted by torch on the very call. A model has a
row only where its output has the image's shape and every gradient it gives is finite; ours also has
to agree with the plain ops, and its row says how far it is from its floor (see `bench_models.py`).

Letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.models import create_model
from fastdiff_kernels import _numerics

from . import harness, rivals
from .bench_ops import Options, mib
from .harness import Job, Refused, Row, Timing

NEAR = 0.15  # how far apart parameters may be
Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Field:
    """Models to be compared.

    Attributes:
        name: resolution and size.
        first: the preset that sets the size, and its fields.
        side, batch: of the images.
        text: width of the text, None without.
    """

    name: str
    first: str
    side: int
    batch: int
    text: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


SMALL = Field("32 px, small", "iuvit_cifar10", 32, 4, overrides={"dim": 384, "layers": 5})
FULL = [
    Field("32 px", "iuvit_cifar10", 32, 16),
    Field("64 px with text", "iuvit_cc12m64", 64, 4, text=1024),
]


def fields(full: bool) -> list[Field]:
    """What is compared."""
    return FULL if full else [SMALL]


def parameters(model: nn.Module) -> int:
    """Their number."""
    return sum(p.numel() for p in model.parameters())


def matched(build: Build, wanted: int, step: int) -> nn.Module:
    """The model whose width, a multiple of `step`, brings its parameters nearest to `wanted`.

    Raises:
        ValueError: none comes within 15 %.
    """
    sizes: dict[int, int] = {}
    for width in range(step, 4096, step):
        with torch.device("meta"):
            sizes[width] = parameters(build(width))
        if sizes[width] > wanted:
            break
    best = min(sizes, key=lambda width: abs(sizes[width] - wanted))
    if abs(sizes[best] / wanted - 1) > NEAR:
        raise ValueError(f"no width gives {wanted / 1e6:.1f}M parameters: {sizes[best] / 1e6:.1f}M")
    return build(best)


class Diffusers(nn.Module):
    """A model of diffusers behind our call.

    Args:
        inner: The model.
        takes: "text", "label" or nothing beside the image and the time.
    """

    def __init__(self, inner: nn.Module, takes: str = "") -> None:
        super().__init__()
        self.inner, self.takes = inner, takes

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), t (B,), context (B, S, width), to (B, C, H, W)."""
        if self.takes == "text":
            return self.inner(x, t, context).sample
        if self.takes == "label":
            label = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            return self.inner(x, timestep=t.long(), class_labels=label).sample
        return self.inner(x, t).sample


def unet_2d(field: Field, width: int) -> nn.Module:
    """`UNet2DModel` with attention at the two lower resolutions of three."""
    from diffusers import UNet2DModel

    return Diffusers(
        UNet2DModel(
            sample_size=field.side,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )


def unet_2d_condition(field: Field, width: int) -> nn.Module:
    """`UNet2DConditionModel`, Stable Diffusion's four levels."""
    from diffusers import UNet2DConditionModel

    inner = UNet2DConditionModel(
        sample_size=field.side,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=field.text,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    return Diffusers(inner, "text")


def dit(field: Field, width: int) -> nn.Module:
    """`DiTTransformer2DModel` on the 16 x 16 patches that IU-ViT has, 12 layers; no text."""
    from diffusers import DiTTransformer2DModel

    inner = DiTTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=12 if field is not SMALL else 4,
        sample_size=field.side,
        patch_size=field.side // 16,
    )
    return Diffusers(inner, "label")


@dataclass
class Entrant:
    """A model of a field.

    Attributes:
        module: called as (x, t, context).
        library: "fastdiff", "eager" for ours with plain ops, "floor" for what is left of ours
            without them, "diffusers".
    """

    module: nn.Module
    library: str

    def ops(self) -> contextlib.AbstractContextManager[Any]:
        """The ops it runs on."""
        contexts = {"eager": rivals.plain, "floor": rivals.floor}
        return contexts.get(self.library, contextlib.nullcontext)()


def entrants(field: Field) -> dict[str, Callable[[int], Entrant]]:
    """By name, how each is made, given the parameters to match."""

    def own(preset: str, library: str) -> Callable[[int], Entrant]:
        def make(wanted: int) -> Entrant:
            def build(width: int) -> nn.Module:
                if preset.startswith("unet"):
                    return create_model(preset, channels=width, groups=4, heads=4)
                fields = {"context_dim": field.text} if field.text else {}
                shape = {k: v for k, v in field.overrides.items() if k == "layers"}
                side = {"image_size": field.side, "patch_size": field.side // 16}
                return create_model(preset, dim=width, **shape, **side, **fields)

            return Entrant(matched(build, wanted, 4 if "unet" in preset else 64), library)

        return make

    def theirs(make: Callable[[Field, int], nn.Module], step: int) -> Callable[[int], Entrant]:
        return lambda wanted: Entrant(
            matched(lambda width: make(field, width), wanted, step), "diffusers"
        )

    name = field.first
    found: dict[str, Callable[[int], Entrant]] = {
        name: lambda wanted: Entrant(create_model(name, **field.overrides), "fastdiff"),
        "U-ViT, eager": own("uvit_s2_cifar10", "eager"),
        "U-Net, eager": own("unet_t2i_64" if field.text else "unet_cifar10", "eager"),
        "U-Net": own("unet_t2i_64" if field.text else "unet_cifar10", "fastdiff"),
        "DiTTransformer2DModel": theirs(dit, 32),
    }
    if field.text:
        found["UNet2DConditionModel"] = theirs(unet_2d_condition, 8)
    else:
        found["UNet2DModel"] = theirs(unet_2d, 4)
    return found


def run_field(field: Field, device: torch.device, options: Options) -> list[Row]:
    """Two rows for each model.

    Raises:
        Refused: one of ours is wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    x, noise = (
        torch.randn(field.batch, 3, field.side, field.side, generator=generator, device=device)
        for _ in range(2)
    )
    t = torch.arange(field.batch, device=device) * 999.0 // field.batch
    context = None
    if field.text:
        context = torch.randn(field.batch, 77, field.text, generator=generator, device=device)
    with torch.device("meta"):
        wanted = parameters(create_model(field.first, **field.overrides))
    rows: list[Row] = []
    jobs: dict[tuple[str, str], Job] = {}
    about: dict[str, Row] = {}
    for name, make in entrants(field).items():
        try:
            with torch.device(device):
                one = make(wanted)
            ready = prepare(one, x, t, context, noise)
            about[name] = measured(one, ready, (x, t, context), device)
        except (ImportError, ValueError) as error:
            rows.append({"case": f"{field.name}: {name}", "failed": harness.reason(error, device)})
            continue
        jobs |= {(name, direction): job for direction, job in ready.items()}
        if one.library == "fastdiff":
            floor = prepare(Entrant(one.module, "floor"), x, t, context, noise)
            jobs |= {(f"{name}, floor", direction): job for direction, job in floor.items()}
    seconds = options.seconds * len(jobs)
    found = harness.measure(jobs, device, rounds=options.rounds, seconds=seconds)
    for (name, direction), timing in found.items():
        if name not in about:
            continue
        floor_timing = found.get((f"{name}, floor", direction))
        if not isinstance(timing, Timing):
            rows.append({"case": f"{field.name}: {name}, {direction}", "failed": timing})
            continue
        us, shared = 1e6 * timing.seconds, dict(about[name])
        flops = shared.pop(f"{direction}_flops")
        peak = shared.pop("peak_mib")
        rows.append(
            {
                "case": f"{field.name}: {name}",
                "field": field.name,
                "model": name,
                "dtype": "float32",
                "direction": direction,
                "us": us,
                "spread": timing.spread,
                "over_floor": timing.seconds / floor_timing.seconds
                if isinstance(floor_timing, Timing)
                else None,
                "batch": field.batch,
                "flops": flops,
                "tflops": flops / us / 1e6,
                "images_per_second": 1e6 * field.batch / us,
                "peak_mib": peak if direction == "training" else None,
                **shared,
            }
        )
    return rows


def prepare(
    one: Entrant, x: Tensor, t: Tensor, context: Tensor | None, noise: Tensor
) -> dict[str, Job]:
    """The jobs of a model, checked.

    Raises:
        Refused: ours differs from the plain ops.
        ValueError: output of another shape, or a gradient that is not finite.
    """
    module = one.module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():  # from zero most gradients would be zero
                p.normal_(std=0.02)

    def forward() -> Tensor:
        with torch.no_grad(), one.ops():
            return module(x, t, context)

    def training() -> tuple[Tensor | None, ...]:
        with one.ops():
            out = module(x, t, context)
        return torch.autograd.grad(out, list(module.parameters()), noise, allow_unused=True)

    out = forward()
    if out.shape != x.shape:
        raise ValueError(f"output has shape {tuple(out.shape)}")
    if not all(g.isfinite().all() for g in training() if g is not None):
        raise ValueError("a gradient is not finite")
    if one.library == "fastdiff":
        with rivals.plain():
            plain = forward()
        apart = float(_numerics.rms(out - plain) / _numerics.rms(plain))
        if not apart <= 1e-3:
            raise Refused(f"{apart:.2g} away from the plain ops")
    return {"forward": forward, "training": training}


def convolution_backward_flops(
    dy: Sequence[int], x: Sequence[int], weight: Sequence[int], *more: Any, out_shape: Any = None
) -> int:
    """The forward's products for each of the gradients of x and weight, also of grouped ones."""
    return 2 * math.prod(dy) * math.prod(weight[1:]) * sum(more[-1][:2])


def addmm_flops(
    out: Sequence[int], a: Sequence[int], b: Sequence[int], *more: Any, out_shape: Any = None
) -> int:
    """A product that adds to what is there: torch's counter knows the one out of place alone."""
    return 2 * math.prod(a) * b[-1]


def measured(
    one: Entrant, jobs: Mapping[str, Job], arguments: tuple[Any, ...], device: torch.device
) -> Row:
    """Parameters, FLOPs and memory of a model."""
    row: Row = {"library": one.library, "parameters": parameters(one.module)}
    # The plain ops do the same products, and attend by functions that torch's counter knows.
    right: dict[Any, Any]
    right = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    right |= {torch.ops.aten.addmm_: addmm_flops}
    with rivals.plain(), FlopCounterMode(display=False, custom_mapping=right) as counter:
        out = one.module(*arguments)
        row["forward_flops"] = counter.get_total_flops()
        out.backward(torch.ones_like(out))  # the counter does not take autograd.grad
    row["training_flops"] = counter.get_total_flops()
    one.module.zero_grad()
    row["peak_mib"] = mib(harness.peak_memory(jobs["training"], device))
    return row


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "race" in metafunc.fixturenames:
        some = fields(torch.cuda.is_available() or metafunc.config.getoption("--full"))
        metafunc.parametrize("race", some, ids=[one.name.replace(" ", "-") for one in some])


def test_backbones(race: Field, benchmark: Any, bench_options: Options, results: list[Row]) -> None:
    """One field; pytest-benchmark sees the first model's training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_field(race, device, bench_options)
    results += rows
    benchmark.extra_info["rows"] = rows
    model = create_model(race.first, **race.overrides).to(device)
    x = torch.randn(race.batch, 3, race.side, race.side, device=device)
    context = None if race.text is None else torch.randn(race.batch, 77, race.text, device=device)
    t = torch.zeros(race.batch, device=device)
    job = prepare(Entrant(model, "fastdiff"), x, t, context, torch.ones_like(x))["training"]
    benchmark.pedantic(job, rounds=2, warmup_rounds=1)
