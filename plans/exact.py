"""A plan without solver error: every solve by dopri5, every jump unchanged.

With the same latents and the same noise in the jumps, a plan and its exact version are coupled.
The root mean squared distance of their results is therefore an upper bound on the Wasserstein-2
distance between the distributions that they sample.  Jumps reduce it: the noise is shared, and the
exact descent contracts earlier distances (Restart, arXiv:2306.14878, section 3).  Measuring it
needs no detector, no reference and few images.  It does not include the error of the model, which
Restart also contracts.
"""

from __future__ import annotations

from torch import Tensor

from plans.plan import AnyPlan, Segment, Solve
from plans.process import ForwardProcess, Noise
from solvers.driver import Meter
from solvers.oracle import dopri5

#: Intermediate states of exact plans, by the sequence of segments that led to them.
Visited = dict[tuple, Tensor]


def exact_end(
    plan: AnyPlan,
    meter: Meter,
    x: Tensor,
    noise: Noise,
    visited: Visited,
    tol: float,
) -> Tensor:
    """The result of ``plan`` from the state ``x`` (B, C, H, W) if every solve is done by dopri5.

    A last interval that ends at 0 is one Euler step, as in the plan.  ``tol`` is both of dopri5's
    tolerances.  ``visited`` caches the intermediate states, so that plans with the same first
    segments, the same ``x`` and the same draws share them.
    """
    process = ForwardProcess.of(noise)
    path: tuple = ()
    for segment in plan:
        if isinstance(segment, Solve):
            path = (*path, tuple(segment.ts[_ends(segment.ts)].tolist()))
        else:
            path = (*path, segment)
        if path not in visited:
            visited[path] = _follow(segment, meter, x, process, tol)
        x = visited[path]
    return x


def _follow(
    segment: Segment, meter: Meter, x: Tensor, process: ForwardProcess, tol: float
) -> Tensor:
    if not isinstance(segment, Solve):
        for state in segment.visit(meter, x, process):
            x = state
        return x
    ends = segment.ts[_ends(segment.ts)]
    if len(ends) == 2:
        return dopri5(meter, x, ends, tol, tol).x[-1]
    if ends[0] > ends[1]:
        x = dopri5(meter, x, ends[:2], tol, tol).x[-1]
    return meter(x, ends[1]).x0


def _ends(ts: Tensor) -> list[int]:
    """Indices of the nodes of an exact solve: the first, the last, and the one before a final 0."""
    return [0, -1] if float(ts[-1]) > 0 else [0, -2, -1]
