"""The EDM family's preconditioning (Karras et al. 2022, arXiv:2206.00364, table 1).

``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``: one forward pass, and four rules for the four
coefficients.  The classes and their settings have the names of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from denoisers.nets.dhariwal import DhariwalUNet
from denoisers.nets.layers import Conv2d, one_of
from denoisers.nets.mlp import MLP
from denoisers.nets.song import SongUNet
from denoisers.nets.unet import EDMNetwork
from denoisers.noise_schedules import LinearVP
from denoisers.precision import wide_dtype, widened
from solvers.types import Denoised

#: Architectures, by their published names.
NETWORKS: dict[str, type[EDMNetwork]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
    "MLP": MLP,
}


class Coefficients(NamedTuple):
    """The coefficients at one noise level, or at a batch of them in the shape of sigma."""

    c_skip: Tensor | float
    c_out: Tensor
    c_in: Tensor | float
    c_noise: Tensor  #: the noise label that the network is conditioned on


class Precond(nn.Module):
    """A network with a rule for its coefficients; the network's parameters are under ``model.``.

    The network ``F`` has a dtype of its own (see :meth:`cast`).  The arithmetic around it runs on
    the device of ``x`` in its dtype, in float32 at least.  Derivatives in ``x`` and ``sigma`` are
    exact.  ``sigma_min`` and ``sigma_max`` are the noise levels of training; the output does not
    depend on them.  ``use_fp16``, a published setting, is ignored.

    Raises ValueError for an unknown ``model_type`` and for invalid settings.
    """

    outputs = 1  #: network outputs per image channel, of which the first ones are used
    D: int | None = None  #: dimensions that PFGM++ adds to those of the data

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        sigma_min: float,
        sigma_max: float,
        *,
        label_dim: int = 0,
        use_fp16: bool = False,
        model_type: str = "SongUNet",
        **settings: Any,
    ) -> None:
        super().__init__()
        one_of("model_type", model_type, tuple(NETWORKS))
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(f"the noise levels go from {sigma_min} up to {sigma_max}")
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.dtype = torch.float32
        self.model = NETWORKS[model_type](
            img_resolution,
            img_channels,
            img_channels * self.outputs,
            label_dim=label_dim,
            **settings,
        )

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """At ``sigma`` > 0, of any shape, in the dtype of ``sigma``; differentiable."""
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> Precond:
        """Run the network in ``dtype``; below float32, embedding and norms keep float32 weights."""
        self.dtype = dtype
        wide = wide_dtype(dtype)
        self.to(wide)
        if dtype != wide:
            for module in self.modules():
                if isinstance(module, Conv2d):
                    module.to(dtype=dtype)
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma`` (0-d or (B, 1, 1, 1)); labels one-hot (B, K).

        For a network with classes, no labels are the same as zeros.  ``augment_labels`` (B, K)
        describe how training images were augmented; samples have none.
        """
        state, sigma = widened(x, sigma)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        raw, feat = self.network(c_in * state, c_noise.reshape(-1), class_labels, augment_labels)
        x0 = c_skip * state + c_out * raw[:, : self.img_channels].to(state.dtype)
        return Denoised(x0.to(x.dtype), feat)

    def network(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``F`` and the bottleneck's channel mean, on the device and in the dtype of ``x``."""
        weight = self.model.map_layer0.weight
        if self.label_dim and class_labels is None:
            class_labels = weight.new_zeros(1, self.label_dim)

        def embeddable(labels: Tensor) -> Tensor:
            return labels.to(weight.dtype).to(weight.device)

        inputs = x.to(self.dtype).to(weight.device)
        if self.dtype != weight.dtype:  # half precision: its kernels are fastest in this layout
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        raw, feat = self.model(
            inputs,
            embeddable(noise_labels),
            None if class_labels is None else embeddable(class_labels),
            None if augment_labels is None else embeddable(augment_labels),
        )
        return raw.to(x.device), feat.to(x.device).to(x.dtype)


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
    variances as well, which are not used.  Published samplers stay on these levels.  Learned ones
    do not, and need the gradient of the label: between two levels it is linear in
    ``ln alpha = -ln(1 + sigma^2) / 2``, as in :class:`noise_schedules.DiscreteVP`; at a level it is
    the published label, and beyond either end that of the end.
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
        model_type: str = "DhariwalUNet",
        **settings: Any,
    ) -> None:
        u = cosine_levels(C_1, C_2, M)
        low, high = float(u[M - 1]), float(u[0])
        super().__init__(img_resolution, img_channels, low, high, model_type=model_type, **settings)
        self.register_buffer("u", u)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = self._label(sigma)
        return Coefficients(1.0, -sigma, (sigma**2 + 1).rsqrt(), c_noise)

    def _label(self, sigma: Tensor) -> Tensor:
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
    if name not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning '{name}' is not one of {', '.join(PRECONDITIONINGS)}")
    return PRECONDITIONINGS[name](bottleneck=bottleneck, **settings)
