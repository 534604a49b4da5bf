"""Gradients of an interval in r, c and a, as needed to train a guide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from solvers.driver import Meter, State, advance
from solvers.rules import FixedRatio
from solvers.types import InsertedNode, Node, Solver
from tests.solver_problem import BATCH, WITH_GUIDE, mixture, start

TS = torch.tensor([5.0, 3.0, 2.0, 1.2, 0.6], dtype=torch.float64)


def interval(solver: Solver, state: State, i: int, r: Tensor, c: Tensor, a: Tensor) -> State:
    def guide(node: Node, t_next: Tensor) -> InsertedNode:
        return InsertedNode(r, c, a)

    return advance(solver, Meter(mixture()), state, TS[i], TS[i + 1], guide)


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    ramp = torch.arange(BATCH, dtype=torch.float64).reshape(BATCH, 1, 1, 1)
    values = (0.35 + 0.1 * ramp, 1.01 - 0.01 * ramp, 0.95 + 0.02 * ramp)
    return tuple(value.requires_grad_() for value in values)  # type: ignore[return-value]


def with_history(solver: Solver) -> State:
    """A state two plain intervals down, so that every history is full."""
    state = State(start(5.0))
    for i in range(2):
        state = advance(solver, Meter(mixture()), state, TS[i], TS[i + 1], FixedRatio(0.5))
    return state


def projected(x: Tensor) -> Tensor:
    """Three random projections of a sample: one backward pass each, not one per value."""
    weights = torch.randn(3, x[0].numel(), generator=torch.Generator().manual_seed(0))
    return x.flatten(1) @ weights.to(x).T


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_gradcheck_of_one_interval(name):
    solver, chosen = WITH_GUIDE[name], parameters()
    state = with_history(solver)

    def last(r: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return projected(interval(solver, state, 2, r, c, a).x)

    assert torch.autograd.gradcheck(last, chosen, eps=1e-6, atol=1e-6, rtol=1e-6)
    gradients = torch.autograd.grad(last(*chosen).square().sum(), chosen)
    for which, gradient in zip("rca", gradients, strict=True):
        assert float(gradient.abs().min()) > 1e-6, f"{name} does not depend on {which}"


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_gradcheck_through_the_history(name):
    """Two intervals: what the first one did reaches the second through state and history."""
    solver, chosen = WITH_GUIDE[name], parameters()
    state = with_history(solver)

    def both(r: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return projected(interval(solver, interval(solver, state, 2, r, c, a), 3, r, c, a).x)

    assert torch.autograd.gradcheck(both, chosen, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", WITH_GUIDE)
def test_gradients_stay_with_their_sample(name):
    solver, chosen = WITH_GUIDE[name], parameters()
    x = interval(solver, with_history(solver), 2, *chosen).x
    for gradient in torch.autograd.grad(x[0].sum(), chosen):
        assert float(gradient[1:].abs().max()) == 0.0 and float(gradient[0].abs()) > 0.0
