"""tools/train_detector.py: it learns, it resumes bit-equal, its augmentation is what it says."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn.functional import pad

from metrics.cnn import CNNConfig, SmallCNN, load_cnn
from metrics.detectors import load_detector
from tools import train_detector
from tools.train_detector import Plan, augment, fit, learning_rate, load_labelled, main

PLAN = Plan(epochs=3, batch=8, lr=0.05, momentum=0.9, weight_decay=5e-4, smoothing=0.1,
            warmup=0.2, seed=0, bf16=False)  # fmt: skip
CPU = torch.device("cpu")


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


def fresh(train: tuple[torch.Tensor, torch.Tensor]) -> SmallCNN:
    torch.manual_seed(0)
    model = SmallCNN(CNNConfig((8, 8, 16), 2))
    model.whiten_(train[0])
    return model


def test_it_learns_and_the_file_is_a_detector(tmp_path: Path) -> None:
    train, test = dataset(tmp_path / "a.zip", 64, 0), dataset(tmp_path / "b.zip", 20, 1)
    dest = tmp_path / "d.safetensors"
    arguments = f"--data {train} --test {test} --dest {dest} --channels 8 8 16 --epochs 4"
    done = CliRunner().invoke(main, [*arguments.split(), "--batch", "16", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    _, record = load_cnn(dest)
    assert record["test_accuracy"] == 1.0 and "test accuracy 100.00 %" in done.output
    assert record["images_seen"] == 4 * 64 and record["feature_width"] == 16
    assert load_detector("cifar10-small", path=dest, device="cpu").dim == 16


def test_a_killed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = load_labelled(dataset(tmp_path / "a.zip", 24, 0))
    whole = fresh(train)
    fit(whole, train, train, PLAN, tmp_path / "whole.state", CPU)

    def killed(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_detector, "accuracy", killed)
        fit(fresh(train), train, train, PLAN, tmp_path / "torn.state", CPU)
    resumed = fresh(train)
    with torch.no_grad():
        resumed.head.weight.zero_()  # all of it has to come from the state
    fit(resumed, train, train, PLAN, tmp_path / "torn.state", CPU)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    other = Plan(**(vars(PLAN) | {"lr": 0.1}))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        fit(fresh(train), train, train, other, tmp_path / "torn.state", CPU)


def test_every_augmented_image_is_a_shifted_maybe_mirrored_one() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (600, 3, 32, 32), generator=generator, dtype=torch.uint8)
    padded = pad(images.float(), (2, 2, 2, 2), mode="reflect").byte()
    seen = set()
    for image, source in zip(
        augment(images, torch.Generator().manual_seed(0)), padded, strict=True
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
    again = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(again, augment(images, torch.Generator().manual_seed(0)))


def test_learning_rate_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(PLAN, p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == 0 and rates[20] == PLAN.lr and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10] == pytest.approx(PLAN.lr / 2) and rates[60] == pytest.approx(PLAN.lr / 2)
    assert np.all(np.diff(rates[:21]) > 0) and np.all(np.diff(rates[20:]) < 0)
