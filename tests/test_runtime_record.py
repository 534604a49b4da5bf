"""Run records: what is written is what is read, and everything else is refused by name."""

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
    with pytest.raises(TypeError, match=r"options\['path'\] = .* cannot go into a record"):
        RunRecord.make("train", {"path": Path("x")}, {}, {})


def change(**changes: Any) -> str:
    return json.dumps({**json.loads(make().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            change(colour="red"),
            "run.json has the unknown key 'colour': remove it, "
            "or use the version of the toolkit that wrote it",
        ),
        (
            change(schema=2, colour="red"),
            "run.json has schema 2, but this version reads up to 1: "
            "update the toolkit to the version that wrote it",
        ),
        (
            '{"command": "train",\n  "options": }',
            "run.json is not valid JSON (line 2, column 14: Expecting value): "
            "mend it there, or delete it and run again",
        ),
        (
            "[1, 2]",
            "run.json holds a list instead of a run record: delete it and run again",
        ),
        (
            '{"command": "train"}',
            "run.json lacks the key 'options': delete the record and run again",
        ),
        (
            change(git_commit=5),
            "run.json has 5 as 'git_commit' where a str or null belongs: "
            "mend it, or delete the record and run again",
        ),
        (
            change(schema=True),
            "run.json has True as 'schema' where a int belongs: "
            "mend it, or delete the record and run again",
        ),
    ],
)
def test_broken_records_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(text)
    with pytest.raises(UserError) as caught:
        RunRecord.read("run.json")
    assert str(caught.value) == message


def test_unreadable_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(UserError) as caught:
        RunRecord.read(path)
    assert str(caught.value) == (
        f"{path} cannot be read (No such file or directory): give the folder of a run"
    )
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as caught:
        RunRecord.read(path)
    assert str(caught.value) == f"{path} is not a text file: delete it and run again"


def test_differences_name_what_would_change_the_images() -> None:
    one = RunRecord.make("sample", {"seeds": "0-9", "batch": 4}, {"name": "a"}, {"nfe": 5})
    two = RunRecord.make("sample", {"seeds": "0-4", "batch": 8}, {"name": "a"}, {"nfe": 5, "x": 1})
    assert one.differences(one) == []
    assert one.differences(two, ignore=("batch",)) == [
        "options.seeds: '0-9' != '0-4'",
        "plan.x: None != 1",
    ]
