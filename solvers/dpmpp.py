"""DPM-Solver++ multistep, orders 1 to 3, in ``lambda = -ln sigma`` (arXiv:2211.01095)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.rules import ScaledStep, euler
from solvers.types import Guide, Node


@dataclass(frozen=True)
class DPMpp(ScaledStep):
    """Exponential multistep integrator, in data form (denoised state) or noise form (slope).

    With ``h = lambda_t - lambda_s`` both forms are ``base - scale (p1 m0 + p2 D1 + p3 D2)``:
    data form ``base = (sigma_t / sigma_s) x``, factors at ``-h``, ``m = x0``; noise form
    ``base = x``, factors ``sigma_t`` times those at ``h``, ``m = d``; there ``base`` and the first
    term are Euler's step.

    ``corrected=False`` is the published third-order rule.  Its second difference has half the
    weight that the expansion requires, so it converges at order 2.  ``corrected=True`` doubles
    that term and converges at order 3.

    ``thresholding`` clips every data prediction to its own 0.995 quantile of ``|x0|`` (at least
    1) and divides by it (Imagen, arXiv:2205.11487, section 2.3), as the published AMED code does
    with ``predict_x0``.
    """

    max_order: int = 3
    predict_x0: bool = True
    lower_order_final: bool = True
    thresholding: bool = False
    corrected: bool = False
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.max_order not in (1, 2, 3):
            raise ValueError(f"DPM-Solver++ has orders 1 to 3, got max_order = {self.max_order}")
        if self.thresholding and not self.predict_x0:
            raise ValueError("thresholding requires data predictions; set predict_x0=True")

    def step(self, nodes: tuple[Node, ...], t: Tensor, order: int, scale: Tensor | float) -> Tensor:
        newest = nodes[-1]
        h = _lam(t) - _lam(newest.t)
        g = -h if self.predict_x0 else h
        p1 = torch.expm1(g)
        if self.predict_x0:
            unit: Tensor | float = 1.0
            x = t / newest.t * newest.x - scale * p1 * self._model(newest)
        else:
            unit, x = t, euler(newest, t, scale)
        if order == 2:
            x = x - scale * unit * 0.5 * p1 * self._differences(nodes, h, 1)[0]
        elif order == 3:
            d1, d2 = self._differences(nodes, h, 2)
            p2 = p1 / g - 1
            p3 = p2 / g - 0.5
            x = x - scale * unit * (p2 * d1 + (2 * p3 if self.corrected else p3) * d2)
        return x

    def _differences(self, nodes: tuple[Node, ...], h: Tensor, count: int) -> list[Tensor]:
        """The first (and second) difference of the model outputs, in units of the step ``h``."""
        m = [self._model(node) for node in reversed(nodes[-count - 1 :])]
        lam = [_lam(node.t) for node in reversed(nodes[-count - 1 :])]
        r0 = (lam[0] - lam[1]) / h
        first = (m[0] - m[1]) / r0
        if count == 1:
            return [first]
        r1 = (lam[1] - lam[2]) / h
        older = (m[1] - m[2]) / r1
        return [first + r0 / (r0 + r1) * (first - older), (first - older) / (r0 + r1)]

    def _model(self, node: Node) -> Tensor:
        if not self.predict_x0:
            return node.d
        return threshold(node.x0) if self.thresholding else node.x0


def threshold(x0: Tensor, quantile: float = 0.995) -> Tensor:
    """Clip each sample of (B, ...) to its own quantile of ``|x0|``, at least 1, and rescale."""
    # One sample at a time: torch.quantile rejects inputs of more than 16 million elements.
    limits = torch.stack([row.abs().flatten().quantile(quantile) for row in x0])
    limit = limits.clamp(min=1.0).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def _lam(t: Tensor) -> Tensor:
    return -torch.log(t)
