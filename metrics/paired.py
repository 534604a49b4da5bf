"""Whether two sets of images of the same seeds differ in FID, or only by chance.

FID is a smooth function of a mean and a covariance, so to first order it is a mean over images of
their influences. The standard error of a difference is then that of the mean of the differences of
influences, image by image: the infinitesimal jackknife (Jaeckel, 1972; Efron, 1982, chapter 6),
which is what a paired bootstrap comes to with ever more draws, but takes no draws. Noise that both
sets share, since they start from the same latents, cancels. The reference is taken as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg, stats
from torch import Tensor

from metrics.frechet import factor, rounding
from metrics.statistics import Statistics

LEVEL = 0.05  #: p below which two sets are told apart
LEAST = 2  #: images per feature; with fewer, covariances are too near to singular to be linearised


@dataclass(frozen=True)
class Gap:
    """By how much two sets differ."""

    difference: float  #: FID of one less FID of the other
    error: float  #: standard error of that
    p: float  #: of a difference as large by chance, two-sided


def enough(images: int, dim: int) -> bool:
    """Whether influences of this many images mean anything."""
    return images >= LEAST * dim


def influences(features: Tensor, moments: Statistics, reference: Statistics) -> np.ndarray:
    """The influence of each image on the FID of its set, (K,) float64.

    With ``T = R^(1/2) (R^(1/2) S R^(1/2))^(-1/2) R^(1/2)``, which carries the covariance S of the
    set over into R of the reference (Dowson & Landau, 1982), the FID has the gradients
    ``2 (mu - mu_R)`` and ``I - T``. So an image at x has the influence
    ``2 (mu - mu_R).(x - mu) + (x - mu).(I - T)(x - mu) - tr (I - T) S``.

    Args:
        features: (K, d), of all images of the set or of some drawn at random.
        moments: of all images.

    Raises:
        ValueError: fewer images than `enough`, or a covariance that is singular.
    """
    moments.require(reference.detector)
    dim = moments.detector.dim
    if not enough(moments.n, dim):
        raise ValueError(
            f"{moments.n} images say nothing about differences in {dim} features: take "
            f"{LEAST * dim} or more."
        )
    cov = moments.cov
    root = factor(reference.cov)
    values, vectors = linalg.eigh(root.T @ cov @ root, driver="evd", check_finite=False)
    if values.min() <= rounding(values):
        raise ValueError(
            f"the covariance of statistics '{moments.source}' is singular, so the influence of an "
            "image has no bounds: take images that differ more."
        )
    half = (root @ vectors) / values**0.25
    gradient = np.eye(dim) - half @ half.T
    x = features.double().numpy() - moments.mean
    quadratic = np.einsum("ij,ij->i", x @ gradient, x) - np.sum(gradient * cov)
    made: np.ndarray = 2 * x @ (moments.mean - reference.mean) + quadratic
    return made


def gap(
    one: tuple[float, np.ndarray], other: tuple[float, np.ndarray], images: int
) -> Gap:  # fmt: skip
    """From FID and influences of two sets of ``images`` images each, of the same seeds in order.

    The influences may be those of a part of the images, the same part of both.
    """
    difference = one[0] - other[0]
    error = float(np.std(one[1] - other[1], ddof=1) / np.sqrt(images))
    if error == 0:  # the same images
        return Gap(difference, 0.0, 1.0 if difference == 0 else 0.0)
    return Gap(difference, error, float(2 * stats.norm.sf(abs(difference) / error)))


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, so raised that any false alarm is as rare as stated.

    Holm, 1979: the k-th smallest of n times n - k + 1, and none below a smaller one's.
    """
    order = np.argsort(ps)
    raised = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    out = np.empty(len(ps))
    out[order] = np.maximum.accumulate(raised).clip(max=1)
    return [float(p) for p in out]
