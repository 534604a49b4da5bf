"""Masks of PDS: closed forms, files, refusals, the command line, the bundled ones."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from image_data.sources import image_batches
from pds.masks import BUNDLED, fit, load_mask
from pds.operators import mirrored
from runtime import cli
from runtime.errors import UserError
from runtime.record import RunRecord
from tools.fit_masks import main

SHAPE = (3, 4, 6)


def pictures(count: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images as files."""
    path = tmp_path / "images"
    path.mkdir()
    for i, image in enumerate(pictures()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fit_masks", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.run(main)
    return left.value.code if isinstance(left.value.code, int) else 0


def test_masks_are_the_mean_powers_of_images_in_0_to_1() -> None:
    images = pictures()
    masks = fit(images.split(3))
    x = images.double() / 255
    cosine = torch.tensor(
        [[np.exp(-2j * np.pi * (k * i / 4 + m * j / 6)) for i in range(4) for j in range(6)]
         for k in range(4) for m in range(6)]
    )  # fmt: skip
    power = (x.flatten(2).to(cosine.dtype) @ cosine.T).abs().square().mean(0).reshape(SHAPE)
    assert (masks.freq - (1 + power).log()).abs().max() < 1e-12
    assert (masks.space - x.square().mean(0)).abs().max() < 1e-15
    assert masks.n == 7 and torch.equal(masks.freq, mirrored(masks.freq))


def test_a_constant_image_has_power_at_the_zero_frequency_alone() -> None:
    masks = fit([torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)])
    assert float(masks.freq[0, 0, 0]) == pytest.approx(np.log1p((0.2 * 16) ** 2), rel=1e-12)
    assert masks.freq.flatten()[1:].abs().max() < 1e-12
    assert (masks.space - 0.04).abs().max() < 1e-15


def test_batches_do_not_matter() -> None:
    images = pictures()
    whole, parts = fit([images]), fit(images.split(1))
    assert (whole.freq - parts.freq).abs().max() < 1e-12
    assert (whole.space - parts.space).abs().max() < 1e-15


def test_black_images_raise() -> None:
    with pytest.raises(UserError, match="all 0 images"):
        fit([])
    with pytest.raises(UserError, match="all 3 images are black"):
        fit([torch.zeros(3, 1, 2, 2, dtype=torch.uint8)])


def test_what_is_fitted_loads_and_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dest = tmp_path / "masks"
    command = ("--data", folder, "--dest", dest, "--batch", 2)
    assert run(monkeypatch, *command, "-n") == 0
    assert not dest.exists() and json.loads(capsys.readouterr().out)["plan"] == {"images": 7}
    assert run(monkeypatch, *command) == 0
    assert sorted(p.name for p in dest.iterdir()) == ["freq.npy", "run.json", "space.npy"]
    truth = fit([pictures()])
    for kind, wanted in (("freq", truth.freq), ("space", truth.space)):
        path = dest / f"{kind}.npy"
        assert np.load(path, allow_pickle=False).shape == (1, *SHAPE)  # as published
        mask = load_mask(kind, str(path), "mine", SHAPE)
        assert mask is not None and (mask.values - wanted).abs().max() < 1e-6 * wanted.max()
        assert mask.describe()["name"] == path.name
    assert RunRecord.read(dest / "run.json").options["data"] == str(folder)
    first = (dest / "freq.npy").read_bytes()
    assert run(monkeypatch, *command[:-1], 5) == 0
    assert (dest / "freq.npy").read_bytes() == first


def test_a_part_of_the_images_is_drawn_by_the_seed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 2):
        dest = tmp_path / str(seed)
        assert run(monkeypatch, "--data", folder, "--dest", dest, "--num", 3,
                   "--seed", seed) == 0  # fmt: skip
    wanted = fit(image_batches(folder, 7, num=3, seed=2)).space.float().numpy()
    masks = [np.load(tmp_path / d / "space.npy", allow_pickle=False)[0] for d in ("0", "2")]
    assert np.array_equal(masks[1], wanted) and not np.array_equal(*masks)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data", "nowhere"), "nowhere does not exist"),
        (("--data", "images", "--num", "9"), "9 images were asked for, found 7"),
        (("--data", "torn"), "0.png in torn"),
    ],
)
def test_what_cannot_be_fitted_leaves_nothing(
    arguments: tuple, sentence: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("0.png", "1.png"):
        (torn / name).write_bytes((folder / name).read_bytes()[:60])
    assert run(monkeypatch, *arguments, "--dest", "out") == 1
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def uneven() -> np.ndarray:
    return np.arange(1, 1 + np.prod(SHAPE), dtype=np.float64).reshape(SHAPE)


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        ("freq", np.ones((3, 4, 4)), "3x4x4, but 'mine' needs 3x4x6"),
        ("space", np.ones((2, *SHAPE)), "2x3x4x6"),
        ("space", -np.ones(SHAPE), "negative"),
        ("space", np.zeros(SHAPE), "all 0"),
        ("freq", np.full(SHAPE, np.nan), "not finite"),
        ("freq", uneven(), "differ by 0.22"),
        ("freq", np.array(["a"]), "not an array of real numbers"),
        ("freq", np.array([None, 1]), "cannot be read"),
    ],
)
def test_invalid_masks_raise(kind: str, values: np.ndarray, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    np.save(path, values)
    with pytest.raises(UserError) as caught:
        load_mask(kind, str(path), "mine", SHAPE)
    message = str(caught.value)
    assert sentence in message and f"--{kind}_mask_path" in message and "\n" not in message
    assert "python -m tools.fit_masks" in message


def test_unreadable_files_raise(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "several.npz", a=np.ones(SHAPE))
    for name, reason in (
        ("absent.npy", "No such file"),
        ("text.npy", "cannot be read"),
        ("several.npz", "cannot be read"),
    ):
        with pytest.raises(UserError, match=reason):
            load_mask("space", str(tmp_path / name), "mine", SHAPE)
    with pytest.raises(UserError, match="'mine' has no bundled masks"):
        load_mask("freq", "bundled", "mine", SHAPE)
    assert load_mask("freq", "none", "mine", SHAPE) is None


def test_a_mask_that_is_even_up_to_rounding_is_taken(tmp_path: Path) -> None:
    values = uneven()
    even = values + mirrored(torch.from_numpy(values)).numpy()
    np.save(tmp_path / "m.npy", (even * (1 + 1e-5 * uneven() / uneven().max())).astype(np.float32))
    assert load_mask("freq", str(tmp_path / "m.npy"), "mine", SHAPE) is not None
    np.save(tmp_path / "s.npy", uneven())
    assert load_mask("space", str(tmp_path / "s.npy"), "mine", SHAPE) is not None


def test_the_bundled_masks_are_those_of_the_training_images(golden) -> None:
    """Those that NumPy's own transform makes of all 50,000, both rounded to float32."""
    assert set(BUNDLED.values()) == {"cifar10"}
    for kind in ("freq", "space"):
        mask = load_mask(kind, "bundled", "cifar10-small", (3, 32, 32))
        assert mask is not None
        assert (mask.values - torch.tensor(golden("pds_masks")[kind])).abs().max() < 2e-6
