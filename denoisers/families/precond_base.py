"""The base class of EDM's preconditionings: a network with a rule for four coefficients.

``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)`` (Karras et al. 2022, arXiv:2206.00364,
section 5).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from denoisers.nets.dhariwal import DhariwalUNet
from denoisers.nets.layers import Conv2d, one_of
from denoisers.nets.mlp import MLP
from denoisers.nets.song import SongUNet
from denoisers.nets.unet import EDMNetwork
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

    def inputs(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) in the dtype, on the device and in the layout of the network."""
        weight = self.model.map_layer0.weight
        x = x.to(self.dtype).to(weight.device)
        half = self.dtype != weight.dtype
        if half or (weight.device.type, self.dtype) == ("cpu", torch.float32):
            x = x.contiguous(memory_format=torch.channels_last)  # its kernels are the fastest
        return x

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

        raw, feat = self.model(
            self.inputs(x),
            embeddable(noise_labels),
            None if class_labels is None else embeddable(class_labels),
            None if augment_labels is None else embeddable(augment_labels),
        )
        return raw.to(x.device), feat.to(x.device).to(x.dtype)
