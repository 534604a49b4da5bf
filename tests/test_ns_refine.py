"""Refinement of a table on Gaussian data, where nothing but the gradient steps is random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from ns.calibrate import Latents, calibrate
from ns.coordinates import WhitenedTable
from ns.losses import spectral
from ns.refine import STATE, Pair, RefineLoop, refine
from ns.search import final_error, prior_table
from runtime.dist import World
from runtime.errors import UserError
from runtime.log import read_json_lines
from solvers.driver import Meter
from solvers.table import Table
from tests.test_ns_calibrate import HIGH, LOW, PLAIN, curves, denoiser

HERE = World(0, 1, torch.device("cpu"))
ALL = curves(48)
OTHER = Latents([curves(24, seed=1)], [Meter(denoiser())])


def pairs(numbers: Sequence[int]) -> Iterator[Pair]:
    chosen = list(numbers)
    yield Pair(ALL.x[0, chosen], ALL.images[chosen], denoiser())


LOSS = spectral(PLAIN)


def judge(table: Table) -> float:
    return final_error(table, OTHER, LOSS)


def start() -> WhitenedTable:
    prior = prior_table([7.0, 2.0, 0.6], HIGH, LOW)
    return WhitenedTable.around(calibrate(prior, Latents([ALL], [Meter(denoiser())]), PLAIN))


def run(folder: Path, updates: int = 60, lr: float = 0.05) -> tuple[Table, list[Table]]:
    saved: list[Table] = []
    loop = RefineLoop(updates, batch=16, report=10, lr=lr)
    folder.mkdir(exist_ok=True)
    table = refine(start(), pairs, range(48), judge, LOSS, loop, folder, HERE, saved.append)
    return table, saved


def test_the_image_comes_nearer_on_latents_that_were_not_seen(tmp_path: Path) -> None:
    """Calibrated rows serve their own states, and the times are free as well."""
    table, saved = run(tmp_path, lr=0.2)
    before = judge(start().table())
    rows = read_json_lines(tmp_path / "stats.jsonl")
    assert judge(table) < 0.95 * before
    assert judge(table) == min(row["held_out"] for row in rows) == rows[-1]["best"]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60] and len(saved) == 7
    assert saved[0].ragged == start().table().ragged  # kept before the first update


def test_a_table_that_gets_worse_is_not_kept(tmp_path: Path) -> None:
    table, _ = run(tmp_path, updates=20, lr=30.0)
    rows = read_json_lines(tmp_path / "stats.jsonl")
    assert all(row["held_out"] > 2 * judge(start().table()) for row in rows)
    assert table.ragged == start().table().ragged


def test_a_diverged_run_ends_in_a_sentence_and_keeps_its_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"update 2 .* give a smaller --lr than 1e\+200"):
        run(tmp_path, lr=1e200)
    assert (tmp_path / STATE).exists()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        run(tmp_path)
