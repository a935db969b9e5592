"""How samplers carry a Gaussian when the network is the best one: exactly, without drawing.

For data N(mu, Sigma) the best x_0 and eps are affine in x_t = a x_0 + s eps, so every sampler is an
affine map of x_T and of the noise of its steps. It is recovered from the sampler itself by running
it on unit vectors, and compared with the same recursion written in matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Sampler = Callable[..., Tensor]


class Gaussian(NamedTuple):
    mean: Tensor  # (D,)
    cov: Tensor  # (D, D)


class Step(NamedTuple):
    """x <- M x + d + N z."""

    M: Tensor
    d: Tensor
    N: Tensor


DATA = Gaussian(
    torch.tensor([0.3, -0.2], dtype=torch.float64),
    torch.tensor([[0.30, 0.12], [0.12, 0.25]], dtype=torch.float64),
)


def noised(data: Gaussian, a: float, s: float) -> Gaussian:
    eye = torch.eye(len(data.mean), dtype=torch.float64)
    return Gaussian(a * data.mean, a * a * data.cov + s * s * eye)


def best(data: Gaussian, a: float, s: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(P, p) and (Q, q) with x_0 = P x + p and eps = Q x + q."""
    at = noised(data, a, s)
    precision = torch.linalg.inv(at.cov)
    P, Q = a * data.cov @ precision, s * precision
    return (P, data.mean - P @ at.mean), (Q, -Q @ at.mean)


def network(
    data: Gaussian, levels: Callable[[float], tuple[float, float]], prediction: str = "eps"
) -> Callable[[Tensor, Tensor], Tensor]:
    """The best network; `levels` gives a and s of a t."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a, s = levels(float(t[0]))
        (P, p), (Q, q) = best(data, a, s)
        x0, eps = x @ P.T + p, x @ Q.T + q
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]

    return model


def carried(draw: Sampler, start: Gaussian, calls: int) -> Gaussian:
    """Mean and covariance behind a sampler, from its answers to unit vectors.

    Args:
        draw: (x_T, generator) -> samples.
        start: of x_T.
        calls: noises that it may draw; 0 for one that draws none.
    """
    dim = len(start.mean)
    eye = torch.eye(dim, dtype=torch.float64)
    rows = 1 + dim + calls * dim
    x_T = torch.zeros(rows, dim, dtype=torch.float64)
    x_T[1 : 1 + dim] = eye

    def unit_noise(i: int, shape: tuple[int, ...]) -> Tensor:
        assert 0 <= i < calls
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[1 + dim + i * dim : 1 + dim + (i + 1) * dim] = eye
        return noise

    out = draw(x_T, unit_noise)
    offset, columns = out[0], (out[1:] - out[0]).T
    A, B = columns[:, :dim], columns[:, dim:]
    return Gaussian(A @ start.mean + offset, A @ start.cov @ A.T + B @ B.T)


def recursion(steps: Iterable[Step], start: Gaussian) -> Gaussian:
    mean, cov = start
    for M, d, N in steps:
        mean, cov = M @ mean + d, M @ cov @ M.T + N @ N.T
    return Gaussian(mean, cov)
