"""Prompts from files: row i belongs to seed i, whatever the file looks like."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_data.prompts import read_prompts
from runtime.errors import UserError

CAPTIONS = ["A man, seated", 'a "red" apple', "zwei\nZeilen", "größe 🦉"]


def test_a_csv_of_captions_as_published(tmp_path: Path) -> None:
    """Quoted commas, quotes and line ends, columns before and after, a mark at the start."""
    path = tmp_path / "captions.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "image_id", "text", "file"])
        writer.writerows([i, 10 * i, text, f"{i}.jpg"] for i, text in enumerate(CAPTIONS))
    assert read_prompts(path) == tuple(CAPTIONS)
    path.rename(tmp_path / "CAPTIONS.CSV")
    assert read_prompts(str(tmp_path / "CAPTIONS.CSV")) == tuple(CAPTIONS)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_a_text_file_has_a_prompt_a_line(tmp_path_factory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "prompts.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes(end.join(lines).encode())
        assert read_prompts(path) == tuple(lines)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"id,caption\n1,x\n", "has the columns id, caption and none called 'text'"),
        ("a.csv", b"", "has the columns none and none called 'text'"),
        ("a.csv", b"id,text\n", "holds no prompt: write one a line"),
        ("a.csv", b"id,text\n1,a\n\n3,c\n", "row 1 .from 0. is an empty prompt"),
        ("a.csv", b"id,text\n1,a\n2\n", "row 1 .from 0. is an empty prompt"),
        ("a.csv", b"id,text\n1,a\n2,  \n", "row 1 .from 0. is an empty prompt"),
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"one\n\nthree\n", "row 1 .from 0. is an empty prompt: fill or remove it"),
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_what_holds_no_prompts_says_so(tmp_path, name, content, sentence) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read .No such file.*check"):
        read_prompts(tmp_path / "absent.csv")
