"""Run records: round trips, and errors for invalid ones."""

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime import record
from runtime.errors import UserError
from runtime.record import RunRecord


def make() -> RunRecord:
    return RunRecord.make(
        "train",
        options={"num_steps": 4, "afs": True, "S_max": math.inf, "restart_info": {"0": (3, 2)}},
        model={"name": "cifar10-small", "sha256": "ab" * 32},
        plan={"nfe": 5, "grid": [80.0, 0.002]},
    )


def test_round_trip(tmp_path: Path) -> None:
    first = make()
    first.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == first
    assert RunRecord.from_json(first.to_json()) == first
    assert first.options["restart_info"] == {"0": [3, 2]}
    assert set(first.versions) == {"amed-toolkit", "python", "torch", "numpy"}
    assert first.schema == record.SCHEMA and first.created.endswith("+00:00")


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make().git_commit is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not on this machine")
def test_the_commit_is_that_of_this_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--message=one")
    git("tag", "v1")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert make().git_commit == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert make().git_commit == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setattr(record, "ROOT", tmp_path / "site-packages")
    assert make().git_commit is None  # the repository around an installed copy is not ours


def test_values_json_cannot_hold_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"options\['path'\]"):
        RunRecord.make("train", {"path": Path("x")}, {}, {})  # type: ignore[dict-item]


def change(**changes: Any) -> str:
    return json.dumps({**json.loads(make().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change(colour="red"), "colour is unknown to this version"),
        (change(schema=2, colour="red"), "schema 2"),
        ('{"command": "train",\n  "options": }', "line 2 column 14"),
        ("[1, 2]", "the content is of type array where object is expected"),
        ('{"command": "train"}', "options is missing"),
        (change(git_commit=5), "git_commit is of type int where str . null is expected"),
        (change(schema=True), "schema is of type bool where int is expected"),
    ],
)
def test_invalid_records_raise(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"run.json:? .*{message}"):
        RunRecord.read(path)


def test_unreadable_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        RunRecord.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"run\.json is not a text file"):
        RunRecord.read(path)


def test_differences() -> None:
    one = RunRecord.make("sample", {"seeds": "0-9", "batch": 4}, {"name": "a"}, {"nfe": 5})
    two = RunRecord.make("sample", {"seeds": "0-4", "batch": 8}, {"name": "a"}, {"nfe": 5, "x": 1})
    assert one.differences(one) == []
    assert one.differences(two, ignore=("batch",)) == [
        "options.seeds: '0-9' != '0-4'",
        "plan.x: None != 1",
    ]
