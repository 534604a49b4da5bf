"""Numbers on command lines: finite, within their range, of one set of types."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import torch

from commands.app import COMMANDS, load
from commands.numbers import LIMIT, SEED, TOLERANCE, Number
from denoisers.analytic import GaussianDenoiser
from solvers.grids import Grid, get_grid
from solvers.oracle import dopri5


def options(command: click.Command) -> Iterator[click.Parameter]:
    yield from command.params
    if isinstance(command, click.Group):
        for part in command.commands.values():
            yield from options(part)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_takes_a_number_that_is_none(name: str) -> None:
    for option in options(load(name)):
        kind = option.type
        if isinstance(kind, click.types.FloatParamType) and name != "train-denoiser":
            assert isinstance(kind, Number), option.name
            for text in ("nan", "inf", "-inf"):
                if text == "inf" and option.name == "S_max":
                    assert kind is LIMIT and kind.convert(text, option, None) == float("inf")
                    continue
                with pytest.raises(click.BadParameter, match="finite|range"):
                    kind.convert(text, option, None)
        if isinstance(kind, click.types.IntParamType):
            for text in ("nan", "1e3", "²"):
                with pytest.raises(click.BadParameter, match="not a valid integer"):
                    kind.convert(text, option, None)
        if option.name == "seed" and name != "train-denoiser":
            assert kind is SEED


@pytest.mark.parametrize("rho", [1e-3, 1e-320, 5e-324, 1e-300])
def test_an_exponent_that_overflows_is_one_sentence(rho: float) -> None:
    with pytest.raises(ValueError, match=r"schedule_rho = .* too small|does not decrease"):
        get_grid("polynomial", 5, 0.002, 80.0, rho)


def test_the_smallest_exponents_that_fit_have_a_grid() -> None:
    for rho in (0.01, 0.1, 1e2, 1e4):
        ts = Grid("polynomial", 5, rho, 0.002, 80.0).nodes()
        assert bool(ts.isfinite().all() & (ts.diff() < 0).all())


@pytest.mark.parametrize("tol", [float("nan"), float("inf"), 0.0, -1.0, 1e-300, 1e-9])
def test_tolerances_below_the_rounding_are_one_sentence(tol: float) -> None:
    denoiser = GaussianDenoiser(torch.zeros(1, 2, 2), 0.25)
    ts = torch.tensor([80.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="give a larger --tol"):
        dopri5(denoiser, torch.ones(2, 1, 2, 2), ts, rtol=tol, atol=tol)
    assert TOLERANCE.min == 1e-14


def test_a_field_that_no_step_resolves_is_one_sentence() -> None:
    """torchdiffeq asserts that the state is finite and that a step has a length."""
    ts = torch.tensor([80.0, 1.0], dtype=torch.float64)
    start = torch.full((1, 1, 2, 2), float("inf"), dtype=torch.float64)
    with pytest.raises(ValueError, match="found no step size for a tolerance of 1e-06"):
        dopri5(GaussianDenoiser(torch.zeros(1, 2, 2), 0.25), start, ts)
