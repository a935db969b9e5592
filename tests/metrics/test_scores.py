"""Scores against independent formulas, and where their values are known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fastdiff.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), torch.from_numpy(np.cov(x.numpy(), rowvar=False))


def by_scipy(a: Tensor, b: Tensor) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = np.trace(scipy.linalg.sqrtm((cov_a @ cov_b).numpy())).real
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def from_pictures(a: Tensor, b: Tensor) -> float:
    """The distance without any covariance: the trace of the root is the nuclear norm of A B^T."""
    a_, b_ = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    root = torch.linalg.matrix_norm(a_ @ b_.T, "nuc")
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + a_.square().sum() + b_.square().sum() - 2 * root)


def two_sets(d: int) -> tuple[Tensor, Tensor]:
    """Correlated features of fewer pictures than features: both covariances are singular."""
    mix = normal(d, d) * torch.logspace(0, -2, d, dtype=torch.float64)
    return normal(d // 2, d, 1) @ mix, 1.1 * normal(d // 2 + 9, d, 2) @ mix + 0.1


@pytest.mark.parametrize("d", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_frechet_is_scipys_square_root_also_of_singular_covariances(d: int) -> None:
    a, b = two_sets(d)
    ours = frechet_distance(*moments(a), *moments(b))
    assert ours == pytest.approx(by_scipy(a, b), rel=1e-6)
    assert ours == pytest.approx(from_pictures(a, b), rel=1e-12)


def test_frechet_of_sets_that_are_nearly_equal_keeps_its_digits() -> None:
    a, _ = two_sets(256)
    b = a + 1e-3 * normal(*a.shape, 3)
    expected = from_pictures(a, b)
    traces = 2 * float(moments(a)[1].trace())
    assert expected < 1e-6 * traces
    assert frechet_distance(*moments(a), *moments(b)) == pytest.approx(expected, abs=1e-12 * traces)
    assert abs(frechet_distance(*moments(a), *moments(a))) < 1e-12 * traces


def test_frechet_in_closed_form() -> None:
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 3.0])
    a, b = torch.diag(torch.tensor([4.0, 9.0, 0.0])), torch.diag(torch.tensor([1.0, 16.0, 25.0]))
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(4 + 1 + 1 + 25, rel=1e-12)
    # Small eigenvalues are not taken for zeros: (1 - 1e-6)^2.
    small = torch.diag(torch.tensor([4.0, 9.0, 1e-12], dtype=torch.float64))
    one = torch.diag(torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64))
    got = frechet_distance(mean_a, small, mean_a, one)
    assert got == pytest.approx((1 - 1e-6) ** 2, rel=1e-12)
    # A distance: symmetric.
    assert frechet_distance(mean_b, b, mean_a, a) == pytest.approx(31, rel=1e-12)


def test_frechet_takes_covariances_that_were_stored_in_float32() -> None:
    a, b = two_sets(256)
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    assert float(torch.linalg.eigvalsh(cov_a.float())[0]) < 0
    got = frechet_distance(mean_a, cov_a.float(), mean_b, cov_b.float())
    assert got == pytest.approx(from_pictures(a, b), rel=1e-3)


def test_frechet_errors() -> None:
    mean, eye = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(mean, eye, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mean, eye, mean * torch.nan, eye)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(mean, eye, mean, torch.diag(torch.tensor([1.0, 1.0, -1.0])))
    with pytest.raises(ValueError, match="symmetric"):
        frechet_distance(mean, eye, mean, eye + torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0.0]]))


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    x, y = normal(40, 12), 1.3 * normal(50, 12, 1) + 0.2
    xx, yy, xy = (
        polynomial_kernel(a, b, degree=3, gamma=1 / 12, coef0=1)
        for a, b in ((x, x), (y[:40], y[:40]), (x, y[:40]))
    )
    pairs = ~np.eye(40, dtype=bool)
    expected = xx[pairs].mean() + yy[pairs].mean() - 2 * xy.mean()
    got = kernel_distance(x, y[:40], subsets=3, subset_size=40)
    assert got.mean == pytest.approx(expected, rel=1e-10)
    assert got.std < 1e-12  # each subset is the whole


def test_kernel_distance_draws_subsets_by_its_seed() -> None:
    x, y = normal(80, 12), normal(90, 12, 1) + 0.5
    first, again, other = (kernel_distance(x, y, subset_size=30, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.std > 0
    assert first.mean == pytest.approx(other.mean, abs=5 * first.std / 100**0.5)
    # Unbiased: of two sets of one distribution it is about zero, and can be negative.
    same = kernel_distance(normal(500, 12), normal(500, 12, 1), subset_size=100)
    assert abs(same.mean) < 3 * same.std / 5**0.5
    for bad in ({"subset_size": 81}, {"subset_size": 1}, {"subset_size": 4, "subsets": 0}):
        with pytest.raises(ValueError, match="kernel_distance"):
            kernel_distance(x, y, **bad)


def test_inception_score() -> None:
    logits = 2 * normal(60, 7)
    p = logits.softmax(1).numpy()
    expected = np.exp(np.mean([scipy.stats.entropy(row, p.mean(0)) for row in p]))
    assert inception_score(logits, splits=1).mean == pytest.approx(expected, rel=1e-10)
    # Log-probabilities are logits, also where a probability is zero.
    certain = torch.eye(5).log().repeat(8, 1)
    assert inception_score(certain, splits=1).mean == pytest.approx(5, rel=1e-10)
    assert inception_score(torch.zeros(40, 5)).mean == pytest.approx(1, rel=1e-10)
    # Pictures sorted by class: without a shuffle each of five splits would hold one class, score 1.
    sorted_by_class = torch.eye(5).mul(50).repeat_interleave(40, 0)
    assert inception_score(sorted_by_class, splits=5).mean > 4.5
    with pytest.raises(ValueError, match="41 splits"):
        inception_score(torch.zeros(40, 5), splits=41)
    with pytest.raises(ValueError, match="NaN"):
        inception_score(torch.full((40, 5), torch.nan))


def test_precision_and_recall_are_the_share_within_the_neighbours_balls() -> None:
    real, generated = normal(120, 6), 0.7 * normal(100, 6, 1) + 0.4

    def share(points: Tensor, centres: Tensor) -> float:
        # kneighbors() without points leaves each point itself out.
        radii = (
            NearestNeighbors(n_neighbors=3, algorithm="brute").fit(centres).kneighbors()[0][:, 2]
        )
        distances = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return float((distances <= radii).any(1).mean())

    got = precision_recall(real, generated)
    assert got.precision == pytest.approx(share(generated, real), abs=1e-12)
    assert got.recall == pytest.approx(share(real, generated), abs=1e-12)
    assert 0.2 < got.recall < got.precision < 1  # else the cases would say little


def test_precision_and_recall_where_they_are_known() -> None:
    real = normal(60, 4)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    # Half of the modes: what is drawn is real, what is real is half drawn.
    two = torch.cat([real, real + 100])
    assert precision_recall(two, real) == (1, 0.5)
    # Copies of a picture: balls of radius zero hold their own centre.
    copies = 100 + normal(30, 64).repeat(5, 1)
    assert precision_recall(copies, copies.flip(0)[:121]) == (1, 1)
    with pytest.raises(ValueError, match="neighbours=3"):
        precision_recall(real[:3], real)
    with pytest.raises(ValueError, match="NaN"):
        precision_recall(real, real / 0)
