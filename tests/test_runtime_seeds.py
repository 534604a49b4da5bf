"""Lists of seeds, and whose they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.seeds import CONVERGED_START, SELECTION_START, parse_seeds, selection_seeds


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
        ("", "'' is neither a number nor a range, write for example 0-9,12,20-29"),
        ("1,a", "'a' is neither a number nor a range, write for example 0-9,12,20-29"),
        ("-3", "'-3' is neither a number nor a range, write for example 0-9,12,20-29"),
        ("9-5", "the range 9-5 falls, write 5-9"),
        ("0-9,5", "seed 5 is given twice, give it once"),
        ("0-99999999999", "more than 10000000 seeds, use several runs"),
    ],
)
def test_errors_name_the_part_and_the_remedy(text: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_seeds(text)
    assert str(caught.value) == f"seeds '{text}': {reason}"


def test_no_seed_serves_two_uses() -> None:
    most = CONVERGED_START - SELECTION_START
    uses = [range(SELECTION_START), selection_seeds(most), range(CONVERGED_START, 10**12)]
    assert all(one.stop == other.start for one, other in zip(uses, uses[1:], strict=False))
    with pytest.raises(UserError, match="give --select 10000000 or less"):
        selection_seeds(most + 1)
