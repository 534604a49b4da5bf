"""A plan against itself, solved exactly: closed forms on Gaussian data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from denoisers.analytic import GaussianDenoiser
from plans.exact import exact_end
from plans.plan import run_plan
from restart.build import restart_plan
from restart.intervals import Interval
from restart.tables import published_grid
from solvers.driver import Meter
from solvers.grids import get_grid
from solvers.registry import make_solver

VAR, TOL = 0.25, 1e-7
LOW, HIGH = 0.002, 80.0
DATA = GaussianDenoiser(0.0, VAR)
#: One coordinate that moves with one draw alone each: the latent, and the two jumps.
NAMES = [("restart", 0, 0), ("restart", 0, 1)]
UNITS = torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1, 1)


def normal(name: tuple) -> torch.Tensor:
    return UNITS[1 + NAMES.index(name)]


def plan_of(main, intervals, solver="heun", down="heun"):
    return restart_plan(main, intervals, make_solver(solver), make_solver(down))


def ends(plan, visited=None):
    """The ends of a plan and of its exact self; their three entries are the linear map."""
    x = HIGH * UNITS[0]
    meter = Meter(DATA)
    exact = exact_end(plan, meter, x, normal, {} if visited is None else visited, TOL)
    return run_plan(plan, DATA, x, normal).x[-1].flatten(), exact.flatten(), meter.nfe


def shrink(high: float, low: float) -> float:
    return math.sqrt((VAR + low**2) / (VAR + high**2))


def test_the_exact_plan_is_the_closed_form():
    main = get_grid("polynomial", 7, LOW, HIGH, 7)
    t_lo, t_hi = float(main[4]), 5.0
    _, exact, _ = ends(plan_of(main, [Interval(3, 2, t_lo, t_hi)]))
    lift, again = math.sqrt(t_hi**2 - t_lo**2), shrink(t_hi, t_lo)
    truth = torch.tensor([HIGH * shrink(HIGH, t_lo) * again**2, lift * again**2, lift * again])
    torch.testing.assert_close(exact, truth.double() * shrink(t_lo, LOW), rtol=1e-5, atol=1e-7)
    assert float(exact.square().sum()) == pytest.approx(VAR + LOW**2, rel=1e-4)  # the marginal


def test_a_final_0_is_one_euler_step():
    _, exact, _ = ends(plan_of(published_grid(5), []))
    x = HIGH * shrink(HIGH, LOW)
    assert float(exact[0]) == pytest.approx(x * VAR / (VAR + LOW**2), rel=1e-6)
    grid = published_grid(5)[-2:]
    x0 = exact_end(plan_of(grid, []), Meter(DATA), UNITS[0], normal, {}, TOL)
    assert torch.equal(x0, DATA(UNITS[0], grid[0]).x0)


def test_the_error_of_fine_walks_vanishes_in_heuns_order():
    errors, t_lo = [], float(get_grid("polynomial", 5, LOW, HIGH, 7)[3])  # of both main grids
    for nodes in (65, 129):
        main = get_grid("polynomial", nodes, LOW, HIGH, 7)
        plan = plan_of(main, [Interval(nodes, 2, t_lo, 5.0)])
        made, exact, _ = ends(plan)
        errors.append(float((made - exact).norm()))
    assert errors[1] < 2e-4
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_jumps_contract_an_earlier_error_by_the_known_factor():
    """Euler's error on the way down, then descents that are fine: what remains is theory's."""
    main, t_hi = get_grid("polynomial", 7, LOW, HIGH, 7), 5.0
    at = get_grid("polynomial", 7, LOW, HIGH, 7)[4:]
    t_lo = float(at[0])
    errors = []
    for k in (1, 2):
        plan = plan_of(main, [Interval(400, k, t_lo, t_hi)], "euler")
        made, exact, _ = ends(plan)
        errors.append(float(made[0] - exact[0]))  # of the latent's own way
    first = 1.0
    for t, s in zip(main.tolist()[:4], main.tolist()[1:5], strict=True):
        first *= 1 + (s - t) * t / (VAR + t**2)  # Euler's factor of one step
    rest = math.prod(
        1 + (s - t) * t / (VAR + t**2)
        for t, s in zip(at.tolist()[:-1], at.tolist()[1:], strict=True)
    )
    for k, error in enumerate(errors, 1):
        contracted = HIGH * shrink(t_hi, t_lo) ** k
        truth = contracted * (first * rest - shrink(HIGH, t_lo) * shrink(t_lo, LOW))
        assert error == pytest.approx(truth, rel=1e-3)
    assert abs(errors[1]) < 0.2 * abs(errors[0])


def test_it_bounds_the_distance_of_the_distributions_and_is_not_that_to_the_ode():
    main = get_grid("polynomial", 18, LOW, HIGH, 7)
    for intervals in ([], [Interval(3, 2, 0.06, 0.3)], [Interval(4, 1, 0.4, 5.0)]):
        made, exact, _ = ends(plan_of(main, intervals))
        bound = float((made - exact).norm())
        w2 = abs(float(made.norm()) - float(exact.norm()))  # of two centred normal laws
        assert w2 <= bound * (1 + 1e-9)
        ode = HIGH * shrink(HIGH, LOW) * UNITS[0].flatten()
        if intervals:  # an exact Restart is right in law and does not end where the ODE does
            assert float((exact - ode).norm()) > 5 * bound
        else:
            assert w2 == pytest.approx(bound, rel=1e-6)


def test_plans_that_begin_alike_share_the_way():
    main = get_grid("polynomial", 7, LOW, HIGH, 7)
    visited: dict[Any, Any] = {}
    one = plan_of(main, [Interval(2, 1, 0.3, 5.0)])
    two = plan_of(main, [Interval(3, 2, 0.3, 5.0)], "euler")
    _, first, spent = ends(one, visited)
    assert spent > 50
    assert ends(plan_of(main, [Interval(9, 1, 0.3, 5.0)], "ipndm"), visited)[2] == 0
    _, second, more = ends(two, visited)
    assert 0 < more < spent  # only the second descent and what follows
    assert torch.equal(second, ends(two)[1]) and not torch.equal(first, second)
