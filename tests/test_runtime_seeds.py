"""Lists of seeds, and the ranges reserved for each use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.seeds import (
    CONVERGED_START,
    SELECTION_START,
    join_seeds,
    parse_seeds,
    seed_ranges,
    selection_seeds,
)


@given(st.lists(st.integers(0, 300), unique=True, min_size=1), st.sampled_from(["", " "]))
def test_what_is_written_is_what_is_read(seeds: list[int], space: str) -> None:
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}{space}-{run[-1]}" for run in runs]
    assert parse_seeds(f",{space}".join(parts)) == seeds


@given(st.text("0123456789-, x", max_size=12))
def test_anything_else_is_refused_in_one_sentence(text: str) -> None:
    try:
        seeds = parse_seeds(text)
    except UserError as error:
        assert str(error).startswith(f"seeds '{text}': ")
    else:
        assert len(seeds) == len(set(seeds)) > 0 and min(seeds) >= 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is neither"),
        ("1,a", "'a' is neither"),
        ("-3", "'-3' is neither"),
        ("9-5", "write 5-9"),
        ("0-9,5", "seed 5 "),
        ("0-99999999999", "more than 10000000 seeds"),
        ("0-" + "9" * 5000, ""),
    ],
)
def test_errors_name_the_part(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^seeds '{text[:40]}.*{reason}"):
        parse_seeds(text)


def test_the_ranges_of_the_uses_are_disjoint() -> None:
    most = CONVERGED_START - SELECTION_START
    uses = [range(SELECTION_START), selection_seeds(most), range(CONVERGED_START, 10**12)]
    assert all(one.stop == other.start for one, other in zip(uses, uses[1:], strict=False))
    with pytest.raises(UserError, match="--select 10000000 or less"):
        selection_seeds(most + 1)


@pytest.mark.parametrize(
    ("seeds", "text"), [([3], "3"), ([2, 0, 1], "0-2"), ([9, 1, 2, 5, 6, 0], "0-2,5-6,9"), ([], "")]
)
def test_seed_ranges(seeds: list[int], text: str) -> None:
    assert seed_ranges(seeds) == text
    assert not seeds or parse_seeds(text) == sorted(seeds)


@given(st.lists(st.sets(st.integers(0, 40), min_size=1), min_size=1, max_size=4))
def test_joined_seeds_are_those_of_all_lists(sets: list[set[int]]) -> None:
    assert join_seeds(*map(seed_ranges, sets)) == seed_ranges(set().union(*sets))


def test_joining_makes_no_list() -> None:
    assert join_seeds("0-99999999999", "5 - 7", "100000000000,200000000000") == (
        "0-100000000000,200000000000"
    )
