"""What is measured: total, contracted and additional error in the Wasserstein-1 distance.

Section 4.1 of arXiv:2306.14878.  A *process* leads from t_max down to 0 with the network; the
ODE, the SDE and Restart are processes that differ between t_max and t_min only.  It is run twice:

* from ``generated``, what the network's first-order ODE made of the prior by t_max, to ``p``;
* from ``exact``, the true distribution at t_max, to ``q``.

With ``data`` the true distribution at 0:

    total      W1(p, data)      what a user gets
    contracted W1(p, q)         what the process left of the error it began with
    additional W1(q, data)      what the process added by its steps and by the network

W1 between samples is a metric, so ``total <= contracted + additional`` holds for every point.
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
PORTION = 100  #: states that the data's own denoiser takes at a time: more only leave the cache
EXACT_NODES = 24  #: of the walk that carries the true distribution from sigma_max to t_max


def wasserstein1(a: Tensor, b: Tensor) -> float:
    """W1 between two clouds of equally many equally likely points (N, ...): the exact matching.

    Both are flattened; the ground distance is Euclidean.  Raises ValueError for other shapes.
    """
    if a.shape != b.shape or len(a) == 0:
        raise ValueError(f"clouds of {tuple(a.shape)} and {tuple(b.shape)} have no matching")
    cost = cdist(a.flatten(1).double().numpy(), b.flatten(1).double().numpy())
    return float(cost[linear_sum_assignment(cost)].mean())


class PathErrors(NamedTuple):
    """The three distances of the module's description."""

    total: float
    contracted: float
    additional: float


@dataclass(frozen=True, eq=False)
class Process:
    """How to get from the prior to data: a first-order walk down to t_max, and what follows."""

    head: Solve
    body: Plan

    @property
    def nfe(self) -> int:
        """Planned network evaluations per point."""
        return self.head.nfe() + plan_nfe(self.body)


@dataclass(frozen=True, eq=False)
class Cloud:
    """As many latents as the data has points, and the noise of every process that they meet.

    Both runs of a process get the same draws, and ``exact`` comes from the same latents as
    ``generated`` does, so that W1(p, q) is not the distance of two unrelated samples.
    """

    data: Tensor  #: (N, C, 1, 1)
    exact: Tensor  #: (N, C, 1, 1), the true distribution at t_max
    block: int  #: names the draws
    sigma_max: float

    @classmethod
    def make(
        cls, data: Tensor, ideal: Denoiser, block: int, sigma_max: float, t_max: float
    ) -> Cloud:
        """``ideal`` is the denoiser of ``data``: it carries the truth from sigma_max to t_max."""
        ts = get_grid("polynomial", EXACT_NODES, t_max, sigma_max, RHO)
        walk = (Solve(make_solver("heun"), ts),)
        normal = _normal(block, data)
        start = data + sigma_max * normal("latent")
        parts = [run_plan(walk, ideal, part, normal).x[-1] for part in start.split(PORTION)]
        return cls(data, torch.cat(parts), block, sigma_max)

    def ends(self, process: Process, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
        """``p`` and ``q`` of ``process``, (N, C, 1, 1) each.

        Raises RuntimeError where the network was not called as often as planned.
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
            raise RuntimeError(f"{meter.nfe} NFE were spent where the plan says {process.nfe}")
        p, q = both.chunk(2)
        return p, q

    def errors(self, process: Process, denoiser: Denoiser) -> PathErrors:
        """The three errors of ``process``; the matchings run side by side."""
        p, q = self.ends(process, denoiser)
        with ThreadPoolExecutor() as pool:  # the matching does not hold the interpreter's lock
            found = pool.map(wasserstein1, (p, p, q), (self.data, q, self.data))
        return PathErrors(*found)


def _normal(block: int, like: Tensor) -> Callable[[Name], Tensor]:
    """The draws of a block by name, shaped like ``like``; a cloud is one unit of noise."""
    noise = SeedNoise([block])
    return lambda name: noise.normal(name, tuple(like.shape), like.dtype)[0]
