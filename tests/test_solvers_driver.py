"""The driver: evaluations counted, nothing shared between samples, nothing changed in place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from solvers.driver import (
    Meter,
    State,
    advance,
    analytic_node,
    integrate,
    order_at,
    planned_nfe,
)
from solvers.registry import make_solver
from solvers.rules import FixedRatio
from solvers.types import Denoised, InsertedNode, Node, Solver
from tests.solver_problem import (
    BATCH,
    SHAPE,
    SOLVERS,
    WITH_GUIDE,
    grid,
    mixture,
    relative_error,
    start,
)

COLUMN = (BATCH, 1, 1, 1)


class Counter:
    """A cheap denoiser that counts its own calls, apart from any meter."""

    def __init__(self, cost: int = 1) -> None:
        self.cost, self.calls = cost, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        self.calls += 1
        return Denoised(0.5 * x, None)


@dataclass(frozen=True)
class PerSample:
    """A guide with another r, c and a for every sample, as the learned one has."""

    dtype: torch.dtype = torch.float64
    only: int | None = None  #: the guide of this sample alone

    def __call__(self, node: Node, t_next: Tensor) -> InsertedNode:
        ramp = torch.arange(BATCH, dtype=self.dtype).reshape(COLUMN)
        if self.only is not None:
            ramp = ramp[self.only : self.only + 1]
        return InsertedNode(0.3 + 0.15 * ramp, 1 + 0.01 * ramp, 1 - 0.02 * ramp)


# --- evaluations ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_planned_equals_metered(name):
    solver, x = WITH_GUIDE[name], start(batch=1)
    guides = [FixedRatio(0.4)] if name == "amed" else [None, FixedRatio(0.4)]
    for guide, afs, cost, zero, steps in itertools.product(
        guides, (False, True), (1, 2), (False, True), (2, 5)
    ):
        ts, counter = grid(steps, zero), Counter(cost)
        trajectory = integrate(solver, counter, x, ts, guide, afs)
        planned = planned_nfe(solver, ts, guide, afs, cost)
        assert trajectory.nfe == planned == cost * counter.calls
        assert planned_nfe(solver, ts.tolist(), guide, afs, cost) == planned


def test_known_budgets():
    eighteen, half = grid(18, zero=True), FixedRatio(0.5)
    assert planned_nfe(make_solver("heun"), eighteen) == 35
    assert planned_nfe(make_solver("euler"), eighteen) == 18
    assert planned_nfe(make_solver("dpm3"), eighteen) == 52
    assert planned_nfe(make_solver("dpm3"), grid(4), half, afs=True) == 8
    assert planned_nfe(make_solver("amed"), grid(4), half, afs=True) == 5
    assert planned_nfe(make_solver("ipndm"), grid(4), half, afs=True) == 5
    assert planned_nfe(make_solver("ipndm"), grid(6)) == 5
    assert planned_nfe(make_solver("dpmpp"), grid(6), afs=True, cost=2) == 8
    assert planned_nfe(make_solver("heun"), [80.0, 0.0], afs=True) == 0


def test_one_meter_counts_several_integrations():
    meter, ts = Meter(Counter(cost=2)), grid(3)
    first = integrate(make_solver("heun"), meter, start(), ts)
    second = integrate(make_solver("euler"), meter, start(), ts)
    assert (first.nfe, second.nfe, meter.nfe) == (8, 4, 12)


# --- first and last interval ----------------------------------------------------------------


def test_analytic_first_step_closed_form():
    """``d = x / sqrt(1 + t^2)``; for unit Gaussian data far out that is nearly the ODE's own."""
    x, ts = start(), grid()
    t, t_next = ts[0], ts[1]
    d = x / (1 + 80.0**2) ** 0.5
    node = analytic_node(x, t)
    assert relative_error(node.d, d) < 1e-12 and node.feat is None and node.x is x
    counter = Counter()
    state = advance(make_solver("euler"), Meter(counter), State(x), t, t_next, analytic_first=True)
    assert counter.calls == 0
    assert relative_error(state.x, x + (t_next - t) * d) < 1e-12
    # Only the first interval costs nothing.
    afs = integrate(make_solver("euler"), counter, x, ts, afs=True)
    rest = integrate(make_solver("euler"), counter, state.x, ts[1:])
    assert torch.equal(afs.x[1:], rest.x) and counter.calls == 2 * (len(ts) - 2)


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_an_interval_to_zero_lands_on_the_denoised_state(name):
    solver, denoiser, ts = WITH_GUIDE[name], mixture(), grid(4, zero=True)
    trajectory = integrate(solver, denoiser, start(), ts, FixedRatio(0.4))
    assert torch.equal(trajectory.x[-1], denoiser(trajectory.x[-2], ts[-2]).x0)
    assert trajectory.x.shape == (5, BATCH, *SHAPE) and torch.equal(trajectory.t, ts)
    before = advance(solver, Meter(denoiser), State(start()), ts[0], ts[1], FixedRatio(0.4))
    last = advance(solver, Meter(denoiser), before, ts[1], ts[-1], FixedRatio(0.4))
    assert before.substeps == 1 + len(solver.stages)
    assert last.history == () and last.substeps == 0


# --- orders ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy:
    """A solver that takes Euler steps and records the order and the length of the history."""

    inner: Solver
    seen: list[tuple[int, int]] = field(default_factory=list)
    guide: None = None

    @property
    def kept_nodes(self) -> int:
        return self.inner.kept_nodes

    @property
    def max_order(self) -> int:
        return self.inner.max_order

    @property
    def lower_order_final(self) -> bool:
        return self.inner.lower_order_final

    @property
    def stages(self) -> tuple[float, ...]:
        return self.inner.stages

    def predict(self, nodes: tuple[Node, ...], t: Tensor, order: int) -> Tensor:
        assert all(bool(b.t < a.t) for a, b in itertools.pairwise(nodes)), "newest last"
        self.seen.append((order, len(nodes)))
        return nodes[-1].x0 + t / nodes[-1].t * (nodes[-1].x - nodes[-1].x0)

    def correct(self, nodes: tuple[Node, ...], t: Tensor, order: int, mid: InsertedNode) -> Tensor:
        return self.predict(nodes, t, order)

    def revise(self, nodes: tuple[Node, ...], order: int) -> tuple[Node, ...]:
        assert order == (self.seen[-1][0] if self.seen else 0), "the order of the step before"
        return nodes


@pytest.mark.parametrize(
    ("name", "order", "steps", "expected"),
    [
        ("dpmpp", 3, 7, [1, 2, 3, 3, 2, 1]),
        ("dpmpp", 2, 5, [1, 2, 2, 1]),
        ("dpmpp", 1, 4, [1, 1, 1]),
        ("dpmpp", 3, 4, [1, 2, 1]),
        ("dpmpp", 3, 3, [1, 2]),
        ("dpmpp", 3, 2, [1]),
        ("unipc", 3, 7, [1, 2, 3, 3, 2, 1]),
        ("deis", 3, 6, [1, 2, 3, 3, 3]),
        ("ipndm_v", 4, 7, [1, 2, 3, 4, 4, 4]),
        ("ipndm", 4, 8, [1, 2, 3, 4, 4, 4, 4]),
    ],
)
def test_order_sequence(name, order, steps, expected):
    spy = Spy(make_solver(name, max_order=order))
    integrate(spy, Counter(), start(), grid(steps))
    assert [seen for seen, _ in spy.seen] == expected
    assert all(count >= seen for seen, count in spy.seen)


def test_order_sequence_counts_inserted_nodes():
    spy = Spy(make_solver("dpmpp", max_order=3))
    integrate(spy, Counter(), start(), grid(4), FixedRatio(0.5))
    assert [seen for seen, _ in spy.seen] == [1, 2, 3, 3, 2, 1]


def test_order_without_an_end_or_without_taper():
    tapered, plain = make_solver("dpmpp"), make_solver("dpmpp", lower_order_final=False)
    assert [order_at(tapered, i, None) for i in range(1, 6)] == [1, 2, 3, 3, 3]
    assert [order_at(plain, i, 5) for i in range(1, 6)] == [1, 2, 3, 3, 3]
    assert [order_at(tapered, i, 5) for i in range(1, 6)] == [1, 2, 3, 2, 1]


# --- nothing shared, nothing changed --------------------------------------------------------


@pytest.mark.parametrize("name", WITH_GUIDE)
@pytest.mark.parametrize("afs", [False, True])
def test_samples_do_not_touch_their_neighbours(name, afs):
    solver, ts, x = WITH_GUIDE[name], grid(), start()
    together = integrate(solver, mixture(), x, ts, PerSample(), afs).x
    for i in range(BATCH):
        alone = integrate(solver, mixture(), x[i : i + 1], ts, PerSample(only=i), afs).x
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=1e-11, atol=1e-11)
    assert relative_error(together[:, 1:2], together[:, :1]) > 1e-2


PLAIN_AND_GUIDED = [(name, False) for name in SOLVERS] + [(name, True) for name in WITH_GUIDE]


@pytest.mark.parametrize(("name", "guided"), PLAIN_AND_GUIDED)
def test_advance_changes_nothing_in_place(name, guided):
    guide = PerSample() if guided else None
    solver, meter, ts = WITH_GUIDE[name], Meter(mixture()), grid()
    state = State(start())
    for i in range(3):
        state = advance(solver, meter, state, ts[i], ts[i + 1], guide, 10)
    kept = [tensor.clone() for node in state.history for tensor in node[:3]]
    x, history, length = state.x.clone(), state.history, len(state.history)
    once = advance(solver, meter, state, ts[3], ts[4], guide, 10)
    twice = advance(solver, meter, state, ts[3], ts[4], guide, 10)
    assert torch.equal(once.x, twice.x) and once.substeps == twice.substeps
    assert torch.equal(state.x, x) and state.history is history and len(history) == length
    assert length == solver.kept_nodes
    now = [tensor for node in state.history for tensor in node[:3]]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


@pytest.mark.parametrize(("name", "guided"), PLAIN_AND_GUIDED)
def test_float32_agrees_with_float64(name, guided):
    """The grid is float64 always; the state keeps its own type and its own accuracy."""
    single, double = torch.float32, torch.float64
    ts, results = grid(), {}
    for dtype in (single, double):
        guide = PerSample(dtype) if guided else None
        x = start(10.0, dtype)
        levels = ts * (10.0 / ts[0])
        results[dtype] = integrate(WITH_GUIDE[name], mixture(dtype), x, levels, guide).x
        assert results[dtype].dtype == dtype
    assert relative_error(results[single].double(), results[double]) < 2e-5
