"""Scores of generated pictures: feature matrices in, numbers out; everything in float64.

Written here, although torchmetrics 1.9 has most of them: its Frechet distance takes square roots of
the eigenvalues of a product that is not symmetric, so a covariance of n < D pictures leaves D - n
roots of rounding noise. Of D = 2048, n = 1024 and a distance of 5e-5 of the traces it is 1e-4 off
(measured against the pictures themselves); what stands here 6e-11. Its other scores draw their
subsets from torch's global random state, and it has no precision and recall.

Legend: N pictures, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Spread(NamedTuple):
    """Mean and standard deviation of a score over subsets of the pictures."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Share of generated pictures near real ones, and of real pictures near generated ones."""

    precision: float
    recall: float


def frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians; the FID, if of Inception features.

        |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    With S = F F^T the last trace is the sum of the singular values of F_a^T F_b: no root is taken
    of a difference, so singular covariances lose nothing.

    Args:
        mean_a, mean_b: (D,).
        covariance_a, covariance_b: (D, D), symmetric, no eigenvalue below zero beyond rounding.

    Returns:
        The distance, at least 0 up to rounding.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or a covariance that is not
            symmetric or has a negative eigenvalue.

    Numerics: float64 on the CPU; about 3 s for D = 2048 on one core.
    Source: Dowson and Landau 1982; Heusel et al. 2017.
    """
    means = [m.detach().cpu().double() for m in (mean_a, mean_b)]
    covariances = [c.detach().cpu().double() for c in (covariance_a, covariance_b)]
    d = len(means[0])
    if any(m.shape != (d,) for m in means) or any(c.shape != (d, d) for c in covariances):
        told = [tuple(x.shape) for x in (mean_a, covariance_a, mean_b, covariance_b)]
        raise ValueError(f"frechet_distance: shapes {told}; expected (D,), (D, D), (D,), (D, D)")
    if not all(bool(x.isfinite().all()) for x in (*means, *covariances)):
        raise ValueError("frechet_distance: a mean or covariance holds NaN or infinity")
    root = torch.linalg.svdvals(_factor(covariances[0]).T @ _factor(covariances[1])).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)


def _factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F F^T = covariance."""
    scale = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > 1e-6 * scale:
        raise ValueError("frechet_distance: a covariance is not symmetric")
    values, vectors = torch.linalg.eigh(covariance)
    # Files of other tools hold float32 covariances, whose zero eigenvalues are some 1e-7 off.
    if values[0] < -1e-5 * scale * len(values) ** 0.5:
        raise ValueError(f"frechet_distance: a covariance has the eigenvalue {values[0]:.3g}")
    # Those that are zero come out at some 1e-16 of the largest, either side of zero.
    kept = values > 64 * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _features(name: str, *features: Tensor) -> list[Tensor]:
    if any(x.ndim != 2 for x in features) or len({x.shape[1] for x in features}) > 1:
        raise ValueError(f"{name}: features {[tuple(x.shape) for x in features]}; expected (N, D)")
    if not all(bool(x.isfinite().all()) for x in features):
        raise ValueError(f"{name}: features hold NaN or infinity")
    return [x.detach().cpu().double() for x in features]


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Spread:
    """Kernel inception distance: unbiased squared MMD with the kernel (x . y / D + 1)^3.

    Args:
        real: (N, D).
        generated: (M, D).
        subsets: how often it is estimated.
        subset_size: pictures of each side in an estimate; at most N and M.
        seed: of the drawing of subsets (without replacement).

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: shapes, or subset_size outside 2..min(N, M).

    Source: Binkowski et al. 2018.
    """
    real, generated = _features("kernel_distance", real, generated)
    if not 2 <= subset_size <= min(len(real), len(generated)) or subsets < 1:
        raise ValueError(
            f"kernel_distance: {subsets} subsets of {subset_size} of {len(real)} and "
            f"{len(generated)} pictures; expected at least 1, of 2 to the smaller number"
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    d, n = real.shape[1], subset_size
    estimates = []
    for _ in range(subsets):
        x = real[generator.choice(len(real), n, replace=False)]
        y = generated[generator.choice(len(generated), n, replace=False)]
        xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
        estimates.append(float(within - 2 * xy.mean()))
    return Spread(float(np.mean(estimates)), float(np.std(estimates)))


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> Spread:
    """exp of the mean divergence KL(p(k | picture) | p(k)), over splits of the pictures.

    Args:
        logits: (N, K) of a classifier; log-probabilities will do.
        splits: parts of as equal size as can be.
        seed: of the shuffling before the split, so that pictures sorted by class do no harm.

    Returns:
        Mean and standard deviation over the splits; between 1 and K.

    Raises:
        ValueError: shape, or splits outside 1..N.

    Source: Salimans et al. 2016.
    """
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(
            f"inception_score: logits {tuple(logits.shape)} in {splits} splits; expected (N, K) "
            "and at most N splits"
        )
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(logits))
    log_p = logits.detach().cpu()[order].double().log_softmax(1)
    if bool(log_p.isnan().any()):
        raise ValueError("inception_score: logits hold NaN or infinity")
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(0) - np.log(len(part))
        # p log p is 0 where p is, also where its logarithm is minus infinity.
        terms = torch.where(part.exp() > 0, part.exp() * (part - log_marginal), 0.0)
        scores.append(float(terms.sum(1).mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall: is a picture within the k-NN balls of the other side's?

    Args:
        real: (N, D).
        generated: (M, D); as many as real pictures, for values that compare (the source: 50,000).
        neighbours: k; a ball reaches to the k-th nearest other picture of its own side.

    Raises:
        ValueError: shapes, or neighbours outside 1..min(N, M) - 1.

    Source: Kynkaanniemi et al. 2019.
    """
    real, generated = _features("precision_recall", real, generated)
    if not 1 <= neighbours < min(len(real), len(generated)):
        raise ValueError(
            f"precision_recall: neighbours={neighbours} of {len(real)} and {len(generated)} "
            "pictures; expected at least 1 and fewer than the pictures of either side"
        )
    # Distances come as differences of squares: about the centre these are smallest.
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    return PrecisionRecall(
        precision=_covered(generated, real, neighbours),
        recall=_covered(real, generated, neighbours),
    )


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Share of `points` that lie in a ball around one of `centres`."""
    # One more than the neighbours: the nearest is the picture itself.
    radii = torch.cat(
        [
            _squared_distances(part, centres).kthvalue(neighbours + 1, 1)[0]
            for part in centres.split(1024)
        ]
    )
    inside = [(_squared_distances(part, centres) <= radii).any(1) for part in points.split(1024)]
    return float(torch.cat(inside).double().mean())
