"""KID, precision and recall, density and coverage: double sums, closed forms, brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from metrics.kid import kid, mmd2
from metrics.manifolds import density_coverage, precision_recall


def points(count: int, dim: int = 4, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + shift


def by_double_sums(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((np.dot(a, b) / len(a) + 1) ** 3)

    m, n = len(x), len(y)
    own = [sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y)]
    between = sum(k(a, b) for a in x for b in y)
    return own[0] / (m * (m - 1)) + own[1] / (n * (n - 1)) - 2 * between / (m * n)


@given(m=st.integers(2, 7), n=st.integers(2, 7), seed=st.integers(0, 99))
def test_mmd_is_its_double_sum(m: int, n: int, seed: int) -> None:
    x, y = points(m, seed=seed), points(n, seed=seed + 100, shift=0.5)
    expected = by_double_sums(x.numpy(), y.numpy())
    assert mmd2(x, y) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert mmd2(y, x) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def moment_form(mu: np.ndarray, nu: np.ndarray, s: float, t: float) -> float:
    """MMD^2 of N(mu, s I) and N(nu, t I) under (a.b / d + 1)^3, by Gaussian moments.

    E (a.b / d + 1)^3 = 1 + 3 E u + 3 E u^2 + E u^3, u = a.b / d. Given a, a.b is normal with mean
    m = a.nu and variance t |a|^2; the moments of a then follow in closed form.
    """

    def expected(m1: np.ndarray, v1: float, m2: np.ndarray, v2: float) -> float:
        d, dot = len(m1), m1 @ m2
        q1, q2 = m1 @ m1, m2 @ m2
        second = dot**2 + v1 * q2 + v2 * (q1 + d * v1)
        # E (a.m2)^3 + 3 v2 E (a.m2) |a|^2
        third = dot**3 + 3 * dot * v1 * q2 + 3 * v2 * (dot * (q1 + d * v1) + 2 * v1 * dot)
        return 1 + 3 * dot / d + 3 * second / d**2 + third / d**3

    return expected(mu, s, mu, s) + expected(nu, t, nu, t) - 2 * expected(mu, s, nu, t)


def test_the_expectation_of_kid_is_that_of_gaussians() -> None:
    """Unbiased: the mean over many small samples, within four standard errors; small ones too."""
    dim, mu, nu = 3, np.full(3, 0.4), np.array([1.0, -0.5, 0.2])
    truth = moment_form(mu, nu, 1.0, 2.0)
    random = np.random.default_rng(0)
    values = [
        mmd2(
            torch.from_numpy(mu + random.standard_normal((12, dim))),
            torch.from_numpy(nu + 2**0.5 * random.standard_normal((9, dim))),
        )
        for _ in range(4000)
    ]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values) - truth) < 4 * error and error < 0.05 * truth


def test_kid_over_subsets() -> None:
    x, y = points(300), points(200, seed=1, shift=0.3)
    whole = kid(x, y)
    assert (whole.mean, whole.spread, whole.subsets, whole.size) != (0, 0, 1, 200)
    assert whole.size == 200 and whole.subsets == 100
    same_size = kid(x[:200], y)
    assert same_size.subsets == 1 and same_size.spread == 0.0
    assert same_size.mean == pytest.approx(mmd2(x[:200], y), rel=1e-10)
    parts = kid(x, y, subsets=400, size=50, seed=3)
    error = parts.spread / 400**0.5
    assert abs(parts.mean - mmd2(x, y)) < 4 * error  # subsets are unbiased for the whole
    assert kid(x, y, size=50, seed=3) == kid(x, y, size=50, seed=3) != kid(x, y, size=50, seed=4)
    assert mmd2(x, x) < 0  # unbiased: a set and itself give a little less than 0
    with pytest.raises(ValueError, match="got 1 and 200"):
        kid(x[:1], y)


def brute(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    def radii(x: np.ndarray) -> np.ndarray:
        return np.array([sorted(np.delete(row, i))[k - 1] for i, row in enumerate(cdist(x, x))])

    d, r, f = cdist(real, fake), radii(real), radii(fake)
    precision = np.mean([any(d[i, j] <= r[i] for i in range(len(real))) for j in range(len(fake))])
    recall = np.mean([any(d[i, j] <= f[j] for j in range(len(fake))) for i in range(len(real))])
    density = sum(d[i, j] < r[i] for i in range(len(real)) for j in range(len(fake)))
    coverage = np.mean([min(d[i]) < r[i] for i in range(len(real))])
    return float(precision), float(recall), density / (k * len(fake)), float(coverage)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("m", "n", "shift"), [(20, 31, 0.5), (40, 12, 1.5), (9, 9, 0.0)])
def test_manifolds_by_brute_force(
    k: int, m: int, n: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metrics.manifolds.ROWS", 7)  # several blocks
    real, fake = points(m, seed=k), points(n, seed=k + 9, shift=shift)
    found = (*precision_recall(real, fake, k), *density_coverage(real, fake, k))
    np.testing.assert_allclose(found, brute(real.numpy(), fake.numpy(), k), atol=1e-12)


def test_manifolds_on_a_line_by_hand() -> None:
    """Real 0, 1, 3 with k = 1: balls [-1, 1], [0, 2], [1, 5]. Fake 2.5, 6, 6.5: [-1, 6], 6 +- .5"""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[2.5], [6.0], [6.5]])
    assert precision_recall(real, fake, 1) == (1 / 3, 1.0)
    assert density_coverage(real, fake, 1) == (1 / 3, 1 / 3)


def test_equal_and_distant_sets() -> None:
    x = points(50, 64).float()
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0) and density_coverage(x, x + 1e3) == (0, 0)
    twins = torch.cat([x[:1].expand(8, -1)] * 2)  # coinciding points: balls of radius 0
    assert precision_recall(twins, twins) == (1, 1)


def test_fewer_modes_lower_recall_and_coverage_alone() -> None:
    """Fakes from one of two modes: precise, but half of the data is missed."""
    real = torch.cat([points(100, seed=1), points(100, seed=2, shift=20.0)])
    precision, recall = precision_recall(real, points(100, seed=3))
    density, coverage = density_coverage(real, points(100, seed=3))
    assert precision > 0.9 and 0.4 < recall <= 0.5
    assert 0.8 < density < 1.2 * 2 and 0.4 < coverage <= 0.5
    shares = [precision_recall(real[:100], points(100, seed=3, shift=s))[0] for s in (0, 1, 2, 4)]
    assert all(a > b for a, b in pairwise(shares))


def test_too_few_images_for_a_ball() -> None:
    for metric in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="got 9 and 3"):
            metric(points(9), points(3), 3)
