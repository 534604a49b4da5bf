"""Lists on command lines, and paths with a comma, which are given by repeating the option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import compare, fid, solver_error
from runtime.lists import parse_files, parse_sources
from runtime.record import RunRecord
from tests.scripts import Script

NAME = st.text("abc ,/.", min_size=1, max_size=8)


def test_names_are_lists_and_paths_that_exist_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b" / "c,d").mkdir(parents=True)
    assert parse_sources(["1, 2,exps/x"]) == ("1", "2", "exps/x")
    assert parse_sources(["a,b/c,d"]) == ("a,b/c,d",)
    assert parse_sources(["1,2", "a,b/c,d", "3"]) == ("1", "2", "a,b/c,d", "3")
    assert parse_sources(["a,e"]) == ("a", "e") and parse_sources([""]) == parse_sources([]) == ()


@given(st.lists(st.lists(NAME, min_size=1, max_size=3), max_size=3))
def test_files_are_told_apart_by_their_suffix(groups: list[list[str]]) -> None:
    """Joined by commas or repeated, names with commas in them come back."""
    files = [[f"x{name}.npz" for name in group] for group in groups]
    once = [",".join(group) for group in files]
    assert parse_files(once, ".npz") == tuple(name for group in files for name in group)


def test_what_is_no_list_of_files_stays_whole() -> None:
    assert parse_files(["a,b.npz"], ".npz") == ("a,b.npz",)
    assert parse_files(["a.npz, b.npz"], ".npz") == ("a.npz", "b.npz")
    assert parse_files(["a,b.npy"], ".npz") == ("a,b.npy",)


@pytest.mark.parametrize("command", [compare, solver_error], ids=["compare", "solver_error"])
def test_predictors_in_folders_with_a_comma(
    command: object, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    for flags in (["--predictors=a,b"], ["--predictors=a,b", "--predictors=7"]):
        done = script(command.main, *flags, "-n")  # type: ignore[attr-defined]
        assert done.code == 1 and "no predictor at a,b/predictor.safetensors" in done.err
    done = script(command.main, "--predictors=a,c", "-n")  # type: ignore[attr-defined]
    assert done.code == 1 and "there is no predictor at a;" in done.err


def test_references_and_statistics_with_a_comma(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.npz").touch()

    def options(*flags: str) -> dict[str, object]:
        done = script(fid.main, *flags, "-n")
        assert done.code == 0, done.err
        return RunRecord.from_json(json.dumps(json.loads(done.out))).options

    two = "--detector=cifar10-small,inception"
    assert options("calc", "--images=x", "--ref=a,b.npz")["ref"] == ["a,b.npz"]
    repeated = options("calc", "--images=x", two, "--ref=a,b.npz", "--ref=c.npz")
    assert repeated["ref"] == ["a,b.npz", "c.npz"]
    assert options("calc", "--images=x", two, "--ref=c.npz,d.npz")["ref"] == ["c.npz", "d.npz"]
    assert options("ref", "--data=x", "--dest=new,one.npz")["dest"] == ["new,one.npz"]
    both = options("ref", "--data=x", two, "--dest=new,one.npz", "--dest=two.npz")
    assert both["dest"] == ["new,one.npz", "two.npz"]
