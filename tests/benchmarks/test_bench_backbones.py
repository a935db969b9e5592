"""Races between backbones and the lines of scaling: sizes, FLOPs, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_backbones, bench_ops, bench_scaling
from fastdiff.models import create_model

CPU = torch.device("cpu")
QUICK = bench_ops.Options(compile=False, rounds=3, seconds=0.01)


def test_widths_are_searched_for_the_parameters() -> None:
    made = bench_backbones.matched(lambda width: nn.Linear(width, 100), 5000, 4)
    assert bench_backbones.parameters(made) in (4900, 5300)
    with pytest.raises(ValueError, match="no width gives"):
        bench_backbones.matched(lambda width: nn.Linear(width, width), 700, 20)


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolutions_gradients(groups: int) -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    right = {torch.ops.aten.convolution_backward: bench_backbones.convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=right) as counter:
        out = layer(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * out.numel() * 9 * 4 // groups
    assert counter.get_total_flops() == 3 * forward


def test_a_model_of_another_output_has_no_number() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor, t: torch.Tensor, context: None) -> torch.Tensor:
            return self.layer(x)

    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"output has shape \(1, 4, 4, 4\)"):
        bench_backbones.prepare(
            bench_backbones.Entrant(Wrong(), "diffusers"), x, torch.zeros(1), None, x
        )


def test_ours_stands_beside_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    small = bench_backbones.Field(
        "tiny", "iuvit_cifar10", 32, 1, overrides={"dim": 64, "layers": 3, "patch_size": 8}
    )
    name = small.first
    ours = bench_backbones.Entrant(create_model(name, **small.overrides), "fastdiff")
    eager = bench_backbones.Entrant(create_model(name, **small.overrides), "eager")
    made = {name: lambda wanted: ours, "eager": lambda wanted: eager}
    monkeypatch.setattr(bench_backbones, "entrants", lambda field: made)
    rows = bench_backbones.run_field(small, CPU, QUICK)
    by_name = {(row["model"], row["direction"]): row["over_floor"] for row in rows}
    assert len(by_name) == 4
    for direction in ("forward", "training"):
        assert by_name[name, direction] > 0.3
        assert by_name["eager", direction] is None


def test_a_line_of_scaling() -> None:
    small = {"channels": 8, "head_dim": 8, "depth": 1, "multipliers": (1, 1, 1), "groups": 4}
    line = bench_scaling.Line("a", "resolution", (16, 32), overrides=tuple(small.items()))
    rows = bench_scaling.run_line(line, CPU, QUICK)
    assert [row["value"] for row in rows] == [16, 32]
    assert rows[0]["ns_per_pixel"] == pytest.approx(1e3 * rows[0]["us"] / 256)
    assert rows[1]["mflop_per_pixel"] > rows[0]["mflop_per_pixel"]  # the decoder's attention
    assert "goal" in rows[1]
    alone = bench_scaling.run_line(
        bench_scaling.Line("e", "window", (4, 8), encoder=True, overrides=tuple(small.items())),
        CPU,
        QUICK,
    )
    assert "growth" not in alone[1]


def test_growth_is_held_against_the_products() -> None:
    first = {"ns_per_pixel": 10.0, "mflop_per_pixel": 1.0}
    last = {"ns_per_pixel": 24.0, "mflop_per_pixel": 2.0}
    assert bench_scaling.growth(first, last, held=True)["goal"] == "missed: growth 1.20 > 1.15"
    last["ns_per_pixel"] = 22.0
    assert bench_scaling.growth(first, last, held=True)["goal"] == "met"
    del first["mflop_per_pixel"], last["mflop_per_pixel"]
    assert bench_scaling.growth(first, last, held=False) == {"growth": 2.2}
