"""Significance of a difference in FID between two sets of images with the same seeds.

FID is a smooth function of a mean and a covariance, so to first order it is the mean of the
influences of the images. The standard error of a difference is then that of the mean difference of
the influences of corresponding images: the infinitesimal jackknife (Jaeckel, 1972; Efron, 1982,
chapter 6), to which a paired bootstrap converges as the number of draws grows. Noise common to both
sets, which start from the same latents, cancels. The reference is treated as fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg, stats
from torch import Tensor

from metrics.frechet import factor, rounding
from metrics.statistics import Statistics

LEVEL = 0.05  #: significance level
LEAST = 2  #: images per feature; with fewer, covariances are too close to singular to linearise


@dataclass(frozen=True)
class Gap:
    """The difference in FID between two sets."""

    difference: float  #: FID of the first set minus FID of the second
    error: float  #: standard error of the difference
    p: float  #: two-sided p-value of the difference


def enough(images: int, dim: int) -> bool:
    """Whether there are enough images for meaningful influences."""
    return images >= LEAST * dim


def influences(features: Tensor, moments: Statistics, reference: Statistics) -> np.ndarray:
    """The influence of each image on the FID of its set, (K,) float64.

    With ``T = R^(1/2) (R^(1/2) S R^(1/2))^(-1/2) R^(1/2)``, the optimal transport map from the
    covariance S of the set to R of the reference (Dowson & Landau, 1982), the FID has the gradients
    ``2 (mu - mu_R)`` and ``I - T``. So an image at x has the influence
    ``2 (mu - mu_R).(x - mu) + (x - mu).(I - T)(x - mu) - tr (I - T) S``.

    Args:
        features: (K, d), of all images of the set or of a random subset.
        moments: statistics of all images.

    Raises:
        ValueError: too few images (see `enough`), or a singular covariance.
    """
    moments.require(reference.detector)
    dim = moments.detector.dim
    if not enough(moments.n, dim):
        raise ValueError(
            f"{moments.n} images are too few for differences in {dim} features: use "
            f"{LEAST * dim} or more."
        )
    cov = moments.cov
    root = factor(reference.cov)
    values, vectors = linalg.eigh(root.T @ cov @ root, driver="evd", check_finite=False)
    if values.min() <= rounding(values):
        raise ValueError(
            f"the covariance of statistics '{moments.source}' is singular, so influences are not "
            "defined: use more, different images."
        )
    half = (root @ vectors) / values**0.25
    gradient = np.eye(dim) - half @ half.T
    x = features.double().numpy() - moments.mean
    quadratic = np.einsum("ij,ij->i", x @ gradient, x) - np.sum(gradient * cov)
    result: np.ndarray = 2 * x @ (moments.mean - reference.mean) + quadratic
    return result


def gap(
    one: tuple[float, np.ndarray], other: tuple[float, np.ndarray], images: int
) -> Gap:  # fmt: skip
    """The difference of two sets of ``images`` images each, given as (FID, influences).

    The influences are in the order of the seeds. They may be those of a subset of the images,
    the same for both sets.
    """
    difference = one[0] - other[0]
    error = float(np.std(one[1] - other[1], ddof=1) / np.sqrt(images))
    if error == 0:  # the same images
        return Gap(difference, 0.0, 1.0 if difference == 0 else 0.0)
    return Gap(difference, error, float(2 * stats.norm.sf(abs(difference) / error)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values of several comparisons, which control the family-wise error rate.

    Holm, 1979: the k-th smallest of n is multiplied by n - k + 1; results keep their order.
    """
    order = np.argsort(ps)
    scaled = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1)
    return [float(p) for p in adjusted]
