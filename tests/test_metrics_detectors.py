"""Detectors: the bundled ones, a TorchScript one made here, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.classifiers import NETWORKS, load_classifier, save_classifier
from metrics.cnn import CNNConfig, SmallCNN
from metrics.detectors import CHUNK, DETECTORS, Detector, load_detector
from metrics.fid import gather
from metrics.references import load_reference
from metrics.resnet import SmallResNet
from metrics.statistics import DetectorId, Statistics
from tests.attacks import VALUES, torn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def images(count: int, size: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


BUNDLED = ("cifar10-small", "cifar10-small-resnet")


@pytest.fixture(scope="module")
def small() -> Detector:
    return load_detector("cifar10-small", device="cpu")


@pytest.fixture(scope="module", params=BUNDLED)
def bundled(request: pytest.FixtureRequest) -> Detector:
    """Each of the bundled detectors."""
    return load_detector(request.param, device="cpu")


class Scripted(nn.Module):
    """The interface of the published Inception file, with features that can be said in words."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        x = img.to(torch.float32)
        mean = x.mean(dim=[2, 3])
        return torch.cat([mean, x.flatten(1).amax(1, keepdim=True)], 1) if return_features else mean


def scripted(path: Path) -> Path:
    torch.jit.script(Scripted()).save(str(path))
    return path


def test_a_bundled_file_is_what_its_record_says(bundled: Detector) -> None:
    path = DETECTORS[bundled.name].bundled
    assert path is not None and path.stat().st_size <= 4 * 2**20
    model, record = load_classifier(path)
    assert bundled.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bundled.dim == record["feature_width"] == model.dim and 64 <= bundled.dim <= 256
    assert isinstance(model, SmallResNet if "resnet" in bundled.name else SmallCNN)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_bundled_references_belong_to_the_bundled_detectors(
    bundled: Detector, small: Detector
) -> None:
    for name, count in (("cifar10-small", 50_000), ("cifar10-small-test", 10_000)):
        reference = load_reference(name, bundled)
        assert reference.n == count and reference.detector == bundled.id
        assert reference.source_sha256 == load_reference(name, small).source_sha256
        assert re.fullmatch("[0-9a-f]{64}", reference.source_sha256)
        assert np.linalg.eigvalsh(reference.cov).min() > 0
    # the floor: real images against real images
    assert 0 < reference.fid(load_reference("cifar10-small", bundled)) < 0.15


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


def test_the_two_bundled_detectors_are_two(small: Detector) -> None:
    other = load_detector("cifar10-small-resnet", device="cpu")
    assert other.sha256 != small.sha256 and other.dim != small.dim
    with pytest.raises(ValueError, match="compute both with one detector"):
        load_reference("cifar10-small", small).fid(load_reference("cifar10-small", other))


def test_features_are_the_pooled_activations_of_the_classifier(small: Detector) -> None:
    path = DETECTORS["cifar10-small"].bundled
    assert path is not None
    model, _ = load_classifier(path)
    assert isinstance(model, SmallCNN)
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


def test_a_fresh_residual_network_is_means_and_projections() -> None:
    """Its branches start at zero: each block is a 2x2 mean, a 1x1 convolution, and ReLU."""
    torch.manual_seed(0)
    model = SmallResNet(CNNConfig((4, 8, 16))).eval()
    model.prepare_(images(20))
    x = model.normalise(images(3))
    scale = (1 + 1e-5) ** -0.5  # of a batch normalisation that has seen nothing
    x = nn.functional.conv2d(x, model.get_parameter("stem.0.weight"), padding=1).relu() * scale
    for block in model.blocks:
        means = sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        kernel = block.get_parameter("shortcut.1.weight")[:, :, 0, 0]
        x = torch.einsum("oi,bihw->bohw", kernel, means).relu() * scale
    torch.testing.assert_close(model(images(3)).features, x.mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_a_residual_block_is_its_formula() -> None:
    """relu(norm(conv(relu(norm(conv, stride 2)))) + norm(projected means)), in float64."""
    torch.manual_seed(0)
    block = SmallResNet(CNNConfig((4, 8, 16))).blocks[0].double().train()
    nn.init.normal_(block.get_parameter("branch.4.weight"))
    nn.init.normal_(block.get_parameter("branch.4.bias"))
    x = torch.randn(6, 32, 8, 8, dtype=torch.float64)

    def norm(y: Tensor, layer: str) -> Tensor:
        centred = y - y.mean((0, 2, 3), keepdim=True)
        deviation = (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        weight, bias = (block.get_parameter(f"{layer}.{key}") for key in ("weight", "bias"))
        return centred / deviation * weight[:, None, None] + bias[:, None, None]

    def conv(y: Tensor, kernel: Tensor, stride: int) -> Tensor:
        columns = nn.functional.unfold(y, 3, padding=1, stride=stride)
        side = y.shape[-1] // stride
        return (kernel.flatten(1) @ columns).view(len(y), -1, side, side)

    inner = norm(conv(x, block.get_parameter("branch.0.weight"), 2), "branch.1").clamp(min=0)
    branch = norm(conv(inner, block.get_parameter("branch.3.weight"), 1), "branch.4")
    means = x.view(6, 32, 4, 2, 4, 2).mean((3, 5))
    kernel = block.get_parameter("shortcut.1.weight")[:, :, 0, 0]
    projected = torch.einsum("oi,bihw->bohw", kernel, means)
    torch.testing.assert_close(block(x), (branch + norm(projected, "shortcut.2")).clamp(min=0))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_written_network_comes_back(network: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = NETWORKS[network](CNNConfig((8, 8, 16), classes=5)).eval()
    model.prepare_(images(50))
    save_classifier(model, tmp_path / "d.safetensors", {"note": "x"})
    again, record = load_classifier(tmp_path / "d.safetensors")
    assert record["network"] == network and type(again) is type(model)
    assert record["note"] == "x" and again.config == model.config and not again.training
    assert {weight.dtype for weight in again.parameters()} == {torch.float32}
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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("network", NETWORKS)
def test_whatever_a_network_file_says_is_read_or_one_sentence(network: str, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_classifier(NETWORKS[network](CNNConfig((4, 4, 4), 3)), path, {})
    good = path.read_bytes()
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def read(what: object) -> None:
        try:
            load_classifier(path)
        except ValueError as error:
            text = str(error)
            assert str(path) in text and "\n" not in text and len(text) < 3000, what
            assert re.search("is not a detector file|does not fit|update the toolkit", text), what

    widths = ([4, 4], [4] * 10**4, [0, 0, 0], [-1, 4, 4], [4, 4, 10**9], [8, 4, 4], ["a", 4, 4])
    for value in (*VALUES, 10**9, *widths):
        config = record["config"]
        edits = [{**record, "config": {**config, key: value}} for key in config]
        for edit in (value, *edits, *({**record, key: value} for key in record)):
            save_file(tensors, path, {"record": json.dumps(edit)})
            read(edit)
    for number in range(50):
        path.write_bytes(torn(good, number))
        read(number)
    (other,) = NETWORKS.keys() - {network}
    save_file(tensors, path, {"record": json.dumps({**record, "network": other})})
    with pytest.raises(ValueError, match="is not a detector file|does not fit its own record"):
        load_classifier(path)
    save_file(tensors, path, {"record": json.dumps({**record, "network": "vgg"})})
    with pytest.raises(ValueError, match="is not a detector file"):
        load_classifier(path)


def test_files_of_the_first_schema_name_no_network(tmp_path: Path) -> None:
    model, path = SmallCNN(CNNConfig((4, 4, 4))), tmp_path / "d.safetensors"
    save_classifier(model, path, {})
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert (record.pop("schema"), record.pop("network")) == (2, "cnn")
    save_file(tensors, path, {"record": json.dumps({"schema": 1, **record})})
    assert isinstance(load_classifier(path)[0], SmallCNN)
    save_file(tensors, path, {"record": json.dumps({"schema": 2, **record})})
    with pytest.raises(ValueError, match=r"is not a detector file .*'network'"):
        load_classifier(path)


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
    sentence = (
        "'cifar10-small' is bundled for cifar10-small, cifar10-small-resnet, not for detector"
    )
    with pytest.raises(ValueError, match=sentence):
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
