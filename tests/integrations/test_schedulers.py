"""diffusers' schedulers as samplers, and our samplers step by step against diffusers' own."""

import diffusers
import pytest
import torch
from gaussian import MEAN, STD, discrete_model
from torch import Tensor

from fastdiff.diffusion import (
    DiffusionProcess,
    PictureNoise,
    Prediction,
    initial_noise,
    sample_ancestral,
    sample_ddim,
    schedule,
)
from fastdiff.integrations.schedulers import make_scheduler, sample_scheduler

# diffusers hands NumPy arrays that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STEPS = 20
DETERMINISTIC = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
]


class Trace:
    """A network that is not linear, and keeps every x that it is shown."""

    def __init__(self, variance: bool = False) -> None:
        self.seen: list[Tensor] = []
        self.variance = variance

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.clone())
        out = torch.tanh(x + t.view(-1, *[1] * (x.ndim - 1)) / 1000) * 0.7
        return torch.cat([out, torch.sin(x)], dim=1) if self.variance else out


def ddpm_of_diffusers(
    scheduler: diffusers.DDPMScheduler, model: Trace, x: Tensor, noise: PictureNoise
) -> Tensor:
    """diffusers' own loop; its noise comes from `noise`."""
    from diffusers.schedulers import scheduling_ddpm

    shape = tuple(x.shape)
    with pytest.MonkeyPatch.context() as patch:
        for i, t in enumerate(scheduler.timesteps):
            drawn = noise(i, shape)
            patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, drawn=drawn, **__: drawn)
            x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize(("prediction", "clip"), [("eps", True), ("v", True), ("v", False)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")],
)
def test_ancestral_is_ddpm_of_diffusers_step_by_step(
    prediction: Prediction, clip: bool, ours: str, theirs: str
) -> None:
    process = DiffusionProcess(schedule("linear", 100), prediction)
    scheduler = make_scheduler("DDPMScheduler", process, variance_type=theirs, clip_sample=clip)
    scheduler.set_timesteps(100)
    x_T = initial_noise(range(3), (2, 4, 4))
    noise = PictureNoise((0, 1, 2))
    a, b = Trace(ours == "learned"), Trace(ours == "learned")
    expected = ddpm_of_diffusers(scheduler, a, x_T, noise)
    got = sample_ancestral(b, x_T, process, variance=ours, generator=noise, clip_x0=clip)  # type: ignore[arg-type]
    for mine, other in zip([*b.seen, got], [*a.seen, expected], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_that_of_diffusers_step_by_step(
    prediction: Prediction, name: str, spacing: str
) -> None:
    process = DiffusionProcess(schedule(name), prediction)
    scheduler = make_scheduler(
        "DDIMScheduler", process, timestep_spacing=spacing, clip_sample=True, set_alpha_to_one=True
    )
    scheduler.set_timesteps(STEPS)
    x_T = initial_noise(range(3), (2, 4, 4))
    noise = PictureNoise((0, 1, 2))
    a, b = Trace(), Trace()
    x, shape = x_T, tuple(x_T.shape)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(
            a(x, t.expand(3)),
            t,
            x,
            eta=0.6,
            use_clipped_model_output=True,  # eps again from the clipped x_0, as ADM
            variance_noise=noise(i, shape),
        ).prev_sample
    got = sample_ddim(
        b,
        x_T,
        process,
        steps=STEPS,
        eta=0.6,
        spacing=spacing,  # type: ignore[arg-type]
        generator=noise,
    )
    for mine, other in zip([*b.seen, got], [*a.seen, x], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    # And through the adapter.
    adapted = sample_scheduler(
        Trace(),
        x_T,
        process,
        scheduler,
        steps=STEPS,
        generator=noise,
        eta=0.6,
        use_clipped_model_output=True,
    )
    torch.testing.assert_close(adapted, got, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_schedulers_follow_the_probability_flow(name: str, prediction: Prediction) -> None:
    process = DiffusionProcess(schedule("linear"), prediction)
    model = discrete_model(process.schedule.alpha_bar, prediction)
    z = initial_noise(range(4), (1, 2, 2))
    x0 = sample_scheduler(model, z, process, make_scheduler(name, process), steps=50)
    # The flow keeps (x - mean) / std.
    torch.testing.assert_close(x0, MEAN + STD * z, atol=0.06, rtol=0)


def test_a_generator_for_each_picture_makes_pictures_independent_of_the_batch() -> None:
    process = DiffusionProcess(schedule("cosine"))
    model = discrete_model(process.schedule.alpha_bar)
    scheduler = make_scheduler("EulerAncestralDiscreteScheduler", process)

    def drawn(seeds: list[int]) -> Tensor:
        return sample_scheduler(
            model,
            initial_noise(seeds, (1, 2, 2)),
            process,
            scheduler,
            steps=5,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )

    torch.testing.assert_close(drawn([3, 7, 5])[1], drawn([7])[0])
    assert not torch.equal(drawn([3])[0], drawn([7])[0])


def test_the_network_sees_steps_and_the_dtype_of_x_T(capsys: pytest.CaptureFixture[str]) -> None:
    process = DiffusionProcess(schedule("linear"))
    seen: list[tuple[Tensor, torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t, x.dtype))
        return torch.cat([x, x], dim=1)  # a learned variance, left out

    x_T = initial_noise([0, 1], (1, 2, 2)).bfloat16()
    scheduler = make_scheduler("UniPCMultistepScheduler", process, timestep_spacing="trailing")
    out = sample_scheduler(model, x_T, process, scheduler, steps=4, progress=True)
    assert out.dtype == torch.bfloat16
    assert [t.tolist() for t, _ in seen] == [[999] * 2, [749] * 2, [499] * 2, [249] * 2]
    assert {(t.dtype, dtype) for t, dtype in seen} == {(torch.int64, torch.bfloat16)}
    assert "sampling" in capsys.readouterr().err


def test_what_does_not_fit_is_refused() -> None:
    process = DiffusionProcess(schedule("cosine"), "v")
    x_T = initial_noise([0], (1, 2, 2))
    model = discrete_model(process.schedule.alpha_bar, "v")

    def refused(message: str, scheduler: object, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            sample_scheduler(model, x_T, process, scheduler, **options)  # type: ignore[arg-type]

    good = make_scheduler("DDIMScheduler", process)
    refused(r"prediction_type='epsilon', the model predicts v", diffusers.DDIMScheduler())
    other = diffusers.DDIMScheduler(prediction_type="v_prediction")
    refused("has other noise levels than DiffusionProcess.cosine.*make_scheduler", other)
    short = diffusers.DDIMScheduler(num_train_timesteps=100, prediction_type="v_prediction")
    refused("has 100 steps, the process 1000", short)
    for steps in (0, 1001):
        refused(rf"1\.\.1000, got {steps}", good, steps=steps)
    refused("step has no option zeta", good, zeta=1.0)
    euler = make_scheduler("EulerAncestralDiscreteScheduler", process)
    refused("draws its noise itself", euler, generator=lambda i, shape: torch.zeros(shape))
    with pytest.raises(ValueError, match="x's shape"):
        sample_scheduler(lambda x, t: x[:, :, :1], x_T, process, good)
    with pytest.raises(ValueError, match="no scheduler 'DDIM'"):
        make_scheduler("DDIM", process)
    with pytest.raises(ValueError, match="takes no betas: it drives another process"):
        make_scheduler("FlowMatchEulerDiscreteScheduler", process)
    with pytest.raises(ValueError, match="has no option spacing"):
        make_scheduler("DDIMScheduler", process, spacing="trailing")
    eps = DiffusionProcess(schedule("linear"))
    with pytest.raises(ValueError, match="drives another process"):
        sample_scheduler(model, x_T, eps, diffusers.FlowMatchEulerDiscreteScheduler(), steps=5)
