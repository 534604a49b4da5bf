"""Names of other tools are answered with ours."""

from __future__ import annotations

import click
import pytest

from commands.options import Name
from samplers.options import SAMPLERS
from solvers.grids import SCHEDULES, get_grid
from solvers.names import ELSEWHERE, unknown
from solvers.registry import make_solver


@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_hint_is_one_of_our_names(name: str) -> None:
    ours = ELSEWHERE[name].split()[0]
    assert ours in {*SAMPLERS, *SCHEDULES} and name not in {ours, *SCHEDULES}


def test_hints_fit_what_was_asked_for() -> None:
    assert unknown("sampler", "DPM++ 2M", SAMPLERS).startswith(
        "unknown sampler 'DPM++ 2M' (dpmpp with --max_order=2 here); choose one of "
    )
    assert "here" not in unknown("sampler", "karras", SAMPLERS)
    assert "here" not in unknown("sampler", "no such thing", SAMPLERS)


def test_everything_that_takes_a_name_gives_the_hint() -> None:
    with pytest.raises(ValueError, match=r"unknown solver 'ddim' \(euler here\); choose"):
        make_solver("ddim")
    with pytest.raises(ValueError, match=r"unknown schedule 'karras' \(polynomial here\)"):
        get_grid("karras", 4, 0.002, 80)
    option = Name("schedule", SCHEDULES)
    assert option.convert("polynomial", None, None) == "polynomial"
    with pytest.raises(click.BadParameter, match=r"'exponential' \(logsnr here\)"):
        option.convert("exponential", None, None)
