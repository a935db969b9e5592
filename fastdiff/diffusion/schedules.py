"""Noise schedules of discrete diffusion, as float64 tables.

Legend: T number of steps; t step, 0..T-1, where t = 0 is the least noisy step (the paper's t = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The variances beta_t of the forward process (Eq. 1) and what follows from them.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I);  q(x_t | x_0) = N(sqrt(alpha_bar_t)
    x_0, (1 - alpha_bar_t) I). All tables are float64 on the CPU: 1 - alpha_bar_0 would lose four
    of its seven digits in float32.

    Args:
        name: what `schedule` calls it; recorded with a model's weights.
        betas: (T,), each in (0, 1).

    Raises:
        TypeError: betas is not float64.
        ValueError: betas is not (T,) with T >= 1, or a value lies outside (0, 1).

    Source: section 2, Eq. 1-3; DDPM (Ho et al. 2020), Eq. 2-7.
    """

    name: str
    betas: Tensor

    def __post_init__(self) -> None:
        if self.betas.dtype != torch.float64:
            raise TypeError(f"NoiseSchedule: betas must be float64, got {self.betas.dtype}")
        if self.betas.ndim != 1 or self.betas.numel() == 0:
            raise ValueError(f"NoiseSchedule: betas must be (T,), got {tuple(self.betas.shape)}")
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            low, high = float(self.betas.min()), float(self.betas.max())
            raise ValueError(f"NoiseSchedule: betas must lie in (0, 1), got {low:g} .. {high:g}")

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return self.betas.numel()

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t, (T,) float64."""
        return 1.0 - self.betas

    @cached_property
    def alpha_bar(self) -> Tensor:
        """alpha_bar_t = prod_{i <= t} alpha_i, (T,) float64, decreasing."""
        return torch.cumprod(self.alphas, dim=0)

    @cached_property
    def alpha_bar_prev(self) -> Tensor:
        """alpha_bar_{t-1}, (T,) float64; 1 (clean data) in front of the first step."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), (T,) float64."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0), (T,) float64; 0 at t = 0.

        beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t): the variance printed in Eq. 3.
        """
        return self.betas * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_mean_x0(self) -> Tensor:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0), (T,) float64."""
        return self.betas * self.alpha_bar_prev.sqrt() / (1.0 - self.alpha_bar)

    @cached_property
    def posterior_mean_xt(self) -> Tensor:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0), (T,) float64."""
        return self.alphas.sqrt() * (1.0 - self.alpha_bar_prev) / (1.0 - self.alpha_bar)


def linear_schedule(steps: int = 1000) -> NoiseSchedule:
    """The linear schedule of DDPM.

    beta_t from 1e-4 to 0.02 in equal steps, both scaled by 1000 / T, so that another T ends at
    about the same noise.

    Args:
        steps: T; at least 21, because 0.02 * 1000 / T has to stay below 1.

    Raises:
        ValueError: steps is below 21.

    Source: DDPM, section 4; all of the paper's IU-ViT runs (Table 5).
    """
    if steps < 21:
        raise ValueError(f"linear_schedule: steps must be at least 21, got {steps}")
    scale = 1000.0 / steps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
    return NoiseSchedule("linear", betas)


def cosine_schedule(steps: int = 1000) -> NoiseSchedule:
    """The cosine schedule of improved DDPM.

    alpha_bar(u) = f(u) / f(0), f(u) = cos^2(pi/2 (u + s) / (1 + s)), s = 0.008, u in [0, 1];
    beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), 0.999).

    Args:
        steps: T, at least 1.

    Raises:
        ValueError: steps is below 1.

    Source: Nichol and Dhariwal 2021, Eq. 17; all of the paper's ASCEND runs (Table 6).
    """
    if steps < 1:
        raise ValueError(f"cosine_schedule: steps must be at least 1, got {steps}")
    s = COSINE_OFFSET
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos(0.5 * math.pi * (u + s) / (1.0 + s)) ** 2
    return NoiseSchedule("cosine", (1.0 - f[1:] / f[:-1]).clamp(max=MAX_BETA))


def schedule(name: str, steps: int = 1000) -> NoiseSchedule:
    """A noise schedule by its name, as configs give it.

    Args:
        name: "linear" or "cosine".
        steps: T.

    Raises:
        ValueError: the name is unknown, or T is too small for the schedule.
    """
    makers = {"linear": linear_schedule, "cosine": cosine_schedule}
    if name not in makers:
        raise ValueError(f"schedule: name must be one of {sorted(makers)}, got {name!r}")
    return makers[name](steps)
