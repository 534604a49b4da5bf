"""Optimizers of a denoiser's weights, by the name of their part in a training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

LEAST = 16  #: the fewest inputs and outputs of a layer whose weights are a matrix for `muon`


class MatrixMuon(torch.optim.Muon):
    """PyTorch's Muon for weights of any shape, each a matrix with a row for every output.

    Its step sets the singular values of a matrix of averaged gradients to about 1, times 0.2
    sqrt(larger side), which makes its entries as large as Adam's (K. Jordan, "Muon", 2024; the
    scale is that of Liu et al. 2025, arXiv:2502.16982).
    """

    def __init__(self, weights: Iterable[Tensor], lr: float) -> None:
        self.weights = list(weights)
        matrices = [weight.detach().view(len(weight), -1) for weight in self.weights]
        super().__init__(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Change the weights by their gradients."""
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"], strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.view_as(matrix)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights."""
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None


def adam(net: nn.Module, lr: float) -> dict[str, Optimizer]:
    """Adam for everything, as published for EDM."""
    return {"optimizer": Adam(net.parameters(), lr)}


def muon(net: nn.Module, lr: float) -> dict[str, Optimizer]:
    """Muon for the weights of layers; Adam for biases, norms, and layers of few numbers."""
    weights = {n: p for n, p in net.named_parameters() if p.ndim > 1}
    weights = {n: p for n, p in weights.items() if min(len(p), p[0].numel()) >= LEAST}
    rest = [p for name, p in net.named_parameters() if name not in weights]
    return {"optimizer": Adam(rest, lr), "muon": MatrixMuon(weights.values(), lr)}


OPTIMIZERS: dict[str, Callable[[nn.Module, float], dict[str, Optimizer]]] = {
    "adam": adam,
    "muon": muon,
}
