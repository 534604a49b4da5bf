"""Influences of images on FID: against derivatives, a real bootstrap, and repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from metrics.frechet import frechet_distance
from metrics.paired import Gap, enough, gap, holm, influences
from metrics.statistics import DetectorId, Statistics

DIM = 8
ID = DetectorId("toy", "ab" * 32, DIM)
SCALES = torch.arange(1, DIM + 1).double() ** -0.5


def statistics(x: torch.Tensor) -> Statistics:
    made = Statistics(ID, "toy")
    made.update(x)
    return made


REFERENCE = statistics(
    torch.randn(5000, DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * SCALES
)


def pair(
    count: int, seed: int, one: tuple[float, float], other: tuple[float, float], shared: float = 0.9
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of Gaussians, (shift, scale) each, that share much of their noise."""
    generator = torch.Generator().manual_seed(seed)
    z, a, b = torch.randn(3, count, DIM, generator=generator, dtype=torch.float64)
    own = (1 - shared**2) ** 0.5
    x, y = (shared * z + own * w for w in (a, b))
    return one[0] + one[1] * x * SCALES, other[0] + other[1] * y * SCALES


def measured(x: torch.Tensor) -> tuple[float, np.ndarray]:
    made = statistics(x)
    return made.fid(REFERENCE), influences(x, made, REFERENCE)


def weighted_fid(x: np.ndarray, weights: np.ndarray) -> float:
    mean = weights @ x
    cov = (x - mean).T @ ((x - mean) * weights[:, None])
    return frechet_distance(mean, cov, REFERENCE.mean, REFERENCE.cov)


def test_an_influence_is_the_derivative_in_the_weight_of_an_image() -> None:
    x = pair(400, 1, (0.3, 0.8), (0, 1))[0]
    found = influences(x, statistics(x), REFERENCE)
    weights, step = np.full(len(x), 1 / len(x)), 1e-6
    for i in (0, 7, int(np.argmax(np.abs(found)))):
        towards = -weights.copy()
        towards[i] += 1
        ends = [weighted_fid(x.numpy(), weights + s * towards) for s in (step, -step)]
        # weights of 1 / N make the covariance of 1 / N, the statistics have that of 1 / (N - 1)
        assert found[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=2e-3)
    assert abs(found.mean()) < 2e-2 * found.std()


def test_influences_of_a_known_transport() -> None:
    """Diagonal: T = sqrt(r / s), so the influence is a polynomial of the image by hand."""
    x = pair(300, 2, (0.5, 1.3), (0, 1))[0]
    x = torch.linalg.qr(x - x.mean(0)).Q * (len(x) - 1) ** 0.5  # covariance I, mean 0
    r, nu = np.arange(1, DIM + 1.0), np.linspace(-1, 1, DIM)
    reference = statistics(torch.randn(9, DIM))
    reference.n, reference._moments = 10**6, (nu, np.diag(r))
    g = 1 - np.sqrt(r)
    by_hand = -2 * x.numpy() @ nu + (x.numpy() ** 2 - 1) @ g
    np.testing.assert_allclose(influences(x, statistics(x), reference), by_hand, atol=1e-9)


def test_the_error_is_that_of_a_paired_bootstrap() -> None:
    x, y = pair(400, 3, (0.2, 0.8), (0.25, 0.9))
    found = gap(measured(x), measured(y), len(x))
    rng, draws = np.random.default_rng(0), []
    for _ in range(400):
        rows = torch.from_numpy(rng.integers(len(x), size=len(x)))
        draws.append(statistics(x[rows]).fid(REFERENCE) - statistics(y[rows]).fid(REFERENCE))
    assert found.error == pytest.approx(np.std(draws, ddof=1), rel=0.12)  # of 400 draws: 3.5 %
    assert abs(found.difference - (measured(x)[0] - measured(y)[0])) < 1e-12


@pytest.mark.parametrize(
    ("setting", "low", "high"),
    [((0.3, 0.8), 0.01, 0.10), ((0.0, 1.0), 0.0, 0.05)],
    ids=["far", "at the floor, where FID is all bias"],
)
def test_equal_rows_are_told_apart_as_rarely_as_stated(
    setting: tuple[float, float], low: float, high: float
) -> None:
    """At most 5 % of 300 experiments, in which both rows have one distribution; 1.3 % of error."""
    ps = []
    for seed in range(300):
        x, y = pair(64, seed, setting, setting)
        ps.append(gap(measured(x), measured(y), 64).p)
    assert low <= np.mean(np.array(ps) < 0.05) <= high


def test_pairing_finds_what_blocks_and_unpaired_images_do_not() -> None:
    """Rows that share 97 % of their noise: a difference of 4 standard errors; by blocks, p of 4."""
    x, y = pair(800, 5, (0.2, 0.8), (0.22, 0.8), shared=0.97)
    one, other = measured(x), measured(y)
    paired = gap(one, other, 800)
    unpaired = np.hypot(*(np.std(v, ddof=1) / 800**0.5 for _, v in (one, other)))
    assert paired.p < 1e-3 and paired.error < 0.5 * unpaired
    blocks = [
        [statistics(b).fid(REFERENCE) for b in z.split(200)] for z in (x, y)
    ]  # fmt: skip
    t = distributions.ttest_rel(*blocks)
    assert t.pvalue > 10 * paired.p


def test_a_part_of_the_images_gives_the_error_of_all() -> None:
    x, y = pair(6000, 6, (0.2, 0.8), (0.3, 0.8))

    def difference(every: int) -> Gap:
        one, other = (
            (s.fid(REFERENCE), influences(z[::every], s, REFERENCE))
            for z, s in ((x, statistics(x)), (y, statistics(y)))
        )
        return gap(one, other, 6000)

    whole, part = difference(1), difference(4)
    assert part.error == pytest.approx(whole.error, rel=0.1)
    assert part.difference == whole.difference


def test_a_row_and_itself_are_one() -> None:
    x = pair(100, 7, (0.2, 0.8), (0, 1))[0]
    assert gap(measured(x), measured(x.clone()), 100) == Gap(0.0, 0.0, 1.0)


def test_corrected_ps_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_too_few_or_too_equal_images_are_refused() -> None:
    x = pair(2 * DIM - 1, 8, (0, 1), (0, 1))[0]
    assert not enough(len(x), DIM) and enough(len(x) + 1, DIM)
    with pytest.raises(ValueError, match="15 images are too few .* 8 features"):
        influences(x, statistics(x), REFERENCE)
    flat = pair(99, 8, (0, 1), (0, 1))[0]
    flat[:, 1] = flat[:, 0]
    with pytest.raises(ValueError, match="'toy' is singular"):
        influences(flat, statistics(flat), REFERENCE)
    strange = Statistics(DetectorId("other", "cd" * 32, DIM))
    strange.update(flat)
    with pytest.raises(ValueError, match="compute both with one detector"):
        influences(flat, strange, REFERENCE)
