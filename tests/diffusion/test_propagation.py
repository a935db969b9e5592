"""Every sampler carries mean and covariance of a Gaussian as its recursion says, to 1e-10."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from propagation import DATA, Gaussian, Step, best, carried, network, noised, recursion
from torch import Tensor

from fastdiff.diffusion import (
    VPSDE,
    DiffusionProcess,
    Prediction,
    ddim_timesteps,
    sample_ancestral,
    sample_ddim,
    sample_euler_maruyama,
    sample_ode_euler,
    sample_ode_heun,
    schedule,
)

EYE, ZERO = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
SCHEDULES = ["linear", "cosine"]


def agree(got: Gaussian, expected: Gaussian) -> None:
    torch.testing.assert_close(got.mean, expected.mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(got.cov, expected.cov, atol=1e-10, rtol=0)
    # And the answer has to do with the data.
    torch.testing.assert_close(got.mean, DATA.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(got.cov, DATA.cov, atol=0.1, rtol=0)


# In steps.


def discrete_levels(process: DiffusionProcess) -> Callable[[float], tuple[float, float]]:
    table = process.schedule.alpha_bar.tolist()
    return lambda t: (math.sqrt(table[int(t)]), math.sqrt(1 - table[int(t)]))


def ddim_steps(process: DiffusionProcess, times: list[int], eta: float) -> Iterator[Step]:
    bars = [float(process.schedule.alpha_bar[t]) for t in times] + [1.0]
    for now, prev in pairwise(bars):
        (P, p), (Q, q) = best(DATA, math.sqrt(now), math.sqrt(1 - now))
        variance = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
        along = math.sqrt(max(1 - prev - variance, 0.0))
        back = math.sqrt(prev)
        yield Step(back * P + along * Q, back * p + along * q, math.sqrt(variance) * EYE)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("eta", "spacing", "steps"),
    [(0.0, "trailing", 1000), (0.0, "leading", 40), (0.5, "linspace", 60), (1.0, "trailing", 60)],
)
def test_ddim(name: str, eta: float, spacing: str, steps: int) -> None:
    process = DiffusionProcess(schedule(name))
    levels = discrete_levels(process)
    model = network(DATA, levels)
    times = ddim_timesteps(1000, steps, spacing)  # type: ignore[arg-type]

    def draw(x_T: Tensor, noise: Callable[..., Tensor]) -> Tensor:
        return sample_ddim(
            model,
            x_T,
            process,
            steps=steps,
            eta=eta,
            spacing=spacing,  # type: ignore[arg-type]
            generator=noise,
            clip_x0=False,
        )

    start = noised(DATA, *levels(times[0]))
    got = carried(draw, start, steps if eta else 0)
    agree(got, recursion(ddim_steps(process, times, eta), start))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral(name: str, variance: str) -> None:
    process = DiffusionProcess(schedule(name, 200))
    table, levels = process.schedule, discrete_levels(process)
    inner = network(DATA, levels)
    asked = torch.tensor([0.3, -0.8], dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = inner(x, t)
        return torch.cat([out, asked.expand_as(out)], dim=1) if variance == "learned" else out

    def steps() -> Iterator[Step]:
        for t in range(199, -1, -1):
            (P, p), _ = best(DATA, *levels(t))
            to_x0, stay = float(table.posterior_mean_x0[t]), float(table.posterior_mean_xt[t])
            large = float(table.betas[t])
            small = large if t == 0 else float(table.posterior_variance[t])
            wide = (1 + asked) / 2  # Nichol and Dhariwal's v in [0, 1]
            learned = torch.exp(wide * math.log(large) + (1 - wide) * math.log(small))
            N = {"small": small * EYE, "large": large * EYE, "learned": torch.diag(learned)}
            yield Step(to_x0 * P + stay * EYE, to_x0 * p, N[variance].sqrt() if t else ZERO)

    def draw(x_T: Tensor, noise: Callable[..., Tensor]) -> Tensor:
        return sample_ancestral(
            model,
            x_T,
            process,
            variance=variance,  # type: ignore[arg-type]
            generator=noise,
            clip_x0=False,
        )

    start = noised(DATA, *levels(199))
    agree(carried(draw, start, 199), recursion(steps(), start))


# In continuous time. The noise levels are written out again, from the formulas.


def continuous_levels(name: str) -> Callable[[float], tuple[float, float]]:
    def levels(t: float) -> tuple[float, float]:
        u = t / 999
        if name == "linear":
            alpha_bar = math.exp(-0.1 * u - 9.95 * u * u)
        else:
            alpha_bar = (
                math.cos(math.pi / 2 * (u + 0.008) / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008)
            ) ** 2
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    return levels


def rate(name: str, u: float, steps: int) -> float:
    if name == "linear":
        return 0.1 + 19.9 * u
    if u == 1.0:
        return 0.999 * steps
    return min(math.pi / 1.008 * math.tan(math.pi / 2 * (u + 0.008) / 1.008), 0.999 * steps)


def em_steps(name: str, steps: int) -> Iterator[Step]:
    levels = continuous_levels(name)
    times = [0.0, *np.linspace(1e-3, 1.0, steps).tolist()]
    for k in range(steps, 0, -1):
        u, h = times[k], times[k] - times[k - 1]
        beta = rate(name, u, steps)
        a, s = levels(999 * u)
        _, (Q, q) = best(DATA, a, s)
        noise = math.sqrt(beta * h) * EYE if k > 1 else ZERO
        yield Step(EYE + h * beta * (EYE / 2 - Q / s), -h * beta * q / s, noise)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_maruyama(name: str, prediction: Prediction) -> None:
    process = VPSDE(name, prediction)  # type: ignore[arg-type]
    levels = continuous_levels(name)
    model = network(DATA, levels, prediction)

    def draw(x_T: Tensor, noise: Callable[..., Tensor]) -> Tensor:
        return sample_euler_maruyama(model, x_T, process, steps=150, generator=noise)

    start = noised(DATA, *levels(999))
    agree(carried(draw, start, 149), recursion(em_steps(name, 150), start))


@pytest.mark.parametrize(("name", "limit"), [("linear", 2e-3), ("cosine", 5e-3)])
def test_a_thousand_euler_maruyama_steps_land_on_the_true_variance(name: str, limit: float) -> None:
    levels = continuous_levels(name)
    model = network(DATA, levels)

    def draw(x_T: Tensor, noise: Callable[..., Tensor]) -> Tensor:
        return sample_euler_maruyama(model, x_T, VPSDE(name), generator=noise)  # type: ignore[arg-type]

    # From pure noise, as pictures are drawn.
    got = carried(draw, Gaussian(torch.zeros(2, dtype=torch.float64), EYE), 999)
    assert bool(torch.isfinite(got.cov).all())
    torch.testing.assert_close(got.cov, DATA.cov, atol=limit, rtol=0)
    torch.testing.assert_close(got.mean, DATA.mean, atol=limit, rtol=0)


def ode_steps(name: str, steps: int, heun: bool) -> Iterator[Step]:
    levels = continuous_levels(name)
    times = np.linspace(1.0, 0.0, steps + 1).tolist()

    def slope(u: float) -> tuple[Tensor, Tensor]:
        a, s = levels(999 * u)
        _, (Q, q) = best(DATA, a, s)
        half = rate(name, u, steps) / 2
        return half * (EYE - Q / s), -half * q / s

    for u, ahead in pairwise(times):
        h = u - ahead
        F, f = slope(u)
        M, d = EYE + h * F, h * f
        if heun and ahead > 0:
            G, g = slope(ahead)
            M, d = EYE + h / 2 * (F + G @ M), h / 2 * (f + G @ d + g)
        yield Step(M, d, ZERO)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("heun", [False, True])
def test_probability_flow(name: str, heun: bool) -> None:
    levels = continuous_levels(name)
    model, process = network(DATA, levels), VPSDE(name)  # type: ignore[arg-type]
    sample = sample_ode_heun if heun else sample_ode_euler
    start = noised(DATA, *levels(999))
    got = carried(lambda x_T, noise: sample(model, x_T, process, steps=80), start, 0)
    agree(got, recursion(ode_steps(name, 80, heun), start))


DOUBLINGS = [(100, 200), (200, 400), (400, 800), (500, 1000)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "ode_euler", "ode_heun"])
def test_errors_of_the_variance_shrink_with_the_order(name: str, sampler: str) -> None:
    discrete = DiffusionProcess(schedule(name))
    levels = discrete_levels(discrete) if sampler == "ddim" else continuous_levels(name)
    model, start = network(DATA, levels), noised(DATA, *levels(999))

    def error(steps: int) -> float:
        def draw(x_T: Tensor, noise: object) -> Tensor:
            if sampler == "ddim":
                return sample_ddim(model, x_T, discrete, steps=steps, clip_x0=False)
            sample = sample_ode_heun if sampler == "ode_heun" else sample_ode_euler
            return sample(model, x_T, VPSDE(name), steps=steps)  # type: ignore[arg-type]

        return float((carried(draw, start, 0).cov - DATA.cov).norm())

    errors = {steps: error(steps) for steps in sorted({n for pair in DOUBLINGS for n in pair})}
    low, high = (3.6, 4.4) if sampler == "ode_heun" else (1.8, 2.2)
    for few, many in DOUBLINGS:
        assert low < errors[few] / errors[many] < high, errors
