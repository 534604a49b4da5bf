"""The four preconditionings of the EDM family (Karras et al. 2022, arXiv:2206.00364, table 1).

The classes and their settings have the names of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from checkpoints.pickles.records import shown
from denoisers.families.precond_base import Coefficients, Precond
from denoisers.noise_schedules import LinearVP
from runtime.bounds import MOST_SIDE
from solvers.grids import MOST_NODES


def edm_scaling(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """``c_skip``, ``c_out`` and ``1 / c_in`` of EDM's own preconditioning."""
    total = sigma**2 + sigma_data**2
    root = total.sqrt()
    return sigma_data**2 / total, sigma * sigma_data / root, root


class EDMPrecond(Precond):
    """EDM's own: input and target have unit variance for data of standard deviation ``sigma_data``.

    ``D`` is the number of dimensions that PFGM++ adds (arXiv:2302.04265): with
    ``r = sigma sqrt(D)`` its networks have the same coefficients, and only the start of sampling
    and the noise that is added differ.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        D: int | None = None,
        model_type: str = "DhariwalUNet",
        **settings: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, sigma_min, sigma_max, model_type=model_type, **settings
        )
        if D is not None and not (D >= 1 and int(D) == D):
            raise ValueError(f"D is {D}, but PFGM++ adds a whole number of dimensions, 1 or more")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data is {sigma_data}, but a deviation is positive")
        self.sigma_data = sigma_data
        self.D = None if D is None else int(D)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_skip, c_out, root = edm_scaling(sigma, self.sigma_data)
        return Coefficients(c_skip, c_out, 1 / root, sigma.log() / 4)


class VPPrecond(Precond):
    """The variance-preserving SDE (arXiv:2011.13456): ``F`` predicts the noise from ``alpha x``.

    The noise label is ``M - 1`` times the time of the process, which lies in [epsilon_t, 1].
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        **settings: Any,
    ) -> None:
        if not M > 1:
            raise ValueError(f"M is {M}; the process needs two steps or more")
        schedule = LinearVP(beta_d, beta_min)
        t = torch.tensor([epsilon_t, 1.0], device="cpu")
        # Published in float32 and without expm1: the lowest level is 2^-10, not 0.0010005.
        low, high = ((0.5 * beta_d * t**2 + beta_min * t).exp() - 1).sqrt().tolist()
        super().__init__(img_resolution, img_channels, low, high, **settings)
        self.schedule = schedule
        self.M = M

    def coefficients(self, sigma: Tensor) -> Coefficients:
        # in float64, which MPS does not have
        t = self.schedule.sigma_inv(sigma.cpu() if sigma.device.type == "mps" else sigma)
        c_noise = (self.M - 1) * t.to(sigma.dtype).to(sigma.device)
        return Coefficients(1.0, -sigma, (sigma**2 + 1).rsqrt(), c_noise)


class VEPrecond(Precond):
    """The variance-exploding SDE (arXiv:2011.13456): ``F`` is the score times sigma."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        **settings: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, sigma_min, sigma_max, **settings)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return Coefficients(1.0, sigma, 1.0, (sigma / 2).log())


class IDDPMPrecond(Precond):
    """Improved DDPM (arXiv:2102.09672) with its cosine schedule: ``F`` predicts the noise.

    The network was trained at the ``M`` levels ``u``, whose labels are whole numbers, and predicts
    variances as well, which are not used.  The label of sigma is that of the nearest level, as
    published; ``u`` ends in 0, so below half the lowest level it is -1.  With ``interpolate`` it is
    linear in ``ln alpha = -ln(1 + sigma^2) / 2`` between two levels, as in
    :class:`noise_schedules.DiscreteVP`, and beyond either end that of the end: it then has a
    gradient, which a learned scale of the network's time can use.
    """

    outputs = 2
    u: Tensor  #: (M + 1,) decreasing to 0

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        interpolate: bool = False,
        model_type: str = "DhariwalUNet",
        **settings: Any,
    ) -> None:
        if type(interpolate) is not bool:
            raise ValueError(f"interpolate is {interpolate!r}, but it is true or false")
        u = cosine_levels(C_1, C_2, M)
        low, high = float(u[M - 1]), float(u[0])
        super().__init__(img_resolution, img_channels, low, high, model_type=model_type, **settings)
        self.register_buffer("u", u)
        self.interpolate = interpolate

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = self._between(sigma) if self.interpolate else self._nearest(sigma)
        return Coefficients(1.0, -sigma, (sigma**2 + 1).rsqrt(), c_noise)

    def _nearest(self, sigma: Tensor) -> Tensor:
        # Without matrix products, whose rounding depends on the batch; in float32, as published.
        column = sigma.detach().float().reshape(-1, 1)
        levels = self.u.float().to(sigma.device).reshape(-1, 1)
        gaps = torch.cdist(column, levels, compute_mode="donot_use_mm_for_euclid_dist")
        return (len(self.u) - 2 - gaps.argmin(1)).to(sigma.dtype).reshape(sigma.shape)

    def _between(self, sigma: Tensor) -> Tensor:
        levels = torch.log1p(self.u[:-1].to(sigma.dtype).to(sigma.device).flip(0) ** 2)
        value = torch.log1p(sigma**2).contiguous()
        above = torch.searchsorted(levels, value.detach()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return (above - 1 + (value - low) / (high - low)).clamp(0, len(levels) - 1)


def cosine_levels(C_1: float, C_2: float, M: int) -> Tensor:
    """Noise levels (M + 1,) of table 1's iDDPM column, by its recursion in float32, as published.

    ``u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1`` from ``u_M = 0``, with
    ``abar_j = sin^2(pi/2 j / (M (C_2 + 1)))``.
    """
    abar = (torch.arange(M + 1, device="cpu") * (0.5 * math.pi) / M / (C_2 + 1)).sin() ** 2
    ratio = (abar[:-1] / abar[1:]).clamp(min=C_1)
    u = torch.zeros(M + 1, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
    return u


#: Bounds of the settings that size a network, of some twenty times the published ones: blocks of
#: a level, layers, levels, steps of iDDPM and VP.
MOST = {
    "num_blocks": 100, "layers": 100, "channel_mult": 16, "M": MOST_NODES,
    "img_resolution": MOST_SIDE, "img_channels": 1024,
}  # fmt: skip
PRECONDITIONINGS: dict[str, type[Precond]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": IDDPMPrecond,
}


def build(config: Mapping[str, Any], bottleneck: str | None = None) -> Precond:
    """An untrained network from published constructor settings, including ``class_name``.

    ``bottleneck`` names the module whose channel mean is returned; the default is the last encoder
    block.  Raises ValueError, KeyError or TypeError for invalid settings.
    """
    settings = dict(config)
    name = settings.pop("class_name", None)
    for setting, most in MOST.items():
        value = settings.get(setting)
        size = len(value) if isinstance(value, (list, tuple)) else value
        if isinstance(size, (int, float)) and not 1 <= size <= most:
            raise ValueError(f"{setting} is {shown(value)}, where networks have 1 to {most}")
    if name not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning '{name}' is not one of {', '.join(PRECONDITIONINGS)}")
    return PRECONDITIONINGS[name](bottleneck=bottleneck, **settings)
