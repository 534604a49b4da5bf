"""One pass for all metrics: what is kept, what comes back from a file, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import fid
from metrics.detectors import Detector, load_detector
from metrics.draws import choose
from metrics.extrapolation import fid_infinity
from metrics.frechet import frechet_distance
from metrics.kid import kid
from metrics.manifolds import density_coverage, precision_recall
from metrics.measures import METRICS, figures, needs_of, parse_metrics, reference_needs, require
from metrics.statistics import Statistics
from metrics.summary import Collector, FeatureSummary, Requirements, collect
from runtime import cli
from tests.processes import run_command, together
from tests.toy_detector import images, toy

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
ALL = tuple(METRICS)


def summary(
    x: Tensor, needs: Requirements, batch: int = 100, detector: Detector | None = None
) -> FeatureSummary:
    return collect(x.split(batch), [Collector(detector or toy(), needs, len(x), 0, "toy")])[0]


def test_features_of_the_drawn_images_are_kept_in_any_batches() -> None:
    x, needs = images(50), Requirements(20, spatial=True)
    whole = summary(x, needs)
    assert whole.features is not None and whole.kept == 20 and whole.moments.n == 50
    assert torch.equal(whole.features, toy()(x)[torch.from_numpy(choose(50, 20, 0))])
    for batch in (1, 7, 49):
        again = summary(x, needs, batch)
        assert torch.equal(again.features, whole.features)
        np.testing.assert_allclose(again.spatial.cov, whole.spatial.cov, atol=1e-12)
    assert summary(x, Requirements(1000)).kept == 50  # never more than there are
    assert (
        summary(x, Requirements()).features is None and summary(x, Requirements()).spatial is None
    )


def test_the_ranks_together_keep_what_one_keeps() -> None:
    """Rows are zero on all ranks but one: their sum is the whole."""
    x, parts = images(31), []
    for rank in range(3):
        collector = Collector(toy(), Requirements(12), 31, 5)
        parts.append(collect(x[rank::3].split(4), [collector], (rank, 3))[0])
    one = collect([x], [Collector(toy(), Requirements(12), 31, 5)])[0]
    assert torch.equal(parts[0].features + parts[1].features + parts[2].features, one.features)
    assert len({p.moments.source_sha256 for p in parts}) == 3  # without a group each has its part
    merged = parts[0].moments.merge(parts[1].moments, parts[2].moments)
    np.testing.assert_allclose(merged.cov, one.moments.cov, atol=1e-12)


def test_the_hash_is_that_of_the_images_in_order() -> None:
    x = images(9)
    whole = summary(x, Requirements(), 4).moments.source_sha256
    assert summary(x, Requirements(), 9).moments.source_sha256 == whole
    for others in (x.flip(0), x[:8], x.transpose(2, 3).contiguous(), x.bitwise_xor(1)):
        assert summary(others, Requirements()).moments.source_sha256 != whole
    square = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    flat = summary(square.view(2, 3, 4, 16), Requirements()).moments.source_sha256
    assert summary(square, Requirements()).moments.source_sha256 != flat


def test_a_pass_that_goes_on_knows_all_its_images() -> None:
    x, needs = images(20), Requirements(8, spatial=True)
    first = Collector(toy(), needs, 20)
    first.update(x[:12], range(12))
    second = Collector(toy(), needs, 20)
    second.restore(first.state())
    made = collect([x[12:]], [second], start=12)[0]
    assert made.moments.source_sha256 == summary(x, needs).moments.source_sha256
    assert made.spatial.source_sha256 == made.moments.source_sha256


def test_every_figure_is_that_of_its_features() -> None:
    x, y, detector = images(60), images(40, 1) // 2, toy()
    needs = needs_of(ALL)
    found = figures(ALL, summary(x, needs), summary(y, needs), seed=3)
    (a, p), (b, q) = detector.both(x), detector.both(y)
    for key, one, two in (("fid", a, b), ("sfid", p, q)):
        u, v = one.double().numpy(), two.double().numpy()
        expected = frechet_distance(u.mean(0), np.cov(u.T), v.mean(0), np.cov(v.T))
        assert found[key] == pytest.approx(expected, rel=1e-8)
    assert found["kid"] == pytest.approx(kid(a, b, seed=3).mean, rel=1e-12)
    infinity = fid_infinity(a, summary(y, needs).moments, seed=3)
    assert found["fid_inf"] == infinity.fid
    assert found["fid"] - found["fid_inf"] == pytest.approx(found["fid_inf_bias"], abs=1e-8)
    assert (found["precision"], found["recall"]) == precision_recall(b, a)
    assert (found["density"], found["coverage"]) == density_coverage(b, a)


def test_a_set_and_itself_through_a_file(tmp_path: Path) -> None:
    made = summary(images(40), needs_of(ALL))
    made.save(tmp_path / "s.npz")
    read = FeatureSummary.load(tmp_path / "s.npz", toy())
    assert torch.equal(read.features, made.features)
    for pair in ((made, read), (read, made), (read, read)):
        found = figures(ALL, *pair)
        assert found["fid"] == 0.0 and found["sfid"] == 0.0  # exactly: no rounding by the file
        ones = [found[key] for key in ("precision", "recall", "density", "coverage")]
        assert ones == [1, 1, 1, 1]
        assert -0.1 < found["kid"] < 0  # unbiased
    old = Statistics.load(tmp_path / "s.npz")  # for all that need the moments alone
    assert old.n == 40 and np.array_equal(old.cov, made.moments.cov)


def test_what_a_reference_lacks_is_said_before_a_pass(tmp_path: Path) -> None:
    summary(images(9), Requirements()).save(tmp_path / "s.npz")
    bare = FeatureSummary.load(tmp_path / "s.npz", toy())
    for name, message in (("pr", "'toy' hold no features"), ("sfid", "'toy' hold no spatial")):
        with pytest.raises(ValueError, match=message):
            require(bare, needs_of([name]))
    assert require(bare, needs_of(["fid"])) is bare
    assert require(bare, reference_needs(["fid_inf"])) is bare  # only the images' are cut up
    assert reference_needs(["fid_inf", "pr"]).features and reference_needs(["sfid"]).spatial
    with pytest.raises(ValueError, match="pixels has no spatial features"):
        Collector(load_detector("pixels", device="cpu"), needs_of(["sfid"]), 9)
    with pytest.raises(ValueError, match="unknown metric 'is'"):
        parse_metrics("fid,is")
    with pytest.raises(ValueError, match="no metric"):
        parse_metrics(" ")


@pytest.mark.parametrize(
    "change",
    [
        {"features": np.zeros((5, 7), np.float32)},
        {"features": np.zeros((50, 6), np.float32)},  # more than there are images
        {"features": np.full((5, 6), np.nan, np.float32)},
        {"features": np.array(["a"] * 5)},
        {"spatial_mu": np.zeros(4)},
        {"spatial_sigma": np.full((5, 5), np.nan)},
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict) -> None:
    summary(images(9), Requirements(5, spatial=True)).save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as content:
        np.savez(tmp_path / "bad.npz", **{**content, **change})
    with pytest.raises(ValueError, match="invalid|NaN|not with"):
        FeatureSummary.load(tmp_path / "bad.npz", toy())
    with pytest.raises(ValueError, match="detector toy .*not with other"):
        FeatureSummary.load(tmp_path / "s.npz", toy("other"))
    with pytest.raises(ValueError, match="compute both with one detector"):
        FeatureSummary.load(tmp_path / "s.npz", toy(sha256="cd" * 32))


# --- the command line


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["fid.py", *map(str, arguments), "--device", "cpu"])
        cli.run(fid.main)
    code = end.value.code
    assert isinstance(code, int)
    return (code, *capsys.readouterr())


def folder(path: Path, x: Tensor) -> Path:
    path.mkdir()
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def test_several_metrics_and_detectors_in_one_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.jit.script(Corner()).save(str(tmp_path / "corner.pt"))
    both = ["--detector", f"pixels,{tmp_path / 'corner.pt'}"]
    x, y = folder(tmp_path / "x", images(30)), folder(tmp_path / "y", images(25, 1))
    refs = f"{tmp_path / 'p.npz'},{tmp_path / 'c.npz'}"
    code, out, err = run(capsys, "ref", "--data", y, "--dest", refs, "--features", 20, *both)
    assert code == 0 and out.count("wrote") == 2, err
    result = tmp_path / "r.json"
    code, out, err = run(
        capsys, "calc", "--images", x, "--ref", refs, "--metrics", "fid,kid,pr,dc",
        "--json", result, *both,
    )  # fmt: skip
    assert code == 0, err
    assert len(out.splitlines()) == 8
    assert out.count("(detector pixels, N = 30)") == 1
    assert out.count("(detector corner, N = 30 of 30 against 20 of 25)") == 3
    content = json.loads(result.read_text())
    pixels, corner = content["results"]
    assert content["fid"] == pixels["fid"] and content["detector"] == pixels["detector"]
    assert corner["n"] == 30 and corner["reference"]["features_n"] == 20
    detector = load_detector("pixels", device="cpu")
    reference = detector(images(25, 1))[torch.from_numpy(choose(25, 20, 0))]
    expected = precision_recall(reference, detector(images(30)))
    assert (pixels["precision"], pixels["recall"]) == expected
    assert "8x8 by means over areas" in pixels["detector"]["resize"]
    # a reference of moments alone is enough for the extrapolation
    bare = ["--ref", tmp_path / "m.npz", "--detector", tmp_path / "corner.pt"]
    assert run(capsys, "ref", "--data", y, "--dest", bare[1], *bare[2:])[0] == 0
    code, out, err = run(capsys, "calc", "--images", x, "--metrics", "fid,fid_inf", *bare)
    assert code == 0 and "images; line over 1/N from 15)  (detector corner, N = 30 of 30)" in out, (
        err
    )


class Corner(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :2, 0].to(torch.float32).flatten(1) / 255


def test_two_processes_give_the_figures_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = folder(tmp_path / "x", images(23))
    options = ["--detector", "pixels", "--metrics", "fid,kid,pr,dc", "--features", "9"]
    ref = ["ref", "--data", x, "--seed", 4, *options]
    assert run(capsys, *ref, "--batch", 5, "--dest", tmp_path / "1.npz")[0] == 0
    both = [*ref, "--dest", tmp_path / "2.npz", "--device", "cpu"]
    done = together(lambda: run_command(fid.main, *both), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    detector = load_detector("pixels", device="cpu")
    one, two = (FeatureSummary.load(tmp_path / f"{i}.npz", detector) for i in (1, 2))
    assert one.kept == 9 and torch.equal(one.features, two.features)
    assert np.abs(one.moments.cov - two.moments.cov).max() < 1e-10


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = folder(tmp_path / "x", images(3))
    run(capsys, "ref", "--data", x, "--detector", "pixels", "--dest", tmp_path / "s.npz")
    ref = ["--ref", tmp_path / "s.npz", "--detector", "pixels"]
    for arguments, message in [
        (["--metrics", "fid,is"], "unknown metric 'is'"),
        ([*ref, "--metrics", "kid"], "no features"),
        (
            ["--detector", "pixels,cifar10-small", "--ref", "x.npz"],
            "names 1 for 2 detectors: give one for each",
        ),
        (["--detector", "cifar10-small,pixels"], "is bundled for cifar10-small, cifar10-small-res"),
        ([*ref, "--detector-path", x], "detector pixels has no weights"),
        (["--detector", "pixels,dinov2", "--detector-path", x], "write --detector name="),
    ]:
        code, out, err = run(capsys, "calc", "--images", x, *arguments)
        assert (code, out) == (1, "") and message in err and "Traceback" not in err, err
    code, _, err = run(capsys, "ref", "--data", x, "--dest", tmp_path / "t.npz", *ref[2:],
                       "--metrics", "sfid")  # fmt: skip
    assert code == 1 and "no spatial features" in err and not (tmp_path / "t.npz").exists()
