"""Outputs: one run at a time, no record of another command, writable before the work."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import click
import pytest
import torch

from commands import compare, fid, sample, solver_error
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import temporary_name
from runtime.outputs import LOCK, check_file, check_writable, claimed
from runtime.record import RunRecord
from tests.locks import held
from tests.processes import finish, finished, start
from tests.scripts import Script
from tools import converged, convert, dataset_tool, fit_masks, gits, plan_search, train_denoiser

HERE = World(0, 1, torch.device("cpu"))


def test_a_folder_is_one_runs_until_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with held(folder / LOCK, tmp_path) as kill:
        with pytest.raises(UserError, match="out is in use by another run"), claimed(folder, HERE):
            raise AssertionError
        with claimed(folder, World(1, 2, HERE.device)):  # another process of the same run
            pass
        kill()
        assert (folder / LOCK).exists()  # left by the killed run, and no lock
        with claimed(folder, HERE):
            assert [path.name for path in folder.iterdir()] == [LOCK]
        assert list(folder.iterdir()) == []
    with claimed(folder / "fresh", HERE):
        pass
    assert list(folder.iterdir()) == []  # an empty new folder is not kept


def count(folder: Path, times: int) -> None:
    done = 0
    while done < times:
        try:
            with claimed(folder, HERE):
                number = int((folder / "number").read_text())
                time.sleep(0.0005)
                (folder / "number").write_text(str(number + 1))
                done += 1
        except UserError:
            time.sleep(0.0002)


def test_no_two_runs_are_ever_in_one_folder(tmp_path: Path) -> None:
    """Each adds to a number on disk, which loses no addition; the lock comes and goes."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "number").write_text("0")
    processes = [start(partial(count, folder, 60), tmp_path / str(i)) for i in range(3)]
    assert [finish(p, tmp_path / str(i)).code for i, p in enumerate(processes)] == [0, 0, 0]
    assert (folder / "number").read_text() == "180"
    assert [path.name for path in folder.iterdir()] == ["number"]


def test_an_exception_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path, HERE):
        raise KeyError
    with claimed(tmp_path, HERE):
        pass
    assert list(tmp_path.iterdir()) == []


def taken(folder: Path) -> AbstractContextManager[None]:
    return claimed(folder, HERE, "compare")


def test_records_of_other_commands_are_left_alone(tmp_path: Path) -> None:
    RunRecord.make("sample", {}, {}, {}).write(tmp_path / "run.json")
    for commands in ((), ("compare", "sample")):
        with claimed(tmp_path, HERE, *commands):
            pass
    with pytest.raises(UserError, match="results of another command, sample"), taken(tmp_path):
        raise AssertionError
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is not valid JSON"), taken(tmp_path):
        raise AssertionError


def test_images_of_unknown_origin_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "0.JPG").touch()
    with claimed(tmp_path, HERE):
        pass
    with pytest.raises(UserError, match=r"holds images but no run.json"), taken(tmp_path):
        raise AssertionError
    (tmp_path / "errors.json").touch()  # of a command that leaves no run.json
    with taken(tmp_path):
        pass


def test_what_cannot_be_written_is_found_out_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match=r"--json .* cannot be written \(.*Not a directory\)"):
            check_writable(path, "--json")
        with pytest.raises(UserError, match=r"out|b cannot be written"), claimed(path, HERE):
            raise AssertionError
    with pytest.raises(UserError, match="is a folder: give the name of a file"):
        check_file(tmp_path, "--dest", HERE)
    check_file(tmp_path / "new" / "deep" / "x.json", "--json", HERE)
    check_file(tmp_path / "file", "--json", HERE)
    check_file(None, "--json", HERE)
    check_file(tmp_path, "--json", World(1, 2, HERE.device))  # not its business
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


#: Commands, and the flag of the folder that they write to.
FOLDERS: dict[str, tuple[click.Command, tuple[str, ...], str]] = {
    "sample": (sample.main, ("--sampler=euler", "--seeds=0"), "--outdir"),
    "fid gen": (fid.main, ("gen", "--sampler=euler", "--seeds=0-3"), "--outdir"),
    "compare": (compare.main, ("--budgets=5", "--num=8", "--ceilings=False"), "--outdir"),
    "solver_error": (solver_error.main, ("--budgets=5", "--seeds=0"), "--outdir"),
    "plan_search": (plan_search.main, ("--nfe=5", "--select=2"), "--outdir"),
    "converged": (converged.main, ("--seeds=0",), "--outdir"),
    "train_denoiser": (
        train_denoiser.main, ("--data=no.zip", "--like=cifar10-small", "--kimg=1"), "--outdir",
    ),
    "fit_masks": (fit_masks.main, ("--data=images",), "--dest"),
}  # fmt: skip
#: Those whose record is not checked against the record in the folder elsewhere.
RECORDED = ("compare", "solver_error", "plan_search", "fit_masks")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("images")
def test_a_second_run_in_one_folder_is_refused(name: str, script: Script, tmp_path: Path) -> None:
    command, arguments, flag = FOLDERS[name]
    with held(tmp_path / "out" / LOCK, tmp_path):
        done = script(command, *arguments, f"{flag}=out")
    assert done.code == 1 and "error: out is in use by another run" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("images")
def test_an_unwritable_folder_is_found_out_first(name: str, script: Script) -> None:
    command, arguments, flag = FOLDERS[name]
    done = script(command, *arguments, f"{flag}=images/0.png/out")
    assert done.code == 1 and "error: images/0.png/out cannot be written" in done.err


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.usefixtures("images")
def test_samples_are_no_place_for_other_results(name: str, script: Script, tmp_path: Path) -> None:
    command, arguments, flag = FOLDERS[name]
    RunRecord.make("sample", {"seeds": "0-3"}, {}, {}).write(tmp_path / "out" / "run.json")
    before = (tmp_path / "out" / "run.json").read_bytes()
    done = script(command, *arguments, f"{flag}=out")
    assert done.code == 1 and "out holds the results of another command, sample" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    assert (tmp_path / "out" / "run.json").read_bytes() == before


#: Commands with a file to write, the work of which would begin with a download or an error.
FILES: dict[str, tuple[click.Command, tuple[str, ...]]] = {
    "fid calc": (fid.main, ("calc", "--images=no", "--json={}")),
    "fid ref": (fid.main, ("ref", "--data=no", "--dest={}.npz")),
    "fid gen": (fid.main, ("gen", "--sampler=euler", "--seeds=0-3", "--json={}")),
    "fid gen --dest": (fid.main, ("gen", "--sampler=euler", "--seeds=0-3", "--dest={}.npz")),
    "converged": (converged.main, ("--dest={}.npz",)),
    "gits": (gits.main, ("--dest={}",)),
    "dataset_tool": (dataset_tool.main, ("--source=images", "--dest={}.zip")),
    "convert": (convert.main, ("images/0.png", "{}.safetensors")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.usefixtures("images")
def test_an_unwritable_file_is_found_out_first(name: str, script: Script, tmp_path: Path) -> None:
    command, arguments = FILES[name]
    done = script(command, *(text.format("images/0.png/out") for text in arguments))
    assert done.code == 1 and "cannot be written" in done.err and done.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.png", "1.png", "images"]


@pytest.mark.usefixtures("images")
def test_a_data_set_is_written_by_one_process(script: Script, tmp_path: Path) -> None:
    arguments = ("--source=images", "--dest=set.zip")
    left = tmp_path / ".set.zip.abc"  # of a killed process
    left.mkdir()
    (left / "set.zip").write_text("half")
    with held(tmp_path / ".set.zip.lock", tmp_path):
        done = script(dataset_tool.main, *arguments)
    assert done.code == 1 and "error: set.zip is in use by another run" in done.err
    assert script(dataset_tool.main, *arguments).code == 0
    assert not left.exists() and not list(tmp_path.glob(".set*"))
    again = script(dataset_tool.main, *arguments)
    assert again.code == 1 and "set.zip exists already" in again.err


@pytest.mark.parametrize("there", ["out.safetensors", "out.card.json"])
@pytest.mark.usefixtures("images")
def test_convert_replaces_no_file(there: str, script: Script, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    done = script(convert.main, "images/0.png", "out.safetensors")
    assert done.code == 1 and f"error: {there} exists already: remove it" in done.err
    assert (tmp_path / there).read_text() == "mine"


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    dead = temporary_name("row.npz", finished())
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / dead).write_text("half")
    with claimed(tmp_path, HERE):
        assert not list((tmp_path / "rows").iterdir())
    (tmp_path / dead).write_text("half")
    check_writable(tmp_path / "row.npz", "--dest")
    assert not list(tmp_path.glob(".*"))
