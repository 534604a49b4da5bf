"""Step rules on slopes: Heun, DPM-Solver-2 and -3, AMED, and Adams-Bashforth.

Each rule is a formula in evaluated nodes; `solvers.driver` decides where the nodes lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.types import Guide, InsertedNode, Node


class Rule:
    """Base of rules that correct no evaluated state, and step from ``max_order`` nodes."""

    max_order: int

    @property
    def kept_nodes(self) -> int:
        return self.max_order - 1

    def revise(self, nodes: tuple[Node, ...], order: int) -> tuple[Node, ...]:
        return nodes


class ScaledStep(Rule):
    """Base of rules whose `predict` and `correct` are one formula, `step`.

    `correct` multiplies the change of the state by the guide's ``c``.
    """

    stages: ClassVar[tuple[float, ...]] = (1.0,)

    def predict(self, nodes: tuple[Node, ...], t: Tensor, order: int) -> Tensor:
        return self.step(nodes, t, order, 1.0)

    def correct(self, nodes: tuple[Node, ...], t: Tensor, order: int, mid: InsertedNode) -> Tensor:
        return self.step(nodes, t, order, mid.c)

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        """The state at ``t`` from ``nodes`` (newest last), its change multiplied by ``scale``."""
        raise NotImplementedError


@dataclass(frozen=True)
class FixedRatio:
    """A guide that inserts the node at a constant ``r`` and does not rescale."""

    r: float

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise ValueError(f"r = {self.r:g} is outside (0, 1]; give 0 < r <= 1")

    def __call__(self, node: Node, t_next: Tensor) -> InsertedNode:
        return InsertedNode(self.r, 1.0, 1.0)


@dataclass(frozen=True)
class TwoStage(Rule):
    """One slope at the start and one at the inserted node: ``x + c (t' - t)(w_a d_a + w_b d_b)``.

    ``midpoint=False``: ``w = (1 - 1/(2r), 1/(2r))``, which is DPM-Solver-2 (arXiv:2206.00927,
    algorithm 1) for ``r < 1`` and Heun at ``r = 1``.  ``midpoint=True``: ``w = (0, 1)``, the
    AMED-Solver (arXiv:2312.00094, eq. 15), which is based on the mean value theorem.
    """

    guide: Guide | None
    midpoint: bool = False
    max_order: int = 1  # no history is kept between intervals
    lower_order_final: bool = False
    stages: ClassVar[tuple[float, ...]] = (1.0,)

    def predict(self, nodes: tuple[Node, ...], t: Tensor, order: int) -> Tensor:
        a = nodes[-1]
        return a.x + (t - a.t) * a.d

    def correct(self, nodes: tuple[Node, ...], t: Tensor, order: int, mid: InsertedNode) -> Tensor:
        a, b = nodes[-2], nodes[-1]
        if self.midpoint:
            slope = b.d
        else:
            w = 1 / (2 * mid.r)
            slope = (1 - w) * a.d + w * b.d
        return a.x + mid.c * (t - a.t) * slope


@dataclass(frozen=True)
class ThreeStage(ScaledStep):
    """DPM-Solver-3 (arXiv:2206.00927, algorithm 2): slopes at the start, at ``r/2`` and at ``r``.

    In ``lambda = -ln t`` the slope is linear through the start and the newest node, and is
    integrated against its exponential weight.  With ``g`` from the start to ``t`` and ``g_b`` to
    the newest node, this is ``x + (t' - t) d - t' ((e^g - 1)/g - 1) (g/g_b) (d_b - d)``.  The slope
    at ``r/2`` gives the state at ``r``, and the slope at ``r`` the end of the interval.  The order
    is 3 at ``r = 2/3``, where the quadratic term is exact, and 2 elsewhere.
    """

    guide: Guide | None
    max_order: int = 1  # no history is kept between intervals
    lower_order_final: bool = False
    stages: ClassVar[tuple[float, ...]] = (0.5, 1.0)

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        a, b = nodes[0], nodes[-1]
        change = (t - a.t) * a.d
        if len(nodes) > 1:
            g, g_b = torch.log(a.t / t), torch.log(a.t / b.t)
            change = change - t * (torch.expm1(g) / g - 1) * (g / g_b) * (b.d - a.d)
        return a.x + scale * change


#: Adams-Bashforth weights of the slopes (newest first), by order.
ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@dataclass(frozen=True)
class AdamsBashforth(ScaledStep):
    """Improved PNDM: equal-step Adams-Bashforth weights on an unequal grid (arXiv:2204.13902).

    Row 1 is Euler.  Row ``k`` has order ``k`` on a grid that is uniform in sigma and starts with
    a known history.  On any other smooth grid, or without history, rows 2 to 4 have order 2; where
    the ratio of neighbouring steps does not tend to 1 (an inserted node with r != 1/2), order 1.
    """

    max_order: int = 4
    lower_order_final: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_order not in ADAMS_BASHFORTH:
            raise ValueError(f"iPNDM has orders 1 to 4, got max_order = {self.max_order}")

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        newest = nodes[-1]
        weights = ADAMS_BASHFORTH[order]
        slope = weights[0] * newest.d
        for weight, node in zip(weights[1:], reversed(nodes[:-1]), strict=False):
            slope = slope + weight * node.d
        return newest.x + scale * (t - newest.t) * slope
