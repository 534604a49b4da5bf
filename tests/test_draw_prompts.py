"""tools.draw_prompts: a draw that is the same everywhere, and whole rows of the source."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from image_data.prompts import read_prompts
from tests.scripts import Script
from tools.draw_prompts import draw, main

STONE = [4149, 7317, 23492, 22709, 2663]
CAPTIONS = [f'a "cat", {i}\nsat' if i % 7 == 0 else f"caption {i}" for i in range(40)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "all.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image_id", "text"], *([i, text] for i, text in enumerate(CAPTIONS))])
    return path


@pytest.fixture
def run(script: Script):
    def call(*arguments: object) -> tuple[int, str]:
        done = script(main, *arguments)
        return done.code, done.err

    return call


def test_the_draw_is_written_in_stone() -> None:
    """Another order would be another benchmark under the same name."""
    assert draw(30000, 5, 0) == STONE
    assert draw(30000, 5000, 0)[:5] == STONE and draw(30000, 5, 1) != STONE


def test_a_draw_is_uniform_and_without_repetition() -> None:
    rows = draw(30000, 5000, 0)
    assert len(set(rows)) == 5000 and set(rows) <= set(range(30000))
    tenths = [sum(row // 3000 == k for row in rows) for k in range(10)]
    assert all(abs(count - 500) < 4 * (500 * 0.9 * (5 / 6)) ** 0.5 for count in tenths)


def test_the_file_holds_the_rows_drawn(source: Path, tmp_path: Path, run) -> None:
    target = tmp_path / "some.csv"
    assert run(source, target, "--number=9", "--seed=3") == (0, "")
    rows = draw(40, 9, 3)
    assert read_prompts(target) == tuple(CAPTIONS[row] for row in rows)
    with open(target, encoding="utf-8", newline="") as file:
        assert [int(line["row"]) for line in csv.DictReader(file)] == rows
    assert run(source, target, "--number=9", "--seed=3")[0] == 0  # again is no harm


def test_what_cannot_be_drawn_or_written_says_so(source: Path, tmp_path: Path, run) -> None:
    before = sorted(tmp_path.iterdir())
    code, err = run(source, tmp_path / "some.csv")
    assert code == 1 and err == f"error: {source} has 40 prompts: give --number 40\n"
    code, err = run(source, tmp_path / "some.txt", "--number=4")
    assert code == 1 and "give it the suffix .csv" in err
    assert sorted(tmp_path.iterdir()) == before
    whole = source.read_bytes()
    code, err = run(source, source, "--number=4")
    assert code == 1 and "exists with other content: remove it, or give another name" in err
    assert source.read_bytes() == whole
