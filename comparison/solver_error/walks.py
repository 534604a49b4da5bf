"""How far a sampler's states are from the exact solutions: solver error, without a detector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from comparison.solver_error.exact import Exact
from plans.plan import Solve
from plans.table import TableWalk
from samplers.sampler import Sampler
from solvers.driver import Meter, State, advance, integrate, substeps_total
from solvers.table import run_table

Walk = Solve | TableWalk


class WalkErrors(NamedTuple):
    """Root mean squares over the values of an image, of each image by itself."""

    states: Tensor  #: (T, B, C, H, W), the sampler's own, at its T times
    truth: Tensor  #: (T, B, C, H, W), the exact ones
    along: Tensor  #: (T, B) float64, distance between the two; 0 at the start
    local: Tensor  #: (T - 1, B) float64, of each interval if it starts from the exact state
    nfe: int  #: metered, of the walk itself


def walks(sampler: Sampler) -> list[Walk]:
    """The segments of a sampler that is deterministic; none for a stochastic one.

    A path with fresh noise solves no ODE, so there is no exact solution to compare it with.
    """
    solves = [segment for segment in sampler.plan if isinstance(segment, (Solve, TableWalk))]
    return solves if len(solves) == len(sampler.plan) else []


def nodes(part: Walk) -> Tensor:
    """The noise levels of a walk's states, (T,) float64.

    The states inside a table have no noise level of their own, so only its ends are compared.
    """
    if isinstance(part, TableWalk):
        return torch.tensor([part.table.start, part.table.end], dtype=torch.float64)
    return part.ts


def times(solves: Sequence[Walk]) -> list[float]:
    """Every noise level that the walks visit, the start included.

    Rounded, so that grids which compute a common level in different ways agree on it.
    """
    inner = (t for part in solves for t in nodes(part)[1:])
    return [level(t) for t in [nodes(solves[0])[0], *inner]]


def level(t: float | Tensor) -> float:
    """A noise level to 12 digits."""
    return float(f"{float(t):.12g}")


@torch.inference_mode()
def walk(solves: Sequence[Walk], meter: Meter, x: Tensor) -> Tensor:
    """All states (T, B, C, H, W) of the walks from ``x``, which is the first of them."""
    states = [x[None]]
    for part in solves:
        begin = states[-1][-1]
        if isinstance(part, TableWalk):
            states.append(run_table(part.table, meter, begin).x[-1:])
        else:
            walked = integrate(part.solver, meter, begin, part.ts, part.guide, part.afs)
            states.append(walked.x[1:])
    return torch.cat(states)


@torch.inference_mode()
def measure_errors(solves: Sequence[Walk], exact: Exact, seeds: Sequence[int]) -> WalkErrors:
    """Walk from the latents of ``seeds``; then interval by interval from their exact states."""
    truth = exact.states(seeds, times(solves))
    meter, x = exact.problem.begin(seeds)
    walked = walk(solves, meter, x)
    nfe = meter.nfe
    local, at = [], 0
    for part in solves:
        count = len(nodes(part))
        local.append(local_errors(part, meter, truth[at : at + count]))
        at += count - 1
    return WalkErrors(walked, truth, rms(walked - truth), torch.cat(local), nfe)


def local_errors(part: Walk, meter: Meter, truth: Tensor) -> Tensor:
    """(T - 1, B): each interval from the exact state at its start, against the one at its end.

    ``truth`` (T, B, C, H, W) are the exact states at the nodes of ``part``.  The slopes that a
    multistep solver remembers are those at exact states too.  A node that a guide inserts lies
    where the solver puts it when it comes from the exact state before it, and an analytic first
    slope stays analytic.  A table is one interval.
    """
    if isinstance(part, TableWalk):
        return rms(walk([part], meter, truth[0])[-1] - truth[1])[None]
    total = substeps_total(part.solver, len(part.ts) - 1, part.guide)
    state, errors = State(truth[0]), []
    for i, (t, t_next) in enumerate(pairwise(part.ts)):
        afs = part.afs and i == 0
        state = advance(part.solver, meter, state, t, t_next, part.guide, total, afs)
        errors.append(rms(state.x - truth[i + 1]))
        state = state._replace(x=truth[i + 1], order=0)  # an exact state needs no correction
    return torch.stack(errors)


def rms(difference: Tensor) -> Tensor:
    """(..., C, H, W) -> (...): root mean square over an image, float64 on the CPU."""
    return difference.cpu().double().square().mean((-3, -2, -1)).sqrt()
