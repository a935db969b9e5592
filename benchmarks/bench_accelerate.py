"""What `fastdiff.accelerate` takes off other people's models, against the floor below them.

    PYTHONPATH=. python -m benchmarks.bench_accelerate [--rounds 25] [--seconds 60] [CASE ...]

*floor* is the same model with every GroupNorm and SiLU an identity (for Swin there is none);
*removed* is (eager - ours) / (eager - floor). All take turns in one process; times are lower
quartiles.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel

import fastdiff

from . import harness
from .bench_ops import Options
from .harness import Job, Refused, Row

KIND = "accelerate"
Built = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Tensor]


def unet(width: int, layout: torch.memory_format, batch: int = 4) -> Built:
    """A random U-Net of diffusers at 64 x 64 with three levels of `width`, 2 and 2 times it."""
    model = UNet2DModel(
        sample_size=64,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    x = torch.randn(batch, 3, 64, 64).contiguous(memory_format=layout)
    return model.to(memory_format=layout), lambda m, x: m(x, 7).sample, x


def swin(batch: int = 2) -> Built:
    """The two first stages of Swin-T at 224 x 224."""
    config = SwinConfig(image_size=224, depths=(2, 2), num_heads=(3, 6), drop_path_rate=0.0)
    x = torch.randn(batch, 3, 224, 224)
    return SwinModel(config), lambda m, x: m(x).last_hidden_state, x


NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES: dict[str, Callable[[], Built]] = {
    "unet 32, contiguous": lambda: unet(32, NCHW),
    "unet 32, channels_last": lambda: unet(32, NHWC),
    "unet 64, contiguous": lambda: unet(64, NCHW),
    "unet 64, channels_last": lambda: unet(64, NHWC),
    "unet 64, contiguous, b1": lambda: unet(64, NCHW, 1),
    "unet 64, channels_last, b1": lambda: unet(64, NHWC, 1),
    "swin": swin,
}


def without_norms(model: nn.Module) -> nn.Module | None:
    """A copy whose GroupNorms and SiLUs do nothing; None for a model that has none."""
    found = copy.deepcopy(model)
    parts = [m for m in found.modules() if isinstance(m, (nn.GroupNorm, nn.SiLU))]
    for part in parts:
        part.__dict__["forward"] = lambda x: x
    return found if parts else None


def run_case(name: str, rounds: int, seconds: float, *, training: bool = False) -> Row:
    """Check a case, time it, and make its row.

    Raises:
        Refused: the accelerated model gives something else.
    """
    torch.manual_seed(0)
    eager, call, x = CASES[name]()
    eager.train(training)
    ours = copy.deepcopy(eager)
    fastdiff.accelerate(ours)
    with torch.no_grad():
        apart = float((call(ours, x) - call(eager, x)).abs().max())
    if not apart <= 1e-4:
        raise Refused(f"{name}: outputs differ by {apart:.2g}")

    def job(model: nn.Module) -> Job:
        def forward() -> Any:
            with torch.no_grad():
                return call(model, x)

        def step() -> Any:
            return torch.autograd.grad(
                call(model, x).square().sum(), list(model.parameters()), allow_unused=True
            )

        return step if training else forward

    candidates = {"eager": job(eager), "ours": job(ours)}
    floor = without_norms(eager)
    if floor is not None:
        candidates["floor"] = job(floor)
    timings = harness.measure(candidates, torch.device("cpu"), rounds=rounds, seconds=seconds)
    direction = "training" if training else "forward"
    row = harness.race_row(f"accelerate {name}", direction, timings, dtype="float32", kind=KIND)
    times = row["times_us"]
    if floor is not None:
        row["removed"] = (times["eager"] - times["ours"]) / (times["eager"] - times["floor"])
    row["images_per_second"] = 1e6 * x.shape[0] / row["us"]
    return row


def line(row: Row) -> str:
    """A row as one prints it."""
    times = ", ".join(f"{key} {time / 1e3:.1f}" for key, time in row["times_us"].items())
    removed = f", removed {row['removed']:.0%}" if "removed" in row else ""
    return f"{row['case']}, {row['direction']}: {times} ms{removed}, {row['over_eager']:.2f} x"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("name", CASES if full else ["unet 32, channels_last", "swin"])


def test_accelerate(name: str, benchmark: Any, bench_options: Options, results: list[Row]) -> None:
    """One case, and ours as pytest-benchmark sees it."""
    row = run_case(name, rounds=bench_options.rounds, seconds=max(5.0, bench_options.seconds))
    results.append(row)
    benchmark.extra_info["row"] = row
    model, call, x = CASES[name]()
    fastdiff.accelerate(model.eval())
    with torch.no_grad():
        benchmark.pedantic(lambda: call(model, x), rounds=2, warmup_rounds=1)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(map(repr, CASES)))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--training", action="store_true")
    given = parser.parse_args()
    for name in given.cases or CASES:
        print(line(run_case(name, given.rounds, given.seconds, training=given.training)))


if __name__ == "__main__":
    main()
