"""A killed pass goes on where it was, on any number of ranks, and ends as if nothing had been."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from commands import fid
from evaluation import image_metrics, passes
from evaluation.passes import ImageStream, gather_features
from metrics.detectors import load_detector
from metrics.summary import Collector, FeatureSummary, Requirements
from runtime import cli
from runtime.dist import World
from tests.processes import run_command, together
from tests.toy_detector import images, toy

HERE = World(0, 1, torch.device("cpu"))
NEEDS = Requirements(20, spatial=True)


class Source:
    """50 images in batches of 8, of which the batch ``fatal`` never comes."""

    def __init__(self, fatal: int = 99, name: str = "x") -> None:
        self.fatal, self.name, self.read = fatal, name, 0

    def stream(self) -> ImageStream:
        def batches(start: int, bar: Any) -> Iterator[Tensor]:
            for i, batch in enumerate(images(50)[start:].split(8), start // 8):
                if i == self.fatal:
                    raise KeyboardInterrupt
                self.read += len(batch)
                yield batch

        return ImageStream(self.name, 50, 8, {"images": self.name}, batches)


def summary(
    source: Source, cache: Path, needs: Requirements = NEEDS, seed: int = 0
) -> FeatureSummary:
    with gather_features(source.stream(), [toy(), toy()], needs, seed, HERE, cache) as (_, made):
        return made


def same(one: FeatureSummary, two: FeatureSummary) -> bool:
    parts = [(s.moments.n, s.moments.mean, s.moments.cov, s.spatial.cov) for s in (one, two)]
    equal = all(np.array_equal(a, b) for a, b in zip(*parts, strict=True))
    return equal and torch.equal(one.features, two.features)


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SAVE_EVERY", -1.0)


@pytest.mark.usefixtures("always")
def test_a_killed_pass_goes_on_and_ends_bit_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = summary(Source(), tmp_path / "other")
    assert whole.moments.n == 50 and files(tmp_path) == []
    for fatal in (3, 5):  # killed twice
        killed = Source(fatal)
        with pytest.raises(KeyboardInterrupt):
            summary(killed, tmp_path)
        assert len(files(tmp_path)) == 1
    assert killed.read == 16  # 24 were there already
    last = Source()
    assert same(summary(last, tmp_path), whole) and last.read == 10
    assert "continuing after 40 of 50 images" in capsys.readouterr().err
    assert files(tmp_path) == []


@pytest.mark.usefixtures("always")
def test_a_kill_after_the_pass_and_before_the_results_costs_no_pass(tmp_path: Path) -> None:
    stream = Source().stream()
    with (
        pytest.raises(KeyboardInterrupt),
        gather_features(stream, [toy(), toy()], NEEDS, 0, HERE, tmp_path) as (whole, _),
    ):
        raise KeyboardInterrupt
    again = Source()
    assert same(summary(again, tmp_path), whole) and again.read == 0
    assert files(tmp_path) == []


@pytest.mark.usefixtures("always")
def test_another_pass_does_not_take_it_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        summary(Source(3), tmp_path)
    for source, needs, seed in [
        (Source(name="y"), NEEDS, 0),
        (Source(), Requirements(19, True), 0),
        (Source(), NEEDS, 1),
    ]:
        assert summary(source, tmp_path, needs, seed).moments.n == 50 and source.read == 50
    (kept,) = files(tmp_path)
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the state of an interrupted pass, cannot be"):
        summary(Source(), tmp_path)


@pytest.mark.usefixtures("always")
def test_a_cache_that_cannot_be_written_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    made = summary(Source(), tmp_path / "file")
    err = capsys.readouterr().err
    assert same(made, summary(Source(), tmp_path / "other"))
    assert err.count("note: the state of this pass cannot be kept in") == 1  # once, not every time
    assert "if it is interrupted, it begins anew" in err


@pytest.mark.usefixtures("always")
def test_a_state_that_cannot_be_removed_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".npz":
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert summary(Source(), tmp_path).moments.n == 50
    assert "cannot be removed (Permission denied)" in capsys.readouterr().err


def test_a_short_pass_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        summary(Source(6), tmp_path)
    assert files(tmp_path) == []


# --- fid.py, and several processes


def dying(batches: int, arguments: list[object]) -> None:
    """``fid.py ref`` that dies after so many batches, and keeps what it has after each."""
    left, update = iter(range(batches)), Collector.update

    def mortal(*given: Any) -> None:
        if next(left, None) is None:
            raise ValueError("killed")
        update(*given)

    setattr(Collector, "update", mortal)  # noqa: B010
    passes.SAVE_EVERY, cli.HEAD_START = -1.0, 0.0
    run_command(fid.main, "ref", *arguments)


def ref(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["fid.py", "ref", *map(str, arguments)])
        cli.run(fid.main)
    text = capsys.readouterr().err
    assert end.value.code == 0, text
    return text


def test_one_process_two_processes_and_one_finish_a_pass_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "x").mkdir()
    for i, image in enumerate(images(50).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    arguments = ["--data", folder, "--detector", "pixels", "--features", 20, "--device", "cpu"]
    ref(capsys, *arguments, "--dest", tmp_path / "whole.npz", "--cache-dir", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    both = [*arguments, "--batch", 8, "--cache-dir", tmp_path / "b", "--dest", tmp_path / "r.npz"]
    for processes, said in ((1, ""), (2, "after 16 of 50")):  # 2 batches of 8, then 2
        died = together(lambda: dying(2, both), tmp_path, processes)
        assert all(rank.code == 1 and "error: killed" in rank.err for rank in died), died
        assert said in died[0].err
    assert "continuing after 32 of 50 images" in ref(capsys, *both)
    assert files(tmp_path / "b") == []
    detector = load_detector("pixels", device="cpu")
    one, two = (FeatureSummary.load(tmp_path / f"{name}.npz", detector) for name in ("whole", "r"))
    assert two.moments.n == 50 and torch.equal(one.features, two.features)
    assert np.abs(one.moments.mean - two.moments.mean).max() < 1e-10
    assert np.abs(one.moments.cov - two.moments.cov).max() < 1e-10


def test_changed_images_are_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over a folder is known by the names, sizes and times of its files."""
    (folder := tmp_path / "x").mkdir()
    for i, image in enumerate(images(9).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")
    monkeypatch.setattr(passes, "SAVE_EVERY", -1.0)
    common = ["--data", folder, "--detector", "pixels", "--device", "cpu", "--cache-dir", tmp_path]
    monkeypatch.setattr(
        image_metrics, "save_statistics", lambda *_: 1 / 0
    )  # dies with the pass done
    with pytest.raises(ZeroDivisionError):
        ref(capsys, *common, "--dest", tmp_path / "r.npz")
    capsys.readouterr()
    monkeypatch.undo()
    Image.new("RGB", (16, 16), "red").save(folder / "4.png")
    assert "continuing" not in ref(capsys, *common, "--dest", tmp_path / "r.npz")
    assert len(files(tmp_path / "passes")) == 1  # that of the old images
