"""A plan without a solver's error: every walk by dopri5, every jump as it is.

On the same latents and the same jumps, a plan and its exact self are two coupled samples.  The root
of the mean squared distance of their ends is therefore an upper bound on the Wasserstein-2 distance
between what the plan samples and what it would sample if its walks were exact.  Jumps make it
smaller, as they should: the noise is shared, and the exact descent contracts whatever distance was
there before (Restart, arXiv:2306.14878, section 3).  It needs neither detector nor reference and
few images; what it cannot see is the error of the model itself, which Restart contracts as well.
"""

from __future__ import annotations

from torch import Tensor

from plans.plan import AnyPlan, Segment, Solve
from plans.process import ForwardProcess, Noise
from solvers.driver import Meter
from solvers.oracle import dopri5

#: States on the way to the end of exact plans, by all that happened before.
Visited = dict[tuple, Tensor]


def exact_end(
    plan: AnyPlan,
    meter: Meter,
    x: Tensor,
    noise: Noise,
    visited: Visited,
    tol: float,
) -> Tensor:
    """Where ``plan`` ends from the state ``x`` (B, C, H, W) if dopri5 solves every walk.

    A last interval that ends at 0 is one Euler step, as in the plan.  ``tol`` is both of dopri5's
    tolerances.  ``visited`` is filled with every state on the way: plans that begin alike, with
    the same ``x`` and draws, share them.
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
    """The nodes that matter to an exact walk: the first, the last, and the one before a final 0."""
    return [0, -1] if float(ts[-1]) > 0 else [0, -2, -1]
