"""The VP-SDE in continuous time, and the samplers that integrate it.

Legend: B batch; u time in [0, 1], 0 = data; t = 999 u, what the network is given; h step in u; x_T
standard normal noise; a = sqrt(alpha_bar(u)), s = sqrt(1 - alpha_bar(u)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.process import Prediction, Process
from fastdiff.diffusion.schedules import COSINE_OFFSET, MAX_BETA
from fastdiff.diffusion.stepping import (
    Denoiser,
    StepNoise,
    draw,
    predict,
    progress_bar,
    to_x0_and_eps,
)
from fastdiff.diffusion.thresholding import Threshold

# Where U-ViT's grid, and the paper's, stops before the step to 0.
_FIRST_TIME = 1e-3
_LAST_T = 999.0
_BETA_MIN, _BETA_MAX = 0.1, 20.0


class VPSDE(Process):
    """The variance-preserving SDE, dx = -beta(u) x / 2 du + sqrt(beta(u)) dw.

    linear: beta(u) = 0.1 + 19.9 u, alpha_bar(u) = exp(-0.1 u - 9.95 u^2);
    cosine: alpha_bar(u) = f(u) / f(0), f(u) = cos^2(pi/2 (u + 0.008) / 1.008), whose beta(u) =
        pi / 1.008 tan(pi/2 (u + 0.008) / 1.008) is infinite at u = 1, see `beta`.

    It serves training, guidance and conversions as `DiffusionProcess` does, with t = 999 u of any
    real dtype in [0, 999]. Its network is trained with u ~ U(0, 1). One that was trained in 1000
    discrete steps is a close stand-in: the noise of its step k is that of t = 0.999 (k + 1).

    Args:
        schedule: "linear" (all of the paper's IU-ViT runs) or "cosine" (its ASCEND runs).
        prediction: as in `Process`.

    Raises:
        ValueError: an unknown schedule or prediction.

    Source: Song et al. 2021 (score SDE), Appendix B; U-ViT's training.
    """

    def __init__(
        self, schedule: Literal["linear", "cosine"] = "linear", prediction: Prediction = "eps"
    ) -> None:
        super().__init__(prediction)
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"VPSDE: schedule must be linear or cosine, got {schedule!r}")
        self.schedule = schedule

    def __repr__(self) -> str:
        return f"VPSDE({self.schedule}, {self.prediction})"

    def _noise_levels(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = float(t.min()), float(t.max())
            if not (low >= 0 and high <= _LAST_T):
                raise ValueError(f"VPSDE: t must lie in 0..999, got {low:g}..{high:g}")
        u = t.to(device, torch.float64) / _LAST_T
        if self.schedule == "linear":
            log_alpha_bar = -(_BETA_MIN * u + 0.5 * (_BETA_MAX - _BETA_MIN) * u * u)
            a, s = (0.5 * log_alpha_bar).exp(), (-torch.expm1(log_alpha_bar)).sqrt()
        else:
            # cos^2 A - cos^2 B = sin(B - A) sin(A + B) keeps all digits of s near u = 0.
            start = _cosine_angle(0.0)
            angle = 0.5 * math.pi * (u + COSINE_OFFSET) / (1.0 + COSINE_OFFSET)
            a = angle.cos() / math.cos(start)
            s = ((angle - start).sin() * (angle + start).sin()).sqrt() / math.cos(start)
        return torch.stack([a, s], dim=1).to(dtype)

    def beta(self, u: float, steps: int) -> float:
        """beta(u) as `steps` steps over [0, 1] integrate it: at most 0.999 steps.

        The bound is the discrete cosine schedule's, beta_t <= 0.999, where beta_t = beta(u) / T.
        Without it the cosine explodes at u = 1. The linear one stays below it from 21 steps on.
        """
        if self.schedule == "linear":
            beta = _BETA_MIN + (_BETA_MAX - _BETA_MIN) * u
        else:
            cosine = math.cos(_cosine_angle(u))
            sine = math.sin(_cosine_angle(u))
            # At u = 1 the cosine is a rounding error of either sign.
            beta = math.pi / (1.0 + COSINE_OFFSET) * sine / max(cosine, 1e-12)
        return min(beta, MAX_BETA * steps)


def _cosine_angle(u: float) -> float:
    return 0.5 * math.pi * (u + COSINE_OFFSET) / (1.0 + COSINE_OFFSET)


class _Flow:
    """Scores of a network along a grid of times, from noise to data.

    Args:
        times: u, decreasing, the last one 0; the network is never asked there.
    """

    def __init__(
        self,
        name: str,
        model: Denoiser,
        x_T: Tensor,
        process: VPSDE,
        times: Sequence[float],
        clip_x0: bool | Threshold,
    ) -> None:
        if not isinstance(process, VPSDE):
            raise TypeError(
                f"{name}: process must be a VPSDE, in continuous time, got {process!r}; for a "
                "process in steps there are sample_ddim and sample_ancestral"
            )
        self.model, self.process, self.clip_x0 = model, process, clip_x0
        self.dtype, self.times, self.steps = x_T.dtype, times, len(times) - 1
        self.start = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        # Times are rounded to the state's precision once, and the scores use what the network sees.
        self.t = _LAST_T * torch.tensor(times, dtype=self.start.dtype).to(x_T.device)

    def step(self, k: int) -> tuple[float, float]:
        """h and beta of the step from times[k] to times[k + 1]."""
        u = self.times[k]
        return u - self.times[k + 1], self.process.beta(u, self.steps)

    def score(self, x: Tensor, k: int) -> Tensor:
        """grad log p(x) at times[k], -eps / s."""
        t = self.t[k].expand(x.shape[0])
        out, _ = predict(self.model, x, t, self.dtype)
        if self.clip_x0 is False:
            eps = self.process.to_eps(out, x, t)
        else:
            _, eps = to_x0_and_eps(self.process, out, x, t, self.clip_x0)
        return -eps / self.process.noise_std(x, t)

    def slope(self, x: Tensor, k: int) -> Tensor:
        """-dx/du of the probability flow at times[k]: beta (x + score) / 2."""
        return 0.5 * self.process.beta(self.times[k], self.steps) * (x + self.score(x, k))


@torch.no_grad()
def sample_euler_maruyama(
    model: Denoiser,
    x_T: Tensor,
    process: VPSDE,
    *,
    steps: int = 1000,
    generator: torch.Generator | StepNoise | None = None,
    clip_x0: bool | Threshold = False,
    progress: bool = False,
) -> Tensor:
    """Draw samples with Euler-Maruyama on the reverse VP-SDE: the sampler of the paper's FIDs.

    x <- x + h beta (x / 2 + score) + sqrt(h beta) z, over the times linspace(1, 1e-3, steps) and
    then 0, score = -eps / s; no noise z on the last step.

    Args:
        model: (x, t) -> the process's prediction, shaped as x; t is (B,) floating, 999 u.
        x_T: standard normal, (B, ...); the network sees every x in this dtype.
        process: noise levels and meaning of the network's output.
        steps: calls of the network, at least 1; the paper: 1000.
        generator: where z comes from: a torch generator on x_T's device, or a callable (i, shape)
            -> noise of the i-th call, for instance `PictureNoise`; None: torch's own.
        clip_x0: False as in the paper, True for [-1, 1], or a threshold; the noise is then taken
            again from the clipped x_0.
        progress: show a tqdm bar.

    Returns:
        Samples shaped as x_T, in its dtype.

    Raises:
        ValueError: steps is below 1, or the model's output has another shape.
        TypeError: the process is not a VPSDE.

    Numerics: the state is kept in float32; no synchronisation with the device between steps.
    Source: Song et al. 2021 (score SDE), Eq. 6; U-ViT's sampler, 1000 steps of which its FIDs and
        the paper's are; B.1.
    """
    _check_steps("sample_euler_maruyama", steps)
    times = [*np.linspace(1.0, _FIRST_TIME, steps).tolist(), 0.0]
    flow = _Flow("sample_euler_maruyama", model, x_T, process, times, clip_x0)
    x = flow.start
    for k in progress_bar(range(steps), progress):
        h, beta = flow.step(k)
        x = x + h * beta * (0.5 * x + flow.score(x, k))
        if k + 1 < steps:
            x = x + math.sqrt(h * beta) * draw(generator, k, x)
    return x.to(x_T.dtype)


@torch.no_grad()
def sample_ode_euler(
    model: Denoiser,
    x_T: Tensor,
    process: VPSDE,
    *,
    steps: int = 250,
    clip_x0: bool | Threshold = False,
    progress: bool = False,
) -> Tensor:
    """Draw samples with Euler's method on the probability-flow ODE, in equal steps of u.

    x <- x + h beta (x + score) / 2, over linspace(1, 0, steps + 1)

    Args:
        model, x_T, process, clip_x0, progress: as in `sample_euler_maruyama`.
        steps: calls of the network, at least 1.

    Returns, Raises, Numerics: as `sample_euler_maruyama`. No noise is drawn.

    Source: Song et al. 2021 (score SDE), Eq. 13.
    """
    _check_steps("sample_ode_euler", steps)
    times = np.linspace(1.0, 0.0, steps + 1).tolist()
    flow = _Flow("sample_ode_euler", model, x_T, process, times, clip_x0)
    x = flow.start
    for k in progress_bar(range(steps), progress):
        x = x + flow.step(k)[0] * flow.slope(x, k)
    return x.to(x_T.dtype)


@torch.no_grad()
def sample_ode_heun(
    model: Denoiser,
    x_T: Tensor,
    process: VPSDE,
    *,
    steps: int = 50,
    clip_x0: bool | Threshold = False,
    progress: bool = False,
) -> Tensor:
    """Draw samples with Heun's method on the probability-flow ODE: of second order.

    x' = x + h f(x, u_k);  x <- x + h (f(x, u_k) + f(x', u_{k+1})) / 2, f = beta (x + score) / 2,
    over linspace(1, 0, steps + 1). The last step is Euler's: the score has no value at u = 0.

    Args:
        model, x_T, process, clip_x0, progress: as in `sample_euler_maruyama`.
        steps: at least 1; 2 steps - 1 calls of the network.

    Returns, Raises, Numerics: as `sample_euler_maruyama`. No noise is drawn.

    Source: Song et al. 2021 (score SDE), Eq. 13; EDM (Karras et al. 2022), Algorithm 1.
    """
    _check_steps("sample_ode_heun", steps)
    times = np.linspace(1.0, 0.0, steps + 1).tolist()
    flow = _Flow("sample_ode_heun", model, x_T, process, times, clip_x0)
    x = flow.start
    for k in progress_bar(range(steps), progress):
        h = flow.step(k)[0]
        slope = flow.slope(x, k)
        ahead = x + h * slope
        x = ahead if k + 1 == steps else x + 0.5 * h * (slope + flow.slope(ahead, k + 1))
    return x.to(x_T.dtype)


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
