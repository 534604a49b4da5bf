"""The Frechet distance against closed forms and an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

from metrics.frechet import frechet_distance


def random_cov(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((dim, rank or 2 * dim))
    return factor @ factor.T / factor.shape[1]


@given(seed=st.integers(0, 2**16), dim=st.integers(1, 24))
def test_equal_covariances_leave_the_squared_distance_of_the_means(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    cov = random_cov(rng, dim)
    mu1, mu2 = rng.standard_normal((2, dim))
    assert abs(frechet_distance(mu1, cov, mu2, cov) - np.sum((mu1 - mu2) ** 2)) < 1e-8


@given(seed=st.integers(0, 2**16), dim=st.integers(1, 24))
def test_diagonal_covariances(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.exponential(size=(2, dim))
    a[: dim // 3] = 0  # singular in places
    mu = np.zeros(dim)
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert abs(frechet_distance(mu, np.diag(a), mu, np.diag(b)) - expected) < 1e-8


@given(seed=st.integers(0, 2**16), dim=st.integers(1, 24))
def test_full_covariances_one_carried_over_into_the_other(seed: int, dim: int) -> None:
    """x -> T x with T symmetric and positive is the optimal transport: tr sqrt(S TST) = tr T S."""
    rng = np.random.default_rng(seed)
    cov, transport = random_cov(rng, dim), random_cov(rng, dim)
    mu1, mu2 = rng.standard_normal((2, dim))
    other = transport @ cov @ transport
    other = (other + other.T) / 2
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(cov + other - 2 * transport @ cov)
    assert abs(frechet_distance(mu1, cov, mu2, other) - expected) < 1e-8


@given(seed=st.integers(0, 2**16))
def test_two_dimensions_by_hand(seed: int) -> None:
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for 2 x 2."""
    rng = np.random.default_rng(seed)
    cov1, cov2 = random_cov(rng, 2), random_cov(rng, 2)
    product = cov1 @ cov2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(max(np.linalg.det(product), 0)))
    expected = np.trace(cov1) + np.trace(cov2) - 2 * root
    assert abs(frechet_distance(np.zeros(2), cov1, np.zeros(2), cov2) - expected) < 1e-8


@pytest.mark.parametrize(("rank1", "rank2"), [(96, 96), (7, 48), (48, 7), (7, 7), (9, 5), (1, 1)])
def test_low_rank_covariances(rank1: int, rank2: int) -> None:
    """S = F F': tr sqrt(S1 S2) is the sum of the singular values of F1' F2."""
    rng = np.random.default_rng(0)
    f1, f2 = rng.standard_normal((48, rank1)), rng.standard_normal((48, rank2))
    singular = np.linalg.svd(f1.T @ f2, compute_uv=False)
    expected = np.sum(f1**2) + np.sum(f2**2) - 2 * np.sum(singular)
    mu = np.zeros(48)
    assert abs(frechet_distance(mu, f1 @ f1.T, mu, f2 @ f2.T) - expected) < 1e-8


def test_covariances_that_only_just_pass_for_regular() -> None:
    """One direction short of full rank, rounding may leave a tiny positive variance there."""
    mu = np.zeros(12)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        f1, f2 = 10 * rng.standard_normal((12, 11)), 10 * rng.standard_normal((12, 12))
        singular = np.linalg.svd(f1.T @ f2, compute_uv=False)
        expected = np.sum(f1**2) + np.sum(f2**2) - 2 * np.sum(singular)
        assert abs(frechet_distance(mu, f1 @ f1.T, mu, f2 @ f2.T) - expected) < 1e-8, seed


@pytest.mark.parametrize("rank", [None, 5])
def test_zero_on_itself_and_nearly_so_beside_it(rank: int | None) -> None:
    rng = np.random.default_rng(1)
    for dim in range(1, 40):
        mu, cov = rng.standard_normal(dim), random_cov(rng, dim, rank)
        assert frechet_distance(mu, cov, mu.copy(), cov.copy()) == 0.0
    assert 0 <= frechet_distance(mu, cov, mu, cov * (1 + 1e-12)) < 1e-8
    assert frechet_distance(mu, 0 * cov, mu, cov) == pytest.approx(np.trace(cov), rel=1e-12)


@pytest.mark.parametrize(("rank1", "rank2"), [(None, None), (6, None), (None, 6), (6, 9)])
def test_symmetric(rank1: int | None, rank2: int | None) -> None:
    rng = np.random.default_rng(2)
    one = rng.standard_normal(32), random_cov(rng, 32, rank1)
    two = rng.standard_normal(32), random_cov(rng, 32, rank2)
    assert abs(frechet_distance(*one, *two) - frechet_distance(*two, *one)) < 1e-8


@pytest.mark.parametrize("dim", [1, 2, 17, 80])
def test_against_the_root_of_the_unsymmetric_product(dim: int) -> None:
    rng = np.random.default_rng(dim)
    mu1, mu2 = rng.standard_normal((2, dim))
    cov1, cov2 = random_cov(rng, dim), 3 * random_cov(rng, dim)
    root = np.trace(np.real(linalg.sqrtm(cov1 @ cov2)))
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * root
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-6)


def test_rotation_and_scale() -> None:
    """A common rotation changes nothing, a common scale s multiplies by s^2."""
    rng = np.random.default_rng(3)
    (mu1, mu2), q = rng.standard_normal((2, 16)), linalg.qr(rng.standard_normal((16, 16)))[0]
    cov1, cov2 = random_cov(rng, 16), random_cov(rng, 16)
    plain = frechet_distance(mu1, cov1, mu2, cov2)
    turned = frechet_distance(q @ mu1, q @ cov1 @ q.T, q @ mu2, q @ cov2 @ q.T)
    scaled = frechet_distance(3 * mu1, 9 * cov1, 3 * mu2, 9 * cov2)
    assert turned == pytest.approx(plain, rel=1e-10)
    assert scaled == pytest.approx(9 * plain, rel=1e-10)


EYE, ZERO = np.eye(3), np.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ZERO, EYE, np.zeros(2), np.eye(2)), "3 features, the second 2"),
        ((ZERO, np.eye(2), ZERO, EYE), r"shape \(3,\) and a covariance of shape \(2, 2\)"),
        ((ZERO, EYE, ZERO * np.nan, EYE), "second statistics hold NaN"),
        ((ZERO, np.full((3, 3), np.inf), ZERO, EYE), "first statistics hold NaN or infinite"),
        ((ZERO, np.diag([1, 1, -0.5]), ZERO, EYE), r"negative eigenvalue \(-0.5"),
        ((ZERO, EYE, ZERO, np.diag([1, 1, -0.5])), "negative eigenvalue"),
        ((ZERO, EYE + np.triu(np.ones((3, 3)), 1), ZERO, EYE), "first covariance is not symmetric"),
    ],
)
def test_errors_name_what_is_wrong(arguments: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def test_covariances_of_single_precision_pass() -> None:
    """Rounding makes some of their zero variances a little negative."""
    rng = np.random.default_rng(4)
    cov = random_cov(rng, 60, 20).astype(np.float32).astype(np.float64)
    assert np.linalg.eigvalsh(cov).min() < -1e-9
    mu = np.zeros(60)
    assert abs(frechet_distance(mu, cov, mu, 4 * cov) - np.trace(cov)) < 1e-3
