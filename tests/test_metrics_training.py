"""tools.train_detector: it learns, it resumes bit-equal, its augmentation is what it says."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import pad

from metrics.classifiers import NETWORKS, load_classifier
from metrics.cnn import CNNConfig, FeatureClassifier
from metrics.detectors import load_detector
from runtime.dist import World, world
from runtime.errors import UserError
from tests.processes import together
from tools import train_detector
from tools.train_detector import (
    DetectorRecipe,
    augment,
    first_model,
    fit,
    learning_rate,
    load_labelled,
    main,
)

PLAN = DetectorRecipe(epochs=3, batch=8, lr=0.05, momentum=0.9, weight_decay=5e-4, smoothing=0.1,
            warmup=0.2, seed=0, bf16=False, shift=2, cutout=0, init=None)  # fmt: skip
FAST = replace(PLAN, lr=0.3)
CPU = World(0, 1, torch.device("cpu"))


def dataset(path: Path, count: int, seed: int) -> Path:
    """Noise with horizontal (class 0) or vertical (class 1) stripes."""
    rng = np.random.default_rng(seed)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            stripes = np.tile(60 * (-1) ** np.arange(32)[:, None], (1, 32))
            label = i % 2
            clean = 128 + (stripes.T if label else stripes)[:, :, None]
            noisy = clean + 40 * rng.standard_normal((32, 32, 3))
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{i:03}.png", buffer.getvalue())
            labels.append([f"{i:03}.png", label])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def fresh(train: tuple[torch.Tensor, ...], network: str = "cnn") -> FeatureClassifier:
    torch.manual_seed(0)
    model = NETWORKS[network](CNNConfig((8, 8, 16), 2))
    model.prepare_(train[0])
    return model


def scalars(folder: Path, name: str) -> list:
    """What TensorBoard shows."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return board.Scalars(name)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_learns_and_the_file_is_a_detector(network: str, tmp_path: Path) -> None:
    train, test = dataset(tmp_path / "a.zip", 64, 0), dataset(tmp_path / "b.zip", 20, 1)
    dest = tmp_path / "d.safetensors"
    arguments = f"--data {train} --test {test} --dest {dest} --channels 8 8 16 --epochs 6"
    arguments += f" --network {network}"
    done = CliRunner().invoke(main, [*arguments.split(), "--batch", "16", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    model, record = load_classifier(dest)
    assert isinstance(model, NETWORKS[network]) and record["network"] == network
    assert record["test_accuracy"] == 1.0 and "test accuracy 100.00 %" in done.output
    assert record["images_seen"] == 6 * 64 and record["feature_width"] == 16
    assert load_detector("cifar10-small", path=dest, device="cpu").dim == 16


@pytest.mark.parametrize("network", NETWORKS)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_labelled(dataset(tmp_path / "a.zip", 24, 0))
    whole = fresh(train, network)
    fit(whole, train, train, PLAN, tmp_path / "whole.state", CPU)

    scores = iter([0.5])

    def killed(*_: object) -> float:
        """In the second epoch."""
        for score in scores:
            return score
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_detector, "accuracy", killed)
        fit(fresh(train, network), train, train, PLAN, tmp_path / "torn.state", CPU)
    resumed = fresh(train, network)
    with torch.no_grad():
        resumed.head.weight.zero_()  # all of it has to come from the state
    fit(resumed, train, train, PLAN, tmp_path / "torn.state", CPU)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    saved = torch.load(tmp_path / "torn.state", weights_only=True)
    assert saved["epochs"] == PLAN.epochs
    assert [e.step for e in scalars(tmp_path / "torn.state.logs", "loss")] == [1, 2, 3]
    other = DetectorRecipe(**(vars(PLAN) | {"lr": 0.1}))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        fit(fresh(train, network), train, train, other, tmp_path / "torn.state", CPU)
    (another,) = NETWORKS.keys() - {network}
    with pytest.raises(UserError, match=r"torn.state does not fit this run \('model'"):
        fit(fresh(train, another), train, train, PLAN, tmp_path / "torn.state", CPU)


@pytest.mark.parametrize("lr", ["nan", "inf", "1e30"])
def test_a_rate_out_of_range_writes_no_detector(tmp_path: Path, lr: str) -> None:
    data, dest = dataset(tmp_path / "a.zip", 24, 0), tmp_path / "d.safetensors"
    arguments = f"--data {data} --test {data} --dest {dest} --channels 8 8 16 --epochs 2 --batch 8"
    done = CliRunner().invoke(main, [*arguments.split(), f"--lr={lr}", "--device=cpu"])
    assert done.exit_code == 2 and "'--lr'" in done.output
    assert not dest.exists() and not dest.with_name(dest.name + ".state").exists()


def test_a_training_that_diverges_leaves_no_state(tmp_path: Path) -> None:
    train = load_labelled(dataset(tmp_path / "a.zip", 24, 0))
    plan = replace(PLAN, lr=1e30)
    with pytest.raises(UserError, match="diverged in epoch 1.*smaller --lr"):
        fit(fresh(train), train, train, plan, tmp_path / "t.state", CPU)
    assert not (tmp_path / "t.state").exists()


def fit_share(folder: Path, pixels: torch.Tensor, network: str) -> None:
    with world("cpu") as here:
        model, data = fresh((pixels,), network), equal_images(pixels[0])
        fit(model, data, data, FAST, folder / "two.state", here)
        torch.save(model.state_dict(), folder / f"{here.rank}.pt")


def equal_images(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One image under two names, so that every share of a batch has its mean and deviation."""
    return image.expand(23, 3, 32, 32), (torch.arange(23) % 5 == 0).long()


@pytest.mark.parametrize("network", NETWORKS)
def test_two_processes_train_what_one_trains(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_detector, "augment", lambda images, *_: images)
    pixels = load_labelled(dataset(tmp_path / "a.zip", 16, 0))[0]
    alone = fresh((pixels,), network)
    start = {name: value.clone() for name, value in alone.state_dict().items()}
    data = equal_images(pixels[0])
    fit(alone, data, data, FAST, tmp_path / "one.state", CPU)
    done = together(lambda: fit_share(tmp_path, pixels, network), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in alone.state_dict().items():
        if not name.endswith("running_var"):  # unbiased, so it depends on the size of the share
            torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4, msg=name)
        if "running" not in name:
            assert torch.equal(one[name], two[name]), name
    assert (alone.head.weight - start["head.weight"]).abs().max() > 1e-2
    figures = (scalars(tmp_path / f"{n}.state.logs", "loss") for n in ("one", "two"))
    for a, b in zip(*figures, strict=True):
        assert (a.step, a.value) == (b.step, pytest.approx(b.value, rel=1e-4))


def test_every_augmented_image_is_a_shifted_maybe_mirrored_one() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
    padded = pad(images.float(), (2, 2, 2, 2), mode="reflect").byte()
    seen = set()
    for image, source in zip(
        augment(images, PLAN, torch.Generator().manual_seed(0)), padded, strict=True
    ):
        candidates = {
            (dy, dx, mirror): (shifted.flip(-1) if mirror else shifted)
            for dy in range(5)
            for dx in range(5)
            for mirror in (False, True)
            for shifted in [source[:, dy : dy + 32, dx : dx + 32]]
        }
        found = [key for key, value in candidates.items() if torch.equal(value, image)]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 50  # 25 shifts, mirrored or not
    again = augment(images, PLAN, torch.Generator().manual_seed(0))
    assert torch.equal(again, augment(images, PLAN, torch.Generator().manual_seed(0)))


def test_cutout_is_one_square_anywhere_in_the_image() -> None:
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    cut = augment(images, replace(PLAN, cutout=10), torch.Generator().manual_seed(0))
    assert torch.equal(cut[:, :1].expand_as(cut), cut) and set(cut.unique().tolist()) == {0, 128}
    square = cut[:, 0] == 128
    assert bool((square.sum((1, 2)) == 100).all())
    for axis in (1, 2):
        assert bool((square.any(axis).sum(1) == 10).all())
        corner = square.any(axis).int().argmax(1)
        share = corner.bincount(minlength=23) / len(corner)
        assert len(share) == 23 and float((share - 1 / 23).abs().max()) < 5 * (1 / 23 / 2000) ** 0.5


@pytest.mark.parametrize("network", NETWORKS)
def test_a_detector_is_trained_further(network: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "a.zip", 24, 0)
    options = f"--data {data} --test {data} --batch 8 --device cpu --threads 1 --lr 0.001".split()
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    for extra in (
        ["--dest", str(first), "--channels", "8", "8", "16", "--epochs", "2", "--network", network],
        ["--dest", str(second), "--init", str(first), "--epochs", "1"],
    ):
        done = CliRunner().invoke(main, [*options, *extra])
        assert done.exit_code == 0, done.output
    (a, earlier), (b, record) = load_classifier(first), load_classifier(second)
    assert record["images_seen"] == 3 * 24 and record["before"] == earlier
    assert type(a) is type(b) is NETWORKS[network]
    assert torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std)
    fixed = {"stem.weight"} if network == "cnn" else set()
    assert all(torch.equal(a.get_parameter(name), b.get_parameter(name)) for name in fixed)
    moved = (a.head.weight - b.head.weight).abs().max()
    assert 0 < float(moved) < 0.05  # a fresh head would differ by about 0.25
    b = first_model(first, None, (4, 4, 4), 0, load_labelled(data))[0]
    learns = {name for name, value in b.named_parameters() if value.requires_grad}
    assert {name for name, _ in b.named_parameters()} - learns == fixed
    done = CliRunner().invoke(
        main, [*options, "--dest", str(second), "--init", str(first), f"--network={network}"]
    )
    assert isinstance(done.exception, UserError) and "leave it out with --init" in str(
        done.exception
    )


def test_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(PLAN, p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[20] == PLAN.lr and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10] == pytest.approx(PLAN.lr / 2) and rates[60] == pytest.approx(PLAN.lr / 2)
    assert np.all(np.diff(rates[:21]) > 0) and np.all(np.diff(rates[20:]) < 0)
