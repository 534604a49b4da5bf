"""Lists of seeds as people write them, and whose seeds are whose."""

from __future__ import annotations

import re
from collections import Counter

from runtime.errors import UserError

MOST = 10_000_000  #: seeds in one list; more is a slip of the keyboard
#: Where the seeds of each use begin, so that no image serves two: figures are reported on those
#: from 0, plans are chosen on those of selections, and a model's converged samples, which figures
#: are held against, have theirs.
SELECTION_START, CONVERGED_START = 10_000_000, 20_000_000


def selection_seeds(images: int) -> range:
    """The seeds of a selection; UserError for more than there are."""
    if images > CONVERGED_START - SELECTION_START:
        raise UserError(
            f"a selection by {images} images has too few seeds of its own: give --select "
            f"{CONVERGED_START - SELECTION_START} or less"
        )
    return range(SELECTION_START, SELECTION_START + images)


def row_of(seed: int) -> int:
    """The number of ``seed`` among the seeds of its use, from 0: the row of its prompt."""
    return seed % SELECTION_START


def parse_seeds(text: str) -> list[int]:
    """``"0-9,12,20-29"`` -> the seeds in the order written, both ends included.

    Raises:
        UserError: no seeds, something that is no range, a falling range, a seed given twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if match is None:
            raise UserError(
                f"seeds '{text}': '{part.strip()}' is neither a number nor a range, "
                "write for example 0-9,12,20-29"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"seeds '{text}': the range {first}-{last} falls, write {last}-{first}")
        if len(seeds) + last - first >= MOST:
            raise UserError(f"seeds '{text}': more than {MOST} seeds, use several runs")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        twice = Counter(seeds).most_common(1)[0][0]
        raise UserError(f"seeds '{text}': seed {twice} is given twice, give it once")
    return seeds
