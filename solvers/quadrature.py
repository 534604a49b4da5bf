"""Integrals of interpolating polynomials against a weight: the core of the multistep rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def integral(
    values: Sequence[Tensor], places: Sequence[Tensor], moments: Sequence[Tensor]
) -> Tensor:
    """The integral of the polynomial through ``values`` (B, C, H, W) at ``places``.

    Places and moments are 0-d or (B, 1, 1, 1); ``moments[k]`` is the integral of ``s**k``.
    """
    first, *others = weights(places, moments)
    total = first * values[0]
    for weight, value in zip(others, values[1:], strict=True):
        total = total + weight * value
    return total


def weights(places: Sequence[Tensor], moments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The weights ``w`` of the values in `integral`: ``sum_j w_j s_j^k = moments[k]``.

    As many moments as places; polynomials of a lower degree than their number are integrated
    exactly.
    """
    s = torch.stack(list(places), -1)
    powers = torch.stack([s**k for k in range(len(places))], -2)
    return torch.linalg.solve(powers, torch.stack(list(moments), -1)).unbind(-1)


def uniform_moments(h: Tensor, count: int) -> list[Tensor]:
    """The integrals of ``s^k`` over [0, 1] for ``k < count``, shaped like ``h``."""
    return [torch.ones_like(h) / (k + 1) for k in range(count)]


def exponential_moments(g: Tensor, count: int) -> list[Tensor]:
    """The integrals of ``g e^(g (1 - s)) s^k`` over [0, 1] for ``k < count``.

    Integration by parts: ``c_0 = e^g - 1`` and ``c_k = k c_(k-1) / g - 1``.
    """
    moments = [torch.expm1(g)]
    for k in range(1, count):
        moments.append(k * moments[-1] / g - 1)
    return moments
