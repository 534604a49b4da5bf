"""Integrals of interpolating polynomials against a weight: the core of the multistep rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def integral(
    values: Sequence[Tensor], places: Sequence[Tensor], moments: Sequence[Tensor | float]
) -> Tensor:
    """The integral of the polynomial through ``values`` (B, C, H, W) at ``places``.

    The places are 0-d or (B, 1, 1, 1); ``moments[k]`` is the integral of ``s**k``.
    """
    first, *others = weights(places, moments)
    total = first * values[0]
    for weight, value in zip(others, values[1:], strict=True):
        total = total + weight * value
    return total


def weights(
    places: Sequence[Tensor | float], moments: Sequence[Tensor | float]
) -> list[Tensor | float]:
    """The weights of the values in `integral`.

    ``sum_j w_j p(s_j)`` is exact for every polynomial ``p`` of a degree below the number of places.
    """
    result: list[Tensor | float] = []
    for j, own in enumerate(places):
        basis: list[Tensor | float] = [1.0]  # coefficients of the Lagrange polynomial, lowest first
        for other in (*places[:j], *places[j + 1 :]):
            pairs = zip([0.0, *basis], [*basis, 0.0], strict=True)
            basis = [(lower - other * same) / (own - other) for lower, same in pairs]
        result.append(sum(c * moment for c, moment in zip(basis, moments, strict=True)))
    return result


def exponential_moments(g: Tensor, count: int) -> list[Tensor]:
    """The integrals of ``g e^(g (1 - s)) s^k`` over [0, 1] for ``k < count``.

    Integration by parts: ``c_0 = e^g - 1`` and ``c_k = k c_(k-1) / g - 1``.
    """
    moments = [torch.expm1(g)]
    for k in range(1, count):
        moments.append(k * moments[-1] / g - 1)
    return moments
