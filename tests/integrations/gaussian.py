"""Data of which everything is known: pixels apart from each other, each N(MEAN, STD^2).

With x_t = a x_0 + s eps the best guess of eps is s (x_t - a MEAN) / (a^2 STD^2 + s^2), and the
deterministic samplers carry x_T along x_t = a MEAN + sqrt(a^2 STD^2 + s^2) z at constant z.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MEAN, STD = 0.3, 0.4


def best_eps(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    return s * (x - a * MEAN) / (a**2 * STD**2 + s**2)


def best(prediction: str, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The best guess of eps, x_0 or v from x_t."""
    eps = best_eps(x, a, s)
    x0 = (x - s * eps) / a
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]


def best_x0(x: Tensor, sigma: Tensor) -> Tensor:
    """The best guess of x_0 from x = x_0 + sigma eps."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def discrete_model(alpha_bar: Tensor, prediction: str = "eps") -> Callable[..., Tensor]:
    """A perfect network for a table: model(x, t), fractional t between its steps in log sigma."""
    log_sigma = ((1 - alpha_bar) / alpha_bar).sqrt().log()

    def model(x: Tensor, t: Tensor | float, **_: object) -> Tensor:
        steps = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        low = steps.floor().long().clamp(0, len(alpha_bar) - 2)
        sigma = torch.lerp(log_sigma[low], log_sigma[low + 1], steps - low).exp()
        a = (1 + sigma**2).rsqrt()
        return best(prediction, x.double(), a, sigma * a).to(x.dtype)

    return model
