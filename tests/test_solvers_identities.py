"""Identities between methods."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers.dpmpp import DPMpp, threshold
from solvers.driver import Meter, State, advance, integrate
from solvers.registry import SolverOptions, make_solver
from solvers.rules import ADAMS_BASHFORTH, AdamsBashforth, FixedRatio, ThreeStage, TwoStage
from solvers.types import Denoised, InsertedNode
from solvers.unipc import UniPC
from tests.solver_problem import (
    MULTISTEP,
    SOLVERS,
    WITH_GUIDE,
    grid,
    mixture,
    relative_error,
    sample,
    start,
)


def refined(ts: Tensor, r: float) -> Tensor:
    """The grid with a node inserted at the constant ``r`` in every interval."""
    nodes = [ts[0]]
    for t, t_next in zip(ts, ts[1:], strict=False):
        nodes += [t_next**r * t ** (1 - r), t_next]
    return torch.stack(nodes)


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("r", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("afs", [False, True])
def test_constant_plugin_is_the_base_solver_on_the_refined_grid(name, r, afs):
    solver, ts = MULTISTEP[name], grid()
    plugin = sample(solver, ts, FixedRatio(r), afs)
    base = sample(solver, refined(ts, r), afs=afs)
    assert torch.equal(plugin, base[::2])


def test_euler_is_first_order_dpm_solver():
    euler = sample(make_solver("euler"), grid(20))
    for data in (True, False):
        other = sample(make_solver("dpmpp", max_order=1, predict_x0=data), grid(20))
        assert relative_error(other, euler) < 1e-12
    assert torch.equal(sample(make_solver("ipndm", max_order=1), grid(20)), euler)


def test_euler_by_hand():
    ts, denoiser, x = grid(), mixture(), start()
    for t, t_next in zip(ts, ts[1:], strict=False):
        x0 = denoiser(x, t).x0
        x = x0 + t_next / t * (x - x0)  # DDIM: the noise estimate is kept, its level lowered
    assert relative_error(sample(make_solver("euler"), ts)[-1], x) < 1e-12


def test_heun_is_the_two_stage_rule_at_r_1():
    heun = sample(make_solver("heun"), grid(20))
    assert relative_error(sample(make_solver("dpm", r=1.0), grid(20)), heun) < 1e-12
    ts, denoiser, x = grid(20), mixture(), start()
    for t, t_next in zip(ts, ts[1:], strict=False):  # EDM, algorithm 1, by hand
        d = (x - denoiser(x, t).x0) / t
        ahead = x + (t_next - t) * d
        x = x + (t_next - t) * (d + (ahead - denoiser(ahead, t_next).x0) / t_next) / 2
    assert relative_error(heun[-1], x) < 1e-12


def test_dpm_solver_2_is_its_exponential_form():
    """``x' = x - s' (e^h - 1) [(1 - 1/(2r)) d + d_mid / (2r)]``, the node at ``lambda + r h``."""
    r, ts, denoiser, x = 0.3, grid(), mixture(), start()
    for t, t_next in zip(ts, ts[1:], strict=False):
        h = torch.log(t) - torch.log(t_next)
        d = (x - denoiser(x, t).x0) / t
        t_mid = torch.exp(-(-torch.log(t) + r * h))
        x_mid = x - t_mid * torch.expm1(r * h) * d
        d_mid = (x_mid - denoiser(x_mid, t_mid).x0) / t_mid
        x = x - t_next * torch.expm1(h) * ((1 - 1 / (2 * r)) * d + d_mid / (2 * r))
    assert relative_error(sample(make_solver("dpm", r=r), ts)[-1], x) < 1e-12


def test_dpm_solver_3_is_the_published_algorithm_of_a_vp_process():
    """Lu et al. 2022, algorithm 2, with its alpha and sigma; our ``x`` is theirs over alpha."""
    ts, denoiser, x = grid(), mixture(), start()
    alpha = lambda t: 1 / torch.sqrt(1 + t**2)  # noqa: E731
    sigma = lambda t: t * alpha(t)  # noqa: E731
    noise = lambda u, t: (u / alpha(t) - denoiser(u / alpha(t), t).x0) / t  # noqa: E731
    r1, r2 = 1 / 3, 2 / 3
    x = x * alpha(ts[0])
    for t, t_next in zip(ts, ts[1:], strict=False):
        h = torch.log(t) - torch.log(t_next)
        s1, s2 = t * torch.exp(-r1 * h), t * torch.exp(-r2 * h)
        eps = noise(x, t)
        u1 = alpha(s1) / alpha(t) * x - sigma(s1) * torch.expm1(r1 * h) * eps
        first = noise(u1, s1) - eps
        u2 = alpha(s2) / alpha(t) * x - sigma(s2) * torch.expm1(r2 * h) * eps
        u2 = u2 - sigma(s2) * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1) * first
        second = noise(u2, s2) - eps
        x = alpha(t_next) / alpha(t) * x - sigma(t_next) * torch.expm1(h) * eps
        x = x - sigma(t_next) / r2 * (torch.expm1(h) / h - 1) * second
    assert relative_error(sample(make_solver("dpm3"), ts)[-1], x / alpha(ts[-1])) < 1e-12


def test_amed_rule_at_the_geometric_mean_is_dpm_solver_2():
    half = FixedRatio(0.5)
    ours = sample(make_solver("amed"), grid(), half)
    assert relative_error(ours, sample(make_solver("dpm"), grid())) < 1e-12
    # They differ elsewhere: the AMED rule ignores the first slope.
    other = sample(make_solver("amed"), grid(), FixedRatio(0.3))
    assert relative_error(other, sample(make_solver("dpm", r=0.3), grid())) > 1e-3


def test_adams_bashforth_weights_integrate_the_interpolating_polynomial():
    """Exact in fractions: ``sum_j w_j (-j)^p = integral_0^1 s^p ds = 1 / (p + 1)`` for p < k."""
    for order, weights in ADAMS_BASHFORTH.items():
        exact = [Fraction(w).limit_denominator(24) for w in weights]
        assert len(weights) == order
        for power in range(order):
            moment = sum(w * (-j) ** power for j, w in enumerate(exact))
            assert moment == Fraction(1, power + 1)


class SlopeField:
    """A denoiser whose ODE is ``dx/dt = p(t)``, whatever the state."""

    cost = 1

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(x - sigma * (self.power + 1) * sigma**self.power, None)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_walks_polynomials_exactly(order):
    """With exact history, degree ``order - 1`` in the slope costs no error, the next one does."""
    ts = torch.linspace(3.0, 1.0, 9, dtype=torch.float64)
    for power in (order - 1, order):
        solver, meter = make_solver("ipndm", max_order=order), Meter(SlopeField(power))
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        known = order - 1
        nodes = tuple(meter(x * t ** (power + 1), t) for t in ts[:known])
        state = State(x * ts[known] ** (power + 1), nodes, known)
        for t, t_next in zip(ts[known:], ts[known + 1 :], strict=False):
            state = advance(solver, meter, state, t, t_next)
        error = abs(float(state.x) - 1.0)  # x(t) = t^(power + 1)
        assert error < 1e-12 if power < order else error > 1e-3


def test_scales_of_the_direction_and_of_the_network_time():
    """The state is affine in ``c``; ``a`` scales the network time but not the slope."""
    x, t, t_next = start(), grid()[1], grid()[2]
    denoiser = mixture()

    def step(c: float, a: float) -> Tensor:
        guide = lambda node, t_next: InsertedNode(0.4, c, a)  # noqa: E731
        return advance(make_solver("amed"), Meter(denoiser), State(x), t, t_next, guide).x

    d = (x - denoiser(x, t).x0) / t
    t_mid = t_next**0.4 * t**0.6
    x_mid = x + (t_mid - t) * d
    d_mid = (x_mid - denoiser(x_mid, 0.9 * t_mid).x0) / t_mid
    truth = x + 1.1 * (t_next - t) * d_mid
    assert relative_error(step(1.1, 0.9), truth) < 1e-12
    assert relative_error(step(1.0, 0.9), truth) > 1e-3
    assert relative_error(step(1.1, 1.0), truth) > 1e-5


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_c_scales_the_change_and_nothing_else(name):
    """``x' = base + c change``; the base is what the rule's linear part leaves unscaled."""
    solver, ts = WITH_GUIDE[name], grid()
    state = State(start())
    for i in range(2):
        state = advance(solver, Meter(mixture()), state, ts[i], ts[i + 1], FixedRatio(0.4))

    def step(c: float) -> Tensor:
        guide = lambda node, t_next: InsertedNode(0.4, c, 1.0)  # noqa: E731
        return advance(solver, Meter(mixture()), state, ts[2], ts[3], guide).x

    t_mid = ts[3] ** 0.4 * ts[2] ** 0.6
    node = Meter(mixture())(state.x, ts[2])
    if isinstance(solver, TwoStage | ThreeStage):
        base = state.x
    else:  # the second half step starts at the inserted node
        nodes = solver.revise((*state.history, node), state.order)
        mid = Meter(mixture())(solver.predict(nodes, t_mid, solver.max_order), t_mid)
        base = solver.revise((*nodes, mid), solver.max_order)[-1].x
        if isinstance(solver, UniPC) or (isinstance(solver, DPMpp) and solver.predict_x0):
            base = ts[3] / t_mid * base
    assert relative_error(step(1.3), base + 1.3 * (step(1.0) - base)) < 1e-12
    assert relative_error(step(0.0), base) < 1e-12


@pytest.mark.parametrize("name", SOLVERS)
def test_data_at_one_point_are_solved_exactly_by_every_method(name):
    """All data at one point: ``x(t) = m + t/T (x(T) - m)``, straight, so any rule is exact."""
    point = torch.full((1, 2, 2, 2), 0.4, dtype=torch.float64)

    class Point:
        cost = 1

        def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
            return Denoised(point.expand_as(x), None)

    ts = grid()
    ours = integrate(SOLVERS[name], Point(), start(), ts, FixedRatio(0.6)).x
    exact = point + (ts / ts[0]).reshape(-1, 1, 1, 1, 1) * (start() - point)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


def test_threshold_by_hand():
    x0 = start(2.0)
    x0[1] *= 0.1  # a sample within [-1, 1] stays as it is
    ours = threshold(x0)
    assert torch.equal(ours[1], x0[1])
    for row, clipped in zip(x0.numpy(), ours.numpy(), strict=True):
        limit = max(1.0, float(np.quantile(np.abs(row), 0.995)))
        np.testing.assert_allclose(clipped, np.clip(row, -limit, limit) / limit, rtol=1e-14)
    assert float(ours.abs().max()) <= 1.0


def test_a_thresholded_step_by_hand():
    x, t, t_next = start(), grid()[1], grid()[2]
    solver = make_solver("dpmpp", max_order=1, thresholding=True)
    ours = advance(solver, Meter(mixture()), State(x), t, t_next).x
    x0 = mixture()(x, t).x0
    assert float((threshold(x0) - x0).abs().max()) > 0.1
    by_hand = t_next / t * x + (1 - t_next / t) * threshold(x0)
    assert relative_error(ours, by_hand) < 1e-12


def test_invalid_settings_raise():
    cases = [
        (lambda: make_solver("rk45"), "unknown solver 'rk45'"),
        (lambda: AdamsBashforth(max_order=5), "max_order = 5"),
        (lambda: make_solver("ipndm", max_order=0), "max_order = 0"),
        (lambda: DPMpp(max_order=4), "max_order = 4"),
        (lambda: make_solver("dpmpp", max_order=0), "max_order = 0"),
        (lambda: DPMpp(predict_x0=False, thresholding=True), "predict_x0=True"),
        (lambda: FixedRatio(0.0), "r = 0 "),
        (lambda: make_solver("dpm", r=1.5), "r = 1.5 "),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_solvers_by_name():
    assert make_solver("dpm", r=None) == TwoStage(FixedRatio(0.5))
    assert make_solver("heun") == TwoStage(FixedRatio(1.0))
    assert make_solver("ipndm", max_order=None) == AdamsBashforth(4)
    assert make_solver("dpmpp", max_order=2, predict_x0=None) == DPMpp(2)
    assert make_solver("dpmpp3c") == DPMpp(3, corrected=True)
    assert make_solver("dpm3") == ThreeStage(FixedRatio(2 / 3))
    assert make_solver("amed") == TwoStage(None, midpoint=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ipndm", {"max_ordr": 2}), ("heun", {"r": 0.2}), ("dpmpp3c", {"max_order": 2}),
     ("ipndm", {"predict_x0": None})],
)  # fmt: skip
def test_unknown_options_raise(name, options):
    with pytest.raises(ValueError, match=f"{name!r} has no option '{next(iter(options))}'"):
        make_solver(name, **options)


def test_solver_options_passes_only_what_the_solver_accepts():
    options = SolverOptions(max_order=2, predict_x0=False, r=0.3)
    assert options.make("ipndm") == AdamsBashforth(2)
    assert options.make("dpmpp") == DPMpp(2, predict_x0=False)
    assert options.make("dpm") == TwoStage(FixedRatio(0.3))
    assert options.make("heun") == TwoStage(FixedRatio(1.0))
