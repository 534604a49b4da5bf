"""Plans: jumps, solves, their cost, and that Restart keeps and restores marginals.

On Gaussian data every step is linear, so variances are known exactly.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from denoisers.analytic import GaussianDenoiser, MixtureDenoiser
from plans.plan import Jump, Plan, Solve, plan_nfe, run_plan
from plans.walk import Churn, WalkSpec
from restart.build import restart_plan
from restart.intervals import Interval
from restart.tables import published_grid
from runtime.noise import SeedNoise
from solvers.driver import Meter, State, advance, integrate
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.rules import FixedRatio
from solvers.types import Denoiser

HEUN = make_solver("heun")
EDM = partial(get_grid, "polynomial", rho=7.0)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def no_draw(name: tuple) -> torch.Tensor:
    raise AssertionError(f"draw {name} was not expected")


def linear_parts(plan: Plan, denoiser: Denoiser) -> dict:
    """Factors of the start (key "x") and of each named draw in the final state of a linear plan."""
    names = ["x", *(part.name for part in plan if isinstance(part, Jump))]
    unit = torch.eye(len(names), dtype=torch.float64)
    rows = {name: unit[i].reshape(-1, 1, 1, 1) for i, name in enumerate(names)}
    out = run_plan(plan, denoiser, rows["x"], lambda name: rows[name]).x[-1].flatten()
    return dict(zip(names, out.tolist(), strict=True))


def final_variance(plan: Plan, denoiser: Denoiser, start: float) -> float:
    parts = linear_parts(plan, denoiser)
    return start * parts.pop("x") ** 2 + sum(factor**2 for factor in parts.values())


def test_a_classic_solver_is_the_plan_of_one_solve():
    ts, x = published_grid(6), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    denoiser = GaussianDenoiser(0.3, 0.5)
    expected = integrate(HEUN, denoiser, x, ts)
    got = run_plan((Solve(HEUN, ts),), denoiser, x, no_draw)
    assert torch.equal(got.t, expected.t) and torch.equal(got.x, expected.x)
    assert got.nfe == expected.nfe == 11


def test_jump_adds_the_named_noise_and_keeps_the_dtype():
    x, z = torch.ones(2, 1, 2, 2), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    plan = (Jump(0.3, 0.5, ("up",), scale=1.5),)
    got = run_plan(plan, GaussianDenoiser(0.0, 1.0), x, {("up",): z}.__getitem__)
    assert got.t.tolist() == [0.3, 0.5] and got.nfe == 0 and got.x.dtype == torch.float32
    assert torch.equal(got.x[0], x)
    torch.testing.assert_close(got.x[1].double(), 1 + 0.6 * z, atol=1e-6, rtol=0)


def test_a_jump_of_zero_length_adds_nothing():
    ts, x = published_grid(5), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    denoiser = GaussianDenoiser(0.0, 0.5)
    still = Jump(float(ts[0]), float(ts[0]), ("never",))
    got = run_plan((still, Solve(HEUN, ts)), denoiser, x, no_draw)
    expected = integrate(HEUN, denoiser, x, ts)
    assert torch.equal(got.t, expected.t) and torch.equal(got.x, expected.x)


def test_trajectory_holds_every_state_in_the_order_of_the_visits():
    main = f64(4.0, 2.0, 1.0, 0.0)
    plan = restart_plan(main, [Interval(3, 2, 1.0, 3.0)], HEUN, rho=1.0)
    got = run_plan(plan, GaussianDenoiser(0.0, 1.0), torch.ones(1, 1, 1, 1), lambda _: f64(0.5))
    assert got.t.tolist() == [4, 2, 1, 3, 2, 1, 3, 2, 1, 0]
    assert got.x.shape == (10, 1, 1, 1, 1)
    up = math.sqrt(8) * 0.5  # both jumps lift the state on which the walk before them ended
    for before in (2, 5):
        assert float(got.x[before + 1] - got.x[before]) == pytest.approx(up, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1.003, 0.5])
def test_jump_and_descent_keep_the_marginal_of_gaussian_data(scale):
    v, t_lo, t_max = 0.25**2, 0.06, 0.30
    ts = EDM(3000, t_lo, t_max)
    plan = (Jump(t_lo, t_max, ("restart", 0, 0), scale), Solve(HEUN, ts))
    got = final_variance(plan, GaussianDenoiser(0.0, v), start=v + t_lo**2)
    # The descent shrinks variance by the ratio of the marginals; with scale 1 they cancel.
    up = v + t_lo**2 + scale**2 * (t_max**2 - t_lo**2)
    assert got == pytest.approx(up * (v + t_lo**2) / (v + t_max**2), rel=1e-6)
    if scale == 1.0:
        assert got == pytest.approx(v + t_lo**2, rel=1e-6)


def test_each_restart_contracts_a_wrong_variance_by_the_known_factor():
    v, t_lo, t_max = 0.25**2, 0.06, 0.30
    main = f64(0.31, t_lo)
    for k in (1, 3):
        plan = restart_plan(main, [Interval(1000, k, t_lo, t_max)], HEUN)[1:]
        got = final_variance(plan, GaussianDenoiser(0.0, v), start=1.7 * (v + t_lo**2))
        left = 0.7 * (v + t_lo**2) * ((v + t_lo**2) / (v + t_max**2)) ** k
        assert got - (v + t_lo**2) == pytest.approx(left, rel=1e-4)


def test_restart_repairs_perturbed_starts_of_a_mixture_where_heun_cannot():
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    means, std = 0.8 * draw(4, 3, 4, 4), 0.25
    denoiser = MixtureDenoiser(means, std)
    start = 80.0 * 1.3 * draw(64, 3, 4, 4)  # a start 30 % too wide

    def excess(plan: Plan) -> float:
        """Variance inside the modes over its true value, minus 1."""
        assert plan_nfe(plan) == 43
        x = run_plan(plan, denoiser, start, lambda _: draw(*start.shape)).x[-1]
        squares = (x[:, None] - means).square().flatten(2).mean(2).min(1).values
        return float(squares.mean()) / std**2 - 1

    heun = excess((Solve(HEUN, published_grid(22)),))
    restart = excess(restart_plan(published_grid(18), [Interval(3, 2, 0.06, 0.30)], HEUN))
    assert heun > 0.5  # 1.3^2 - 1 = 0.69 survives an ODE
    assert abs(restart) < 0.35 * heun  # theory: 0.69 * 0.43^2 = 0.13


def test_history_ends_at_a_jump():
    ipndm, denoiser = make_solver("ipndm"), GaussianDenoiser(0.2, 0.3)
    main, z = EDM(6, 0.01, 10.0), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    x = 10 * torch.randn(2, 1, 2, 2, dtype=torch.float64)
    plan = restart_plan(main, [Interval(5, 1, float(main[3]), 5.0)], ipndm, ipndm)
    got = run_plan(plan, denoiser, x, lambda _: z)

    first = integrate(ipndm, denoiser, x, main[:4]).x[-1]
    lifted = first + math.sqrt(25.0 - float(main[3]) ** 2) * z
    down = EDM(5, float(main[3]), 5.0)
    descent = integrate(ipndm, denoiser, lifted, down).x[-1]
    last = integrate(ipndm, denoiser, descent, main[3:]).x[-1]
    torch.testing.assert_close(got.x[4], lifted, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.x[8], descent, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.x[-1], last, atol=1e-12, rtol=0)

    state = State(x)  # the same descent with the main walk's history is another one
    for t, t_next in zip(main[:3], main[1:4], strict=True):
        state = advance(ipndm, Meter(denoiser), state, t, t_next)
    stale = advance(ipndm, Meter(denoiser), state._replace(x=lifted), down[0], down[1]).x
    assert (stale - got.x[5]).abs().max() > 1e-3


def test_an_image_depends_on_its_seed_alone():
    plan = restart_plan(published_grid(6), [Interval(3, 2, 0.06, 0.5)], HEUN, churn=Churn(4.0))
    denoiser = MixtureDenoiser(f64(-1.0, 1.0).reshape(2, 1, 1, 1).expand(2, 1, 2, 2), 0.2)

    def images(seeds):
        normal = partial(SeedNoise(seeds).normal, shape=(1, 2, 2), dtype=torch.float64)
        return run_plan(plan, denoiser, 80.0 * normal("latent"), normal).x[-1]

    apart = torch.cat([images([7]), images([3, 9])])
    torch.testing.assert_close(images([7, 3, 9]), apart, atol=1e-12, rtol=0)


SOLVERS = ("euler", "heun", "dpm", "dpm3", "ipndm", "dpmpp", "dpmpp3c", "unipc", "deis")


@st.composite
def plans(draw):
    """Any plan that `restart_plan` accepts, and the denoiser's cost."""
    main = EDM(draw(st.integers(6, 12)), 0.01, 20.0)
    intervals = []
    for t_min, t_max in ((0.05, 0.5), (1.0, 6.0)):
        if draw(st.booleans()):
            intervals.append(
                Interval(draw(st.integers(2, 5)), draw(st.integers(1, 3)), t_min, t_max)
            )

    def walk() -> WalkSpec:
        name, guide = draw(st.sampled_from(SOLVERS)), draw(st.sampled_from([None, FixedRatio(0.4)]))
        return WalkSpec(name, make_solver(name), guide, draw(st.booleans()))

    keep = draw(st.lists(st.floats(0.01, 20.0), max_size=4))
    plan = restart_plan(
        torch.cat([main, f64(0.0)]) if draw(st.booleans()) else main,
        intervals,
        walk(),
        walk(),
        churn=Churn(draw(st.sampled_from([0.0, 3.0])), S_min=0.1, S_max=5.0),
        restart_gamma=draw(st.sampled_from([0.0, 0.1])),
        required_nodes=torch.tensor(keep, dtype=torch.float64) if keep else None,
    )
    return plan, draw(st.sampled_from([1, 2]))


@given(plans())
def test_planned_nfe_is_metered_nfe(case):
    plan, cost = case
    calls = []

    class Counting(GaussianDenoiser):
        def __call__(self, x, sigma):
            calls.append(float(sigma))
            return super().__call__(x, sigma)

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    meter = Meter(Counting(0.0, 0.5, cost=cost))
    meter.nfe = 7  # what was spent before is not the plan's
    got = run_plan(plan, meter, x, lambda _: x)
    assert got.nfe == plan_nfe(plan, cost) == cost * len(calls) == meter.nfe - 7


@given(st.integers(6, 20), st.lists(st.tuples(st.integers(2, 6), st.integers(1, 5)), max_size=2))
def test_nfe_of_heun_inside_heun_is_the_published_formula(n_main, counts):
    levels = ((0.06, 0.6), (1.0, 9.0))
    intervals = [Interval(n, k, *levels[i]) for i, (n, k) in enumerate(counts)]
    formula = 2 * n_main - 1 + sum(2 * k * (n - 1) for n, k in counts)
    assert plan_nfe(restart_plan(published_grid(n_main), intervals, HEUN)) == formula


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jump(2.0, 1.0, ("a",)), "jump .* 2 -> 1"),
        (lambda: Jump(math.nan, 1.0, ("a",)), "jump .* nan -> 1"),
        (lambda: Solve(HEUN, f64(1.0, 2.0)), r"decreasing times, got \[1.0, 2.0\]"),
        (lambda: Solve(HEUN, f64(1.0)), r"two or more .* got \[1.0\]"),
        (
            lambda: run_plan((), GaussianDenoiser(0.0, 1.0), f64(0.0), no_draw),
            "the plan is empty",
        ),
        (
            lambda: run_plan(
                (Solve(HEUN, f64(3.0, 1.0)), Jump(1.5, 2.0, ("a",))),
                GaussianDenoiser(0.0, 1.0),
                torch.zeros(1, 1, 1, 1),
                no_draw,
            ),
            "ends at 1, the next begins at 1.5",
        ),
    ],
)
def test_invalid_plans_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
