"""The driver: every sampler, with or without a guide, integrates over a grid with `advance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.types import Denoised, Denoiser, Guide, Node, Solver, Trajectory


class Meter:
    """Wraps a denoiser and counts network evaluations: every call adds its cost to ``nfe``."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.nfe = 0

    @classmethod
    def of(cls, denoiser: Denoiser | Meter) -> Meter:
        """``denoiser`` itself if it is a meter, which keeps its count, or a new meter around it."""
        return denoiser if isinstance(denoiser, Meter) else cls(denoiser)

    def __call__(self, x: Tensor, t: Tensor, network_time: Tensor | None = None) -> Node:
        """Evaluate at ``x`` (B, C, H, W) and level ``t``; the network gets ``network_time``."""
        self.nfe += self.denoiser.cost
        x0, feat = self.denoiser(x, t if network_time is None else network_time)
        return Node(t, x, x0, feat)


class State(NamedTuple):
    """The state of an integration: `advance` takes one and returns the next, never in place."""

    x: Tensor  #: (B, C, H, W)
    history: tuple[Node, ...] = ()  #: newest last, at most the solver's ``kept_nodes``
    substeps: int = 0  #: solver steps since the integration (re)started
    order: int = 0  #: of the step that predicted ``x``; 0 if ``x`` is given, not predicted
    denoised: Denoised | None = None  #: at ``x``, where that has been evaluated already


def analytic_node(x: Tensor, t: Tensor) -> Node:
    """The node of the analytical first step (AFS), with ``d = x / sqrt(1 + sigma^2)``.

    It needs no evaluation: at a large sigma the data are close to a unit Gaussian
    (arXiv:2210.05475, section 4).  There are no bottleneck features, so ``feat`` is None.
    """
    root = torch.sqrt(1 + t**2)
    return Node(t, x, x / (root * (root + t)), None)  # x - t x / root, where nothing cancels


def order_at(solver: Solver, substep: int, total: int | None) -> int:
    """Order of the ``substep``-th solver step (from 1) of ``total``: rising, then falling."""
    order = min(solver.max_order, substep)
    if solver.lower_order_final and total is not None and substep >= solver.max_order:
        order = min(order, max(1, total + 1 - substep))
    return order


def advance(
    solver: Solver,
    meter: Meter,
    state: State,
    t: Tensor,
    t_next: Tensor,
    guide: Guide | None = None,
    total: int | None = None,
    analytic_first: bool = False,
) -> State:
    """Integrate over one interval, from ``t`` down to ``t_next``.

    ``guide`` (or the solver's own) inserts a node, reached in the solver's ``stages``; without a
    guide the solver predicts the state at ``t_next`` directly.  ``total`` is the number of solver
    steps over the whole grid, for solvers that lower their order at the end.  An interval that
    ends at sigma = 0 is one Euler step, which gives the denoised state.
    """
    guide = guide or solver.guide
    if analytic_first:
        node = analytic_node(state.x, t)
    else:
        node = meter(state.x, t) if state.denoised is None else Node(t, state.x, *state.denoised)
    if t_next == 0:
        return State(node.x0)
    nodes = solver.revise((*state.history, node), state.order)
    substep = state.substeps + 1
    order = order_at(solver, substep, total)
    if guide is None:
        x_next = solver.predict(nodes, t_next, order)
    else:
        mid = guide(node, t_next)
        for stage in solver.stages:
            r = stage * mid.r
            t_mid = t_next**r * t ** (1 - r)
            x_mid = solver.predict(nodes, t_mid, order)
            inserted = meter(x_mid, t_mid, network_time=mid.a * t_mid)
            nodes = solver.revise((*nodes, inserted), order)
            substep += 1
            order = order_at(solver, substep, total)
        x_next = solver.correct(nodes, t_next, order, mid)
    keep = solver.kept_nodes
    return State(x_next, nodes[-keep:] if keep else (), substep, order)


def substeps_total(solver: Solver, num_intervals: int, guide: Guide | None) -> int:
    """Solver steps in ``num_intervals`` intervals: every inserted node adds one to each."""
    return num_intervals * (1 + _inserted(solver, guide))


def integrate(
    solver: Solver,
    denoiser: Denoiser | Meter,
    x: Tensor,
    ts: Tensor,
    guide: Guide | None = None,
    afs: bool = False,
) -> Trajectory:
    """Integrate over the grid ``ts`` (T,) from the state ``x`` (B, C, H, W) at ``ts[0]``.

    ``ts`` decreases and may end with 0.  ``afs`` replaces the first evaluation with
    `analytic_node`.  Returns every state, including the initial one.
    """
    meter = Meter.of(denoiser)
    nfe_before = meter.nfe
    total = substeps_total(solver, len(ts) - 1, guide)
    state, xs = State(x), [x]
    for i in range(len(ts) - 1):
        state = advance(solver, meter, state, ts[i], ts[i + 1], guide, total, afs and i == 0)
        xs.append(state.x)
    return Trajectory(ts, torch.stack(xs), meter.nfe - nfe_before)


def planned_nfe(
    solver: Solver,
    ts: Tensor | Sequence[float],
    guide: Guide | None = None,
    afs: bool = False,
    cost: int = 1,
) -> int:
    """The network evaluations that `integrate` will use, ``cost`` per call.

    One call per interval, plus one for each inserted node (there is none in an interval that ends
    at 0), minus one with AFS.
    """
    intervals = len(ts) - 1
    staged = intervals - (1 if float(ts[-1]) == 0 else 0)
    return (intervals + staged * _inserted(solver, guide) - (1 if afs else 0)) * cost


def _inserted(solver: Solver, guide: Guide | None) -> int:
    return len(solver.stages) if guide or solver.guide else 0
