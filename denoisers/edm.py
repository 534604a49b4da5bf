"""The EDM family: preconditioned U-Nets (Karras et al. 2022, arXiv:2206.00364, table 1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import sha256_file
from solvers.types import Denoised

from .cards import Card
from .files import Files
from .nets import NETWORKS, Network
from .nets.layers import Conv2d
from .weights import fill, read_safetensors

MICRO_BATCH = 64  #: samples at a time on a CPU: more only leaves the cache


class EDMPrecond(nn.Module):
    """``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``; parameters are under ``model.``.

    The network ``F`` has a dtype of its own (see :meth:`cast`).  The arithmetic around it runs on
    the device of ``x`` in its dtype, in float32 at least.  ``sigma_min`` and ``sigma_max`` are
    published with the settings and only recorded.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        *,
        label_dim: int = 0,
        sigma_min: float = 0.0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **settings: Any,
    ) -> None:
        super().__init__()
        if model_type not in NETWORKS:
            raise ValueError(f"model_type is '{model_type}'; known: {', '.join(NETWORKS)}")
        self.label_dim = label_dim
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data
        self.dtype = torch.float32
        self.model: Network = NETWORKS[model_type](
            img_resolution, img_channels, img_channels, label_dim=label_dim, **settings
        )

    def cast(self, dtype: torch.dtype) -> EDMPrecond:
        """Run the network in ``dtype``; below float32, embedding and norms keep float32 weights."""
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
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
        """Denoise ``x`` (B, C, H, W) at ``sigma`` (0-d or (B, 1, 1, 1)); labels one-hot (B, K)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        state, sigma = x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
        total = sigma**2 + self.sigma_data**2
        raw, feat = self.network(
            state / total.sqrt(), sigma.log().reshape(-1) / 4, class_labels, augment_labels
        )
        c_out = sigma * self.sigma_data / total.sqrt()
        x0 = self.sigma_data**2 / total * state + c_out * raw.to(wide)
        return Denoised(x0.to(x.dtype), feat)

    def network(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``F`` and the bottleneck's mean, on the device and in the (wide) dtype of ``x``."""
        weight = self.model.map_layer0.weight
        if self.label_dim and class_labels is None:
            class_labels = weight.new_zeros(1, self.label_dim)

        def embeddable(labels: Tensor) -> Tensor:
            return labels.to(weight.dtype).to(weight.device)

        inputs = x.to(self.dtype).to(weight.device)
        if self.dtype != weight.dtype:  # half precision: the layout its kernels are fast in
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        raw, feat = self.model(
            inputs,
            embeddable(noise_labels),
            None if class_labels is None else embeddable(class_labels),
            None if augment_labels is None else embeddable(augment_labels),
        )
        return raw.to(x.device), feat.to(x.device).to(x.dtype)


PRECONDITIONINGS: dict[str, type[EDMPrecond]] = {"EDMPrecond": EDMPrecond}


@dataclass(eq=False)
class EDMDenoiser:
    """A network with its labels bound in: one evaluation per call."""

    net: EDMPrecond
    labels: Tensor | None  #: one-hot (B, K), or None
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype."""
        labels = self.labels
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"{len(labels)} labels are bound but the batch has {len(x)}")
        if x.device.type != "cpu" or len(x) <= MICRO_BATCH:
            return self.net(x, sigma, labels)
        outs = []
        for i in range(0, len(x), MICRO_BATCH):
            part = slice(i, i + MICRO_BATCH)
            level = sigma[part] if sigma.ndim and len(sigma) > 1 else sigma
            outs.append(self.net(x[part], level, None if labels is None else labels[part]))
        return Denoised(torch.cat([o.x0 for o in outs]), torch.cat([o.feat for o in outs]))


@dataclass(frozen=True, eq=False)
class EDMModel:
    """A loaded model of the EDM family."""

    card: Card
    sha256: str  #: of the weights that were loaded
    net: EDMPrecond

    def decode(self, x: Tensor) -> Tensor:
        """Samples of these models are images."""
        return x

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> EDMDenoiser:
        """Fix the classes, (B,) int64 or None (none: unconditional).

        Raises UserError for labels out of range, labels of an unconditional model, or guidance.
        """
        if guidance_rate not in (None, 0.0, 1.0):
            raise UserError(
                f"'{self.card.name}' has no guidance, but the rate is {guidance_rate}; leave it out"
            )
        if prompts is not None:
            raise UserError(f"'{self.card.name}' takes no text; leave the prompts out")
        if labels is None:
            return EDMDenoiser(self.net, None)
        classes = self.card.label_dim
        if not classes:
            raise UserError(f"'{self.card.name}' is unconditional: it takes no class labels")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"class {wrong} is not one of the {classes} (0..{classes - 1})")
        return EDMDenoiser(self.net, F.one_hot(labels, classes))


def build(config: Mapping[str, Any], bottleneck: str | None = None) -> EDMPrecond:
    """An untrained network from published constructor settings, ``class_name`` among them."""
    settings = dict(config)
    name = settings.pop("class_name")
    if name not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning '{name}' is not one of {', '.join(PRECONDITIONINGS)}")
    return PRECONDITIONINGS[name](bottleneck=bottleneck, **settings)


def load_edm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> EDMModel:
    """Load ``files.main``; see :func:`registry.load_model`."""
    file = files.main
    digest = sha256_file(file)
    if file == card.bundled and digest != card.sha256:
        raise UserError(
            f"{file} has sha256 {digest} where its card says {card.sha256}; restore the file"
        )
    tensors, metadata = read_safetensors(file)
    config: Mapping[str, Any] = card.config
    bottleneck: str | None = card.bottleneck
    if "config" in metadata:  # another network of the family knows its own settings
        config, bottleneck = json.loads(metadata["config"]), metadata.get("bottleneck_module")
    found = (config["img_channels"], config["img_resolution"], config["img_resolution"])
    if found != card.shape or config.get("label_dim", 0) != card.label_dim:
        raise UserError(
            f"{file} is for samples {found} with {config.get('label_dim', 0)} classes where "
            f"'{card.name}' has {card.shape} and {card.label_dim}; choose the dataset it belongs to"
        )
    net = build(config, bottleneck)
    fill(net, tensors, str(file))
    net.eval().requires_grad_(False)
    return EDMModel(card, digest, net.cast(dtype).to(device))
