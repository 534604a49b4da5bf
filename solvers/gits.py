"""Noise levels by geometry-inspired time scheduling (GITS), arXiv:2405.11326, algorithm 1.

A grid of few levels is a path through the levels of a fine grid.  A step of that path costs what
one Euler step makes wrong that starts on an accurate trajectory, and dynamic programming finds
the path of least cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.driver import Meter
from solvers.types import Denoiser


def euler_errors(denoiser: Denoiser | Meter, x: Tensor, ts: Tensor) -> Tensor:
    """The error of one Euler step from each level of the fine grid ``ts`` (N,) to each later one.

    The step starts at the state, and is compared with a state, of the Euler walk over all of
    ``ts`` from ``x`` (B, C, H, W) at ``ts[0]``, which takes N - 1 evaluations.  Returns (N, N)
    float64 on the CPU: the distance from row to column, mean over the samples; infinite on and
    below the diagonal.
    """
    meter, states, slopes = Meter.of(denoiser), [x], []
    for t, t_next in zip(ts, ts[1:], strict=False):
        slopes.append(meter(states[-1], t).d)
        states.append(states[-1] + (t_next - t) * slopes[-1])
    errors = torch.full((len(ts), len(ts)), torch.inf, dtype=torch.float64)
    for i, slope in enumerate(slopes):
        for j in range(i + 1, len(ts)):
            wrong = states[i] + (ts[j] - ts[i]) * slope - states[j]
            errors[i, j] = wrong.flatten(1).norm(dim=1).mean()
    return errors


def best_path(cost: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """The path from node 0 to the last one in exactly ``steps`` steps of least total cost.

    ``cost`` (N, N) has the cost of a step from row to column, infinite where there is none.  The
    n-th step (from 0) is weighted with ``coefficient ** n``: above 1, late errors count more than
    early ones.  Returns ``steps + 1`` increasing node numbers; ValueError if there is no such path.
    """
    if not 1 <= steps < len(cost):
        raise ValueError(
            f"a path of {steps} steps through {len(cost)} nodes is impossible; give 1 to "
            f"{len(cost) - 1} steps"
        )
    least, choices = cost[:, -1], []  # of the remaining steps, from every node
    for _ in range(steps - 1):
        least, choice = (cost + coefficient * least).min(dim=1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, len(cost) - 1]
