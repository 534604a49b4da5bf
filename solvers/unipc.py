"""UniPC: a multistep predictor and a corrector that needs no evaluation (arXiv:2302.04867)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.quadrature import exponential_moments, integral
from solvers.rules import ScaledStep
from solvers.types import Guide, Node

#: The functions B(h): ``g`` and ``e^g - 1``, where ``g = -h`` in data form.
VARIANTS = ("bh1", "bh2")


@dataclass(frozen=True)
class UniPC(ScaledStep):
    """UniP and UniC in data form, in ``lambda = -ln sigma``, orders 1 to 3.

    Once the denoiser is evaluated at a predicted state, `revise` takes the step again with this
    value included, and adds what that changes.  With the corrector ``max_order = p`` has order
    ``p + 1``.  The state at the end of the grid is a prediction.

    A polynomial through two nodes is integrated with ``B(h) / 2`` for its first moment.  More nodes
    determine all weights, so ``variant`` matters only in the predictor of order 2 and in the
    corrector of order 1.
    """

    max_order: int = 3
    lower_order_final: bool = True
    variant: str = "bh2"
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3):
            raise ValueError(f"UniPC has orders 1 to 3, got max_order = {self.max_order}")
        if self.variant not in VARIANTS:
            raise ValueError(f"UniPC has no variant {self.variant!r}; choose bh1 or bh2")

    @property
    def kept_nodes(self) -> int:
        return self.max_order  # one more than the predictor needs, for the corrector

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        newest = nodes[-1]
        return t / newest.t * newest.x - scale * self._change(nodes[-order:], newest.t, t)

    def revise(self, nodes: tuple[Node, ...], order: int) -> tuple[Node, ...]:
        if order == 0:
            return nodes
        *older, newest = nodes
        used, start = older[-order:], older[-1].t
        predicted = self._change(tuple(used), start, newest.t)
        corrected = self._change((*used, newest), start, newest.t)
        return (*older, newest._replace(x=newest.x + predicted - corrected))

    def _change(self, used: tuple[Node, ...], start: Tensor, end: Tensor) -> Tensor:
        """What the denoised states of ``used`` contribute to the step (subtracted from it)."""
        h = torch.log(start / end)
        moments = exponential_moments(-h, len(used))
        if len(used) == 2:
            moments[1] = (-h if self.variant == "bh1" else moments[0]) / 2
        places = [torch.log(start / node.t) / h for node in used]
        return integral([node.x0 for node in used], places, moments)
