"""Multistep rules that integrate the polynomial through the newest slopes: iPNDM_v and DEIS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.quadrature import exponential_moments, integral, uniform_moments
from solvers.rules import ScaledStep, euler
from solvers.types import Guide, Node


@dataclass(frozen=True)
class VariableAdamsBashforth(ScaledStep):
    """iPNDM with Adams-Bashforth weights of the true steps: order ``max_order`` on any grid.

    The slope is interpolated in sigma.  On a uniform grid this is `AdamsBashforth`.
    """

    max_order: int = 4
    lower_order_final: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3, 4):
            raise ValueError(f"iPNDM_v has orders 1 to 4, got max_order = {self.max_order}")

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        newest, used = nodes[-1], nodes[-order:]
        h = t - newest.t
        places = [(node.t - newest.t) / h for node in used]
        bends = [node.d - newest.d for node in used]
        bend = integral(bends, places, uniform_moments(h, order))
        return euler(newest, t, scale) + scale * h * bend


@dataclass(frozen=True)
class DEIS(ScaledStep):
    """tAB-DEIS in log-rho (arXiv:2204.13902): the slope is interpolated in ``ln sigma``.

    Their rho, in which the ODE is ``dx = d drho``, is sigma here.  Order 3 is the noise form of
    DPM-Solver++ with its second difference doubled.
    """

    max_order: int = 3
    lower_order_final: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3):
            raise ValueError(f"DEIS has orders 1 to 3, got max_order = {self.max_order}")

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        newest, used = nodes[-1], nodes[-order:]
        h = torch.log(newest.t / t)
        places = [torch.log(newest.t / node.t) / h for node in used]
        bends = [node.d - newest.d for node in used]
        bend = integral(bends, places, exponential_moments(h, order))
        return euler(newest, t, scale) - scale * t * bend
