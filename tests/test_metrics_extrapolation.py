"""FID-infinity: on Gaussians whose distance is known, and as a line through known points."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metrics.extrapolation import fid_infinity
from metrics.statistics import DetectorId, Statistics

DIM = 16
ID = DetectorId("toy", "ab" * 32, DIM)
VARIANCES = torch.arange(1, DIM + 1).double() ** -1


def reference() -> Statistics:
    """Moments as if of infinitely many images."""
    made = Statistics(ID, "exact")
    made.update(torch.zeros(2, DIM))
    made.n, made._moments = 10**9, (np.zeros(DIM), np.diag(VARIANCES.numpy()))
    return made


def images(count: int, seed: int, shift: float, scale: float) -> torch.Tensor:
    x = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return shift + scale * x * VARIANCES.sqrt()


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.1, 0.9)])
@pytest.mark.parametrize("count", [4 * DIM, 10 * DIM])
def test_the_bias_is_taken_off(shift: float, scale: float, count: int) -> None:
    """Mean over 100 sets: a tenth of the bias is left at most, and four standard errors."""
    truth = DIM * shift**2 + (1 - scale) ** 2 * float(VARIANCES.sum())
    made = [fid_infinity(images(count, seed, shift, scale), reference()) for seed in range(100)]
    bias = np.mean([m.fids[0] for m in made]) - truth
    left = np.array([m.fid for m in made]) - truth
    error = left.std(ddof=1) / 10
    assert bias > 20 * error / 4  # there was one
    assert abs(left.mean()) < 0.1 * bias + 4 * error


def test_the_line_goes_through_the_means_over_disjoint_subsets() -> None:
    x = images(7 * DIM + 3, 1, 0.2, 0.8)
    found = fid_infinity(x, reference(), seed=4)
    assert found.sizes == (len(x), len(x) // 2, len(x) // 3)
    order = np.random.RandomState(4).permutation(len(x))
    for count, fid in zip((1, 2, 3), found.fids, strict=True):
        parts = np.array_split(x.numpy()[order], count)
        by_hand = []
        for part in parts:
            s = Statistics(ID)
            s.update(torch.from_numpy(part))
            by_hand.append(s.fid(reference()))
        assert fid == pytest.approx(np.mean(by_hand), rel=1e-10)
    inverse = np.array([1, 2, 3]) / len(x)
    slope = np.sum((inverse - inverse.mean()) * found.fids) / np.sum(
        (inverse - inverse.mean()) ** 2
    )
    assert found.slope == pytest.approx(slope, rel=1e-9) and slope > 0
    assert found.fid == pytest.approx(np.mean(found.fids) - slope * inverse.mean(), rel=1e-9)
    assert fid_infinity(x, reference(), seed=4) == found != fid_infinity(x, reference(), seed=5)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="16 features needs 64 images"):
        fid_infinity(images(63, 0, 0, 1), reference())
