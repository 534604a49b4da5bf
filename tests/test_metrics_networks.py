"""Detectors of the registry beside the bundled one: Inception-v3, DINOv2, CLIP, pixels, a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import CHUNK, Detector, load_detector, parse_detectors
from metrics.inception import FidInception, load_inception
from metrics.vision import resize

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
transformers = pytest.importorskip("transformers")


def images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


# --- Inception-v3, written a second time: as a table of branches over plain functions


def table() -> Iterator[tuple[str, list[list[str]]]]:
    """Blocks in order; a branch is a list of "name in out height x width stride/padding"."""

    def five(c: int, p: int) -> list[list[str]]:
        return [
            [f"1x1 {c} 64 1x1"], [f"5x5_1 {c} 48 1x1", "5x5_2 48 64 5x5"],
            [f"3x3dbl_1 {c} 64 1x1", "3x3dbl_2 64 96 3x3", "3x3dbl_3 96 96 3x3"],
            ["mean", f"_pool {c} {p} 1x1"],
        ]  # fmt: skip

    def six(w: int) -> list[list[str]]:
        return [
            ["1x1 768 192 1x1"],
            [f"7x7_1 768 {w} 1x1", f"7x7_2 {w} {w} 1x7", f"7x7_3 {w} 192 7x1"],
            [f"7x7dbl_1 768 {w} 1x1", f"7x7dbl_2 {w} {w} 7x1", f"7x7dbl_3 {w} {w} 1x7",
             f"7x7dbl_4 {w} {w} 7x1", f"7x7dbl_5 {w} 192 1x7"],
            ["mean", "_pool 768 192 1x1"],
        ]  # fmt: skip

    def seven(c: int, pool: str) -> list[list[str]]:
        once = [f"3x3_1 {c} 384 1x1"]
        twice = [f"3x3dbl_1 {c} 448 1x1", "3x3dbl_2 448 384 3x3"]
        return [
            [f"1x1 {c} 320 1x1"], [*once, "3x3_2a 384 384 1x3"], [*once, "3x3_2b 384 384 3x1"],
            [*twice, "3x3dbl_3a 384 384 1x3"], [*twice, "3x3dbl_3b 384 384 3x1"],
            [pool, f"_pool {c} 192 1x1"],
        ]  # fmt: skip

    yield from zip(
        ["Mixed_5b", "Mixed_5c", "Mixed_5d"], [five(192, 32), five(256, 64), five(288, 64)],
        strict=True,
    )  # fmt: skip
    dbl = ["3x3dbl_1 288 64 1x1", "3x3dbl_2 64 96 3x3", "3x3dbl_3 96 96 3x3 2"]
    yield "Mixed_6a", [["3x3 288 384 3x3 2"], dbl, ["halve"]]
    for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
        yield f"Mixed_6{name}", six(width)
    long = ["7x7x3_1 768 192 1x1", "7x7x3_2 192 192 1x7", "7x7x3_3 192 192 7x1"]
    short = ["3x3_1 768 192 1x1", "3x3_2 192 320 3x3 2"]
    yield "Mixed_7a", [short, [*long, "7x7x3_4 192 192 3x3 2"], ["halve"]]
    yield "Mixed_7b", seven(1280, "mean")
    yield "Mixed_7c", seven(2048, "max")


STEM = ["1a_3x3 3 32 3x3 2", "2a_3x3 32 32 3x3 0", "2b_3x3 32 64 3x3", "halve",
        "3b_1x1 64 80 1x1", "4a_3x3 80 192 3x3 0", "halve"]  # fmt: skip
POOLS = {
    # a mean that counts no padding: sums over ones
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1),
    "max": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


def layers() -> dict[str, tuple[int, int, int, int]]:
    """Prefix of every convolution -> its kernel's shape, by the table."""
    found = {}
    rows = [("Conv2d_", STEM)] + [
        (f"{block}.branch", branch) for block, branches in table() for branch in branches
    ]
    for prefix, row in rows:
        for layer in row:
            if layer not in POOLS:
                name, c_in, c_out, kernel, *_ = layer.split()
                height, width = map(int, kernel.split("x"))
                found[prefix + name] = (int(c_out), int(c_in), height, width)
    return found


def state_dict() -> dict[str, Tensor]:
    """Random weights under the published names, that keep activations of the order of one."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in layers().items():
        weight = torch.randn(shape, generator=generator)
        state[f"{name}.conv.weight"] = weight * (2 / weight[0].numel()) ** 0.5
        for key in ("weight", "bias", "running_mean", "running_var"):
            draw = torch.rand(shape[0], generator=generator)
            state[f"{name}.bn.{key}"] = draw * 0.2 + (key in {"weight", "running_var"}) - 0.1
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    return state


def by_hand(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    def walk(x: Tensor, prefix: str, row: list[str]) -> Tensor:
        for layer in row:
            if layer in POOLS:
                x = POOLS[layer](x)
                continue
            name, _, _, kernel, *rule = layer.split()
            stride, padded = (2, False) if rule == ["2"] else (1, rule != ["0"])
            sides = [int(k) // 2 * padded for k in kernel.split("x")]
            key = prefix + name
            x = F.conv2d(x, state[f"{key}.conv.weight"], None, stride, sides)
            mean, var, scale, shift = (
                state[f"{key}.bn.{k}"].view(-1, 1, 1)
                for k in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)
        return x

    x = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    x, spatial = walk(x, "Conv2d_", STEM), x
    for block, branches in table():
        x = torch.cat([walk(x, f"{block}.branch", branch) for branch in branches], 1)
        spatial = x[:, :7].flatten(1) if block == "Mixed_6d" else spatial
    return x.mean((2, 3)), spatial


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state_dict(), path)
    return path


def test_names_and_shapes_of_inception_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = FidInception()
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if "num_batches" not in k}
    assert ours == {k: tuple(v.shape) for k, v in state_dict().items()}
    convolutions = [k for k in ours if k.endswith("conv.weight")]
    assert len(convolutions) == 94  # as Inception-v3 without its auxiliary head has
    # the published count of Inception-v3 without its auxiliary head, and eight more classes
    counted = sum(np.prod(v) for k, v in ours.items() if ".running_" not in k)
    assert counted == 23_834_568 + 8 * 2049


@torch.no_grad()
def test_inception_is_its_second_construction(published: Path) -> None:
    x = images(2, 40, 52)
    pooled, spatial = load_inception(published)(x)
    expected, expected_spatial = by_hand(state_dict(), x)
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 7 * 17 * 17)
    assert float(expected.std()) > 1e-2 and float(expected_spatial.std()) > 1e-2
    for got, want in ((pooled, expected), (spatial, expected_spatial)):
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_other_state_dicts_are_refused(published: Path, tmp_path: Path) -> None:
    state = state_dict()
    without = {k: v for k, v in state.items() if k != "Mixed_6b.branch1x1.bn.bias"}
    wrong = state | {"fc.weight": torch.zeros(1000, 2048)}
    for content, message in (
        (without, "tensor Mixed_6b.branch1x1.bn.bias"),
        (wrong, "tensor fc.weight"),
        (state | {"AuxLogits.fc.bias": torch.zeros(3)}, "tensor AuxLogits.fc.bias"),
        ([1, 2], "holds no weights by name"),
        (nn.Linear(2, 2), "another network"),  # a pickled class is not run
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            load_detector("inception-pt", path=tmp_path / "other.pth", device="cpu")


# --- DINOv2 and CLIP, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("vision")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dino = transformers.Dinov2Config(**sizes, image_size=56, patch_size=28)
    transformers.Dinov2Model(dino).save_pretrained(root / "dinov2")
    tower = {**sizes, "intermediate_size": 32}
    clip = transformers.CLIPConfig(
        vision_config={**tower, "image_size": 30, "patch_size": 15, "projection_dim": 12},
        text_config={**tower, "vocab_size": 99},
        projection_dim=12,
    )  # fmt: skip
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    return {name: root / name for name in ("dinov2", "clip")}


def test_the_square_is_that_of_pil() -> None:
    for height, width, size in ((64, 48, 30), (20, 31, 56), (30, 30, 30)):
        x = images(2, height, width)
        x[1] = torch.arange(width).mul(255 // width).byte()  # a ramp
        ours = resize(x, size)
        for image, made in zip(x, ours, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            wanted = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32)
            assert np.abs(made.permute(1, 2, 0).numpy() - wanted).max() <= 1  # PIL's fixed point


@torch.no_grad()
def test_dinov2_gives_its_class_token(folders: dict[str, Path]) -> None:
    detector = load_detector("dinov2", path=folders["dinov2"], device="cpu")
    x = images(3, 40, 50)
    model = transformers.Dinov2Model.from_pretrained(folders["dinov2"]).eval()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    expected = model(pixel_values=(resize(x, 224) / 255 - mean) / std).pooler_output
    assert detector.dim == 16 and float(expected.std(0).max()) > 1e-4
    torch.testing.assert_close(detector(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_clip_gives_its_embedding(folders: dict[str, Path]) -> None:
    detector = load_detector("clip", path=folders["clip"], device="cpu")
    x = images(3, 30, 30)  # the size of the model: the library's own preprocessing leaves it alone
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tower = model.vision_model(pixel_values=(x / 255 - mean) / std).pooler_output
    assert detector.dim == 12
    torch.testing.assert_close(detector(x), model.visual_projection(tower), atol=1e-5, rtol=0)


def test_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a Dinov2Model"):
        load_detector("dinov2", path=folders["clip"], device="cpu")
    with pytest.raises(ValueError, match="cannot be read as a CLIPVision"):
        load_detector("clip", path=tmp_path, device="cpu")


# --- pixels, one's own file, and what all have in common


class Corner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (
            F.conv2d(x.float(), torch.ones(5, 3, 3, 3))[:, :, 0, 0]
            + x.float().mean((1, 2, 3))[:, None]
        )


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "corner.pt"
    torch.jit.script(Corner()).save(str(path))
    return path


def test_pixels_are_means_over_areas() -> None:
    detector = load_detector("pixels", device="cpu")
    x = images(3, 16, 24)
    expected = x.float().view(3, 3, 8, 2, 8, 3).mean((3, 5)).flatten(1) / 255
    torch.testing.assert_close(detector(x), expected)
    same = images(2, 8, 8)
    assert torch.equal(detector(same), same.flatten(1) / 255)


def test_a_file_of_ones_own_is_known_by_its_name(own: Path, tmp_path: Path) -> None:
    detector = load_detector(str(own), device="cpu")
    x = images(2)
    assert (detector.name, detector.dim) == ("corner", 5)
    corner = x[:, :, :3, :3].float().sum((1, 2, 3)) + x.float().mean((1, 2, 3))
    torch.testing.assert_close(detector(x), corner[:, None].expand(2, 5))
    torch.jit.script(nn.Identity()).save(str(tmp_path / "same.pt"))
    with pytest.raises(ValueError, match=r"returns \(2, 3, 64, 64\)"):
        load_detector(str(tmp_path / "same.pt"), device="cpu")
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        load_detector(str(tmp_path / "none.pt"), device="cpu")


def detectors(folders: dict[str, Path], own: Path) -> Iterator[Detector]:
    for name in ("cifar10-small", "pixels", str(own)):
        yield load_detector(name, device="cpu")
    for name, folder in folders.items():
        yield load_detector(name, path=folder, device="cpu")


def test_no_detector_sees_the_batch(folders: dict[str, Path], own: Path) -> None:
    x = images(CHUNK + 3)
    for detector in detectors(folders, own):
        together = detector(x)
        parts = [x[:1], x[1:8], x[8:]]
        assert torch.equal(torch.cat([detector(p) for p in parts]), together), detector.name
        assert together.shape == (len(x), detector.dim) and together.dtype == torch.float32
        assert detector.both(x[:2]).spatial is None and detector.resize != ""


def test_inception_does_not_see_the_batch(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of two, for the price's sake; the chunk is what makes it so."""
    monkeypatch.setattr("metrics.detectors.CHUNK", 2)
    detector = load_detector("inception-pt", path=published, device="cpu")
    x = images(3)
    together = detector.both(x)
    assert together.spatial is not None and detector.spatial_id.dim == together.spatial.shape[1]
    for i in range(3):
        one = detector.both(x[i : i + 1])
        assert torch.equal(one.pooled, together.pooled[i : i + 1])
        assert torch.equal(one.spatial, together.spatial[i : i + 1])


def test_lists_of_detectors() -> None:
    assert parse_detectors("cifar10-small") == [("cifar10-small", None)]
    assert parse_detectors("inception-pt=a.pth, my/own.pt") == [
        ("inception-pt", Path("a.pth")),
        ("my/own.pt", None),
    ]
    for text in ("", "pixels,pixels"):
        with pytest.raises(ValueError, match="empty or repeats"):
            parse_detectors(text)
    with pytest.raises(ValueError, match="unknown detector 'vgg'"):
        parse_detectors("pixels,vgg")


def test_a_comma_may_be_part_of_a_detectors_path(tmp_path: Path) -> None:
    folder = tmp_path / "a, b"
    folder.mkdir()
    (folder / "mine,too.pt").touch()
    assert parse_detectors(f"pixels,dinov2={folder},{folder}/mine,too.pt") == [
        ("pixels", None),
        ("dinov2", folder),
        (f"{folder}/mine,too.pt", None),
    ]
