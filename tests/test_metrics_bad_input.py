"""Small, equal and damaged sets of images: errors and values of every metric."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import fid
from metrics.detectors import Detector
from metrics.frechet import frechet_distance
from metrics.measures import METRICS, figures, needs_of
from metrics.statistics import DetectorId
from metrics.summary import Collector, FeatureSummary, collect
from tests.deep_images import png16
from tests.scripts import Script

DIM, SPATIAL = 3, 12
SHARES = ("precision", "recall", "density", "coverage")


def means(x: Tensor) -> Tensor:
    """Three means; twelve pixels as spatial features."""
    x = x.float() / 255
    return torch.cat([x.mean((2, 3)), x[:, :, :2, :2].flatten(1)], 1)


TOY = Detector(DetectorId("toy", "ab" * 32, DIM), means, torch.device("cpu"), spatial_dim=SPATIAL)


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def grey(count: int, level: int) -> Tensor:
    return torch.full((count, 3, 8, 8), level, dtype=torch.uint8)


def summary(x: Tensor) -> FeatureSummary:
    return collect([x], [Collector(TOY, needs_of(tuple(METRICS)), len(x))])[0]


def of(name: str, x: Tensor, y: Tensor) -> dict[str, float]:
    return figures([name], summary(x), summary(y))


TOO_FEW = {
    "fid": "2 images, got 1",
    "sfid": "2 images, got 1",
    "fid_inf": "12 images or more, got 1",
    "kid": "got 1 and 20",
    "pr": "more than 3 images .* 20 and 1",
    "dc": "more than 5 images .* 20 and 1",
}


@pytest.mark.parametrize("name", METRICS)
def test_one_image_is_too_few_for_every_metric(name: str) -> None:
    with pytest.raises(ValueError, match=TOO_FEW[name]):
        of(name, images(1), images(20))


def test_a_set_and_itself() -> None:
    """Exactly 0 for FID; unbiased estimates are slightly below 0."""
    x = images(60)
    alike, other = of("fid", x, x), of("fid", x, images(60, 1))
    assert alike["fid"] == of("sfid", x, x)["sfid"] == 0.0 < other["fid"]
    assert -0.1 < of("kid", x, x)["kid"] < 0
    values = of("pr", x, x) | of("dc", x, x)
    assert [values[key] for key in SHARES] == [1, 1, 1, 1]
    infinity = of("fid_inf", x, x)
    assert infinity["fid_inf"] < 0 < infinity["fid_inf_bias"]


def test_sets_without_any_spread() -> None:
    """All images equal: covariances of 0, balls of radius 0, kernels of two points."""
    x, y = grey(20, 51), grey(20, 204)  # 0.2 and 0.8 in every feature
    gap = 0.6**2
    assert of("fid", x, y)["fid"] == pytest.approx(DIM * gap, rel=1e-6)
    assert of("sfid", x, y)["sfid"] == pytest.approx(SPATIAL * gap, rel=1e-6)
    infinity = of("fid_inf", x, y)
    assert infinity["fid_inf"] == pytest.approx(DIM * gap, rel=1e-6)
    assert abs(infinity["fid_inf_bias"]) < 1e-9
    kernel = [(u * v + 1) ** 3 for u, v in ((0.2, 0.2), (0.8, 0.8), (0.2, 0.8))]
    assert of("kid", x, y)["kid"] == pytest.approx(kernel[0] + kernel[1] - 2 * kernel[2], rel=1e-6)
    values = of("pr", x, y) | of("dc", x, y)
    assert [values[key] for key in SHARES] == [0, 0, 0, 0]


@pytest.mark.parametrize(("name", "key"), [("fid", "fid"), ("sfid", "sfid")])
def test_singular_covariances(name: str, key: str) -> None:
    """Grey images: all features are one, so S = s 1 1', and tr sqrt(S S') = d sqrt(s s')."""
    levels = [torch.linspace(a, b, 40).round().byte() for a, b in ((10, 90), (50, 250))]
    x, y = (v.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous() for v in levels)
    (m, s), (n, t) = ((float(v.mean()), float(v.std())) for v in (u.double() / 255 for u in levels))
    dim = DIM if name == "fid" else SPATIAL
    assert abs(of(name, x, y)[key] - dim * ((m - n) ** 2 + (s - t) ** 2)) < 1e-6


def test_fewer_images_than_features_are_singular_too() -> None:
    x, y = images(9), images(9, 1)
    spatial = [means(z)[:, DIM:].double().numpy() for z in (x, y)]
    centred = [(z - z.mean(0)) / 8**0.5 for z in spatial]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shift = np.sum((spatial[0].mean(0) - spatial[1].mean(0)) ** 2)
    expected = shift + sum(np.sum(z**2) for z in centred) - 2 * root
    assert of("sfid", x, y)["sfid"] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"mu": np.full(DIM, np.nan)}, "NaN"),
        ({"sigma": np.full((DIM, DIM), np.inf)}, "NaN or infinite"),
        ({"sigma": np.eye(DIM) + np.triu(np.ones((DIM, DIM)), 1)}, "not symmetric"),
        ({"sigma": np.diag([1.0, 1.0, -1.0])}, "negative eigenvalue"),
        ({"spatial_sigma": -np.eye(SPATIAL)}, "negative eigenvalue"),
        ({"spatial_mu": np.full(SPATIAL, np.nan)}, "NaN"),
        ({"features": np.full((5, DIM), np.nan, np.float32)}, "the features in .* invalid"),
        ({"features": np.zeros((5, DIM + 1), np.float32)}, "the features in .* invalid"),
    ],
)  # fmt: skip
def test_damaged_statistics(tmp_path: Path, damage: dict[str, np.ndarray], message: str) -> None:
    path = tmp_path / "s.npz"
    summary(images(20)).save(path)
    with np.load(path) as content:
        damaged = {**content, **damage, "source_sha256": "00" * 32}
    np.savez(path, **damaged)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        figures(("fid", "sfid"), summary(images(20, 1)), FeatureSummary.load(path, TOY))


# --- the command line


def save(folder: Path, x: Tensor, mode: str = "RGB") -> Path:
    folder.mkdir()
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).convert(mode).save(folder / f"{i}.png")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def mixed_sizes(folder: Path) -> Path:
    Image.new("RGB", (9, 8)).save(save(folder, images(20)) / "x.png")
    return folder


def mixed_channels(folder: Path) -> Path:
    Image.new("RGBA", (8, 8)).save(save(folder, images(20)) / "x.png")
    return folder


def deep(folder: Path) -> Path:
    (save(folder, images(20)) / "x.png").write_bytes(png16(3, 2, 8))
    return folder


def torn(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    save(folder, images(20))
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            content = file.read_bytes()
            archive.writestr(file.name, content[:100] if file.name == "7.png" else content)
    return path


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (empty, "no image"),
    (lambda folder: save(folder, images(1)), "1 image"),
    (mixed_sizes, "x.png .* 9x8, the first is 8x8"),
    (mixed_channels, "x.png .* mode RGBA"),
    (lambda folder: save(folder, images(20), "L"), "0.png .* grayscale"),
    (deep, "x.png .* more than 8 bits"),
    (torn, "7.png in .*.zip cannot be read"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_images_are_one_sentence_for_all_metrics(
    make: Callable[[Path], Path], message: str, tmp_path: Path, script: Script
) -> None:
    """And nothing is written: no figures, no statistics, no trace of a pass in the cache."""
    given = make(tmp_path / "images")
    cache, result, stats = tmp_path / "cache", tmp_path / "r.json", tmp_path / "s.npz"
    fixed = ["--detector", "pixels", "--metrics", "fid,fid_inf,kid,pr,dc", "--batch", "4"]
    fixed += ["--device", "cpu", "--cache-dir", str(cache)]
    reference = tmp_path / "ref.npz"

    def run(*arguments: object) -> tuple[object, str]:
        done = script(fid.main, *arguments, *fixed)
        return done.code, done.err

    good = save(tmp_path / "good", images(20, 1))
    assert run("ref", "--data", good, "--dest", reference)[0] == 0
    for arguments in (
        ["calc", "--images", given, "--ref", reference, "--json", result],
        ["ref", "--data", given, "--dest", stats],
    ):
        code, err = run(*arguments)
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 1 and len(said) == 1 and "Traceback" not in err
        assert re.search(message, said[0]), said
        assert not result.exists() and not stats.exists()
        assert not [path for path in cache.rglob("*") if path.is_file()]


def test_two_equal_folders_are_at_exactly_0(tmp_path: Path, script: Script) -> None:
    """Under other names of the folder and in other batches; a changed grey level is seen."""
    x = images(30)
    changed = x.clone()
    changed[3, 0, 0, 0] ^= 1
    folders = [save(tmp_path / n, z) for n, z in (("a", x), ("b", x), ("c", changed))]
    found: list[str] = []
    for path, arguments in zip(
        folders,
        (["ref", "--data", "--dest"], *[["calc", "--images", "--ref"]] * 2),
        strict=True,
    ):
        words = [arguments[0], arguments[1], path, arguments[2], tmp_path / "s.npz"]
        words += ["--batch", 30 if found == [] else 7, "--detector", "pixels", "--device", "cpu"]
        done = script(fid.main, *words)
        assert done.code == 0
        found.append(done.out.split()[1])
    assert float(found[1]) == 0.0 and 0 < float(found[2]) < 1e-6


def test_the_frechet_distance_of_equal_sums_is_exactly_0() -> None:
    """Without a hash to know them by."""
    x = summary(images(20)).moments
    assert frechet_distance(x.mean, x.cov, x.mean.copy(), x.cov.copy()) == 0.0
