"""The Frechet distance between two Gaussians (Dowson & Landau, 1982; FID: Heusel et al., 2017)."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import blas

NEGATIVE = 1e-4  #: tolerance for negative eigenvalues relative to the largest, for float32 files


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2) - 2 tr sqrt(S1 S2), in float64.

    S1 S2 is not symmetric, but it has the eigenvalues of the symmetric A S2 A with A = S1^(1/2);
    the trace of its root is the sum of their roots. Covariances may be singular. Equal arguments
    give exactly 0.

    Args:
        mu1, mu2: means (d,). cov1, cov2: symmetric positive semi-definite covariances (d, d).

    Raises:
        ValueError: shapes do not fit, or an entry is not finite, or a covariance is not symmetric
            or has a negative variance in some direction.
    """
    (mu1, cov1), (mu2, cov2) = _checked(mu1, cov1, "first"), _checked(mu2, cov2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"the first statistics have {len(mu1)} features, the second {len(mu2)}: "
            "compute both with one detector."
        )
    if np.array_equal(mu1, mu2) and np.array_equal(cov1, cov2):
        return 0.0
    trace = np.sqrt(_eigenvalues_of_product(cov1, cov2).clip(min=0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace
    return max(0.0, float(distance))


def _eigenvalues_of_product(cov1: np.ndarray, cov2: np.ndarray) -> np.ndarray:
    """Eigenvalues of S1 S2, up to zeros."""
    root = factor(cov1)
    values = _eigenvalues(_between(root, cov2))
    _no_negative(values)
    if values.min(initial=np.inf) < rounding(values):
        # Zero eigenvalues are computed as rounding errors, whose roots are not small. If S2 is the
        # singular covariance, its factor has fewer columns, without these eigenvalues.
        other = factor(cov2)
        if other.shape[1] < root.shape[1]:
            return _eigenvalues(_between(other, cov1))
    return values


def _between(root: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """R' S R, at half the cost if R is a Cholesky factor, of which half the entries are zero."""
    if linalg.bandwidth(root)[1] == 0 and len(root) == root.shape[1]:
        # S' = S is already in the order of columns that BLAS works in
        right = blas.dtrmm(1.0, root, cov.T, side=1, lower=1)
        return np.asarray(blas.dtrmm(1.0, root, right, lower=1, trans_a=1, overwrite_b=1))
    return np.asarray(root.T @ cov @ root)


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix, by PyTorch, whose library is nearly twice as fast as SciPy's here."""
    return torch.linalg.eigvalsh(torch.from_numpy(matrix)).numpy()


def factor(cov: np.ndarray) -> np.ndarray:
    """A matrix R (d, r) with R R' = cov, without directions whose variance is a rounding error.

    R' S R has the non-zero eigenvalues of A S A, A = cov^(1/2), since R = A U with U' U = 1. A
    Cholesky factor is such an R at a tenth of the cost of ``eigh``. It cannot be used for a
    singular covariance, because the root of a zero variance would be that of a rounding error.
    """
    with contextlib.suppress(linalg.LinAlgError):
        lower = linalg.cholesky(cov, lower=True, check_finite=False)
        variances = lower.diagonal() ** 2  # of each feature given those before it
        if variances.min(initial=np.inf) > 1e3 * rounding(cov.diagonal()):
            return lower
    values, vectors = linalg.eigh(cov, driver="evd", check_finite=False)
    _no_negative(values)
    kept = values > rounding(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _no_negative(values: np.ndarray) -> None:
    """Raise ValueError for negative eigenvalues beyond the rounding errors of float32 files."""
    if values.min(initial=0) < -NEGATIVE * np.abs(values).max(initial=0):
        raise ValueError(
            f"a covariance has a negative eigenvalue ({values.min():.3g}, the largest is "
            f"{values.max():.3g}): make the statistics again."
        )


def rounding(values: np.ndarray) -> float:
    """Eigenvalues below this cannot be distinguished from zero in float64."""
    return len(values) * np.finfo(np.float64).eps * values.max(initial=0)


def _checked(mu: np.ndarray, cov: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    mu, cov = np.asarray(mu, np.float64), np.asarray(cov, np.float64)
    if mu.ndim != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(
            f"the {which} statistics have a mean of shape {mu.shape} and a covariance of shape "
            f"{cov.shape}: expected (d,) and (d, d)."
        )
    if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
        raise ValueError(
            f"the {which} statistics hold NaN or infinite values: compute them again from "
            "finite features."
        )
    scale = np.abs(cov).max(initial=0)
    if not linalg.issymmetric(cov) and np.abs(cov - cov.T).max(initial=0) > 1e-8 * scale:
        raise ValueError(
            f"the {which} covariance is not symmetric: pass the covariance of the features."
        )
    return mu, cov
