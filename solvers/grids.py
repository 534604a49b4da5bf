"""Time grids: N noise levels decreasing from sigma_max to sigma_min, float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete")

#: Smallest time of the VP process behind ``time_uniform`` (Song et al. 2021, arXiv:2011.13456).
VP_EPSILON = 1e-3

TimeMap = Callable[[Tensor], Tensor]


def get_grid(
    schedule_type: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float | None = None,
    *,
    sigma: TimeMap | None = None,
    sigma_inv: TimeMap | None = None,
) -> Tensor:
    """Return ``num_steps`` noise levels from ``sigma_max`` down to ``sigma_min``.

    ``polynomial`` is EDM's grid (arXiv:2206.00364, eq. 5), ``logsnr`` is uniform in log sigma,
    ``time_uniform`` is polynomial in the time of a VP process that ends at ``sigma_max``,
    ``discrete`` is polynomial in the model's own time: it needs the model's ``sigma(t)`` and
    ``sigma_inv(sigma)``.  ``rho`` is the exponent (``logsnr`` has none).

    Returns (num_steps,) float64 on the CPU.  Raises ValueError for settings that make no grid.
    """
    _check(schedule_type, num_steps, sigma_min, sigma_max, rho)
    if schedule_type == "logsnr":
        first, last = math.log(sigma_max), math.log(sigma_min)
        grid = torch.linspace(first, last, num_steps, dtype=torch.float64).exp()
    elif schedule_type == "polynomial":
        grid = _power_ramp(sigma_max, sigma_min, num_steps, rho)
    elif schedule_type == "time_uniform":
        grid = _vp_sigma(_power_ramp(1.0, VP_EPSILON, num_steps, rho), sigma_min, sigma_max)
    else:
        if sigma is None or sigma_inv is None:
            raise ValueError(
                "schedule 'discrete' needs a model with its own time, and this model has none; "
                "choose polynomial, logsnr or time_uniform"
            )
        ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
        t_first, t_last = (float(t) for t in sigma_inv(ends))
        grid = sigma(_power_ramp(t_first, t_last, num_steps, rho)).to(torch.float64)
    grid[0], grid[-1] = sigma_max, sigma_min  # exact ends, free of the rounding of the powers
    if not bool((grid.diff() < 0).all()):  # a range outside the model's, or no such VP process
        raise ValueError(
            f"schedule {schedule_type!r} has no decreasing levels from sigma_max = {sigma_max:g} "
            f"to sigma_min = {sigma_min:g} with rho = {rho}; choose a smaller sigma_min, levels "
            "that the model knows, or schedule 'logsnr'"
        )
    return grid


def refine(
    schedule_type: str, num_steps: int, inserted: int, *args: float | None, **maps: TimeMap | None
) -> tuple[Tensor, slice]:
    """Insert ``inserted`` nodes (M) into every interval of a grid, in the same schedule.

    Returns the grid of ``(M + 1)(num_steps - 1) + 1`` nodes and the slice that picks the coarse
    nodes out of it (AMED, arXiv:2312.00094, section 3.3).
    """
    if inserted < 0:
        raise ValueError(f"M = {inserted} inserted nodes make no grid; give M >= 0")
    fine = get_grid(schedule_type, (inserted + 1) * (num_steps - 1) + 1, *args, **maps)  # type: ignore[arg-type]
    return fine, slice(None, None, inserted + 1)


def _power_ramp(first: float, last: float, num_steps: int, rho: float | None) -> Tensor:
    assert rho is not None
    a, b = first ** (1 / rho), last ** (1 / rho)
    ramp = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    return (a + ramp * (b - a)) ** rho


def _vp_sigma(t: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise level of the linear VP process with sigma(eps) = sigma_min, sigma(1) = sigma_max."""
    log_min, log_max = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_min / VP_EPSILON - log_max) / (VP_EPSILON - 1)
    beta_min = log_max - beta_d / 2
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def _check(
    schedule_type: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float | None
) -> None:
    if schedule_type not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule_type!r}; choose one of {', '.join(SCHEDULES)}"
        )
    if num_steps < 2:
        raise ValueError(f"a grid of {num_steps} node(s) has no interval; give num_steps >= 2")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max, "
            f"got sigma_min = {sigma_min:g}, sigma_max = {sigma_max:g}"
        )
    if schedule_type != "logsnr" and (rho is None or not rho > 0):
        raise ValueError(
            f"schedule {schedule_type!r} needs an exponent rho > 0, got {rho}; "
            "pass --schedule_rho (7 is usual for polynomial, 1 for the others)"
        )
