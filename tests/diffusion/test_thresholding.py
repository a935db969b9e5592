"""Static and dynamic thresholds, alone and inside samplers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import (
    DiffusionProcess,
    dynamic_threshold,
    initial_noise,
    sample_ancestral,
    sample_ddim,
    schedule,
    static_threshold,
)


def test_dynamic_threshold_is_imagens() -> None:
    x0 = 3 * initial_noise(range(3), (3, 8, 8)).double()
    x0[2] /= 30  # within [-1, 1]: left alone
    got = dynamic_threshold(0.9)(x0)
    for picture, out in zip(x0.numpy(), got.numpy(), strict=True):
        s = max(np.percentile(np.abs(picture), 90), 1)
        np.testing.assert_allclose(out, np.clip(picture, -s, s) / s, rtol=1e-12)
    assert torch.equal(got[2], x0[2])
    assert float(got[0].abs().max()) == 1


def test_the_whole_range_is_the_largest_pixel() -> None:
    x0 = torch.tensor([[4.0, -2.0, 1.0]])
    assert torch.equal(dynamic_threshold(1.0)(x0), x0 / 4)
    assert torch.equal(static_threshold(x0), torch.tensor([[1.0, -1.0, 1.0]]))


def test_samplers_take_any_threshold() -> None:
    process = DiffusionProcess(schedule("linear", 100), "x0")
    x_T = initial_noise([0], (1, 2, 2))
    ramp = torch.tensor([4.0, -2.0, 1.0, 0.0]).view(1, 1, 2, 2)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return ramp

    for threshold, expected in (
        (dynamic_threshold(1.0), ramp / 4),
        (static_threshold, ramp.clamp(-1, 1)),
        (True, ramp.clamp(-1, 1)),
        (False, ramp),
    ):
        for sample in (sample_ddim, sample_ancestral):
            torch.testing.assert_close(sample(model, x_T, process, clip_x0=threshold), expected)  # type: ignore[operator]


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.01])
def test_bad_quantiles_are_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        dynamic_threshold(quantile)
