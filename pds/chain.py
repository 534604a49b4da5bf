"""Predictor-corrector sampling of the variance-exploding SDE, with and without preconditioning.

Song et al. 2021 (arXiv:2011.13456), algorithm 2: Langevin steps at every noise level (the
corrector, algorithm 4), then one step of the reverse diffusion to the next level (the predictor).
PDS (arXiv:2207.02196) replaces every noise ``z`` by ``A z``, including the initial one, and every
score ``g`` by ``B g``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pds.operators import Preconditioner
from plans.process import ForwardProcess
from solvers.driver import Meter
from solvers.grids import get_grid

EPS = 1e-5  #: the SDE time of the published code goes from 1 to this


@dataclass(frozen=True, eq=False)  # tensors have no boolean ==, so chains compare by identity
class Chain:
    """A segment of a plan (see ``plans.plan.Segment``): N iterations from the highest level to 0.

    Without the predictor (``predictor = none`` of the published code) only Langevin steps lead from
    level to level, and the last state keeps the noise of the lowest level.

    Random numbers are the named draws ``("corrector", i, k)`` and ``("predictor", i)`` of
    iteration i, from 0.
    """

    levels: Tensor  #: (N,) float64 on the CPU, decreasing; the last predictor step goes to 0
    network_sigma: Tensor  #: (N,) the noise levels passed to the network
    operators: Preconditioner = field(default_factory=Preconditioner)
    snr: float = 0.16  #: signal-to-noise ratio of a corrector step
    n_steps: int = 1  #: corrector steps at each level
    predictor: bool = True  #: whether a step of the reverse diffusion follows them
    batch_coupled: bool = False  #: as published: one corrector step size for the whole batch

    @property
    def start(self) -> float:
        return float(self.levels[0])

    @property
    def times(self) -> list[float]:
        levels: list[float] = self.levels.tolist()
        return [*levels[1:], 0.0] if self.predictor else levels

    def __str__(self) -> str:
        end, step = (" -> 0", " and a predictor step") if self.predictor else ("", "")
        return (
            f"{len(self.levels)} iterations {self.levels[0]:g} -> {self.levels[-1]:g}{end}, each "
            f"of {self.n_steps} corrector step(s){step}"
        )

    def nfe(self, cost: int = 1) -> int:
        return len(self.levels) * (self.n_steps + self.predictor) * cost

    def visit(self, meter: Meter, x: Tensor, process: ForwardProcess) -> Iterator[Tensor]:
        """Yield the state (B, C, H, W) after each iteration, from ``x = sigma_max z``.

        As published, the last predictor step adds no noise (Tweedie's formula at the lowest level).
        """
        operators = self.operators.to(x)

        def drift(x: Tensor, network_sigma: Tensor) -> Tensor:
            return operators.drift((meter(x, network_sigma).x0 - x) / network_sigma**2)

        def noise(*name: str | int) -> Tensor:
            return operators.noise(process.normal(name).to(x))

        x = operators.noise(x)
        last = len(self.levels) - 1
        for i, (level, network_sigma) in enumerate(
            zip(self.levels, self.network_sigma, strict=True)
        ):
            for k in range(self.n_steps):
                g, z = drift(x, network_sigma), noise("corrector", i, k)
                x = langevin(x, g, z, langevin_step(g, z, self.snr, self.batch_coupled))
            if self.predictor:
                below = self.levels[i + 1] if i < last else torch.zeros_like(level)
                variance = level**2 - below**2
                x = x + variance * drift(x, network_sigma)
                if i < last:
                    x = x + variance.sqrt() * noise("predictor", i)
            yield x


def ve_levels(
    iterations: int, sigma_min: float, sigma_max: float, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The levels of the discretised VE SDE and those passed to the network, (N,) float64 each.

    The levels are geometric.  The published code passes ``sigma(t)`` at N uniform times t from 1
    to ``eps`` instead of 0, so the network's levels are slightly higher.  Raises ValueError as
    `solvers.grids.get_grid` does.
    """
    levels = get_grid("logsnr", iterations, sigma_min, sigma_max)
    offset = torch.linspace(0, eps, iterations, dtype=torch.float64)
    return levels, levels * (sigma_max / sigma_min) ** offset


def langevin(x: Tensor, g: Tensor, z: Tensor, step: Tensor | float) -> Tensor:
    """``x + step g + sqrt(2 step) z`` for ``g = B score``, ``z = A noise``, all (B, C, H, W)."""
    return x + step * g + (2 * step) ** 0.5 * z


def langevin_step(g: Tensor, z: Tensor, snr: float, coupled: bool = False) -> Tensor:
    """The step size ``2 (snr |z| / |g|)^2`` of each sample, (B, 1, 1, 1).

    ``coupled`` first averages both norms over the batch, as the published code does, so that a
    sample depends on the others in its batch.
    """
    norms = [torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True) for v in (z, g)]
    if coupled:
        norms = [norm.mean(0, keepdim=True) for norm in norms]
    return 2 * (snr * norms[0] / norms[1]) ** 2
