"""Detectors: the bundled one, a TorchScript one made here, and what they refuse."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metrics.classifiers import load_classifier, save_classifier
from metrics.cnn import CNNConfig, SmallCNN
from metrics.detectors import CHUNK, DETECTORS, Detector, load_detector, load_reference
from metrics.fid import gather
from metrics.statistics import DetectorId, Statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def small() -> Detector:
    return load_detector("cifar10-small", device="cpu")


class Scripted(nn.Module):
    """The interface of the published Inception file, with features that can be said in words."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = img.to(torch.float32)
        mean = x.mean(dim=[2, 3])
        return torch.cat([mean, x.flatten(1).amax(1, keepdim=True)], 1) if return_features else mean


def scripted(path: Path) -> Path:
    torch.jit.script(Scripted()).save(str(path))
    return path


def test_the_bundled_file_is_what_its_record_says(small: Detector) -> None:
    path = DETECTORS["cifar10-small"].bundled
    assert path is not None and path.stat().st_size <= 4 * 2**20
    model, record = load_classifier(path)
    assert small.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert small.dim == record["feature_width"] == model.dim and 64 <= small.dim <= 256
    assert not any(p.requires_grad for p in model.parameters())


def test_the_bundled_reference_belongs_to_the_bundled_detector(small: Detector) -> None:
    for name, count in (("cifar10-small", 50_000), ("cifar10-small-test", 10_000)):
        reference = load_reference(name, small)
        assert reference.n == count and reference.detector == small.id
        assert re.fullmatch("[0-9a-f]{64}", reference.source_sha256)
        assert np.linalg.eigvalsh(reference.cov).min() > 0
    # the floor: real images against real images
    assert 0 < reference.fid(load_reference("cifar10-small", small)) < 0.1


def test_features_do_not_depend_on_the_batch(small: Detector) -> None:
    x = images(CHUNK + 9)
    together = small(x)
    assert together.dtype == torch.float32 and together.shape == (len(x), small.dim)
    for batch in (1, 7, CHUNK):
        some = x[: 3 * batch]
        apart = torch.cat([small(part) for part in some.split(batch)])
        assert torch.equal(apart, together[: len(some)]), batch
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert torch.equal(small(x[order]), together[order])
    assert small(x[:0]).shape == (0, small.dim)


def test_features_are_the_pooled_activations_of_the_classifier(small: Detector) -> None:
    path = DETECTORS["cifar10-small"].bundled
    assert path is not None
    model, _ = load_classifier(path)
    x = images(4)
    by_hand = model.stages(nn.functional.silu(model.stem(model.normalise(x)))).mean((2, 3))
    torch.testing.assert_close(small(x), by_hand, rtol=1e-4, atol=1e-5)
    logits = by_hand @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_stem_whitens_patches() -> None:
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.rand(64, 3, 66, 66) * 255, 3, stride=2).byte()
    model = SmallCNN(CNNConfig((4, 4, 4)))
    model.prepare_(smooth, eps=0.0)
    x = model.normalise(smooth)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    y = model.stem(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y[:12], -y[12:])
    torch.testing.assert_close(y[:12] @ y[:12].T / y.shape[1], torch.eye(12), atol=1e-3, rtol=0)


def test_a_written_network_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = SmallCNN(CNNConfig((8, 8, 16), classes=5)).eval()
    model.prepare_(images(50))
    save_classifier(model, tmp_path / "d.safetensors", {"note": "x"})
    again, record = load_classifier(tmp_path / "d.safetensors")
    assert record["note"] == "x" and again.config == model.config and not again.training
    assert again.stem.weight.dtype == torch.float32
    torch.testing.assert_close(again(images(3)).logits, model(images(3)).logits, rtol=0, atol=2e-2)
    # what was rounded once is not rounded again
    save_classifier(again, tmp_path / "e.safetensors", {})
    twice, _ = load_classifier(tmp_path / "e.safetensors")
    assert torch.equal(again(images(3)).features, twice(images(3)).features)


def test_wrong_images_are_refused(small: Detector) -> None:
    with pytest.raises(ValueError, match="takes 32x32 images, got 64x64"):
        small(images(2, 64))
    with pytest.raises(ValueError, match="takes uint8 images"):
        small(images(2).float())
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\)"):
        small(images(2)[:, :1])


def test_torchscript_detector(tmp_path: Path) -> None:
    path = scripted(tmp_path / "inception.pt")
    detector = load_detector("inception", path=path, device="cpu")
    assert (detector.name, detector.dim) == ("inception", 4)
    assert detector.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    x = images(CHUNK + 3, 48)  # any size
    expected = torch.cat([x.float().mean((2, 3)), x.flatten(1).amax(1, keepdim=True).float()], 1)
    torch.testing.assert_close(detector(x), expected)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(3, 4)).save(str(tmp_path / "other.pt"))
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match="is not a TorchScript detector"):
            load_detector("inception", path=tmp_path / name, device="cpu")
        with pytest.raises(ValueError, match="is not a detector file"):
            load_detector("cifar10-small", path=tmp_path / name, device="cpu")
    for name in DETECTORS.keys() - {"pixels"}:
        with pytest.raises(FileNotFoundError, match=r"none.pt does not exist"):
            load_detector(name, path=tmp_path / "none.pt", device="cpu")
    with pytest.raises(ValueError, match="pixels has no weights"):
        load_detector("pixels", path=tmp_path / "none.pt", device="cpu")
    with pytest.raises(ValueError, match="unknown detector 'vgg'"):
        load_detector("vgg", device="cpu")
    with pytest.raises(ValueError, match="inception is not bundled"):
        load_detector("inception", device="cpu")


def test_a_newer_or_damaged_network_file_is_refused(tmp_path: Path) -> None:
    model = SmallCNN(CNNConfig((4, 4, 4)))
    save_classifier(model, tmp_path / "newer.safetensors", {"schema": 99})
    with pytest.raises(ValueError, match="schema 99"):
        load_classifier(tmp_path / "newer.safetensors")
    del model.stages[2]
    save_classifier(model, tmp_path / "less.safetensors", {})
    with pytest.raises(ValueError, match="less.safetensors is not a detector file"):
        load_classifier(tmp_path / "less.safetensors")


def test_references_of_another_detector_are_refused(small: Detector, tmp_path: Path) -> None:
    other = load_detector("inception", path=scripted(tmp_path / "i.pt"), device="cpu")
    gather([images(5)], other, "toy").save(tmp_path / "toy.npz")
    assert load_reference(tmp_path / "toy.npz", other).n == 5
    with pytest.raises(ValueError, match="detector inception .*, not with"):
        load_reference(tmp_path / "toy.npz", small)
    with pytest.raises(ValueError, match="compute both with one detector"):
        load_reference("cifar10-small", other)
    retrained = DetectorId(small.name, "0" * 64, small.dim)
    forged = Statistics(retrained, "older detector")
    forged.update(small(images(5)))
    forged.save(tmp_path / "forged.npz")
    with pytest.raises(ValueError, match="older detector"):
        load_reference(tmp_path / "forged.npz", small)
    with pytest.raises(
        FileNotFoundError,
        match="'imagenet' is neither",
    ):
        load_reference("imagenet", small)
