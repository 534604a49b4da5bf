"""Streaming statistics: parts equal the whole, files come back, strangers are refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metrics.fid import block_fid
from metrics.frechet import frechet_distance
from metrics.statistics import DetectorId, Statistics

ID = DetectorId("toy", "ab" * 32, 5)


def features(count: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, ID.dim, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1, ID.dim + 1) + 3


def statistics(x: torch.Tensor, detector: DetectorId = ID) -> Statistics:
    stats = Statistics(detector, "toy")
    stats.update(x)
    return stats


@given(cuts=st.lists(st.integers(0, 40), max_size=4))
def test_batches_and_merged_parts_equal_the_whole(cuts: list[int]) -> None:
    x = features(40)
    edges = sorted({0, *cuts, 40})
    parts = [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    streamed = Statistics(ID)
    for part in parts:
        streamed.update(part)
    merged = statistics(parts[0]).merge(*map(statistics, parts[1:]))
    for stats in (streamed, merged):
        assert stats.n == 40
        np.testing.assert_allclose(stats.mean, x.double().mean(0), atol=1e-10)
        np.testing.assert_allclose(stats.cov, np.cov(x.double().T.numpy()), atol=1e-10)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_gaussians_of_known_moments(full: bool) -> None:
    """Features with exactly these means and covariances, through the sums: FID in closed form."""
    rng = np.random.default_rng(7)
    a, b = rng.exponential(size=(2, ID.dim)) + 0.1
    turn = np.linalg.qr(rng.standard_normal((ID.dim, ID.dim)))[0] if full else np.eye(ID.dim)
    means = rng.standard_normal((2, ID.dim))

    def exact(count: int, mean: np.ndarray, variances: np.ndarray) -> torch.Tensor:
        x = rng.standard_normal((count, ID.dim))
        white = np.linalg.qr(x - x.mean(0))[0] * (count - 1) ** 0.5
        return torch.from_numpy(mean + white * variances**0.5 @ turn.T)

    one, two = statistics(exact(60, means[0], a)), statistics(exact(90, means[1], b))
    np.testing.assert_allclose(one.cov, turn * a @ turn.T, atol=1e-12)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((a**0.5 - b**0.5) ** 2)
    assert abs(one.fid(two) - expected) < 1e-8
    parts = [statistics(x) for x in exact(60, means[0], a).split(13)]
    assert abs(parts[0].merge(*parts[1:]).fid(two) - expected) < 1e-8


def test_sums_are_float64() -> None:
    """A float32 sum of these squares would lose the covariance altogether."""
    x = features(50).double() / 100 + 1000
    stats = statistics(x)
    np.testing.assert_allclose(stats.cov, np.cov(x.T.numpy()), atol=1e-7)


def test_merging_leaves_the_parts_alone() -> None:
    one, two = statistics(features(4)), statistics(features(4, 1))
    before = one.mean.copy()
    one.merge(two)
    assert one.n == 4 and np.array_equal(one.mean, before)


def test_blocks() -> None:
    blocks = [statistics(features(30, seed)) for seed in range(3)]
    reference = statistics(features(500, 9))
    result = block_fid(blocks, reference)
    x = torch.cat([features(30, seed) for seed in range(3)]).double().numpy()
    whole = frechet_distance(x.mean(0), np.cov(x.T), reference.mean, reference.cov)
    each = [frechet_distance(b.mean, b.cov, reference.mean, reference.cov) for b in blocks]
    assert result.n == 90
    assert result.fid == pytest.approx(whole, abs=1e-10)
    np.testing.assert_allclose(result.blocks, each, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(each))
    assert result.spread == pytest.approx(np.std(each, ddof=1))
    assert block_fid(blocks[:1], reference).spread == 0.0
    with pytest.raises(ValueError, match="at least one block"):
        block_fid([], reference)


def test_saved_statistics_come_back(tmp_path: Path) -> None:
    stats = statistics(features(40))
    stats.save(tmp_path / "s.npz")
    again = Statistics.load(tmp_path / "s.npz")
    assert (again.detector, again.n, again.source) == (ID, 40, "toy")
    np.testing.assert_allclose(again.mean, stats.mean, rtol=1e-12)
    np.testing.assert_allclose(again.cov, stats.cov, rtol=1e-12, atol=1e-12)
    assert stats.fid(again) < 1e-10
    merged, whole = again.merge(statistics(features(9, 1))), stats.merge(statistics(features(9, 1)))
    np.testing.assert_allclose(merged.cov, whole.cov, atol=1e-10)


@pytest.mark.parametrize(
    "other",
    [DetectorId("toy", "cd" * 32, 5), DetectorId("other", "ab" * 32, 5)],
    ids=["weights", "name"],
)
def test_another_detector_is_refused(other: DetectorId) -> None:
    one, two = statistics(features(9)), statistics(features(9), other)
    for mix in (lambda: one.merge(two), lambda: one.fid(two), lambda: block_fid([one], two)):
        with pytest.raises(ValueError, match="made with detector"):
            mix()


def test_the_same_images_are_at_no_distance_however_they_were_summed(tmp_path: Path) -> None:
    one, two = statistics(features(40)), Statistics(ID, "elsewhere")
    for part in features(40).split(7):
        two.update(part * (1 + 1e-4))  # far coarser than any rounding
    assert one.fid(two) > 0
    one.source_sha256 = two.source_sha256 = "ef" * 32
    one.save(tmp_path / "s.npz")
    assert one.fid(two) == Statistics.load(tmp_path / "s.npz").fid(two) == 0.0
    two.update(features(3, 1))  # no longer those images
    assert two.source_sha256 == "" and one.fid(two) > 1e-3
    assert one.merge(statistics(features(3, 1))).source_sha256 == ""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mu, cov: (mu, -cov), "negative eigenvalue"),
        (lambda mu, cov: (mu + 0.1, cov), "same images .* but their FID is 0.05"),
        (lambda mu, cov: (mu, cov * 1.1), "same images .* one of them is damaged"),
    ],
    ids=["negated", "moved", "scaled"],
)
def test_an_equal_hash_is_a_check_and_not_a_result(
    damage: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], message: str
) -> None:
    stats = statistics(features(40))
    stats.source_sha256 = "ef" * 32
    content = {name: np.asarray(value) for name, value in stats.arrays().items()}
    content["mu"], content["sigma"] = damage(stats.mean, stats.cov)
    damaged = Statistics.of_arrays("s.npz", content)
    for one, other in ((stats, damaged), (damaged, stats)):
        with pytest.raises(ValueError, match=message):
            one.fid(other)


def test_features_that_make_no_sense_are_refused() -> None:
    stats = Statistics(ID)
    with pytest.raises(ValueError, match=r"features of shape \(2, 4\)"):
        stats.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="NaN or infinite features"):
        stats.update(torch.full((2, 5), torch.nan))
    stats.update(features(1))
    for name in ("mean", "cov"):
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            getattr(stats, name)


GOOD = {
    "mu": np.zeros(5), "sigma": np.eye(5), "detector": "toy", "detector_sha256": "ab", "n": 9,
    "source": "x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None, "detector": None}, "lack detector, n"),
        ({"mu": np.zeros(4)}, r"mu of shape \(4,\), sigma of shape \(5, 5\)"),
        ({"n": 1}, "n = 1"),
        ({"sigma": np.full((5, 5), np.inf)}, "NaN or infinite"),
        ({"mu": np.array(["a"] * 5)}, "are not numbers"),
        ({"mu": np.array([{}] * 5, dtype=object)}, "not an .npz of plain arrays"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    content = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(tmp_path / "s.npz", **content)
    with pytest.raises(ValueError, match=message):
        Statistics.load(tmp_path / "s.npz")


def test_hostile_and_broken_files(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "h.npz", **(GOOD | {"source": np.array(Hostile(), dtype=object)}))
    (tmp_path / "text.npz").write_text("not a zip")
    buffer = io.BytesIO()
    np.savez(buffer, **GOOD)
    (tmp_path / "torn.npz").write_bytes(buffer.getvalue()[:300])
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("h", "text", "torn", "single"):
        with pytest.raises(ValueError, match="not an .npz of plain arrays"):
            Statistics.load(tmp_path / f"{name}.npz")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="do not exist"):
        Statistics.load(tmp_path / "none.npz")


def test_published_moments_are_adopted_once_declared(tmp_path: Path) -> None:
    path = tmp_path / "published.npz"
    np.savez(path, mu=np.arange(5.0), sigma=2 * np.eye(5))
    stats = Statistics.adopt(path, ID, 50_000)
    assert (stats.n, stats.detector) == (50_000, ID)
    np.testing.assert_allclose(stats.mean, np.arange(5.0), atol=1e-10)
    np.testing.assert_allclose(stats.cov, 2 * np.eye(5), atol=1e-10)
    with pytest.raises(ValueError, match="not with"):
        Statistics.adopt(path, DetectorId("wide", "ab", 7), 50_000)
    stats.save(path)
    with pytest.raises(ValueError, match="already have a detector"):
        Statistics.adopt(path, ID, 50_000)
