"""Schedules against their closed forms, and the identities between their tables."""

import math

import pytest
import torch

from fastdiff.diffusion import NoiseSchedule, cosine_schedule, linear_schedule, schedule


def test_linear_is_ddpm_and_scales_with_T() -> None:
    betas = linear_schedule().betas
    assert betas.dtype == torch.float64
    assert betas.shape == (1000,)
    for t in (0, 1, 500, 999):
        assert float(betas[t]) == pytest.approx(1e-4 + (0.02 - 1e-4) * t / 999, rel=1e-12)
    short = linear_schedule(100)
    assert float(short.betas[0]) == pytest.approx(1e-3)
    assert float(short.betas[-1]) == pytest.approx(0.2)
    # The continuous limit ends at exp(-10.05); DDPM's own chain at 4.036e-5.
    assert float(linear_schedule().alpha_bar[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(linear_schedule(20_000).alpha_bar[-1]) == pytest.approx(math.exp(-10.05), rel=0.01)


def test_cosine_is_the_closed_form_where_it_is_not_capped() -> None:
    table = cosine_schedule()

    def f(u: float) -> float:
        return math.cos(math.pi / 2 * (u + 0.008) / 1.008) ** 2

    for t in (0, 10, 500, 900, 998):
        assert float(table.alpha_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert float(table.betas[-1]) == 0.999
    assert float(table.betas[0]) == pytest.approx(1 - f(0.001) / f(0), rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [21, 100, 1000])
def test_tables_obey_their_definitions(name: str, steps: int) -> None:
    table = schedule(name, steps)
    assert table.steps == steps
    assert table.name == name
    product = 1.0
    for t in range(steps):
        beta, previous = float(table.betas[t]), product
        product *= 1.0 - beta
        assert float(table.alphas[t]) == pytest.approx(1.0 - beta)
        assert float(table.alpha_bar[t]) == pytest.approx(product, rel=1e-9)
        assert float(table.alpha_bar_prev[t]) == pytest.approx(previous, rel=1e-9)
        assert float(table.snr[t]) == pytest.approx(product / (1 - product), rel=1e-9)
        # Bayes: the precision of q(x_{t-1} | x_t, x_0) adds that of both factors.
        if t > 0:
            precision = (1.0 - beta) / beta + 1.0 / (1.0 - previous)
            variance = float(table.posterior_variance[t])
            assert variance == pytest.approx(1.0 / precision, rel=1e-8)
            weight_x0 = variance * math.sqrt(previous) / (1.0 - previous)
            weight_xt = variance * math.sqrt(1.0 - beta) / beta
            assert float(table.posterior_mean_x0[t]) == pytest.approx(weight_x0, rel=1e-8)
            assert float(table.posterior_mean_xt[t]) == pytest.approx(weight_xt, rel=1e-8)
    assert float(table.posterior_variance[0]) == 0.0
    assert float(table.posterior_mean_x0[0]) == pytest.approx(1.0)
    assert bool((table.snr[1:] < table.snr[:-1]).all())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule: name must be one of .*got 'cosin'"):
        schedule("cosin")
    with pytest.raises(ValueError, match="at least 21, got 20"):
        linear_schedule(20)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        cosine_schedule(0)
    with pytest.raises(TypeError, match=r"float64, got torch\.float32"):
        NoiseSchedule("mine", torch.full((3,), 0.1))
    with pytest.raises(ValueError, match=r"\(0, 1\), got 0.5 .. 1"):
        NoiseSchedule("mine", torch.tensor([0.5, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must be \(T,\), got \(2, 1\)"):
        NoiseSchedule("mine", torch.full((2, 1), 0.1, dtype=torch.float64))
