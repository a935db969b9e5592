"""Samplers against data whose denoiser is known exactly, and their promises on seeds and steps."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import (
    DiffusionProcess,
    PictureNoise,
    Prediction,
    ddim_timesteps,
    initial_noise,
    sample_ancestral,
    sample_ddim,
    schedule,
)

MEAN, STD = 0.3, 0.4


def gaussian(process: DiffusionProcess) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact network for data N(MEAN, STD^2): E[x_0 | x_t], as the process's prediction."""
    alpha_bar = process.schedule.alpha_bar

    def model(x: Tensor, t: Tensor) -> Tensor:
        bar = alpha_bar[t].view(-1, *[1] * (x.ndim - 1))
        wide = x.double()
        gain = bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar)
        x0 = MEAN + gain * (wide - bar.sqrt() * MEAN)
        eps = (wide - bar.sqrt() * x0) / (1 - bar).sqrt()
        v = bar.sqrt() * eps - (1 - bar).sqrt() * x0
        return {"eps": eps, "x0": x0, "v": v}[process.prediction].to(x.dtype)

    return model


def two_points(process: DiffusionProcess) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact eps for data -1 with weight 1/4 and +1 with weight 3/4."""
    alpha_bar = process.schedule.alpha_bar

    def model(x: Tensor, t: Tensor) -> Tensor:
        bar = alpha_bar[t].view(-1, *[1] * (x.ndim - 1)).to(x)
        x0 = torch.tanh(bar.sqrt() * x / (1 - bar) + 0.5 * math.log(3.0))
        return (x - bar.sqrt() * x0) / (1 - bar).sqrt()

    return model


def noise_of(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, generator=generator, dtype=dtype), generator


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_maps_a_gaussian_by_its_closed_form(name: str) -> None:
    x_T = torch.linspace(-3, 3, 7, dtype=torch.float64).view(7, 1)
    errors = []
    for total in (500, 1000, 2000):
        process = DiffusionProcess(schedule(name, total))
        x0 = sample_ddim(gaussian(process), x_T, process, steps=total, clip_x0=False)
        # The probability flow keeps (x - mean) / std.
        bar = float(process.schedule.alpha_bar[-1])
        spread = math.sqrt(bar * STD**2 + 1 - bar)
        expected = MEAN + STD * (x_T - math.sqrt(bar) * MEAN) / spread
        errors.append(float((x0 - expected).abs().max()))
    # DDIM is of first order: the distance halves with the step.
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddim_steps_multiply_as_computed_by_hand(steps: int) -> None:
    process = DiffusionProcess(schedule("linear"))
    x_T = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    x0 = sample_ddim(gaussian(process), x_T, process, steps=steps, clip_x0=False)
    # Each step on x - a MEAN is one factor: (a' a S + s' s) / (a^2 S + s^2), S = STD^2.
    factor = 1.0
    bars = [float(process.schedule.alpha_bar[t]) for t in ddim_timesteps(1000, steps)] + [1.0]
    for now, prev in pairwise(bars):
        top = math.sqrt(prev * now) * STD**2 + math.sqrt((1 - prev) * (1 - now))
        factor *= top / (now * STD**2 + 1 - now)
    expected = MEAN + factor * (x_T - math.sqrt(bars[0]) * MEAN)
    torch.testing.assert_close(x0, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ancestral_draws_a_gaussian(name: str, variance: str) -> None:
    process = DiffusionProcess(schedule(name))
    x_T, generator = noise_of(20_000)
    x0 = sample_ancestral(
        gaussian(process),
        x_T,
        process,
        variance=variance,  # type: ignore[arg-type]
        generator=generator,
        clip_x0=False,
    )
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.012)
    assert float(x0.std()) == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler", ["ddim", "ddim_eta", "ancestral"])
def test_samplers_draw_a_two_point_mixture(sampler: str) -> None:
    process = DiffusionProcess(schedule("linear"))
    x_T, generator = noise_of(20_000)
    model = two_points(process)
    if sampler == "ancestral":
        x0 = sample_ancestral(model, x_T, process, generator=generator)
    else:
        eta = 1.0 if sampler == "ddim_eta" else 0.0
        x0 = sample_ddim(model, x_T, process, steps=200, eta=eta, generator=generator)
    assert float((x0.abs() - 1).abs().mean()) < 0.02
    assert float((x0 > 0).double().mean()) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("clip_x0", [True, False])
def test_ddim_with_eta_one_over_all_steps_is_ancestral(clip_x0: bool) -> None:
    process = DiffusionProcess(schedule("cosine", 100))
    x_T, _ = noise_of(64, torch.float64)
    noise = PictureNoise(tuple(range(64)))
    model = gaussian(process)
    ddim = sample_ddim(model, x_T, process, steps=100, eta=1.0, generator=noise, clip_x0=clip_x0)
    ancestral = sample_ancestral(model, x_T, process, generator=noise, clip_x0=clip_x0)
    torch.testing.assert_close(ddim, ancestral, atol=1e-9, rtol=1e-9)
    assert float(ddim.std()) > 0.1


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_prediction_types_of_one_network_agree(name: str, eta: float) -> None:
    x_T = initial_noise(range(32), (1, 4, 4)).double()
    samples = []
    kinds: tuple[Prediction, ...] = ("eps", "x0", "v")
    for prediction in kinds:
        process = DiffusionProcess(schedule(name), prediction)
        noise = PictureNoise(tuple(range(32)))
        samples.append(
            sample_ddim(gaussian(process), x_T, process, steps=25, eta=eta, generator=noise)
        )
    for other in samples[1:]:
        torch.testing.assert_close(other, samples[0], atol=1e-5, rtol=0)


def test_prediction_types_agree_in_float32() -> None:
    x_T = initial_noise(range(32), (1, 4, 4))
    eps, v = (DiffusionProcess(schedule("linear"), kind) for kind in ("eps", "v"))
    torch.testing.assert_close(
        sample_ddim(gaussian(v), x_T, v), sample_ddim(gaussian(eps), x_T, eps), atol=1e-5, rtol=0
    )


def test_ddim_is_deterministic_and_draws_no_noise() -> None:
    process = DiffusionProcess(schedule("cosine"))
    x_T = initial_noise([3, 4], (3, 4, 4))

    def refuse(i: int, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError("eta 0 must draw nothing")

    first = sample_ddim(gaussian(process), x_T, process, steps=10, generator=refuse)
    torch.manual_seed(5)
    second = sample_ddim(gaussian(process), x_T, process, steps=10)
    assert torch.equal(first, second)
    assert torch.equal(x_T, initial_noise([3, 4], (3, 4, 4)))


def test_timesteps_by_hand() -> None:
    assert ddim_timesteps(1000, 50)[:3] == [999, 979, 959]
    assert ddim_timesteps(1000, 50)[-1] == 19
    assert ddim_timesteps(1000, 50, "leading")[:2] == [980, 960]
    assert ddim_timesteps(1000, 50, "leading")[-1] == 0
    assert ddim_timesteps(1000, 50, "linspace")[:2] == [999, 979]
    assert ddim_timesteps(1000, 50, "linspace")[-1] == 0
    assert ddim_timesteps(1000, 1) == ddim_timesteps(1000, 1, "linspace") == [999]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_are_distinct_and_decreasing_for_any_count(spacing: str) -> None:
    for total in (21, 100, 1000):
        for steps in {1, 2, 3, 7, total // 3, total - 1, total}:
            times = ddim_timesteps(total, steps, spacing)  # type: ignore[arg-type]
            assert len(times) == steps
            assert all(a > b for a, b in pairwise(times))
            assert times[-1] >= 0
            assert times[0] <= total - 1
            if spacing != "leading":
                assert times[0] == total - 1


def test_the_model_sees_the_steps_and_the_dtype_of_x_T() -> None:
    process = DiffusionProcess(schedule("linear", 40), "v")
    seen: list[tuple[list[int], torch.dtype, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t.tolist(), t.dtype, x.dtype))
        return torch.zeros_like(x)

    x_T = initial_noise([0, 1], (1, 2, 2)).bfloat16()
    assert sample_ddim(model, x_T, process, steps=4).dtype == torch.bfloat16
    assert seen == [([t, t], torch.int64, torch.bfloat16) for t in (39, 29, 19, 9)]
    seen.clear()
    sample_ancestral(model, x_T, process)
    assert [times[0] for times, _, _ in seen] == list(range(39, -1, -1))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_picture_does_not_depend_on_its_batch(sampler: str) -> None:
    process = DiffusionProcess(schedule("cosine", 50))

    def draw(seeds: list[int]) -> Tensor:
        x_T, noise = initial_noise(seeds, (3, 4, 4)), PictureNoise(tuple(seeds))
        if sampler == "ancestral":
            return sample_ancestral(gaussian(process), x_T, process, generator=noise)
        return sample_ddim(gaussian(process), x_T, process, steps=10, eta=1.0, generator=noise)

    alone, batch = draw([17]), draw([5, 17, 2**64 - 1])
    assert torch.equal(batch[1], alone[0])
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(batch[2], batch[1])


def test_seeded_noise_is_standard_normal_and_uncorrelated() -> None:
    x_T = initial_noise(range(2000), (3, 4, 4)).flatten(1)
    noise = PictureNoise(tuple(range(2000)))
    first, second = noise(0, (2000, 3, 4, 4)).flatten(1), noise(1, (2000, 48)).flatten(1)
    for sample in (x_T, first, second):
        assert float(sample.mean()) == pytest.approx(0.0, abs=0.015)
        assert float(sample.std()) == pytest.approx(1.0, abs=0.015)
    # Neighbouring seeds, and neighbouring steps of one seed.
    pairs = [(x_T[1:], x_T[:-1]), (x_T, first), (first, second), (x_T[1:], first[:-1])]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 0.015


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_torch_generator_decides_the_noise(sampler: str) -> None:
    process = DiffusionProcess(schedule("cosine", 30))
    x_T = initial_noise([0], (1, 2, 2))

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if sampler == "ancestral":
            return sample_ancestral(gaussian(process), x_T, process, generator=generator)
        return sample_ddim(gaussian(process), x_T, process, steps=5, eta=1.0, generator=generator)

    first = draw(0)
    torch.manual_seed(7)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


@pytest.mark.parametrize("v", [-1.0, 1.0])
def test_a_learned_variance_at_its_ends_is_a_fixed_one(v: float) -> None:
    process = DiffusionProcess(schedule("cosine", 30))
    x_T, noise = initial_noise([0, 1], (2, 2, 2)), PictureNoise((0, 1))
    model = gaussian(process)

    def learned(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), torch.full_like(x, v)], dim=1)

    torch.testing.assert_close(
        sample_ancestral(learned, x_T, process, variance="learned", generator=noise),
        sample_ancestral(
            model, x_T, process, variance="small" if v < 0 else "large", generator=noise
        ),
    )
    # Other samplers leave it out.
    ddim = sample_ddim(model, x_T, process, steps=10)
    assert torch.equal(sample_ddim(learned, x_T, process, steps=10), ddim)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_adds_no_noise_on_the_last_step(variance: str) -> None:
    process = DiffusionProcess(schedule("cosine", 30))
    calls: list[int] = []

    def noise(i: int, shape: tuple[int, ...]) -> Tensor:
        calls.append(i)
        return torch.zeros(shape)

    x_T = initial_noise([0], (1, 2, 2))
    sample_ancestral(
        gaussian(process),
        x_T,
        process,
        variance=variance,  # type: ignore[arg-type]
        generator=noise,
    )
    assert calls == list(range(29))


def test_clipping_keeps_pixels_in_range() -> None:
    process = DiffusionProcess(schedule("linear", 100), "x0")

    def bright(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 3.0)

    x_T = initial_noise([0], (1, 2, 2))
    assert torch.equal(sample_ddim(bright, x_T, process, steps=5), torch.ones_like(x_T))
    assert torch.equal(sample_ancestral(bright, x_T, process), torch.ones_like(x_T))
    free = sample_ddim(bright, x_T, process, steps=5, clip_x0=False)
    assert torch.equal(free, torch.full_like(x_T, 3.0))


def test_progress_bar_and_gradients_off(capsys: pytest.CaptureFixture[str]) -> None:
    process = DiffusionProcess(schedule("linear", 30))
    weight = torch.ones((), requires_grad=True)
    x_T = initial_noise([0], (1, 2, 2))
    x0 = sample_ddim(lambda x, t: weight * x, x_T, process, steps=3, progress=True)
    assert not x0.requires_grad
    assert "sampling" in capsys.readouterr().err


def test_bad_input_is_refused() -> None:
    process = DiffusionProcess(schedule("linear"))
    x_T = initial_noise([0], (1, 2, 2))
    model = gaussian(process)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"1\.\.1000, got {steps}"):
            sample_ddim(model, x_T, process, steps=steps)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        sample_ddim(model, x_T, process, eta=1.5)
    with pytest.raises(ValueError, match="got 'even'"):
        sample_ddim(model, x_T, process, spacing="even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'fixed'"):
        sample_ancestral(model, x_T, process, variance="fixed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a model of 2 output channels for the 1 of x"):
        sample_ancestral(model, x_T, process, variance="learned")
    with pytest.raises(ValueError, match=r"x's shape \(1, 1, 2, 2\).*got \(1, 3, 2, 2\)"):
        sample_ddim(lambda x, t: torch.cat([x, x, x], 1), x_T, process)
    with pytest.raises(ValueError, match="2 seeds for the shape"):
        PictureNoise((1, 2))(0, (3, 1, 2, 2))
    with pytest.raises(ValueError, match="got -1"):
        initial_noise([-1], (1, 2, 2))
    with pytest.raises(ValueError, match="must not be empty"):
        initial_noise([], (1, 2, 2))
