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

from plans.plan import AnyPlan, Normal, Segment, Solve
from solvers.driver import Meter
from solvers.oracle import dopri5

#: States on the way to the end of exact plans, by all that happened before.
Visited = dict[tuple, Tensor]


def exact_end(
    plan: AnyPlan, meter: Meter, x: Tensor, normal: Normal, visited: Visited, tol: float
) -> Tensor:
    """Where ``plan`` ends from the state ``x`` (B, C, H, W) if dopri5 solves every walk.

    A last interval that ends at 0 is one Euler step, as in the plan.  ``tol`` is both of dopri5's
    tolerances.  ``visited`` is filled with every state on the way: plans that begin alike, with
    the same ``x`` and draws, share them.
    """
    path: tuple = ()
    for part in plan:
        if isinstance(part, Solve):
            path = (*path, tuple(part.ts[_ends(part.ts)].tolist()))
        else:
            path = (*path, part)
        if path not in visited:
            visited[path] = _follow(part, meter, x, normal, tol)
        x = visited[path]
    return x


def _follow(part: Segment, meter: Meter, x: Tensor, normal: Normal, tol: float) -> Tensor:
    if not isinstance(part, Solve):
        for state in part.visit(meter, x, normal):
            x = state
        return x
    ends = part.ts[_ends(part.ts)]
    if len(ends) == 2:
        return dopri5(meter, x, ends, tol, tol).x[-1]
    if ends[0] > ends[1]:
        x = dopri5(meter, x, ends[:2], tol, tol).x[-1]
    return meter(x, ends[1]).x0


def _ends(ts: Tensor) -> list[int]:
    """The nodes that matter to an exact walk: the first, the last, and the one before a final 0."""
    return [0, -1] if float(ts[-1]) > 0 else [0, -2, -1]
