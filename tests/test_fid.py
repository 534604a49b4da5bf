"""fid.py from the command line: figures, records, processes, and one sentence for an error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import fid
from metrics.detectors import DETECTORS, load_detector
from metrics.frechet import frechet_distance
from metrics.references import load_reference
from metrics.statistics import Statistics
from runtime import files
from tests.processes import run_command, together
from tests.scripts import Script

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture
def run(script: Script) -> Script:
    """``run("calc", "--images", path)`` -> exit code, stdout, stderr."""
    return lambda *arguments: script(fid.main, *arguments, "--device", "cpu")


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def figure(output: str) -> float:
    return float(output.split()[1])


def test_fid_of_images_is_that_of_their_features(run: Script, tmp_path: Path) -> None:
    images = pixels(11)
    folder = write(tmp_path / "a", images)
    code, out, _ = run("calc", "--images", folder, "--json", tmp_path / "r.json", "--batch", 4)
    assert code == 0

    detector = load_detector("cifar10-small", device="cpu")
    reference = load_reference("cifar10-small", detector)
    x = detector(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    expected = frechet_distance(x.mean(0), np.cov(x.T), reference.mean, reference.cov)

    result = json.loads((tmp_path / "r.json").read_text())
    assert result["fid"] == pytest.approx(expected, rel=1e-8)
    assert out == f"FID {expected:.6g}  (detector cifar10-small, N = 11)\n"
    assert result["n"] == 11 and result["reference"]["n"] == 50_000
    assert result["detector"]["sha256"] == detector.sha256
    assert result["record"]["options"]["images"] == str(folder)
    shape = str((3, 32, 32)).encode()
    each = (hashlib.sha256(shape + i.transpose(2, 0, 1).tobytes()).digest() for i in images)
    assert result["source_sha256"] == hashlib.sha256(b"".join(each)).hexdigest()
    assert result["reference"]["source_sha256"] == reference.source_sha256


def test_folder_zip_and_statistics_agree(run: Script, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pixels(9))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"some/where/{file.name}")
    stats = tmp_path / "a.npz"
    assert run("ref", "--data", tmp_path / "a.zip", "--dest", stats)[0] == 0
    figures = [run("calc", "--images", p)[1] for p in (folder, tmp_path / "a.zip", stats)]
    assert figures[0] == figures[1] == figures[2]
    # the same images are the same: known by their hash, whatever the batches round
    for path in (folder, tmp_path / "a.zip", stats):
        options = ["--ref", stats] if path == stats else ["--ref", stats, "--batch", 2]
        assert figure(run("calc", "--images", path, *options)[1]) == 0.0


def test_images_may_be_the_reference(run: Script, tmp_path: Path) -> None:
    """Of one folder to another in one call, in the metrics that need features as well."""
    one, other = write(tmp_path / "a", pixels(9)), write(tmp_path / "b", pixels(14, seed=1))
    stats = tmp_path / "b.npz"
    assert run("ref", "--data", other, "--features", 14, "--dest", stats)[0] == 0
    for metrics in ("fid", "fid,kid"):
        said = [run("calc", "--images", one, "--ref", ref, "--metrics", metrics)[1]
                for ref in (stats, other)]  # fmt: skip
        assert said[0] == said[1] and figure(said[0]) > 0.1
    assert figure(run("calc", "--images", one, "--ref", one)[1]) == 0.0
    refused = run("calc", "--images", one, "--ref=")
    assert refused[0] == 1 and "names 0 for 1 detectors" in refused[2]
    both = ["calc", "--images", one, "--ref", other, "--num", 5, "--device", "cpu"]
    done = together(lambda: run_command(fid.main, *both), tmp_path)
    assert done[0].out == run(*both)[1] and "N = 5" in done[0].out and done[1].out == ""


def test_result_does_not_depend_on_batch_or_processes(run: Script, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pixels(13))
    options = ["--data", folder, "--num_images", 11, "--seed", 5]
    run("ref", *options, "--dest", tmp_path / "1.npz", "--batch", 3)
    run("ref", *options, "--dest", tmp_path / "2.npz", "--batch", 100)
    both = ["ref", *options, "--dest", tmp_path / "3.npz", "--device", "cpu"]
    done = together(lambda: run_command(fid.main, *both), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    assert [rank.out.count("wrote") for rank in done] == [1, 0]
    first, *others = (Statistics.load(tmp_path / f"{i}.npz") for i in (1, 2, 3))
    assert first.n == 11 and first.source == "a" and len(first.source_sha256) == 64
    for other in others:
        assert other.n == 11 and other.source_sha256 == first.source_sha256
        assert np.abs(other.mean - first.mean).max() < 1e-10
        assert np.abs(other.cov - first.cov).max() < 1e-10


def test_fetched_detector_is_kept_and_checked(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published file is downloaded once; a changed one is refused."""

    class Means(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return img.to(torch.float32).mean(dim=[2, 3])

    served = tmp_path / "served" / "inception-2015-12-05.pt"
    served.parent.mkdir()
    torch.jit.script(Means()).save(str(served))
    entry = dataclasses.replace(DETECTORS["inception"], url=served.as_uri())
    monkeypatch.setitem(DETECTORS, "inception", entry)
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a", pixels(9))
    options = ["ref", "--data", folder, "--detector", "inception", "--cache-dir", "kept", "--dest"]
    code, out, err = run(*options, "one.npz")
    assert code == 0, err
    assert "detector inception, N = 9" in out
    kept = tmp_path / "kept" / served.name
    assert kept.with_name(kept.name + ".sha256").read_text().strip() == files.sha256_file(served)
    assert Statistics.load("one.npz").detector.sha256 == files.sha256_file(served)

    served.unlink()  # offline from now on
    assert run(*options, "two.npz")[0] == 0
    kept.write_bytes(kept.read_bytes() + b"x")
    code, _, err = run(*options, "three.npz")
    assert code == 1 and "was expected" in err and not Path("three.npz").exists()
    code, _, err = run("calc", "--images", "one.npz", "--ref", "cifar10-small")
    assert code == 1 and "compute both with one detector" in err


def test_published_moments_become_a_reference_once_declared(run: Script, tmp_path: Path) -> None:
    path = tmp_path / "published.npz"
    dim = load_detector("cifar10-small", device="cpu").dim
    np.savez(path, mu=np.zeros(dim), sigma=np.eye(dim))
    code, _, err = run("calc", "--images", path)
    assert code == 1 and "lack detector, detector_sha256, n, source: make them with fid.py" in err
    code, _, err = run("ref", "--data", path, "--dest", tmp_path / "r.npz")
    assert code == 1 and "does not say how many images it is of: add --num" in err
    assert run("ref", "--data", path, "--dest", tmp_path / "r.npz", "--num", 500)[0] == 0
    code, out, _ = run("calc", "--images", tmp_path / "r.npz", "--ref", tmp_path / "r.npz")
    assert (code, out) == (0, "FID 0  (detector cifar10-small, N = 500)\n")


def test_dry_run_prints_the_record_and_touches_nothing(run: Script, tmp_path: Path) -> None:
    for arguments in (
        ["calc", "--images", tmp_path / "none", "--json", tmp_path / "r.json"],
        ["ref", "--data", tmp_path / "none", "--dest", tmp_path / "r.npz"],
    ):
        code, out, _ = run(*arguments, "-n", "--num", 7)
        assert code == 0 and json.loads(out)["options"]["num"] == 7
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_sentence(run: Script, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", pixels(3))
    big = tmp_path / "big"
    big.mkdir()
    for i in range(2):
        Image.new("RGB", (64, 48)).save(big / f"{i}.png")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["--images", tmp_path / "none"], "does not exist: pass a folder or a zip of images"),
        (["--images", tmp_path / "empty"], "holds no image"),
        (["--images", big], "takes 32x32 images, got 64x48"),
        (["--images", folder, "--num", 5], "5 images were asked for, found 3"),
        (
            ["--images", folder, "--ref", "cifar"],
            "'cifar' is neither one of cifar10-small, ",
        ),
        (["--images", tmp_path / "s.npz", "--num", 5], "--num 5 draws images, but"),
        (["--images", tmp_path / "s.npz"], "do not exist: make them with fid.py ref"),
        (["--images", folder, "--detector-path", tmp_path / "d"], "d does not exist: check"),
    ]:
        code, out, err = run("calc", *arguments)
        sentence = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, out, len(sentence)) == (1, "", 1), (arguments, err)
        assert message in sentence[0] and "Traceback" not in err
    code, _, err = run("ref", "--data", folder, "--dest", tmp_path / "stats")
    assert code == 1 and "has to end in .npz" in err
    code, _, err = run("calc", "--images", folder, "--detector", "vgg")
    assert code == 1 and "unknown detector 'vgg': choose one of cifar10-small, " in err
