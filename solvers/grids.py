"""Time grids: noise levels that decrease from sigma_max to sigma_min, float64 on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from solvers.names import unknown

#: The schedules and their default exponents rho (``logsnr`` has none).
DEFAULT_RHO: dict[str, float | None] = {
    "polynomial": 7.0,
    "logsnr": None,
    "time_uniform": 1.0,
    "discrete": 1.0,
}
SCHEDULES = tuple(DEFAULT_RHO)
MOST_NODES = 10_000  #: of a grid; the longest published samplers have 4000 steps
EXPLICIT = "explicit"  #: the schedule of a grid whose noise levels are given one by one

#: Beside noise of this level float32 no longer resolves a grey level: its spacing is 2/256.
LARGEST_SIGMA = 1e5

#: Smallest time of the VP process behind ``time_uniform`` (Song et al. 2021, arXiv:2011.13456).
VP_EPSILON = 1e-3

TimeMap = Callable[[Tensor], Tensor]


class TimeMaps(NamedTuple):
    """The maps between a model's own time and noise levels, for the ``discrete`` schedule."""

    sigma: TimeMap  #: time -> noise level
    sigma_inv: TimeMap  #: noise level -> time


class NoiseRange(Protocol):
    """What a grid needs to know about a model: part of the model's card."""

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    @property
    def time_maps(self) -> TimeMaps | None: ...


@dataclass(frozen=True)
class Grid:
    """The settings of a time grid, as given on the command line and kept in records.

    None means the default: the exponent of the schedule, the noise levels of the model.  Raises
    ValueError for more than `MOST_NODES` nodes.
    ``resolve`` fills the defaults in; a grid has nodes only once it is resolved.  A grid of given
    noise levels is made by ``explicit``.
    """

    schedule_type: str = "polynomial"
    num_steps: int | None = None  #: number of nodes, not counting a final 0
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    time_maps: TimeMaps | None = None
    times: tuple[float, ...] | None = None  #: the noise levels themselves

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            _check_length(self.num_steps)

    @classmethod
    def explicit(cls, times: Sequence[float]) -> Grid:
        """The grid of these noise levels.

        Raises ValueError unless they are two or more, positive, decreasing, and at most
        `LARGEST_SIGMA`.
        """
        pairs = zip(times, times[1:], strict=False)
        if len(times) < 2 or not all(0 < b < a <= LARGEST_SIGMA for a, b in pairs):
            raise ValueError(
                f"the noise levels {', '.join(f'{t:g}' for t in times) or '()'} are no grid: give "
                f"two or more that decrease from {LARGEST_SIGMA:g} or less and stay above 0"
            )
        return cls(EXPLICIT, len(times), None, times[-1], times[0], times=tuple(times))

    def resolve(self, card: NoiseRange) -> Grid:
        """The same grid with every default filled in from the schedule and from ``card``.

        An exponent of a schedule that has none is dropped.
        """
        default = DEFAULT_RHO.get(self.schedule_type)
        return replace(
            self,
            rho=default if None in (default, self.rho) else self.rho,
            sigma_min=card.sigma_min if self.sigma_min is None else self.sigma_min,
            sigma_max=card.sigma_max if self.sigma_max is None else self.sigma_max,
            time_maps=card.time_maps if self.time_maps is None else self.time_maps,
        )

    @property
    def ends(self) -> tuple[float, float]:
        """(sigma_min, sigma_max).  Raises ValueError before ``resolve``."""
        if self.sigma_min is None or self.sigma_max is None:
            raise ValueError("the grid has no noise levels yet: call resolve(card) first")
        return self.sigma_min, self.sigma_max

    def nodes(self, num_steps: int | None = None) -> Tensor:
        """The noise levels, (num_steps,) float64; ``num_steps`` overrides that of the grid."""
        count = self.num_steps if num_steps is None else num_steps
        if count is None:
            raise ValueError("num_steps is not set: give the number of nodes")
        if self.times is not None:
            if count != len(self.times):
                raise ValueError(
                    f"a grid of {len(self.times)} given noise levels has no {count} nodes: give "
                    "a schedule instead"
                )
            return torch.tensor(self.times, dtype=torch.float64)
        return get_grid(self.schedule_type, count, *self.ends, self.rho, self.time_maps)

    def closed(self, num_steps: int | None = None) -> Tensor:
        """The nodes and a final 0, (num_steps + 1,)."""
        nodes = self.nodes(num_steps)
        return torch.cat([nodes, nodes.new_zeros(1)])

    def refined(self, inserted: int) -> tuple[Tensor, int]:
        """The grid of the same schedule with ``inserted`` (M) more nodes in every interval.

        Returns ``(M + 1)(num_steps - 1) + 1`` nodes and the stride M + 1: every stride-th node is
        a node of this grid (AMED, arXiv:2312.00094, section 3.3).
        """
        if inserted < 0:
            raise ValueError(f"M = {inserted} is negative; give M >= 0")
        stride = inserted + 1
        return self.nodes(stride * ((self.num_steps or 0) - 1) + 1), stride


def get_grid(
    schedule_type: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float | None = None,
    time_maps: TimeMaps | None = None,
) -> Tensor:
    """Return ``num_steps`` noise levels from ``sigma_max`` down to ``sigma_min``.

    ``polynomial`` is EDM's grid (arXiv:2206.00364, eq. 5), ``logsnr`` is uniform in log sigma,
    ``time_uniform`` is polynomial in the time of a VP process that ends at ``sigma_max``,
    ``discrete`` is polynomial in the model's own time and needs its ``time_maps``.  ``rho`` is
    the exponent, by default that of `DEFAULT_RHO`.

    Returns (num_steps,) float64 on the CPU.  Raises ValueError for invalid settings.
    """
    rho = DEFAULT_RHO.get(schedule_type) if rho is None else rho
    _check(schedule_type, num_steps, sigma_min, sigma_max, rho)
    if schedule_type == "logsnr":
        first, last = math.log(sigma_max), math.log(sigma_min)
        grid = torch.linspace(first, last, num_steps, dtype=torch.float64).exp()
    elif schedule_type == "polynomial":
        grid = _power_ramp(sigma_max, sigma_min, num_steps, rho)
    elif schedule_type == "time_uniform":
        grid = _vp_sigma(_power_ramp(1.0, VP_EPSILON, num_steps, rho), sigma_min, sigma_max)
    else:
        grid = _discrete(num_steps, sigma_min, sigma_max, rho, time_maps)
    grid[0], grid[-1] = sigma_max, sigma_min  # exact ends, without the rounding of the powers
    if not bool((grid.diff() < 0).all()):  # outside the model's range, or no such VP process
        raise ValueError(
            f"schedule {schedule_type!r} does not decrease from sigma_max = {sigma_max:g} "
            f"to sigma_min = {sigma_min:g} with rho = {rho}; choose a smaller sigma_min, levels "
            "within the model's range, or schedule 'logsnr'"
        )
    return grid


def check_exponent(schedule_type: str, rho: float | None) -> None:
    """Raise ValueError for an exponent that was asked for of a schedule that has none.

    Grids themselves take and ignore it, because published predictors state one for every schedule.
    """
    if rho is not None and DEFAULT_RHO.get(schedule_type, rho) is None:
        raise ValueError(
            f"--schedule_rho {rho:g} is not an option of --schedule_type {schedule_type}, which "
            "has no exponent: leave it out"
        )


def _discrete(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float | None, maps: TimeMaps | None
) -> Tensor:
    if maps is None:
        raise ValueError(
            "schedule 'discrete' needs a model with its own time, and this model has none; "
            "choose polynomial, logsnr or time_uniform"
        )
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    t_first, t_last = (float(t) for t in maps.sigma_inv(ends))
    return maps.sigma(_power_ramp(t_first, t_last, num_steps, rho)).to(torch.float64)


def _power_ramp(first: float, last: float, num_steps: int, rho: float | None) -> Tensor:
    assert rho is not None
    try:
        a, b = first ** (1 / rho), last ** (1 / rho)
    except OverflowError:
        raise ValueError(
            f"schedule_rho = {rho:g} is too small: {max(first, last):g} to the power of 1 / rho is "
            "no float; give a larger one, such as 1"
        ) from None
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
        raise ValueError(unknown("schedule", schedule_type, SCHEDULES))
    _check_length(num_steps)
    if num_steps < 2:
        raise ValueError(f"a grid of {num_steps} node(s) has no interval; give num_steps >= 2")
    if not 0 < sigma_min < sigma_max <= LARGEST_SIGMA:
        raise ValueError(
            f"noise levels must satisfy 0 < sigma_min < sigma_max <= {LARGEST_SIGMA:g}, "
            f"got sigma_min = {sigma_min:g}, sigma_max = {sigma_max:g}"
        )
    if rho is not None and not rho > 0:
        raise ValueError(f"schedule_rho = {rho:g} must be positive: leave it out for the default")


def _check_length(num_steps: int) -> None:
    if num_steps > MOST_NODES:
        raise ValueError(
            f"a grid of {num_steps} nodes is longer than any sampler needs: give {MOST_NODES} or "
            "fewer"
        )
