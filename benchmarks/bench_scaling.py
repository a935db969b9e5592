"""How time grows with resolution, batch and window, per pixel and per counted product.

    pytest benchmarks/bench_scaling.py --benchmark-only [--full]

ASCEND's encoder attends within windows, so its time per pixel must not grow with the image; the
decoder's attention is global, so the whole model is held against its counted products per pixel.
IU-ViT stands beside it at a constant patch size, where attention is over all patches. All points of
a line take turns in one process. Small models on a CPU, `--full` or a GPU: the presets' widths.

Letters: B batch, C channels, H W pixels, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import roofline
from fastdiff.models import Backbone, create_model
from fastdiff.models.ascend import ASCEND

from . import harness
from .bench_ops import Options, verdict
from .harness import Job, Refused, Row, Timing

# Growth of the encoder's time per pixel, and of the model's over that of its products per pixel.
MOST = 1.15
ASCEND_SMALL = {"channels": 32, "head_dim": 32, "depth": 1, "multipliers": (1, 2, 2, 2)}
# Patches of 8 keep IU-ViT's attention over all of them within a CPU's reach at 256 pixels.
IUVIT_SMALL = {"dim": 128, "layers": 3, "patch_size": 8, "head_dim": 64}


@dataclass(frozen=True)
class Line:
    """One quantity against one axis.

    Attributes:
        name: what is timed.
        axis: "resolution", "batch" or "window".
        points: values of the axis, ascending.
        batch: images, where the axis is another.
        encoder: the encoder alone.
        overrides: the preset's fields.
        preset: its name.
    """

    name: str
    axis: str
    points: tuple[int, ...]
    preset: str = "ascend_256"
    batch: int = 1
    encoder: bool = False
    overrides: tuple[tuple[str, Any], ...] = ()


def lines(small: bool) -> list[Line]:
    """What is measured."""
    ascend = tuple((ASCEND_SMALL if small else {}).items())
    iuvit = tuple((IUVIT_SMALL if small else {"patch_size": 16}).items())
    sides = (64, 128, 256)
    most = 8 if small else 16
    batches = tuple(2**n for n in range(most.bit_length()))
    return [
        Line("ASCEND's encoder", "resolution", sides, encoder=True, overrides=ascend),
        Line("ASCEND", "resolution", sides, overrides=ascend),
        Line("IU-ViT", "resolution", sides, preset="iuvit_church256", overrides=iuvit),
        Line("ASCEND", "batch", batches, preset="ascend_celeba64", overrides=ascend),
        Line("ASCEND's encoder", "window", (4, 8, 16), encoder=True, overrides=ascend),
    ]


class Point:
    """A model at one point of a line."""

    def __init__(self, line: Line, value: int, device: torch.device) -> None:
        fields = dict(line.overrides)
        side, batch = 64, line.batch
        if line.axis == "resolution":
            side = value
        elif line.axis == "batch":
            batch = value
        else:
            fields["window"], side = value, 128
        fields["image_size"] = side
        if line.preset.startswith("ascend"):
            # The same levels attend at every resolution: the last three.
            levels = len(fields.get("multipliers", (1, 1, 2, 2, 3, 4)))
            if line.preset == "ascend_celeba64" and "multipliers" not in fields:
                levels = 4
            fields["attention_resolutions"] = tuple(side >> n for n in range(levels)[-3:])
        with torch.device(device):
            self.model = create_model(line.preset, **fields).eval()
        with torch.device("meta"):
            self.shape: Backbone = create_model(line.preset, **fields)
        self.batch, self.pixels, self.line = batch, batch * side**2, line
        config = self.model.config
        self.x = torch.randn(batch, config.in_channels, side, side, device=device)
        self.t = torch.full((batch,), 500.0, device=device)

    def call(self) -> Tensor:
        """The part that the line is about."""
        if not self.line.encoder:
            return self.model(self.x, self.t)
        assert isinstance(self.model, ASCEND)
        x = self.x.contiguous(memory_format=torch.channels_last)
        return self.model.encoder(x, self.model.time(self.t), None)[-1]

    def job(self) -> Job:
        def job() -> Tensor:
            with torch.no_grad():
                return self.call()

        return job

    def products(self) -> float:
        """FLOPs of the whole model's forward."""
        return roofline.count(self.shape, self.batch, training=False, dtype=torch.float32).flops


def run_line(line: Line, device: torch.device, options: Options) -> list[Row]:
    """One row for each point; the last has the growth from the first.

    Raises:
        Refused: a result is not finite, or could not be timed.
    """
    points = {value: Point(line, value, device) for value in line.points}
    jobs: dict[int, Job] = {value: point.job() for value, point in points.items()}
    for value, job in jobs.items():
        if not job().isfinite().all():
            raise Refused(f"{line.name}, {line.axis} {value}: not finite")
    found = harness.measure(jobs, device, rounds=options.rounds, seconds=4 * options.seconds)
    rows: list[Row] = []
    for value, point in points.items():
        timing = found[value]
        if not isinstance(timing, Timing):
            raise Refused(f"{line.name}, {line.axis} {value}: {timing}")
        rows.append(
            {
                "case": f"{line.name}, {line.axis} {value}",
                "scaling": line.axis,
                "line": line.name,
                "value": value,
                "dtype": "float32",
                "direction": "forward",
                "us": 1e6 * timing.seconds,
                "spread": timing.spread,
                "ns_per_pixel": 1e9 * timing.seconds / point.pixels,
            }
        )
        if not line.encoder:
            rows[-1]["mflop_per_pixel"] = point.products() / point.pixels / 1e6
    if line.axis == "resolution":
        rows[-1] |= growth(rows[0], rows[-1], held=line.preset.startswith("ascend"))
    return rows


def growth(first: Row, last: Row, *, held: bool) -> Row:
    """Growth of the time per pixel, over that of the products where they are counted."""
    grown = last["ns_per_pixel"] / first["ns_per_pixel"]
    if "mflop_per_pixel" in last:
        grown /= last["mflop_per_pixel"] / first["mflop_per_pixel"]
    row: Row = {"growth": grown}
    if held:
        row["goal"] = verdict([("growth", grown, MOST, False)])
    return row


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "line" in metafunc.fixturenames:
        small = not (torch.cuda.is_available() or metafunc.config.getoption("--full"))
        some = lines(small)
        names = [f"{line.name}, {line.axis}".replace(" ", "-") for line in some]
        metafunc.parametrize("line", some, ids=names)


def test_scaling(line: Line, benchmark: Any, bench_options: Options, results: list[Row]) -> None:
    """One line, and its last point as pytest-benchmark sees it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = run_line(line, device, bench_options)
    results += rows
    benchmark.extra_info["rows"] = rows
    job: Callable[[], Any] = Point(line, line.points[-1], device).job()
    benchmark.pedantic(job, rounds=2, warmup_rounds=1)
