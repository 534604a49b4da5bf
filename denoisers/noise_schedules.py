"""Processes of models with their own time ``t`` in (0, 1] and their own scale of the state.

The state of such a model is ``y = alpha (x0 + sigma n)``.  Divided by ``alpha`` it is that of the
variance-exploding process in which this toolkit samples, so all that a process has to tell is
``sigma(t)``, its inverse, and ``y`` from ``x``:

* variance preserving: ``alpha^2 (1 + sigma^2) = 1``, so ``sigma^2 = expm1(-2 ln alpha(t))``;
* rectified flow: ``y = (1 - s) x0 + s n``, so ``sigma = s / (1 - s)`` and ``alpha = 1 - s``.

Times and noise levels of grids are float64 on the CPU; everything works on tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from solvers.grids import MOST_NODES


class NoiseSchedule(Protocol):
    """A process: the maps between its time and the noise level, and the scale of its state."""

    def sigma(self, t: Tensor) -> Tensor: ...

    def sigma_inv(self, sigma: Tensor) -> Tensor: ...

    def own_state(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the model sees for the state ``x`` at ``sigma``: ``alpha x``, in their dtype."""
        ...


class VariancePreserving:
    """The scale of the state of a variance-preserving process."""

    def own_state(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` with unit variance, for data of unit variance."""
        return x / (1 + sigma**2).sqrt()


@dataclass(frozen=True)
class Flow:
    """Rectified flow (arXiv:2209.03003), ``y = (1 - s) x0 + s n``, with a static ``shift`` k.

    Its time t is that of the unshifted process.  The shift (arXiv:2403.03206, section 5.3.2)
    moves it to ``s = k t / (1 + (k - 1) t)``, which multiplies every noise level by k:
    ``sigma = s / (1 - s) = k t / (1 - t)``.  A dynamic shift mu is one by ``exp(mu)``.
    At t = 1 sigma is infinite; samplers start below.  Networks are told ``1000 s``.
    """

    shift: float = 1.0
    steps: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift {self.shift:g} of a flow is no factor: give one above 0")

    def sigma(self, t: Tensor) -> Tensor:
        t = t.to(torch.float64)
        return self.shift * t / (1 - t)

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        sigma = sigma.to(torch.float64)
        return sigma / (self.shift + sigma)

    def own_state(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``(1 - s) x``."""
        return x / (1 + sigma)

    def x0(self, x: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
        """The clean image ``y - s v`` from the velocity ``v = n - x0`` at ``y``."""
        return self.own_state(x, sigma) - sigma / (1 + sigma) * velocity

    def network_time(self, sigma: Tensor) -> Tensor:
        """``1000 s`` of every entry of ``sigma``; flat, in float64 on the CPU."""
        level = sigma.cpu().to(torch.float64).reshape(-1)
        return self.steps * level / (1 + level)


@dataclass(frozen=True)
class LinearVP(VariancePreserving):
    """Linear ``beta(t) = beta_min + beta_d t`` (arXiv:2011.13456, eq. 33): ADM's models.

    ``-2 ln alpha = beta_d t^2 / 2 + beta_min t`` for ``t`` in [eps, 1].  ADM's network time is
    ``999 t``.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def __post_init__(self) -> None:
        if not (self.beta_d > 0 and self.beta_min > 0):
            raise ValueError(
                f"beta_d = {self.beta_d:g} and beta_min = {self.beta_min:g} must be positive "
                "for a noise level that rises with time"
            )

    def sigma(self, t: Tensor) -> Tensor:
        t = t.to(torch.float64)
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """The positive root of the quadratic, in a form without cancellation at small sigma."""
        q = torch.log1p(sigma.to(torch.float64) ** 2)
        return 2 * q / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * q).sqrt())


def _linear(first: float, last: float, num_steps: int) -> Tensor:
    return torch.linspace(first, last, num_steps, dtype=torch.float64)


def _scaled_linear(first: float, last: float, num_steps: int) -> Tensor:
    return _linear(first**0.5, last**0.5, num_steps) ** 2


def _cosine(first: float, last: float, num_steps: int) -> Tensor:
    """Betas of ``abar(t) = cos^2(pi/2 (t + 0.008) / 1.008)``, at most 0.999 (arXiv:2102.09672)."""
    abar = ((_linear(0, 1, num_steps + 1) + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


#: Rules for the N betas of a model trained at discrete steps, under the names of ``diffusers``.
BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


@dataclass(frozen=True, eq=False)
class DiscreteVP(VariancePreserving):
    """The continuous schedule of a model trained at N steps: ``ln alpha`` is piecewise linear.

    Step ``i`` is at ``t = (i + 1) / N`` (arXiv:2206.00927, appendix D.3); beyond either end the
    last segment is extended.  ``alphas_cumprod`` (N,) holds the products of ``1 - beta``.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.ndim != 1 or len(abar) < 2:
            raise ValueError(f"alphas_cumprod must be a list of steps, got {tuple(abar.shape)}")
        if not (bool((abar.diff() < 0).all()) and 0 < float(abar[-1]) <= float(abar[0]) < 1):
            raise ValueError("alphas_cumprod must decrease strictly within (0, 1)")

    @classmethod
    def from_betas(
        cls, first: float, last: float, num_steps: int = 1000, rule: str = "scaled_linear"
    ) -> DiscreteVP:
        """Betas from ``first`` to ``last`` by one of the ``BETAS``; ValueError for another rule.

        LDM and Stable Diffusion use ``scaled_linear``, which is linear in the square roots.
        """
        if rule not in BETAS:
            raise ValueError(f"unknown rule of betas '{rule}'; known: {', '.join(BETAS)}")
        if not 2 <= num_steps <= MOST_NODES:
            raise ValueError(f"a process of {num_steps} steps is none: give 2 to {MOST_NODES}")
        return cls(torch.cumprod(1 - BETAS[rule](first, last, num_steps), 0))

    def sigma(self, t: Tensor) -> Tensor:
        times, logs = self._steps()
        return torch.expm1(-2 * _interpolate(t.to(torch.float64), times, logs)).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        times, logs = self._steps()
        log_alpha = -0.5 * torch.log1p(sigma.to(torch.float64) ** 2)
        return _interpolate(log_alpha, logs.flip(0), times.flip(0))

    def network_time(self, sigma: Tensor) -> Tensor:
        """The step as a real number, ``N t - 1``, of every entry of ``sigma``; flat."""
        return len(self.alphas_cumprod) * self.sigma_inv(sigma.cpu()).reshape(-1) - 1

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Times and ``ln alpha`` of the steps, both (N,)."""
        logs = 0.5 * self.alphas_cumprod.to(torch.float64).log()
        count = len(logs)
        return torch.arange(1, count + 1, dtype=torch.float64) / count, logs


def _interpolate(at: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear interpolation; ``xs`` increase, and the end segments are extended."""
    right = torch.searchsorted(xs, at.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
    return ys[left] + slope * (at - xs[left])
