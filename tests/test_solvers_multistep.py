"""UniPC, DEIS and iPNDM with variable steps: exactness, identities, the corrector, linearity."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from solvers.driver import Meter, State, advance, analytic_node, integrate
from solvers.quadrature import exponential_moments, uniform_moments, weights
from solvers.registry import make_solver
from solvers.rules import ADAMS_BASHFORTH
from solvers.types import Denoised, Node, Solver
from tests.solver_problem import UNIPC, grid, mixture, relative_error, sample, start

NEW = {
    "ipndm_v": make_solver("ipndm_v"),
    "deis": make_solver("deis"),
    **UNIPC,
}
STEPS = torch.tensor([7.0, 4.0, 2.9, 1.1, 0.5], dtype=torch.float64)  #: ratios far from 1


# --- exactness ------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [-1.3, -0.02, 0.4, 2.5])
def test_exponential_moments_by_simpsons_rule(g):
    s = torch.linspace(0, 1, 2001, dtype=torch.float64)
    rule = torch.full_like(s, 2.0)
    rule[1::2], rule[0], rule[-1] = 4.0, 1.0, 1.0
    for k, ours in enumerate(exponential_moments(torch.tensor(g, dtype=torch.float64), 4)):
        truth = (rule * g * torch.exp(g * (1 - s)) * s**k).sum() / (3 * (len(s) - 1))
        assert float(ours) == pytest.approx(float(truth), rel=1e-8)


def adams(places: Iterable[float]) -> list[float]:
    s = [torch.tensor(place, dtype=torch.float64) for place in places]
    return [float(w) for w in weights(s, uniform_moments(s[0], len(s)))]


def test_equal_steps_have_the_weights_of_adams_and_bashforth():
    for order, expected in ADAMS_BASHFORTH.items():
        assert adams(range(0, -order, -1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("equal", [True, False])
def test_published_third_order_of_ipndm_v_needs_equal_steps(equal):
    """The weights of the published code, its bracket as it is: the second moment is lost."""
    h, h1, h2 = (1.0, 1.0, 1.0) if equal else (1.0, 2.0, 3.0)
    third = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
    published = [1 + h / h1 / 2 + third, -h / h1 / 2 - (1 + h1 / h2) * third, third * h1 / h2]
    places = [0.0, -h1 / h, -(h1 + h2) / h]
    moments = [sum(w * s**k for w, s in zip(published, places, strict=True)) for k in range(3)]
    assert moments[:2] == pytest.approx([1, 1 / 2], rel=1e-12)
    assert (abs(moments[2] - 1 / 3) < 1e-12) == equal
    assert (adams(places) == pytest.approx(published, rel=1e-12)) == equal


class Chosen:
    """A denoiser that returns a function of sigma, whatever the state."""

    cost = 1

    def __init__(self, x0) -> None:
        self.x0 = x0

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(self.x0(x, sigma), None)


def walk_with_history(solver: Solver, denoiser: Chosen, exact) -> float:
    """The largest error on `STEPS` from a full history of exact nodes."""
    meter, known = Meter(denoiser), solver.kept_nodes
    nodes = tuple(meter(exact(t), t) for t in STEPS[:known])
    state, errors = State(exact(STEPS[known]), nodes, known), []
    for t, t_next in pairwise(STEPS[known:]):
        state = advance(solver, meter, state, t, t_next)
        errors.append(float((state.x - exact(t_next)).abs().max()))
    return max(errors)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_is_exact_for_slopes_that_are_polynomials_in_sigma(order):
    solver, one = make_solver("ipndm_v", max_order=order), torch.ones(1, 1, 1, 1).double()
    for power in (order - 1, order):
        denoiser = Chosen(lambda x, t, p=power: x - t * (p + 1) * t**p)
        error = walk_with_history(solver, denoiser, lambda t, p=power: one * t ** (p + 1))
        assert error < 1e-11 if power < order else error > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_exact_for_slopes_that_are_polynomials_in_ln_sigma(order):
    """``d/dt (t L^p) = L^p + p L^(p-1)`` with ``L = ln t``."""
    solver, one = make_solver("deis", max_order=order), torch.ones(1, 1, 1, 1).double()
    for power in (order - 1, order):

        def slope(t: Tensor, p: int = power) -> Tensor:
            log = torch.log(t)
            return log**p + (p * log ** (p - 1) if p else 0.0)

        denoiser = Chosen(lambda x, t, slope=slope: x - t * slope(t))
        error = walk_with_history(solver, denoiser, lambda t, p=power: one * t * torch.log(t) ** p)
        assert error < 1e-11 if power < order else error > 1e-3


# --- identities -----------------------------------------------------------------------------


def test_first_orders_are_euler():
    euler = sample(make_solver("euler"), grid(20))
    for name in ("ipndm_v", "deis"):
        assert relative_error(sample(make_solver(name, max_order=1), grid(20)), euler) < 1e-12
    node = Meter(mixture())(start(2.0), STEPS[2])
    step = make_solver("euler").predict((node,), STEPS[3], 1)
    for solver in UNIPC.values():  # its predictor alone; the corrector makes it another method
        assert relative_error(solver.predict((node, node, node), STEPS[3], 1), step) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_on_equal_steps_is_ipndm(order):
    ours, other = (make_solver(name, max_order=order) for name in ("ipndm_v", "ipndm"))
    equal = torch.linspace(80.0, 1.0, 9, dtype=torch.float64)
    assert relative_error(sample(ours, equal), sample(other, equal)) < 1e-12
    if order > 1:
        assert relative_error(sample(ours, grid()), sample(other, grid())) > 1e-3


def test_deis_of_order_3_is_the_noise_form_with_its_second_difference_doubled():
    other = make_solver("dpmpp3c", predict_x0=False, lower_order_final=False)
    nodes = tuple(Meter(mixture())(start(float(t)), t) for t in STEPS[:3])
    ours = make_solver("deis").predict(nodes, STEPS[3], 3)
    assert relative_error(ours, other.predict(nodes, STEPS[3], 3)) < 1e-12


def test_the_predictors_of_unipc_are_dpm_solver_pp():
    """Order 2 with bh2 is its second order, order 3 its corrected third order."""
    nodes = tuple(Meter(mixture())(start(float(t)), t) for t in STEPS[:3])
    for variant, order, other in (
        ("bh2", 2, make_solver("dpmpp", max_order=2)),
        ("bh1", 3, make_solver("dpmpp3c")),
        ("bh2", 3, make_solver("dpmpp3c")),
    ):
        ours = make_solver("unipc", variant=variant).predict(nodes, STEPS[3], order)
        assert relative_error(ours, other.predict(nodes, STEPS[3], order)) < 1e-12
    bh1, bh2 = (make_solver("unipc", variant=v).predict(nodes, STEPS[3], 2) for v in ("bh1", "bh2"))
    assert relative_error(bh1, bh2) > 1e-3


# --- the corrector --------------------------------------------------------------------------


def test_the_corrector_of_order_1_by_hand():
    """``x^c = (t'/t) x - (e^-h - 1) D - B/2 (D' - D)``, D' at the prediction."""
    denoiser, (t, t_next, t_last) = mixture(), grid()[1:4]
    for variant in ("bh1", "bh2"):
        x, h = start(float(t)), torch.log(t / t_next)
        b = -h if variant == "bh1" else torch.expm1(-h)
        first = denoiser(x, t).x0
        base = t_next / t * x - torch.expm1(-h) * first
        second = denoiser(base, t_next).x0
        corrected = base - b / 2 * (second - first)
        solver = make_solver("unipc", max_order=1, variant=variant)
        ours = integrate(solver, denoiser, x, torch.stack([t, t_next, t_last])).x
        assert relative_error(ours[1], base) < 1e-12
        by_hand = t_last / t_next * corrected - torch.expm1(torch.log(t_last / t_next)) * second
        assert relative_error(ours[2], by_hand) < 1e-12


@pytest.mark.parametrize("order", [2, 3])
def test_the_corrector_is_exact_for_one_degree_more_than_the_predictor(order):
    """``x0 = (p + L) L^(p-1)`` has the solution ``x = L^p``: ``dx/dL = x0 - x``, ``L = -ln t``."""
    solver, one = make_solver("unipc", max_order=order), torch.ones(1, 1, 1, 1).double()
    for power in (order, order + 1):
        exact = lambda t, p=power: one * (-torch.log(t)) ** p  # noqa: E731
        x0 = lambda x, t, p=power: one * (p - torch.log(t)) * (-torch.log(t)) ** (p - 1)  # noqa: E731
        meter = Meter(Chosen(x0))
        nodes = tuple(meter(exact(t), t) for t in STEPS[:order])
        predicted = meter(solver.predict(nodes, STEPS[order], order), STEPS[order])
        (*kept, revised) = solver.revise((*nodes, predicted), order)
        truth = exact(STEPS[order])
        assert tuple(kept) == nodes and revised.x0 is predicted.x0
        assert float((predicted.x - truth).abs()) > 1e-3
        error = float((revised.x - truth).abs())
        assert error < 1e-11 if power == order else error > 1e-4


def test_a_given_state_is_not_corrected():
    """Only predictions are: not the first state, nor one that replaces a prediction."""
    solver, meter, ts = make_solver("unipc"), Meter(mixture()), grid()
    state = advance(solver, meter, State(start()), ts[0], ts[1])
    assert state.order == 1 and torch.equal(state.history[-1].x, start())
    kept = advance(solver, meter, state._replace(order=0), ts[1], ts[2])
    assert torch.equal(kept.history[-1].x, state.x)
    revised = advance(solver, meter, state, ts[1], ts[2])
    assert relative_error(revised.history[-1].x, state.x) > 1e-4
    assert relative_error(revised.x, kept.x) > 1e-4


def test_analytic_first_node():
    """It enters the history like any other: the walk is that of a denoiser which returns it."""
    ts, plain = grid(), mixture()

    class First:
        cost = 1

        def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
            return Denoised(analytic_node(x, sigma).x0, None) if sigma == ts[0] else plain(x, sigma)

    for solver in NEW.values():
        ours = integrate(solver, mixture(), start(), ts, afs=True)
        assert torch.equal(ours.x, integrate(solver, First(), start(), ts).x)
        assert ours.nfe == len(ts) - 2


# --- linearity ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_rules_are_linear_in_states_and_denoised_states(name):
    solver = NEW[name]
    times = STEPS[: solver.max_order + 1]

    def nodes(seed: int) -> tuple[Node, ...]:
        drawn = torch.Generator().manual_seed(seed)
        pairs = torch.randn(len(times), 2, 3, 1, 2, 2, generator=drawn, dtype=torch.float64)
        return tuple(Node(t, x, x0, None) for t, (x, x0) in zip(times, pairs, strict=True))

    def rule(nodes: tuple[Node, ...]) -> Tensor:
        revised = solver.revise(nodes, solver.max_order)
        return solver.predict(revised, STEPS[-1] / 3, solver.max_order)

    a, b = nodes(1), nodes(2)
    mixed = tuple(
        Node(m.t, 2 * m.x - 3 * n.x, 2 * m.x0 - 3 * n.x0, None) for m, n in zip(a, b, strict=True)
    )
    assert relative_error(rule(mixed), 2 * rule(a) - 3 * rule(b)) < 1e-12
