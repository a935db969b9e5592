"""The continuous process and its samplers: levels, grid, noise, clipping, refusals."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from fastdiff.diffusion import (
    VPSDE,
    DiffusionProcess,
    PictureNoise,
    Prediction,
    cosine_schedule,
    initial_noise,
    linear_schedule,
    sample_euler_maruyama,
    sample_ode_euler,
    sample_ode_heun,
    schedule,
)

SAMPLERS = [sample_euler_maruyama, sample_ode_euler, sample_ode_heun]


def levels(process: VPSDE, u: list[float]) -> tuple[Tensor, Tensor]:
    t = 999 * torch.tensor(u, dtype=torch.float64)
    ones = torch.ones(len(u), 1, dtype=torch.float64)
    a = process.q_sample(ones, t, 0 * ones)
    s = process.q_sample(0 * ones, t, ones)
    return a.flatten(), s.flatten()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_alpha_bar_is_the_integral_of_beta(name: str) -> None:
    process = VPSDE(name)  # type: ignore[arg-type]
    times = [1e-3, 0.1, 0.5, 0.9, 0.99]
    a, s = levels(process, times)
    for k, u in enumerate(times):
        # So many steps that the bound is out of reach.
        integral = quad(lambda v: process.beta(v, 10**9), 0, u, epsabs=1e-13)[0]
        assert float(a[k]) == pytest.approx(math.exp(-integral / 2), rel=1e-9)
        assert float(s[k]) == pytest.approx(math.sqrt(-math.expm1(-integral)), rel=1e-9)


def test_the_discrete_schedules_are_close_to_it() -> None:
    times = [0.2, 0.5, 0.8]
    for name, table in (("linear", linear_schedule()), ("cosine", cosine_schedule())):
        a, _ = levels(VPSDE(name), times)  # type: ignore[arg-type]
        for k, u in enumerate(times):
            discrete = float(table.alpha_bar[round(1000 * u) - 1])
            assert float(a[k]) ** 2 == pytest.approx(discrete, rel=0.05)


def test_beta_is_bounded_as_the_discrete_cosine_is() -> None:
    process = VPSDE("cosine")
    assert process.beta(1.0, 1000) == 999.0
    assert process.beta(1.0, 10) == 9.99
    assert process.beta(0.5, 1000) == pytest.approx(
        math.pi / 1.008 * math.tan(math.pi / 2 * 0.508 / 1.008)
    )
    assert VPSDE("linear").beta(1.0, 1000) == pytest.approx(20.0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_conversions_at_fractional_times(name: str, prediction: Prediction) -> None:
    process = VPSDE(name, prediction)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.999, 250.3, 998.9])
    x_t, target = process.q_sample(x0, t, noise), process.target(x0, t, noise)
    torch.testing.assert_close(process.to_x0(target, x_t, t), x0)
    torch.testing.assert_close(process.to_eps(target, x_t, t), noise)
    shifted = process.shift_eps(target, torch.full_like(noise, 0.1), t)
    torch.testing.assert_close(process.to_eps(shifted, x_t, t), noise + 0.1)
    assert float(process.loss(target, x0, t, noise).max()) == 0


def test_euler_maruyama_is_a_direct_integration_in_float64() -> None:
    rng = np.random.default_rng(0)
    x_T, z = rng.standard_normal((4, 3)), rng.standard_normal((60, 4, 3))
    times = np.append(0.0, np.linspace(1e-3, 1, 60))
    x = x_T.copy()
    for i in range(60):
        u, before = times[60 - i], times[59 - i]
        alpha_bar, beta = np.exp(-0.1 * u - 9.95 * u**2), 0.1 + 19.9 * u
        score = -np.tanh(x * u + 0.2) / np.sqrt(1 - alpha_bar)
        drift = -0.5 * beta * x - beta * score
        x = x + drift * (before - u)
        if before > 0:
            x = x + np.sqrt(beta * (u - before)) * z[i]

    seen: list[float] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.tanh(x * t.view(-1, 1) / 999 + 0.2)

    got = sample_euler_maruyama(
        model,
        torch.from_numpy(x_T),
        VPSDE("linear"),
        steps=60,
        generator=lambda i, shape: torch.from_numpy(z[i]),
    )
    np.testing.assert_allclose(got.numpy(), x, atol=1e-12)
    np.testing.assert_allclose(seen, 999 * times[:0:-1], rtol=1e-12)


def test_euler_maruyama_draws_no_noise_on_the_last_step_and_does_not_clip() -> None:
    calls: list[int] = []

    def noise(i: int, shape: tuple[int, ...]) -> Tensor:
        calls.append(i)
        return torch.full(shape, 100.0)

    x_T = initial_noise([0], (1, 2, 2))
    out = sample_euler_maruyama(lambda x, t: x, x_T, VPSDE("linear"), steps=20, generator=noise)
    assert calls == list(range(19))
    assert float(out.abs().max()) > 10


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_the_cosine_is_finite_in_float32(steps: int) -> None:
    x_T = initial_noise([0, 1], (1, 2, 2))
    for sample in SAMPLERS:
        assert bool(torch.isfinite(sample(lambda x, t: x, x_T, VPSDE("cosine"), steps=steps)).all())


def test_calls_and_dtypes() -> None:
    seen: list[tuple[float, torch.dtype, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((float(t[0]), t.dtype, x.dtype))
        return torch.cat([x, x], dim=1)  # as with a learned variance

    x_T = initial_noise([0, 1], (1, 2, 2)).bfloat16()
    for sample, calls in zip(SAMPLERS, (10, 10, 19), strict=True):
        seen.clear()
        assert sample(model, x_T, VPSDE("linear"), steps=10).dtype == torch.bfloat16
        assert len(seen) == calls
        assert seen[0] == (999.0, torch.float32, torch.bfloat16)
        assert min(t for t, _, _ in seen) > 0


@pytest.mark.parametrize("sample", SAMPLERS)
def test_clipping_keeps_pixels_in_range(sample: object) -> None:
    assert callable(sample)
    process = VPSDE("cosine", "x0")
    x_T = initial_noise([0], (1, 2, 2))

    def bright(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 3.0)

    clipped = sample(bright, x_T, process, steps=200, clip_x0=True)
    torch.testing.assert_close(clipped, torch.ones_like(x_T), atol=0.05, rtol=0)
    halved = sample(bright, x_T, process, steps=200, clip_x0=lambda x0: x0 / 2)
    torch.testing.assert_close(halved, torch.full_like(x_T, 1.5), atol=0.05, rtol=0)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    def drawn(seeds: list[int]) -> Tensor:
        return sample_euler_maruyama(
            lambda x, t: 0.5 * x,
            initial_noise(seeds, (3, 4, 4)),
            VPSDE("linear"),
            steps=10,
            generator=PictureNoise(tuple(seeds)),
        )

    assert torch.equal(drawn([5, 17, 9])[1], drawn([17])[0])


def test_bad_input_is_refused() -> None:
    x_T = initial_noise([0], (1, 2, 2))
    for sample in SAMPLERS:
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            sample(lambda x, t: x, x_T, VPSDE(), steps=0)
        with pytest.raises(TypeError, match="must be a VPSDE"):
            sample(lambda x, t: x, x_T, DiffusionProcess(schedule("linear")))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'sigmoid'"):
        VPSDE("sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="VPSDE: prediction must be one of"):
        VPSDE(prediction="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.\.999, got 3\.\.1000"):
        VPSDE().q_sample(torch.zeros(2, 1), torch.tensor([3, 1000]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"0\.\.999, got nan\.\.nan"):
        VPSDE().q_sample(torch.zeros(1, 1), torch.tensor([math.nan]), torch.zeros(1, 1))
