"""The measured quantities: total, contracted and additional error in the Wasserstein-1 distance.

Section 4.1 of arXiv:2306.14878.  A *process* goes from t_max to 0 with the network; the ODE, the
SDE and Restart differ only between t_max and t_min.  It is run twice:

* from ``generated``, samples of the network's first-order ODE from the prior to t_max, to ``p``;
* from ``exact``, the true distribution at t_max, to ``q``.

With ``data`` the true distribution at 0:

    total      W1(p, data)      the error of the samples
    contracted W1(p, q)         the rest of the error at t_max after the process
    additional W1(q, data)      the error of the process: its steps and the network

W1 between samples is a metric, so ``total <= contracted + additional``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from plans.plan import Plan, Solve, plan_nfe, run_plan
from runtime.noise import Name, SeedNoise
from solvers.driver import Meter
from solvers.grids import get_grid
from solvers.registry import make_solver
from solvers.types import Denoiser

RHO = 7.0
PORTION = 100  #: states per call of the ideal denoiser; more do not fit the cache
EXACT_NODES = 24  #: nodes of the grid from sigma_max to t_max for the true distribution


def wasserstein1(a: Tensor, b: Tensor) -> float:
    """W1 between two sets of N equally likely points (N, ...), by exact matching.

    Points are flattened; the ground distance is Euclidean.  Raises ValueError for other shapes.
    """
    if a.shape != b.shape or len(a) == 0:
        raise ValueError(f"sets of {tuple(a.shape)} and {tuple(b.shape)} cannot be matched")
    cost = cdist(a.flatten(1).double().numpy(), b.flatten(1).double().numpy())
    return float(cost[linear_sum_assignment(cost)].mean())


class PathErrors(NamedTuple):
    """The three errors defined in the module's docstring."""

    total: float
    contracted: float
    additional: float


@dataclass(frozen=True, eq=False)
class Process:
    """A sampler: a first-order solve from sigma_max to t_max, then a plan from t_max to 0."""

    head: Solve
    body: Plan

    @property
    def nfe(self) -> int:
        """Planned network evaluations per point."""
        return self.head.nfe() + plan_nfe(self.body)


@dataclass(frozen=True, eq=False)
class Cloud:
    """As many latents as there are data points, and the noise for the processes.

    Both runs of a process use the same draws, and ``exact`` comes from the same latents as
    ``generated``, so that W1(p, q) is not the distance of two independent samples.
    """

    data: Tensor  #: (N, C, 1, 1)
    exact: Tensor  #: (N, C, 1, 1), the true distribution at t_max
    block: int  #: seed of the draws
    sigma_max: float

    @classmethod
    def make(
        cls, data: Tensor, ideal: Denoiser, block: int, sigma_max: float, t_max: float
    ) -> Cloud:
        """The cloud of ``block``; ``ideal``, the denoiser of ``data``, computes ``exact``."""
        ts = get_grid("polynomial", EXACT_NODES, t_max, sigma_max, RHO)
        walk = (Solve(make_solver("heun"), ts),)
        normal = _normal(block, data)
        start = data + sigma_max * normal("latent")
        parts = [run_plan(walk, ideal, part, normal).x[-1] for part in start.split(PORTION)]
        return cls(data, torch.cat(parts), block, sigma_max)

    def ends(self, process: Process, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """``p`` and ``q`` of ``process``, (N, C, 1, 1) each.

        Raises RuntimeError if the metered NFE is not the planned one.
        """
        normal, meter = _normal(self.block, self.data), Meter(denoiser)
        latent = self.sigma_max * normal("latent")
        generated = run_plan((process.head,), meter, latent, normal).x[-1]
        both = run_plan(
            process.body,
            meter,
            torch.cat([generated, self.exact]),
            lambda name: normal(name).repeat(2, 1, 1, 1),
        ).x[-1]
        if meter.nfe != process.nfe:
            raise RuntimeError(f"{meter.nfe} NFE were used instead of the planned {process.nfe}")
        p, q = both.chunk(2)
        return p, q

    def errors(self, process: Process, denoiser: Denoiser) -> PathErrors:
        """The three errors of ``process``; the matchings run in parallel."""
        p, q = self.ends(process, denoiser)
        with ThreadPoolExecutor() as pool:  # the matching releases the GIL
            errors = pool.map(wasserstein1, (p, p, q), (self.data, q, self.data))
        return PathErrors(*errors)


def _normal(block: int, like: Tensor) -> Callable[[Name], Tensor]:
    """The draws of a block by name, shaped like ``like``; the whole cloud has one seed."""
    noise = SeedNoise([block])
    return lambda name: noise.normal(name, tuple(like.shape), like.dtype)[0]
