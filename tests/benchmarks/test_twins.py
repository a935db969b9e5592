"""Other libraries' modules on our weights compute what ours do: else a race would prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_models, rivals, twins
from fastdiff.models import create_model
from fastdiff.nn import PlainSwinLayer, ResBlock
from fastdiff.ops import backend

SMALL = {
    "channels": 32,
    "depth": 1,
    "multipliers": (1, 2, 2),
    "attention_resolutions": (16,),
    "groups": 8,
    "head_dim": 16,
}
X, EMB = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "res block": (lambda: ResBlock(32, 64, 16, groups=8), (X, EMB)),
    "down": (lambda: ResBlock(32, 32, 16, groups=8, resample="down"), (X, EMB)),
    "up": (lambda: ResBlock(32, 32, 16, groups=8, resample="up"), (X, EMB)),
    "swin": (
        lambda: PlainSwinLayer(64, window=4, shift=2, head_dim=32, ffn="mlp"),
        (torch.randn(2, 8, 8, 64), None),
    ),
    "unet": (
        lambda: create_model("unet_cifar10", **SMALL).eval(),
        (torch.randn(2, 3, 32, 32), torch.tensor([3.0, 900.0]), None),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_twin_computes_the_same(name: str) -> None:
    build, arguments = CASES[name]
    ours = build()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.1)  # none may stay at zero, where a mistake would not show
    found = twins.twin(ours)
    assert found is not None
    library, theirs = found
    assert type(theirs.inner).__module__.startswith(library)
    with torch.no_grad(), backend("reference"):
        torch.testing.assert_close(theirs(*arguments), ours(*arguments), rtol=1e-4, atol=1e-4)


def test_a_twin_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in bench_models.TINY if c.name.startswith("ResBlock"))
    problem = bench_models.Problem(case, torch.device("cpu"))
    assert set(problem.twin()) == {"diffusers"}

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
            with rivals.plain():
                return 1.1 * problem.module(x, emb)

    monkeypatch.setattr(twins, "twin", lambda ours: ("diffusers", Wrong()))
    with pytest.raises(bench_models.Refused, match="diffusers computes something else"):
        problem.twin()


def test_what_has_no_twin() -> None:
    assert twins.twin(nn.Linear(1, 1)) is None


def test_what_is_removed_of_the_gap_to_the_floor() -> None:
    def row(theirs: float) -> dict:
        times = {"ours": 6e-6, "diffusers": theirs, "floor": 5e-6}
        timed = {n: bench_models.Timing.of([t] * 3, "cpu") for n, t in times.items()}
        case = bench_models.res_block(1, 32, 4, bench_models._TWIN, torch.float32)
        return bench_models.make_row(case, "forward", timed, {}, torch.device("cpu"))

    assert row(10e-6)["removed"] == pytest.approx(0.8)
    assert row(10e-6)["goal"] == "met"
    assert row(7e-6)["goal"] == "missed: removed 0.50 < 0.6"
    assert "removed" not in row(5.1e-6)  # too near the floor to tell
