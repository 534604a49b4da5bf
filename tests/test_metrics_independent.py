"""All figures of a file of statistics, computed a second time by others' means.

Nothing of `metrics` computes here: NumPy's moments and SciPy's square root of the product, kernels
by SciPy's distances, and k-d trees for the neighbours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from scipy.spatial import cKDTree

from metrics.detectors import Detector
from metrics.measures import METRICS, figures, needs_of
from metrics.statistics import DetectorId
from metrics.summary import Collector, FeatureSummary, collect

DIM, SPATIAL = 10, 7
Found = dict[str, float]


def random_features(x: torch.Tensor) -> torch.Tensor:
    """Pixels through fixed random layers: full covariances, far from Gaussian."""
    generator = torch.Generator().manual_seed(0)
    flat = x.float().flatten(1) / 255
    first = torch.randn(flat.shape[1], 30, generator=generator) / flat.shape[1] ** 0.5
    return torch.relu(flat @ first) @ torch.randn(30, DIM + SPATIAL, generator=generator)


DETECTOR = Detector(DetectorId("random", "ab" * 32, DIM), random_features, torch.device("cpu"),
                    spatial_dim=SPATIAL)  # fmt: skip


def images(count: int, seed: int, light: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator) * torch.rand(
        count, 1, 1, 1, generator=generator
    )
    return (255 * light * x).to(torch.uint8)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(linalg.sqrtm(a @ b))
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * root))


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al., 2012, as a U-statistic: the mean over pairs of different images."""
    z = np.concatenate([x, y])
    kernel = (np.einsum("id,jd->ij", z, z) / DIM + 1) ** 3
    one, two = np.triu_indices(len(x), 1), np.triu_indices(len(y), 1)
    n = len(x)
    cross = kernel[:n, n:].mean()
    return float(kernel[:n, :n][one].mean() + kernel[n:, n:][two].mean() - 2 * cross)


def neighbours(real: np.ndarray, fake: np.ndarray) -> Found:
    def radii(x: np.ndarray, k: int) -> np.ndarray:
        return cKDTree(x).query(x, k + 1)[0][:, k]  # the nearest is itself

    r3, f3, r5 = radii(real, 3), radii(fake, 3), radii(real, 5)
    fakes = cKDTree(fake)
    held = [len(fakes.query_ball_point(c, r)) for c, r in zip(real, r5, strict=True)]
    within = {j for c, r in zip(real, r3, strict=True) for j in fakes.query_ball_point(c, r)}
    reals = cKDTree(real)
    back = {j for c, r in zip(fake, f3, strict=True) for j in reals.query_ball_point(c, r)}
    return {
        "precision": len(within) / len(fake), "recall": len(back) / len(real),
        "density": sum(held) / (5 * len(fake)),
        "coverage": float(np.mean(fakes.query(real)[0] < r5)),
    }  # fmt: skip


@pytest.mark.parametrize(("count", "light"), [(120, 1.0), (120, 0.8), (97, 0.3)])
def test_every_figure_a_second_time(tmp_path: Path, count: int, light: float) -> None:
    sets = [images(120, 1, 1.0), images(count, 2, light)]
    needs = needs_of(tuple(METRICS))
    for i, x in enumerate(sets):
        made = collect(x.split(50), [Collector(DETECTOR, needs, len(x))])[0]
        made.save(tmp_path / f"{i}.npz")
    real, fake = (FeatureSummary.load(tmp_path / f"{i}.npz", DETECTOR) for i in range(2))
    found = figures(tuple(METRICS), fake, real)

    both = [random_features(x).double().numpy() for x in sets]
    (r, rs), (f, fs) = ((x[:, :DIM], x[:, DIM:]) for x in both)
    assert found["fid"] == pytest.approx(frechet(f, r), rel=1e-6)
    assert found["sfid"] == pytest.approx(frechet(fs, rs), rel=1e-6)
    shares = neighbours(r, f)
    assert {key: found[key] for key in shares} == pytest.approx(shares, abs=1e-12)
    if count == len(r):  # one subset: all images
        assert found["kid"] == pytest.approx(kid(f, r), rel=1e-9, abs=1e-9)
    order = np.random.RandomState(0).permutation(count)
    fids = [np.mean([frechet(part, r) for part in np.array_split(f[order], cuts)])
            for cuts in range(1, count // (2 * DIM) + 1)][:5]  # fmt: skip
    line = np.polynomial.Polynomial.fit(np.arange(1, len(fids) + 1) / count, fids, 1)
    assert found["fid_inf"] == pytest.approx(float(line(0.0)), rel=1e-6, abs=1e-6)
