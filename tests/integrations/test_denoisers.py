"""k-diffusion's and EDM's conventions, against data whose best denoiser is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from gaussian import MEAN, STD, best, best_x0, discrete_model
from torch import Tensor

from fastdiff.diffusion import DiffusionProcess, cosine_schedule, linear_schedule
from fastdiff.integrations.denoisers import (
    ContinuousSigmas,
    EDMDenoiser,
    KDenoiser,
)
from fastdiff.models import IUViT, IUViTConfig

SCHEDULES = {
    "linear": linear_schedule(),
    "cosine": cosine_schedule(),
    "continuous": ContinuousSigmas(),
}
PREDICTIONS = ("eps", "x0", "v")


def perfect(name: str, prediction: str):
    """The best network of a schedule; it sees nothing but x_t and the step."""
    schedule = SCHEDULES[name]
    if name != "continuous":
        return discrete_model(schedule.alpha_bar, prediction)

    def model(x: Tensor, t: Tensor) -> Tensor:
        # integral of beta from 0 to u, in the SDE's own terms
        u = t.double().view(-1, 1, 1, 1) / 999
        alpha_bar = torch.exp(-(0.1 * u + 0.5 * 19.9 * u**2))
        return best(prediction, x.double(), alpha_bar.sqrt(), (1 - alpha_bar).sqrt()).to(x.dtype)

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoiser_is_the_exact_one(name, prediction):
    model = perfect(name, prediction)
    ours = KDenoiser(model, SCHEDULES[name], prediction)
    theirs = EDMDenoiser(model, SCHEDULES[name], prediction, img_resolution=4, img_channels=3)
    low, high = max(ours.sigma_min, 0.01), min(ours.sigma_max, 100.0)
    sigma = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), 40).double()
    sigma[0], sigma[-1] = low, high
    x = MEAN + torch.randn(40, 3, 4, 4, dtype=torch.float64) * (STD**2 + sigma**2).sqrt().view(
        -1, 1, 1, 1
    )
    exact = best_x0(x, sigma.view(-1, 1, 1, 1))
    # steps reach the network in float32
    torch.testing.assert_close(ours(x, sigma), exact, rtol=0, atol=2e-4)
    out = theirs(x, sigma.view(-1, 1, 1, 1))
    assert out.dtype == torch.float32
    # in float32 eps of a large sigma costs x_0 its digits
    error = (out.double() - exact).abs().amax((1, 2, 3)) / (1 + sigma)
    assert error.max() < 2e-4


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_and_steps_are_each_others_inverse(name):
    denoiser = KDenoiser(perfect(name, "eps"), SCHEDULES[name])
    t = torch.linspace(1.0, 998.5, 300, dtype=torch.float64)
    torch.testing.assert_close(denoiser.sigma_to_t(denoiser.t_to_sigma(t)), t)
    # beyond the ends of a table are its ends
    if name != "continuous":
        sigmas = torch.tensor([1e-9, 1e9], dtype=torch.float64)
        assert denoiser.sigma_to_t(sigmas).tolist() == [0, 999]


def test_the_continuous_sigmas_are_the_sdes():
    schedule = ContinuousSigmas(0.1, 20.0)
    u = torch.linspace(0.001, 1, 7, dtype=torch.float64)
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    beta = 0.1 + 19.9 * grid
    integral = torch.cumulative_trapezoid(beta, grid)
    alpha_bar = torch.exp(-integral[(u * 100_000).round().long() - 1])
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    torch.testing.assert_close(schedule.t_to_sigma(999 * u), sigma, rtol=1e-6, atol=0)
    assert schedule.sigma_max == pytest.approx(float(sigma[-1]))
    with pytest.raises(ValueError, match="expected 0 < beta_min"):
        ContinuousSigmas(20, 0.1)


def test_quantized_steps_are_whole_and_sigma_rounds_to_them():
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    schedule = linear_schedule()
    denoiser = EDMDenoiser(model, schedule, quantize=True, img_resolution=4, img_channels=3)
    sigma = torch.tensor([0.02, 0.5, 7.0, 79.0])
    denoiser(torch.randn(4, 3, 4, 4), sigma)
    assert torch.equal(seen[0], seen[0].round())
    rounded = denoiser.round_sigma(sigma)
    table = schedule.snr.rsqrt()
    for value, wanted in zip(rounded.double(), sigma.double(), strict=True):
        nearest = table[(table.log() - wanted.log()).abs().argmin()]
        assert float(value) == pytest.approx(float(nearest), rel=1e-6)
    # not quantized, EDM's samplers keep their own sigmas
    free = EDMDenoiser(model, schedule, img_resolution=4, img_channels=3)
    assert torch.equal(free.round_sigma(sigma), sigma)
    with pytest.raises(ValueError, match="needs a NoiseSchedule"):
        KDenoiser(model, ContinuousSigmas(), quantize=True)


def test_at_whole_steps_it_is_the_processs_x0():
    model = IUViT(IUViTConfig(image_size=8, dim=32, layers=3, head_dim=16)).eval()
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([3, 400, 700])
    for prediction in PREDICTIONS:
        process = DiffusionProcess(cosine_schedule(), prediction)
        denoiser = KDenoiser(model, process.schedule, prediction)
        sigma = denoiser.t_to_sigma(t).float()
        a = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
        with torch.no_grad():
            ours = denoiser(x_t / a, sigma)
            exact = process.to_x0(model(x_t, t), x_t, t)
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def exact_end(x: Tensor, sigma: float) -> Tensor:
    """Where the probability flow takes x of that sigma."""
    return MEAN + (x - MEAN) * STD / (STD**2 + sigma**2) ** 0.5


def test_edms_heun_sampler_reaches_the_exact_sample():
    """Algorithm 1 of EDM, written down from the paper, as their code calls a network."""
    net = EDMDenoiser(
        perfect("continuous", "v"),
        ContinuousSigmas(),
        "v",
        img_resolution=4,
        img_channels=3,
    )
    steps, rho = 80, 7.0
    low, high = max(0.002, net.sigma_min), min(80.0, net.sigma_max)
    i = torch.arange(steps, dtype=torch.float64)
    ramp = high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
    times = torch.cat([net.round_sigma(ramp**rho), torch.zeros(1)])
    start = torch.linspace(-2, 2, 48, dtype=torch.float64).view(1, 3, 4, 4) * times[0]
    x = start
    for k in range(steps):
        d = (x - net(x, times[k], None).double()) / times[k]
        following = x + (times[k + 1] - times[k]) * d
        if times[k + 1] > 0:
            again = (following - net(following, times[k + 1], None).double()) / times[k + 1]
            following = x + (times[k + 1] - times[k]) * (d + again) / 2
        x = following
    assert (x - exact_end(start, float(times[0]))).abs().max() < 3e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_k_diffusions_euler_sampler_reaches_the_exact_sample(prediction):
    denoiser = KDenoiser(perfect("linear", prediction), linear_schedule(), prediction)
    sigmas = denoiser.get_sigmas(300).double()
    assert sigmas[0] == pytest.approx(denoiser.sigma_max)
    assert sigmas[-2] == pytest.approx(denoiser.sigma_min)
    assert sigmas[-1] == 0
    start = torch.linspace(-2, 2, 48, dtype=torch.float64).view(1, 3, 4, 4) * sigmas[0]
    x = start
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * (x - denoiser(x, now.expand(1))) / now
    assert (x - exact_end(start, float(sigmas[0]))).abs().max() < 0.02


def test_conditions_labels_and_learned_variance_pass():
    config = IUViTConfig(
        image_size=8,
        dim=32,
        layers=3,
        head_dim=16,
        num_classes=4,
        context_dim=8,
        learn_variance=True,
    )
    model = IUViT(config).eval()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.7, 3.0])
    context, y = torch.randn(2, 5, 8), torch.tensor([1, 4])
    plain = KDenoiser(model, linear_schedule())
    out = plain(x, sigma, context=context, y=y)
    assert out.shape == x.shape
    assert not torch.equal(out, plain(x, sigma, y=y))

    net = EDMDenoiser(model, linear_schedule())
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 3, 4)
    one_hot = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])  # the second has no label
    torch.testing.assert_close(net(x, sigma, one_hot, context=context, force_fp32=True), out)
    torch.testing.assert_close(net(x, sigma, y, context=context), out)
    with pytest.raises(ValueError, match=r"class_labels has shape \(2, 3\)"):
        net(x, sigma, one_hot[:, :3])
    unconditional = EDMDenoiser(
        perfect("linear", "eps"), linear_schedule(), img_resolution=8, img_channels=3
    )
    with pytest.raises(ValueError, match="label_dim is 0"):
        unconditional(x, sigma, one_hot)
    with pytest.raises(ValueError, match="prediction='noise'"):
        KDenoiser(model, linear_schedule(), "noise")
    with pytest.raises(ValueError, match="give img_resolution"):
        EDMDenoiser(perfect("linear", "eps"), linear_schedule())


def test_a_cast_leaves_the_table_its_digits():
    denoiser = KDenoiser(IUViT(IUViTConfig(image_size=8, dim=64, layers=3)), linear_schedule())
    denoiser.to(torch.bfloat16)
    assert denoiser.inner_model.dtype == torch.bfloat16
    assert all(key.startswith("inner_model.") for key in denoiser.state_dict())
    sigmas = denoiser.t_to_sigma(torch.arange(1000))
    torch.testing.assert_close(sigmas, linear_schedule().snr.rsqrt(), rtol=1e-12, atol=0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert denoiser(x, torch.tensor(1.0)).dtype == torch.bfloat16


def test_other_codes_call_the_plain_model():
    """guided-diffusion's and U-ViT's own calls, as their loops make them."""
    config = IUViTConfig(
        image_size=8, dim=32, layers=3, head_dim=16, num_classes=4, learn_variance=True
    )
    model = IUViT(config).eval()
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    # guided-diffusion: model(x, t, **model_kwargs), rescaled fractional steps, split by channels
    out = model(x, torch.tensor([12.5, 999.0]), **{"y": y})
    eps, variance = torch.split(out, x.shape[1], dim=1)
    assert eps.shape == variance.shape == x.shape
    # U-ViT: nnet(x, 999 t, y=y), and with text nnet(x, timesteps, context=context)
    times = torch.rand(2) * 999
    assert model(x, times, y=y).shape == out.shape
    text = IUViT(IUViTConfig(image_size=8, dim=32, layers=3, head_dim=16, context_dim=8)).eval()
    context = torch.randn(2, 5, 8)
    assert torch.equal(text(x, times, context), text(x, times, context=context))
