"""Samplers in discrete steps. Each takes a callable `model(x, t)` and knows no network.

Legend: B batch, C channels, H W pixels; t step 0..T-1; x_T standard normal noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.process import DiffusionProcess
from fastdiff.diffusion.stepping import (
    Denoiser,
    StepNoise,
    clipped,
    draw,
    predict,
    progress_bar,
    to_x0_and_eps,
)
from fastdiff.diffusion.thresholding import Threshold

Spacing = Literal["trailing", "leading", "linspace"]
Variance = Literal["small", "large", "learned"]


def ddim_timesteps(total: int, steps: int, spacing: Spacing = "trailing") -> list[int]:
    """The steps that a sampler visits, the noisiest first.

    trailing: round(T - i T / steps) - 1, so 999, 979, .., 19 for 50 of 1000;
    leading: i floor(T / steps), so 980, .., 20, 0 (the DDIM paper; diffusers' DDIMScheduler);
    linspace: round(linspace(T - 1, 0)), so 999, 979, .., 20, 0 (about equal gaps, both ends).

    trailing is the default: the chain starts from pure noise, and only t = T - 1 tells the network
    so. A first call at 980 shows it noise where it expects a little signal, and the picture's
    brightness drifts to the middle (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample
    Steps are Flawed", section 3.3). linspace starts there too but spends a call on t = 0.

    Args:
        total: T, steps of the schedule.
        steps: calls of the network, 1..T.
        spacing: as above.

    Returns:
        `steps` different integers in 0..T-1, decreasing.

    Raises:
        ValueError: steps is outside 1..T, or spacing is unknown.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"ddim_timesteps: steps must lie in 1..{total}, got {steps}")
    i = np.arange(steps)
    if spacing == "trailing":
        times = np.round(total - i * total / steps).astype(np.int64) - 1
    elif spacing == "leading":
        times = i[::-1] * (total // steps)
    elif spacing == "linspace":
        times = np.round(np.linspace(total - 1, 0, steps)).astype(np.int64)
    else:
        names = ("trailing", "leading", "linspace")
        raise ValueError(f"ddim_timesteps: spacing must be one of {names}, got {spacing!r}")
    return cast(list[int], times.tolist())


@torch.no_grad()
def sample_ddim(
    model: Denoiser,
    x_T: Tensor,
    process: DiffusionProcess,
    *,
    steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "trailing",
    generator: torch.Generator | StepNoise | None = None,
    clip_x0: bool | Threshold = True,
    progress: bool = False,
) -> Tensor:
    """Draw samples with DDIM.

    x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma z,
    sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_prev)),
    where x_0 and eps are the network's, z is standard normal, and alpha_bar_prev is 1 at the end.

    Args:
        model: (x, t) -> the process's prediction, shaped as x; t is (B,) int64 in steps 0..T-1.
            As many channels again, a learned variance, are left out.
        x_T: standard normal, (B, ...); the network sees every x in this dtype.
        process: schedule and meaning of the network's output.
        steps: calls of the network, 1..T. The paper: 50 for ASCEND text, 250 for IU-ViT text.
        eta: 0 is deterministic; 1 over all T steps is `sample_ancestral` with small variance.
        spacing: which steps are visited, see `ddim_timesteps`.
        generator: where z comes from if eta > 0: a torch generator on x_T's device, or a callable
            (i, shape) -> noise of the i-th call, for instance `PictureNoise`; None: torch's own.
        clip_x0: clamp x_0 to [-1, 1], the range of pixels, and take eps again from the clamped
            one, as ADM does by default. Off for data that are not pixels. Or another threshold,
            such as `dynamic_threshold()`.
        progress: show a tqdm bar.

    Returns:
        Samples shaped as x_T, in its dtype.

    Raises:
        ValueError: steps, eta or spacing out of range, or the model's output has another shape.

    Numerics: the state is kept in float32; no synchronisation with the device between steps.
    Source: Song et al. 2021, Eq. 12 and 16; sections 4.3 and B.2 of the paper.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"sample_ddim: eta must lie in [0, 1], got {eta}")
    times = ddim_timesteps(process.steps, steps, spacing)
    alpha_bar = process.schedule.alpha_bar.tolist()
    t_all = torch.tensor(times, device=x_T.device)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for i in progress_bar(range(steps), progress):
        t = t_all[i].expand(x.shape[0])
        now, prev = alpha_bar[times[i]], alpha_bar[times[i + 1]] if i + 1 < steps else 1.0
        out, _ = predict(model, x, t, x_T.dtype)
        x0, eps = to_x0_and_eps(process, out, x, t, clip_x0)
        sigma = eta * math.sqrt((1.0 - prev) / (1.0 - now) * (1.0 - now / prev))
        x = math.sqrt(prev) * x0 + math.sqrt(max(1.0 - prev - sigma**2, 0.0)) * eps
        if sigma > 0.0:
            x = x + sigma * draw(generator, i, x)
    return x.to(x_T.dtype)


@torch.no_grad()
def sample_ancestral(
    model: Denoiser,
    x_T: Tensor,
    process: DiffusionProcess,
    *,
    variance: Variance = "small",
    generator: torch.Generator | StepNoise | None = None,
    clip_x0: bool | Threshold = True,
    progress: bool = False,
) -> Tensor:
    """Draw samples with DDPM's ancestral sampler, over all T steps.

    x_{t-1} ~ N(mean of q(x_{t-1} | x_t, x_0), sigma_t^2) with the network's x_0. Without clipping
    the mean is (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), which is Eq. 3 with its
    misprint corrected. No noise on the last step.

    Args:
        model, x_T, process, generator, progress: as in `sample_ddim`.
        variance: sigma_t^2. "small": the posterior variance (Eq. 3); "large": beta_t (DDPM's
            CIFAR-10 runs). The first is exact for data at one point, the second for Gaussian data
            of variance 1. "learned": between the two as the network says,
            sigma_t^2 = large^((1 + v) / 2) small^((1 - v) / 2), where the network's output is
            (B, 2C, ...), the prediction and behind it v (`create_model(..., learn_variance=True)`).
        clip_x0: clamp x_0 to [-1, 1] before the mean is taken, as DDPM and ADM do by default; or
            another threshold, such as `dynamic_threshold()`.

    Returns:
        Samples shaped as x_T, in its dtype.

    Raises:
        ValueError: variance is unknown, or the model's output has another shape: x's, or with
            "learned" that of twice the channels.

    Numerics: the state is kept in float32; no synchronisation with the device between steps.
    Source: DDPM, algorithm 2 and Eq. 6-7; Eq. 3 of the paper; Nichol and Dhariwal 2021, Eq. 15.
    """
    if variance not in get_args(Variance):
        names = get_args(Variance)
        raise ValueError(f"sample_ancestral: variance must be one of {names}, got {variance!r}")
    table = process.schedule
    small, large = table.posterior_variance.sqrt().tolist(), table.betas.sqrt().tolist()
    weight_x0, weight_xt = table.posterior_mean_x0.tolist(), table.posterior_mean_xt.tolist()
    t_all = torch.arange(process.steps, device=x_T.device)
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    for i in progress_bar(range(process.steps), progress):
        step = process.steps - 1 - i
        t = t_all[step].expand(x.shape[0])
        out, v = predict(model, x, t, x_T.dtype)
        if variance == "learned" and v is None:
            raise ValueError(
                f"sample_ancestral: variance='learned' needs a model of {2 * x.shape[1]} output "
                f"channels for the {x.shape[1]} of x, got {tuple(out.shape)}"
            )
        x0 = clipped(process.to_x0(out, x, t), clip_x0)
        x = weight_x0[step] * x0 + weight_xt[step] * x
        sigma: float | Tensor = small[step] if variance == "small" else large[step]
        if v is not None and variance == "learned":
            # large^((1 + v) / 2) small^((1 - v) / 2), as a power of their ratio.
            sigma = large[step] * (small[step] / large[step]) ** (0.5 * (1.0 - v.to(x)))
        if step > 0:
            x = x + sigma * draw(generator, i, x)
    return x.to(x_T.dtype)


@dataclass(frozen=True)
class PictureNoise:
    """Step noise of a batch in which each picture follows its own seed.

    noise(i, shape)[b] is a function of (seeds[b], i) alone, so a picture comes out the same in
    whatever batch it is drawn. The numbers are those of NumPy's Philox, a counter-based generator
    with 128 bits of key: two pictures, or two steps, never share a stream.

    Args:
        seeds: one per picture, 0..2^64-1.
        device: where the noise is wanted.
    """

    seeds: tuple[int, ...]
    device: torch.device | str = "cpu"

    def __call__(self, i: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of the i-th call of the network, float32, shape (B, ...)."""
        if len(shape) == 0 or shape[0] != len(self.seeds):
            raise ValueError(f"PictureNoise: {len(self.seeds)} seeds for the shape {tuple(shape)}")
        # Stream 0 is x_T.
        return _seeded_normal(self.seeds, i + 1, shape[1:]).to(self.device)


def initial_noise(
    seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Tensor:
    """x_T of a batch in which each picture follows its own seed.

    Args:
        seeds: one per picture, 0..2^64-1; picture b is a function of seeds[b] alone.
        shape: of one picture, (C, H, W).
        device: where the noise is wanted; the numbers do not depend on it.

    Returns:
        Standard normal, (len(seeds), C, H, W) float32. Independent of `PictureNoise(seeds)`.

    Raises:
        ValueError: no seeds, or one outside 0..2^64-1.
    """
    if len(seeds) == 0:
        raise ValueError("initial_noise: seeds must not be empty")
    return _seeded_normal(seeds, 0, shape).to(device)


def _seeded_normal(seeds: Sequence[int], stream: int, shape: tuple[int, ...]) -> Tensor:
    out = np.empty((len(seeds), *shape), dtype=np.float32)
    for b, seed in enumerate(seeds):
        if not 0 <= seed < 2**64:
            raise ValueError(f"initial_noise: seeds must lie in 0..2^64-1, got {seed}")
        key = np.array([seed, stream], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(
            dtype=np.float32, out=out[b : b + 1]
        )
    return torch.from_numpy(out)
