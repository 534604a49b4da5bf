"""Stochastic samplers without restarts: EDM's with churn, and DDPM's ancestral sampler."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from plans.plan import Jump, Plan, Solve
from plans.walk import Churn, WalkSpec, churned_walk
from runtime.errors import UserError
from solvers.registry import make_solver
from solvers.types import Solver


def edm_plan(ts: Tensor, churn: Churn | None = None, walk: WalkSpec | Solver | None = None) -> Plan:
    """EDM's stochastic sampler (arXiv:2206.00364, algorithm 2) on ``ts``; Heun by default.

    Without churn this is a plan of one `Solve`.  Draws are named ``("churn", j)`` for interval j.
    """
    churn = churn or Churn()
    walk = WalkSpec.of(walk or make_solver("heun"))
    return tuple(churned_walk(walk, ts, 0, len(ts) - 1, churn, churn.gamma(ts), ("churn",)))


def ddpm_plan(ts: Tensor, eta: float = 1.0) -> Plan:
    """DDPM's ancestral sampler (arXiv:2006.11239, algorithm 2) on ``ts``, which may end in 0.

    Each step from t to s draws from the posterior of ``x_s`` given ``x_t`` and the denoised state
    D, which in sigma time is ``N(D + (s/t)^2 (x_t - D), s^2 (1 - (s/t)^2))`` for every
    variance-preserving process (posterior variance, ``fixed small``).  The mean is one Euler step
    to ``s_down = s^2 / t`` and the variance is ``s^2 - s_down^2``, so the step is a `Solve` to
    ``s_down`` and a `Jump` to s.  ``eta`` scales the noise of the jump and so raises ``s_down``: 0
    is DDIM, that is Euler's method, and 1 is DDPM (arXiv:2010.02502, eq. 12 and 16).

    Draws are named ``("ddpm", j)`` for interval j.  Raises UserError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta:g} is out of range; give 0 (DDIM) to 1 (DDPM)")
    segments: list[Solve | Jump] = []
    for j, (t, s) in enumerate(pairwise(ts)):
        down = s * (1 - eta**2 * (1 - (s / t) ** 2)).sqrt()
        segments.append(Solve(make_solver("euler"), torch.stack([t, down])))
        if down < s:
            segments.append(Jump(float(down), float(s), ("ddpm", j)))
    return tuple(segments)
