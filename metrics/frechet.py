"""The Frechet distance between two Gaussians (Dowson & Landau, 1982; FID: Heusel et al., 2017)."""

from __future__ import annotations

import numpy as np
from scipy import linalg


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2) - 2 tr sqrt(S1 S2), in float64.

    S1 S2 is not symmetric, but it has the eigenvalues of A S2 A with A = S1^(1/2), which is; the
    trace of its root is the sum of their roots. Covariances may be singular.

    Args:
        mu1, mu2: means (d,). cov1, cov2: symmetric positive semi-definite covariances (d, d).

    Raises:
        ValueError: shapes do not fit, or an entry is not finite, or a covariance is not symmetric.
    """
    (mu1, cov1), (mu2, cov2) = _checked(mu1, cov1, "first"), _checked(mu2, cov2, "second")
    if mu1.shape != mu2.shape:
        raise ValueError(
            f"the first statistics have {len(mu1)} features, the second {len(mu2)}: "
            "compute both with one detector."
        )
    if np.array_equal(mu1, mu2) and np.array_equal(cov1, cov2):
        return 0.0
    values, vectors = linalg.eigh(cov1, driver="evd", check_finite=False)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ cov2 @ root
    squares = linalg.eigvalsh((product + product.T) / 2, check_finite=False)
    trace = np.sqrt(squares.clip(min=0)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace)


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
    if not np.allclose(cov, cov.T, rtol=1e-8, atol=1e-10 * max(1.0, np.abs(cov).max(initial=0))):
        raise ValueError(
            f"the {which} covariance is not symmetric: pass the covariance of the features."
        )
    return mu, cov
