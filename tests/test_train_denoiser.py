"""tools.train_denoiser as people use it: whole runs, killed ones, two processes, nonsense."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from denoisers.cards import Card, cards
from denoisers.registry import ModelSource
from denoisers.training import report as training_report
from denoisers.training.batches import TrainingBatches
from denoisers.training.report import Reporter, loss_curve, sample_grid
from denoisers.training.trainer import Recipe, Trainer
from image_data.labelled import LabelledImages
from image_data.sources import ImageSource
from runtime import cli
from runtime.dist import World
from runtime.log import JsonLines, read_json_lines
from runtime.record import RunRecord
from tests import published
from tests.denoiser_problems import DHARIWAL, SONG, network, write_zip
from tests.processes import run_command, start, together
from tools import train_denoiser

#: Six steps, a report after every second.
SHORT = ("--kimg=0.048", "--batch=8", "--tick=16", "--lr=0.01", "--rampup_kimg=0.02", "--workers=0")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_zip(tmp_path / "train.zip", 20)
    write_zip(tmp_path / "valid.zip", 12, seed=1)
    for name, settings in (("song", SONG), ("dhariwal", DHARIWAL)):
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    return tmp_path


class Run:
    """``run("--lr=1", ...)`` trains into <folder>/out in this process."""

    def __init__(self, folder: Path, monkeypatch: Any, capsys: Any) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *arguments: str, out: str = "out", code: int = 0) -> Path:
        self.monkeypatch.setattr("sys.argv", self.command(*arguments, out=out))
        with pytest.raises(SystemExit) as ended:
            cli.run(train_denoiser.main)
        self.err = self.capsys.readouterr().err
        assert ended.value.code == code, self.err
        return self.folder / out

    def command(self, *arguments: str, out: str = "out") -> list[str]:
        own = dict(data="train.zip", valid="valid.zip", config="song.json", outdir=out)
        fixed = [f"--{k}={self.folder / v}" for k, v in own.items()]
        if any(a.startswith(("--init", "--like")) for a in arguments):
            del fixed[2]
        return ["train_denoiser.py", *fixed, "--device=cpu", *SHORT, *arguments]


@pytest.fixture
def run(files, monkeypatch, capsys) -> Run:
    monkeypatch.setattr(training_report, "GRID", 2)
    monkeypatch.setattr(
        training_report, "sample_grid", lambda trainer: np.zeros((2, 2, 3), "uint8")
    )
    return Run(files, monkeypatch, capsys)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Without what a clock measured."""
    found = read_json_lines(folder / "stats.jsonl")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_bit_equal(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    a, b = state(one), state(other)
    assert a["images"] == b["images"]
    for part in ("net", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    for mine, theirs in zip(*(s["optimizer"]["state"].values() for s in (a, b)), strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    written = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(written[0][k], written[1][k]) for k in written[0])


# What a run leaves behind


def test_a_run_leaves_a_model_its_card_and_its_figures(run, monkeypatch) -> None:
    monkeypatch.setattr(training_report, "sample_grid", sample_grid)
    folder = run(f"--config={run.folder / 'dhariwal.json'}", "--augment=0.2", "--seed=3")
    found = rows(folder)
    assert [row["step"] for row in found] == [16, 32, 48]
    assert all(0 < row["loss"] < 10 and 0 < row["valid"] < 10 for row in found)
    assert [row["lr"] for row in found] == pytest.approx([0.008, 0.01, 0.01])
    assert {row["nonfinite"] for row in found} == {0}

    (axes,) = loss_curve(found).axes
    for line, name in zip(axes.lines, ("loss", "valid"), strict=True):
        assert line.get_xydata().tolist() == [[row["step"], row[name]] for row in found]
    assert Image.open(folder / "loss.png").size == (600, 350)
    source = ModelSource("mine", model_path=str(folder / "model.safetensors"))
    model = source.load(World(0, 1, torch.device("cpu")))
    averaged = state(folder)["ema"]
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, averaged[name].half().float())
    x = torch.randn(2, 3, 8, 8)
    assert torch.isfinite(model.bind(torch.tensor([0, 3]))(x, torch.tensor(2.0)).x0).all()
    card = Card(name="mine", **json.loads((folder / "card.json").read_text()))
    assert card == source.card() and (card.label_dim, card.resolution) == (4, 8)
    assert (card.sigma_min, card.sigma_max) == (0.002, 80)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["images_seen"] == "48" and json.loads(metadata["config"]) == DHARIWAL
    record = RunRecord.from_json(metadata["record"])
    assert record == RunRecord.read(folder / "run.json") and record.options["augment"] == 0.2

    board = EventAccumulator(str(folder)).Reload()
    assert {"loss", "valid", "lr", "nonfinite"} < set(board.Tags()["scalars"])
    assert [e.value for e in board.Scalars("valid")] == pytest.approx([r["valid"] for r in found])
    pictures = board.Images("samples")
    assert [picture.step for picture in pictures] == [16, 32, 48]
    assert {Image.open(io.BytesIO(p.encoded_image_string)).size for p in pictures} == {(16, 16)}


def test_frequencies_are_not_rounded_with_the_weights(run) -> None:
    """Those of a Fourier embedding are as large as 2 pi 50: in float16 the phase would be lost."""
    settings = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2}
    (run.folder / "song.json").write_text(json.dumps(settings))
    folder = run("--kimg=0.008")
    name = "model.map_noise.freqs"
    assert torch.equal(load_file(folder / "model.safetensors")[name], state(folder)["ema"][name])


def test_weights_are_continued_and_images_are_counted_on(run) -> None:
    first = run("--kimg=0.016") / "model.safetensors"
    second = run(f"--init={first}", "--kimg=0.008", "--lr=1e-12", out="second")
    with safe_open(second / "model.safetensors", "pt") as file:
        assert file.metadata()["images_seen"] == "24"
    a, b = load_file(first), load_file(second / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)
    random = load_file(run("--kimg=0.008", "--lr=1e-12", out="random") / "model.safetensors")
    assert not all(torch.equal(a[k], random[k]) for k in a)


def test_a_known_card_gives_its_settings() -> None:
    recipe = Recipe(kimg=1, augment=0.1, seed=1)
    net, about = train_denoiser.first_network(None, None, "cifar10-small", recipe, "a.zip")
    card = cards()["cifar10-small"]
    assert about.config == {**card.config, "augment_dim": 9} and about.images_before == 0
    assert about.bottleneck == card.bottleneck == net.model.bottleneck
    again, _ = train_denoiser.first_network(None, None, "cifar10-small", recipe, "a.zip")
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    other, _ = train_denoiser.first_network(None, None, "cifar10-small", Recipe(kimg=1), "a.zip")
    assert not torch.equal(other.model.map_layer0.weight, net.model.map_layer0.weight)


def test_a_published_pickle_can_be_continued(tmp_path) -> None:
    settings = {k: v for k, v in DHARIWAL.items() if k != "class_name"}
    net = network(DHARIWAL)
    published_net = published.network("EDMPrecond", settings, net.state_dict())
    path = tmp_path / "edm.pkl"
    path.write_bytes(published.pickled(published.snapshot(published_net)))
    again, about = train_denoiser.first_network(path, None, None, Recipe(kimg=1), "a.zip")
    assert all(map(torch.equal, again.state_dict().values(), net.state_dict().values()))
    assert about.images_before == 0 and about.config["label_dim"] == 4


def test_an_image_is_known_by_its_number_alone(files) -> None:
    images = LabelledImages(files / "train.zip", 3, 8, 4)
    stream = TrainingBatches(images, 3)
    numbers = [27, 3, 41]
    batch = stream[numbers]
    with ImageSource(files / "train.zip") as source:
        for i, number in enumerate(numbers):
            (alone,) = zip(*stream[[number]], strict=True)
            assert all(torch.equal(one, of[i]) for one, of in zip(alone, batch, strict=True))
            index = stream.order(number)
            assert torch.equal(alone[0], torch.from_numpy(source.read(index).copy()))
            assert int(alone[1]) == index % 4
    assert batch.chance.unique().numel() > 600  # 3 x (192 + 14), hardly any of them equal
    assert not torch.equal(TrainingBatches(images, 4)[numbers].chance, batch.chance)


# Continued runs


def test_a_longer_run_continues_a_finished_one(run) -> None:
    whole = run("--rampup_kimg=0")
    part = run("--rampup_kimg=0", "--kimg=0.032", out="part")
    again = run("--rampup_kimg=0", "--kimg=0.032", out="part")
    assert run.err == f"already trained: {again}; give a larger --kimg to continue\n"
    assert_bit_equal(run("--rampup_kimg=0", out="part"), whole)
    assert part == again


class KilledTraining(BaseException):
    """Ends the process at once, as a kill would."""


def test_a_killed_run_continues_bit_equal(run, monkeypatch) -> None:
    """Between states, and between the figures of a report and its state; with dropout."""
    arguments = (f"--config={run.folder / 'dhariwal.json'}", "--augment=0.2", "--kimg=0.032")
    whole = run(*arguments, out="whole")
    places = [(Trainer, "step", 0), (Reporter, "write", 1), (Trainer, "save", 2)]
    places += [(JsonLines, "append", 1)]
    for owner, place, after in places:
        real, left = getattr(owner, place), iter(range(after))

        def stop(*given: Any, real: Any = real, left: Any = left) -> Any:
            if next(left, None) is None:
                raise KilledTraining
            return real(*given)

        out = f"{place}-{after}"
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, stop)
            with pytest.raises(KilledTraining):
                run(*arguments, out=out)
        torch.rand(1)
        assert_bit_equal(run(*arguments, out=out), whole)


def test_a_process_that_was_killed_continues_bit_equal(run) -> None:
    arguments = ("--kimg=0.096", "--dtype=bfloat16")
    command = run.command(*arguments, "--workers=1")[1:]
    victim = start(lambda: run_command(train_denoiser.main, *command), run.folder / "log")
    stats = run.folder / "out" / "stats.jsonl"
    while victim.is_alive() and not (stats.exists() and stats.read_text().count("\n") >= 1):
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert 0 <= state(run.folder / "out")["images"] < 96
    assert_bit_equal(run(*arguments), run(*arguments, out="whole"))


def test_two_processes_train_what_one_trains(run) -> None:
    """Classes, some of them withheld, augmentation, another order in every pass."""
    settings = {**DHARIWAL, "dropout": 0.0}
    (run.folder / "song.json").write_text(json.dumps(settings))
    arguments = ("--augment=0.2", "--dtype=float64")
    command = run.command(*arguments, out="two")
    done = together(lambda: run_command(train_denoiser.main, *command[1:]), run.folder)
    assert [rank.code for rank in done] == [0, 0], done
    one = run(*arguments, out="one")
    for a, b in zip(rows(run.folder / "two"), rows(one), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    a, b = state(run.folder / "two"), state(one)
    assert all(torch.allclose(a[p][k], b[p][k], 0, 1e-9) for p in ("net", "ema") for k in b[p])
    assert a["images"] == b["images"] == 48


# Nonsense


def broken(folder: Path) -> None:
    with zipfile.ZipFile(folder / "train.zip", "a") as file:
        file.writestr("100.png", b"no image")


NONE = "holds no JSON object of constructor settings: correct it"
LOSS = "the loss is for networks with EDM's preconditioning and Gaussian noise, not for "
#: options, what to do to the folder first, the sentence
REFUSED: dict[str, tuple[list[str], Callable[[Path], object] | None, str]] = {
    "no data": (["--data=nowhere.zip"], None, "nowhere.zip does not exist: pass a folder or a zip"),
    "large images": (
        [],
        lambda folder: write_zip(folder / "train.zip", 3, side=16),
        "000.png in {}/train.zip has 3x16x16 values where the network takes 3x8x8; convert the",
    ),
    "large held-out images": (
        [],
        lambda folder: write_zip(folder / "valid.zip", 3, side=16),
        "000.png in {}/valid.zip has 3x16x16 values where the network takes 3x8x8; convert the",
    ),
    "grey network": (
        [],
        lambda folder: (folder / "song.json").write_text(json.dumps({**SONG, "img_channels": 1})),
        "000.png in {}/train.zip has 3x8x8 values where the network takes 1x8x8; convert the",
    ),
    "no classes": (
        ["--config={}/dhariwal.json"],
        lambda folder: write_zip(folder / "train.zip", 3, classes=0),
        "{}/train.zip has no label for each of its images (",
    ),
    "too many classes": (
        ["--config={}/dhariwal.json"],
        lambda folder: write_zip(folder / "train.zip", 9, classes=5),
        "004.png in {}/train.zip is of class 4, but the network has 4 (0 to 3); give it the label",
    ),
    "broken image": (
        ["--workers=1"],
        broken,
        "image 100.png in {}/train.zip cannot be read (cannot identify image file",
    ),
    "two networks": (["--like=cifar10", "--init=x"], None, "choose the network to train: "),
    "unknown card": (["--like=imagenet256"], None, "--like imagenet256 is unknown; known: cif"),
    "other noise": (["--like=cifar10-vp"], None, LOSS + "VPPrecond: train an EDMPrecond"),
    "PFGM++": (
        [],
        lambda folder: (folder / "song.json").write_text(json.dumps({**SONG, "D": 128})),
        LOSS + "EDMPrecond with D, PFGM++: train an EDMPrecond",
    ),
    "no JSON": (["--config={}/train.zip"], None, "{}/train.zip is no text file: give a JSON"),
    "a number": ([], lambda folder: (folder / "song.json").write_text("7"), "{}/song.json " + NONE),
    "a slip": (
        [],
        lambda folder: (folder / "song.json").write_text(json.dumps({**SONG, "blocks": 1})),
        "{}/song.json has settings that make no network: SongSettings.__init__() got an unexp",
    ),
    "no weights": (["--init={}/nothing"], None, "{}/nothing: No such file or directory"),
    "not told": (
        ["--augment=0.1"],
        lambda folder: (folder / "song.json").write_text(json.dumps({**SONG, "augment_dim": 3})),
        "--augment 0.1 needs a network with augment_dim 9, not 3; leave it out, or give --config",
    ),
    "not finite": (["--lr=1e30"], None, "the loss is nan after 16 images; start again in another"),
    "no time": (["--kimg=0"], None, "--kimg is 0.0; give a number above 0"),
    "a strange type": (["--dtype=int8"], None, "--dtype 'int8' is unknown; known: float32,"),
    "somebody's folder": (
        ["--outdir={}"],
        None,
        "{} is not empty and holds no state.pt; choose another --outdir",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nonsense_is_refused_in_one_sentence(run, what: str) -> None:
    options, prepare, sentence = REFUSED[what]
    if prepare is not None:
        prepare(run.folder)
    before = {p: p.stat().st_mtime_ns for p in run.folder.iterdir()}
    run(*(option.format(run.folder) for option in options), code=1)
    *others, last = run.err.splitlines()
    assert last.startswith("error: " + sentence.format(run.folder)), run.err
    assert all(not line or line.startswith("training: ") for line in others)  # the progress bar
    if what in ("broken image", "not finite"):  # found on the way: the state can still be read
        assert state(run.folder / "out")["images"] < 48
    else:
        assert {p: p.stat().st_mtime_ns for p in run.folder.iterdir()} == before


def test_a_folder_of_another_run_is_left_alone(run) -> None:
    folder = run("--kimg=0.008")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    run("--kimg=0.016", "--lr=0.5", code=1)
    assert f"{folder / 'state.pt'} is of a run with lr 0.01, not 0.5; repeat that" in run.err
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
