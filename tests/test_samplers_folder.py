"""Folders of samples: complete images, continued runs, and errors for other settings."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import UserError
from runtime.images import to_uint8
from runtime.options import Json
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from samplers.folder import Folder, is_whole
from samplers.generate import SampleBatch
from solvers.types import Trajectory


def record(seeds: str = "0-3", **plan: Json) -> RunRecord:
    options = {"seeds": seeds, "batch": 4, "class": None}
    return RunRecord.make(
        "sample", options, {"sha256": "0"}, {"num_steps": 6, "nfe_metered": None, **plan}
    )


def batch(seeds: tuple[int, ...], times: int = 3) -> SampleBatch:
    generator = torch.Generator().manual_seed(seeds[0])
    x = torch.randn(times, len(seeds), 3, 4, 4, generator=generator)
    t = torch.linspace(2, 0, times)
    return SampleBatch(seeds, x[-1], 5, x[-1], Trajectory(t, x, 5))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_names(tmp_path: Path) -> None:
    flat, deep = Folder(tmp_path / "a.b"), Folder(tmp_path / "a.b", subdirs=True, inters=True)
    assert flat.image(1) == tmp_path / "a.b" / "000001.png"
    assert deep.image(1) == tmp_path / "a.b" / "000000" / "000001.png"
    assert deep.image(12345) == tmp_path / "a.b" / "012000" / "012345.png"
    assert deep.strip(12345) == tmp_path / "a.b-inters" / "012000" / "012345.png"
    assert deep.image(7654321) == tmp_path / "a.b" / "7654000" / "7654321.png"


def test_only_a_whole_png_counts(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.save(batch((0, 1, 2, 3, 4)))
    assert folder.missing(range(6)) == [5]
    whole = folder.image(1).read_bytes()
    folder.image(1).write_bytes(whole[:-1])
    folder.image(2).write_bytes(b"")
    folder.image(3).write_bytes(b"x" + whole[1:])
    folder.image(4).unlink()
    assert folder.missing(range(6)) == [1, 2, 3, 4, 5]
    assert is_whole(folder.image(0)) and not is_whole(tmp_path)


def test_a_missing_film_strip_counts_as_missing(tmp_path: Path) -> None:
    plain, stripped = Folder(tmp_path / "x"), Folder(tmp_path / "x", inters=True)
    plain.save(batch((0, 1)))
    assert plain.missing([0, 1]) == [] and stripped.missing([0, 1]) == [0, 1]
    stripped.save(batch((0, 1)))
    assert stripped.missing([0, 1]) == []


def test_pictures_show_the_samples_in_their_places(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x", inters=True)
    made = batch((8, 3, 5))
    folder.save(made)
    seeds, order = [3, 8, 5], [1, 0, 2]
    grid = pixels(folder.save_grid(seeds))
    strip = pixels(folder.save_strips(seeds))
    assert made.trajectory is not None
    frames = [to_uint8(state) for state in made.trajectory.x]
    assert grid.shape == (8, 8, 3) and strip.shape == (12, 12, 3)
    for place, i in enumerate(order):
        row, column = divmod(place, 2)
        cell = grid[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert np.array_equal(cell, frames[-1][i])
        for time, states in enumerate(frames):  # a row per sample, a column per time
            cell = strip[4 * place : 4 * place + 4, 4 * time : 4 * time + 4]
            assert np.array_equal(cell, states[i])
    pictures = {path.name for path in tmp_path.iterdir()} - {"x", "x-inters"}
    assert pictures == {"x-grid.png", "x-inters.png"}  # beside the samples, not among them


def test_grayscale_goes_through_the_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x")
    made = batch((0,))
    folder.save(made._replace(images=made.x[:, :1]))
    grid = pixels(folder.save_grid([0]))
    assert np.array_equal(grid, to_uint8(made.x[:, :1])[0, :, :, 0])


def test_a_folder_goes_on_and_adds_up_its_seeds(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    first, missing = folder.open(record("0-3"), [0, 1, 2, 3])
    assert missing == [0, 1, 2, 3] and RunRecord.read(tmp_path / "run.json") == first
    folder.save(batch((0, 1)))
    second, missing = folder.open(record("3-7"), [3, 4, 5, 6, 7])
    assert missing == [3, 4, 5, 6, 7] and second.options["seeds"] == "0-7"
    folder.save(batch((2, 3, 4, 5, 6, 7)))
    folder.close(second, 5)
    third, missing = folder.open(record("20,0-3"), [20, 0, 1, 2, 3])
    assert missing == [20] and third.options["seeds"] == "0-7,20"
    assert third.plan["nfe_metered"] == 5  # of the existing images


def test_seeds_that_were_given_with_spaces_are_kept(tmp_path: Path) -> None:
    Folder(tmp_path).open(record("0 - 2, 8"), [0, 1, 2, 8])
    later, _ = Folder(tmp_path).open(record("9"), [9])
    assert later.options["seeds"] == "0-2,8-9"


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    opened, _ = folder.open(record(), [0, 1, 2, 3])
    folder.save(batch((0, 1, 2, 3)))
    assert folder.open(record(), [0, 1, 2, 3])[1] == [0]  # killed before its last line: meter one
    folder.close(opened, 5)
    before = (tmp_path / "run.json").stat().st_mtime_ns
    assert folder.open(record(), [0, 1, 2, 3])[1] == []
    assert (tmp_path / "run.json").stat().st_mtime_ns == before


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "x")
    folder.open(record(), [0])
    folder.save(batch((0,)))
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    other_model = dataclasses.replace(record(), model={"sha256": "1"})
    other_class = dataclasses.replace(record(), options={**record().options, "class": 3})
    for other, words in (
        (record(num_steps=7), "plan.num_steps: 7 != 6"),
        (other_model, r"model.sha256: '1' != '0'"),
        (other_class, r"options.class: 3 != None"),
        (record(num_steps=7, a=1, b=2), r"plan.a: 1 != None; plan.b: 2 != None and 1 more\)"),
    ):
        with pytest.raises(UserError, match=words):
            folder.open(other, [0, 1])
    larger = dataclasses.replace(record(), options={"seeds": "0", "batch": 9, "class": None})
    assert folder.open(larger, [0])[1] == [0]  # another batch makes the same images
    (folder.path / "run.json").write_bytes(before[folder.path / "run.json"])
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


def test_images_without_a_record_raise(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.save(batch((2,)))
    with pytest.raises(UserError, match="no run.json"):
        folder.open(record(), [0, 1, 2, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["000002.png"]


def test_seeds_of_several_runs_are_recorded(tmp_path: Path) -> None:
    """However they were written, and also where nothing is missing."""
    folder = Folder(tmp_path / "out")
    for asked, recorded in (
        ("0-3, 5", "0-3, 5"),
        ("7 - 8", "0-3,5,7-8"),
        ("0-3", "0-3,5,7-8"),
        ("2-3,9", "0-3,5,7-9"),
    ):
        now, missing = folder.open(record(asked), parse_seeds(asked))
        if missing:
            folder.save(batch(tuple(missing)))
            folder.close(now, 5)
        assert RunRecord.read(tmp_path / "out" / "run.json").options["seeds"] == recorded


@pytest.mark.parametrize(
    ("recorded", "now"), [("0-99999999999", "0-99999999999"), ("0-3,x", None), ("9" * 5000, None)]
)
def test_seeds_in_an_edited_record(tmp_path: Path, recorded: str, now: str | None) -> None:
    folder = Folder(tmp_path / "out")
    older = record(recorded)
    older.write(tmp_path / "out" / "run.json")
    if now is None:
        with pytest.raises(UserError, match=r"out/run.json: seeds '"):
            folder.open(record("0-3"), range(4))
    else:  # no list is made of them
        assert folder.open(record("0-3"), range(4))[0].options["seeds"] == now
