"""Denoisers in closed form: Gaussian data and Gaussian mixtures.

For data ``x0 ~ p`` and ``x = x0 + sigma n`` the ideal denoiser is the posterior mean
``E[x0 | x]`` (Karras et al. 2022, arXiv:2206.00364, appendix B.3).  Both classes work at any
resolution, in the dtype of the state, on each sample independently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.types import Denoised


@dataclass(eq=False)
class GaussianDenoiser:
    """Data ``N(mean, diag(var))``, or ``N(mean, Q diag(var) Q^T)`` if ``basis`` holds ``Q``.

    ``mean`` and ``var`` are floats or broadcast to (C, H, W); ``basis`` is (C*H*W, C*H*W) with
    orthonormal columns.  Raises ValueError if a variance is negative.
    """

    mean: Tensor | float
    var: Tensor | float
    basis: Tensor | None = None
    cost: int = 1

    def __post_init__(self) -> None:
        lowest = float(torch.as_tensor(self.var).min())
        if lowest < 0:
            raise ValueError(f"a variance is {lowest}; give variances of at least 0")

    @classmethod
    def from_covariance(cls, mean: Tensor, cov: Tensor) -> GaussianDenoiser:
        """Full covariance (C*H*W, C*H*W), symmetric positive semi-definite; mean (C, H, W)."""
        size = mean.numel()
        if cov.shape != (size, size):
            raise ValueError(
                f"the covariance has shape {tuple(cov.shape)}; the mean needs ({size}, {size})"
            )
        values, vectors = torch.linalg.eigh(cov)
        return cls(mean, values.clamp(min=0).reshape(mean.shape), vectors)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """``mean + V (V + sigma^2)^-1 (x - mean)`` for ``x`` (B, C, H, W)."""
        sigma = _like(sigma, x)
        var = _like(self.var, x)
        return Denoised(self._scale(x, var / (var + sigma**2)), _feature(x, sigma))

    def solution(self, x: Tensor, start: Tensor | float, end: Tensor | float) -> Tensor:
        """The solution at sigma = end of the probability-flow ODE from ``x`` (B, C, H, W) at start.

        The ODE is linear: each principal direction with variance v scales by
        ``sqrt((v + end^2) / (v + start^2))``.
        """
        var, start, end = _like(self.var, x), _like(start, x), _like(end, x)
        return self._scale(x, ((var + end**2) / (var + start**2)).sqrt())

    def _scale(self, x: Tensor, factor: Tensor) -> Tensor:
        """``mean + Q diag(factor) Q^T (x - mean)``."""
        mean = _like(self.mean, x)
        offset = x - mean
        if self.basis is None:
            return mean + factor * offset
        basis = _like(self.basis, x)
        rotated = (offset.flatten(1) @ basis).view_as(x)
        return mean + ((factor * rotated).flatten(1) @ basis.T).view_as(x)


@dataclass(eq=False)
class MixtureDenoiser:
    """Data ``sum_k weights_k N(means_k, std_k^2 I)``.

    ``means`` (K, C, H, W); ``std`` a float or (K,); ``weights`` (K,), positive, equal by default
    and normalised here.
    """

    means: Tensor
    std: Tensor | float
    weights: Tensor | None = None
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Posterior mean for ``x`` (B, C, H, W): the components' means, weighted by likelihood."""
        sigma = _like(sigma, x)
        means, std = _like(self.means, x), _like(self.std, x).expand(self.means.shape[0])
        noise = sigma.reshape(-1, 1) ** 2  # (B, 1), or (1, 1) for a 0-d sigma
        var = std**2 + noise  # (B, K)
        distance = (x[:, None] - means).flatten(2).square().sum(2)
        log_weight = -distance / (2 * var) - means[0].numel() / 2 * var.log()
        if self.weights is not None:
            log_weight = log_weight + _like(self.weights, x).log()
        weight = log_weight.softmax(1) / var  # (B, K)
        x0 = torch.einsum("bk,kchw->bchw", weight * noise, means)
        x0 = x0 + (weight * std**2).sum(1)[:, None, None, None] * x
        return Denoised(x0, _feature(x, sigma))


def _like(value: Tensor | float, x: Tensor) -> Tensor:
    """``value`` in the dtype and on the device of ``x``; cast first, as MPS has no float64."""
    return torch.as_tensor(value, dtype=x.dtype).to(x.device)


def _feature(x: Tensor, sigma: Tensor) -> Tensor:
    """In place of a bottleneck, (B, H, W): the channel mean of ``x / sqrt(1 + sigma^2)``."""
    return (x / (1 + sigma**2).sqrt()).mean(1)
