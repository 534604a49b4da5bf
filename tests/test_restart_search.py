"""Successive halving finds what a score prefers, and goes on wherever it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plan_search.halving import Trial, search, search_images, survivors
from restart.candidates import WALKS, Candidate
from runtime.dist import World

HERE = World(0, 1, torch.device("cpu"))
FIELD = [Candidate(f"plan {i}", (), WALKS[0], 2, ()) for i in range(16)]
ROUNDS = [2, 8, 32]
IDENTITY = {"model": "m", "images": ROUNDS}


def score(candidate: Candidate, images: int) -> float:
    """Plan 5 is the best one; few images say so about as well as plan 11 being the best."""
    number = int(candidate.label.split()[1])
    return (number - 5) ** 2 + 40 / images * (number != 11)


def run(file: Path, ask=score, identity=IDENTITY, skipped=lambda n: None, kept=()):
    return search(FIELD, ROUNDS, ask, file, identity, HERE, skipped, kept)


def test_the_best_quarter_of_a_round_goes_on(tmp_path):
    trace = run(tmp_path / "trace.json")
    assert [[t.n for t in trials] for trials in trace] == [[2] * 16, [8] * 4, [32]]
    for trials in trace:
        assert [t.score for t in trials] == sorted(t.score for t in trials)
    for before, after in zip(trace, trace[1:], strict=False):
        assert {t.label for t in after} == {t.label for t in before[: len(after)]}
    assert trace[-1] == [Trial("plan 5", 40 / 32, 32)]
    assert sum(t.n for trials in trace for t in trials) == search_images(16, ROUNDS) == 96
    assert [survivors(n) for n in (1, 2, 4, 6, 16, 39)] == [1, 1, 1, 2, 4, 10]


@pytest.mark.parametrize("killed", [0, 3, 15, 16, 18, 20])
def test_a_killed_search_goes_on_where_it_stopped(tmp_path, killed):
    whole = run(tmp_path / "whole.json")
    asked: list[tuple[str, int]] = []

    def until(candidate: Candidate, images: int) -> float:
        if len(asked) == killed:
            raise KeyboardInterrupt
        asked.append((candidate.label, images))
        return score(candidate, images)

    file = tmp_path / "trace.json"
    saved: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run(file, until)
    before, killed = list(asked), -1
    assert run(file, until, skipped=saved.append) == whole
    assert len(asked) == len(set(asked)) == 21  # nothing was asked twice
    assert sum(saved) == sum(images for _, images in before)
    assert file.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert run(file, until) == whole and len(asked) == 21  # the trace is the search


def test_another_search_starts_anew(tmp_path):
    file = tmp_path / "trace.json"
    run(file)
    content = json.loads(file.read_text())
    content["rounds"][2][0]["score"] = -1.0
    file.write_text(json.dumps(content))
    assert run(file)[-1][0].score == -1.0
    assert run(file, identity={**IDENTITY, "model": "n"})[-1][0].score > 0
    for torn in ("{ torn", "[]", '{"identity": {"model": "m", "images": [2, 8, 32]}}'):
        file.write_text(torn)
        assert run(file)[-1][0].score > 0


def test_a_kept_search_is_not_run_again(tmp_path, capsys):
    folders, skipped = [tmp_path / "bundled", tmp_path / "cache"], list[int]()
    whole = run(tmp_path / "a.json", kept=folders)
    assert [path.parent.name for path in tmp_path.glob("*/*")] == ["cache"]
    assert run(tmp_path / "b.json", never, skipped=skipped.append, kept=folders) == whole
    assert sum(skipped) == search_images(16, ROUNDS)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    with pytest.raises(AssertionError):
        run(tmp_path / "c.json", never, identity={**IDENTITY, "model": "n"}, kept=folders)
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "d.json", kept=[tmp_path / "file"]) == whole
    assert "is not kept for other comparisons" in capsys.readouterr().err


def never(candidate: Candidate, images: int) -> float:
    raise AssertionError(f"{candidate} was asked for")


def test_the_kept_search_takes_the_place_of_a_shorter_one(tmp_path):
    file, folders = tmp_path / "a.json", [tmp_path / "kept"]
    whole = run(file, kept=folders)
    content = json.loads(file.read_text())
    content["rounds"] = content["rounds"][:1]
    file.write_text(json.dumps(content))
    assert run(file, never, kept=folders) == whole


def test_labels_have_to_differ(tmp_path):
    with pytest.raises(ValueError, match="one label"):
        search([*FIELD, FIELD[3]], ROUNDS, score, tmp_path / "trace.json", {}, HERE)
    assert not list(tmp_path.iterdir())
