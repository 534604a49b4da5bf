"""Step rules on slopes: Heun, DPM-Solver-2 and -3, AMED, and Adams-Bashforth.

Each rule is a formula in evaluated nodes; `solvers.driver` decides where the nodes lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.types import Guide, InsertedNode, Node


def euler(node: Node, t: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Euler's step from ``node`` to ``t``: ``x + scale (t - t_node) d``, as a mean of x and x0.

    At a high noise level ``x`` and ``(t - t_node) d`` nearly cancel, which in float32 costs digits
    of the state at a low ``t``.  In ``(t / t_node) x + (1 - t / t_node) x0`` nothing cancels, so
    every rule on slopes begins with this step and adds differences of slopes.
    """
    ratio = t / node.t
    return (1 - scale + scale * ratio) * node.x + scale * (1 - ratio) * node.x0


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
        return euler(nodes[-1], t)

    def correct(self, nodes: tuple[Node, ...], t: Tensor, order: int, mid: InsertedNode) -> Tensor:
        a, b = nodes[-2], nodes[-1]
        w = 1.0 if self.midpoint else 1 / (2 * mid.r)
        bend = (a.x0 - b.x0) / b.t  # d_b - d_a, since `predict` led from a to b
        return euler(a, t, mid.c) + mid.c * (t - a.t) * w * bend


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
        return euler(nodes[0], t, scale) + scale * self._curve(nodes, t)

    def _curve(self, nodes: tuple[Node, ...], t: Tensor) -> Tensor | float:
        """What the curvature through the inserted nodes adds to Euler's step."""
        if len(nodes) == 1:
            return 0.0
        a, b = nodes[0], nodes[-1]
        # d_b - d_a, where b lies on Euler's step from a and what the nodes before b added to it
        bend = (a.x0 - b.x0 + self._curve(nodes[:-1], b.t)) / b.t
        g, g_b = torch.log(a.t / t), torch.log(a.t / b.t)
        return -t * (torch.expm1(g) / g - 1) * (g / g_b) * bend


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
        newest, x = nodes[-1], euler(nodes[-1], t, scale)
        for weight, node in zip(ADAMS_BASHFORTH[order][1:], reversed(nodes[:-1]), strict=False):
            x = x + scale * (t - newest.t) * weight * (node.d - newest.d)
        return x
