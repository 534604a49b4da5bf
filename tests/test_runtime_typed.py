"""Result files come back as they were written, or one sentence says which field is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.typed import (
    OPTIONAL,
    REMEDY,
    SCHEMA,
    from_plain,
    read_earlier,
    read_result,
    to_json,
    write_result,
)


@dataclass(frozen=True)
class Point:
    nfe: int
    fid: float
    detail: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Points:
    name: str
    rounds: list[list[Point]]
    best: Point | None
    folder: Path
    own: str | None = None
    levels: tuple[float, ...] = ()
    extra: dict[str, object] | None = field(default=None, metadata=OPTIONAL)
    schema: int = SCHEMA


POINT = Point(5, 1.5)
DEEP = b"[" * 10**5
POINTS = Points("a", [[POINT, Point(3, math.inf, "b")], []], None, Path("x/y"), levels=(0.1, 2.0))


def plain(**changes: Any) -> dict[str, Any]:
    return {**json.loads(to_json(POINTS)), **changes}


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "points.json"
    assert read_result(Points, file) is None
    for points in (POINTS, replace(POINTS, extra={"k": [1, "x", None]}, best=POINT)):
        write_result(file, points)
        assert read_result(Points, file) == points
    assert list(file.parent.iterdir()) == [file]  # nothing temporary is left


def test_only_optional_fields_are_left_out() -> None:
    content = plain()
    assert content["best"] is None and content["own"] is None
    assert "extra" not in content and "detail" not in content["rounds"][0][0]
    assert content["rounds"][0][1]["detail"] == "b" and content["folder"] == "x/y"
    assert to_json(POINT) == '{\n "nfe": 5,\n "fid": 1.5\n}'  # nothing is added
    assert from_plain(Point, {"nfe": 5, "fid": 1}, "here") == Point(5, 1.0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([], "the content is of type array where object is expected"),
        (plain(name=3), "name is of type int where str is expected"),
        (plain(folder=3), "folder is of type int where Path is expected"),
        (plain(rounds=[[{"nfe": 5}]]), "rounds[0][0].fid is missing"),
        (plain(rounds=[[], [{"nfe": True, "fid": 1}]]), "rounds[1][0].nfe is of type bool where"),
        (plain(rounds=[[], [{"nfe": 5, "fid": 1, "x": 2}]]), "rounds[1][0].x is unknown to this"),
        (plain(levels=[1, "2"]), "levels[1] is of type str where float is expected"),
        (plain(more=1), "more is unknown to this version"),
        (plain(best={"nfe": 1}), "best.fid is missing"),
    ],
)
def test_a_wrong_field_is_named(content: Any, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_result(Points, file)
    text = str(caught.value)
    assert text.startswith(f"{file}: {sentence}") and text.endswith(": " + REMEDY)
    assert "\n" not in text


def test_what_is_no_json_and_what_is_newer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "points.json"
    for damage, sentence in (
        (b"{ torn", "is not valid JSON"),
        (DEEP, "is JSON nested more than 64 deep"),
        (b"\xff\xfe", "is not a text file"),
    ):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=f"points.json {sentence}.*: {REMEDY}"):
            read_result(Points, file)
        assert read_earlier(Points, file) is None
    with pytest.raises(UserError, match="here has schema 2, but .* up to 1: update the toolkit"):
        from_plain(Points, plain(schema=SCHEMA + 1), "here")


def test_what_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_result(tmp_path / "x.json", replace(POINTS, extra={"k": {1, 2}}))
    assert not list(tmp_path.iterdir())
