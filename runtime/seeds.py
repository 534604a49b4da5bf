"""Parsing of lists of seeds, and the ranges of seeds reserved for each use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from runtime.errors import UserError

MAX_SEEDS = 10_000_000  #: seeds in one list; more is probably a typo
#: First seeds of the disjoint ranges for each use: metrics are reported on seeds from 0, plans
#: are selected on seeds from SELECTION_START, and converged reference samples have seeds from
#: CONVERGED_START.
SELECTION_START, CONVERGED_START = 10_000_000, 20_000_000


def selection_seeds(images: int) -> range:
    """The seeds of a selection on ``images`` images; UserError if there are too few."""
    if images > CONVERGED_START - SELECTION_START:
        raise UserError(
            f"--select {images} exceeds the number of seeds reserved for selections: give "
            f"--select {CONVERGED_START - SELECTION_START} or less"
        )
    return range(SELECTION_START, SELECTION_START + images)


def row_of(seed: int) -> int:
    """The number of ``seed`` among the seeds of its use, from 0: the row of its prompt."""
    return seed % SELECTION_START


def parse_seeds(text: str) -> list[int]:
    """``"0-9,12,20-29"`` -> the seeds in the order written, both ends included.

    Raises:
        UserError: no seeds, an invalid or a decreasing range, a repeated seed.
    """
    ranges = _parse_ranges(text)
    if sum(last - first + 1 for first, last in ranges) > MAX_SEEDS:
        raise UserError(f"seeds '{text}': more than {MAX_SEEDS} seeds, use several runs")
    seeds = [seed for first, last in ranges for seed in range(first, last + 1)]
    if len(set(seeds)) < len(seeds):
        repeated = Counter(seeds).most_common(1)[0][0]
        raise UserError(f"seeds '{text}': seed {repeated} is given twice, give it once")
    return seeds


def seed_ranges(seeds: Iterable[int]) -> str:
    """The seeds in increasing order, as `parse_seeds` reads them: ``0-9,12``."""
    return _write_ranges((seed, seed) for seed in seeds)


def join_seeds(*texts: str) -> str:
    """The seeds of all ``texts`` in increasing order, each once, as `seed_ranges` writes them.

    No list of them is made, however many they are.  Raises UserError for anything but seeds.
    """
    return _write_ranges(ends for text in texts for ends in _parse_ranges(text))


def _parse_ranges(text: str) -> list[tuple[int, int]]:
    """The first and the last seed of every part of ``text``."""
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?", part)
        if match is None:
            raise UserError(
                f"seeds '{text}': '{part.strip()}' is neither a number nor a range, "
                "write for example 0-9,12,20-29"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(
                f"seeds '{text}': the range {first}-{last} decreases, write {last}-{first}"
            )
        ranges.append((first, last))
    return ranges


def _write_ranges(ranges: Iterable[tuple[int, int]]) -> str:
    merged: list[list[int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in merged)
