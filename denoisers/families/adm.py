"""ADM: guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) with classifier guidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoints.snapshots import read_state_dict
from checkpoints.weights import filled, read_safetensors
from denoisers.cards import Card
from denoisers.conditions import check_batch, check_class
from denoisers.files import Files
from denoisers.nets.openai import Classifier, UNet, settings_from
from denoisers.noise_schedules import LinearVP
from runtime.errors import UserError
from runtime.files import sha256_file
from solvers.types import Denoised

LAST_STEP = 999  #: the network counts the model's time in [0, 1] in steps of a thousandth


@dataclass(eq=False)
class ADMDenoiser:
    """A network with its classes and guidance bound in: one evaluation per call.

    The classifier is no part of the cost: it is another, far smaller network, and published
    figures count evaluations of the denoiser alone.
    """

    net: UNet
    schedule: LinearVP
    labels: Tensor | None  #: (B,) int64, or None
    classifier: Classifier | None = None
    rate: float = 0.0  #: of guidance; needs labels and the classifier
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype.

        ``D = x - sigma (eps(y, t) - rate sigma / sqrt(1 + sigma^2) grad ln p(label | y, t))`` with
        ``y = x / sqrt(1 + sigma^2)``, clamped to [-1, 1] (algorithm 2 of the paper, for the ODE).
        It is differentiable in ``x`` and ``sigma``, the guidance term too.
        """
        check_batch(self.labels, x)
        wide = torch.promote_types(x.dtype, torch.float32)
        state, sigma = x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
        spread = (1 + sigma**2).sqrt()
        scaled = state / spread
        times = self.steps(sigma).reshape(-1).expand(len(x))
        raw, feat = self.net(scaled, times, self.labels)
        # Half of the channels of a network that learned its variance: not needed by an ODE.
        eps = raw[:, : x.shape[1]].to(x.device).to(wide)
        if self.rate:
            eps = eps - self.rate * sigma / spread * self.pull(scaled, times)
        x0 = (state - sigma * eps).clamp(-1, 1)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(x.dtype))

    def steps(self, sigma: Tensor) -> Tensor:
        """The network's time, 0 to 999: :meth:`LinearVP.sigma_inv` in the dtype of ``sigma``.

        In float32 this form cancels at small sigma (an error of 2e-4 of a step at 0.05), but it is
        the published one, and a network sees the difference in the fifth digit.
        """
        beta_d, beta_min = self.schedule.beta_d, self.schedule.beta_min
        root = (beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt()
        return LAST_STEP * ((root - beta_min) / beta_d)

    def pull(self, scaled: Tensor, times: Tensor) -> Tensor:
        """The gradient of ``ln p(label | scaled, times)`` in ``scaled`` (B, C, H, W).

        It works where gradients are off, and in inference mode; where they are on and ``scaled``
        needs them, the result can be differentiated again.
        """
        if torch.is_grad_enabled() and scaled.requires_grad:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                return self._log_gradient(scaled, times, self.labels, again=True)
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of the inference mode cannot be part of a graph; their clones can.
            labels = None if self.labels is None else self.labels.clone()
            leaf = scaled.detach().clone().requires_grad_()
            return self._log_gradient(leaf, times.detach().clone(), labels, again=False)

    def _log_gradient(
        self, scaled: Tensor, times: Tensor, labels: Tensor | None, again: bool
    ) -> Tensor:
        assert self.classifier is not None and labels is not None  # bind() has seen to it
        logs = self.classifier(scaled, times).log_softmax(dim=1)
        chosen = logs.gather(1, labels.to(logs.device)[:, None])
        return torch.autograd.grad(chosen.sum(), scaled, create_graph=again)[0]


@dataclass(frozen=True, eq=False)
class ADMModel:
    """A loaded ADM; its classifier is read at the first guided :meth:`bind`."""

    card: Card
    sha256: str  #: of the network's weights
    net: UNet
    schedule: LinearVP
    companion: Path | None  #: the classifier's file

    def decode(self, x: Tensor) -> Tensor:
        """Samples of these models are images."""
        return x

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> ADMDenoiser:
        """Fix the classes, (B,) int64, and the rate of guidance, 0 or None for none.

        A network without classes leaves the labels to the classifier.  Raises UserError for
        labels that are missing or out of range, guidance without a classifier, or prompts.
        """
        check_conditions(self.card, self.net, labels, prompts)
        if not guidance_rate:
            return ADMDenoiser(self.net, self.schedule, labels)
        if labels is None:
            raise UserError(
                f"guidance of '{self.card.name}' at rate {guidance_rate:g} steers towards a class: "
                "give a class to every sample, or leave the guidance out"
            )
        return ADMDenoiser(self.net, self.schedule, labels, self.classifier, guidance_rate)

    @cached_property
    def classifier(self) -> Classifier:
        """Read from the companion file; float32 at least, where the published one runs as well.

        Its gradients are too small for half precision.
        """
        with torch.inference_mode(False):  # else the weights could not be part of a graph
            net = self._read_classifier()
            net.cast(self.net.wide)
            return net.to(next(self.net.parameters()).device)

    def _read_classifier(self) -> Classifier:
        if self.companion is None:
            raise UserError(
                f"guidance of '{self.card.name}' needs its classifier: give its file with "
                "--companion_path, or leave the guidance out"
            )
        tensors, config = read_openai(self.companion)
        if "out.2.c_proj.weight" not in tensors:
            raise UserError(f"{self.companion} is no classifier of guided diffusion")
        # Only the U-Net was ever published with another order of attention.
        base = {**self.card.config, "attention": "legacy", "image_size": self.card.resolution}
        settings = settings_from(tensors, {**base, **config})
        found = settings["in_channels"], settings["out_channels"]
        if found != (self.card.channels, self.card.label_dim):
            raise UserError(
                f"{self.companion} tells {found[1]} classes of {found[0]}-channel images apart "
                f"where '{self.card.name}' has {self.card.label_dim} and {self.card.channels}"
            )
        return filled(lambda: Classifier(**settings), tensors, str(self.companion))


def check_conditions(
    card: Card, net: UNet, labels: Tensor | None, prompts: Sequence[str] | None
) -> None:
    """Raise UserError for prompts, and for labels that are missing, unwanted or out of range."""
    if prompts is not None:
        raise UserError(f"'{card.name}' takes no text: leave the prompts out")
    if labels is not None:
        check_class(card, int(labels.min()))
        check_class(card, int(labels.max()))
    elif net.num_classes:
        raise UserError(
            f"'{card.name}' was trained with classes: give every sample one of 0 to "
            f"{net.num_classes - 1}"
        )


def read_openai(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, and the settings in its metadata if it is a safetensors file that has any.

    Raises UserError for a file that is something else.
    """
    if path.suffix != ".safetensors":
        return read_state_dict(path), {}
    tensors, metadata = read_safetensors(path)
    try:
        config = json.loads(metadata.get("config", "{}"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"the config in the metadata of {path} is {metadata['config']!r}, no JSON dict"
        )
    return tensors, config


def resolved(card: Card, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Card:
    """``card`` for the network in ``tensors``: settings, channels and classes as they are there.

    ``config`` holds settings that come with the file.  What neither says is taken from the card,
    such as the resolution, and the classes that a classifier tells apart for a network without.
    """
    base = {**card.config, "image_size": card.resolution, **config}
    settings = settings_from(tensors, base)
    return replace(
        card,
        resolution=settings["image_size"],
        channels=settings["in_channels"],
        label_dim=settings["num_classes"] or (card.label_dim if card.guidance == "cg" else 0),
        config=settings,
    )


def load_unet(
    card: Card, path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[UNet, Card, str]:
    """The network in a file, its card with the settings found there, and the file's sha256.

    Raises UserError if the file is for other samples or classes than ``card`` says.
    """
    tensors, config = read_openai(path)
    own = resolved(card, tensors, config)
    if (own.shape, own.label_dim) != (card.shape, card.label_dim):
        raise UserError(
            f"{path} is for samples {own.shape} with {own.label_dim} classes where '{card.name}' "
            f"has {card.shape} and {card.label_dim}; choose the dataset it belongs to"
        )
    net = filled(lambda: UNet(**own.config), tensors, str(path))
    net.cast(dtype)
    return net.to(device), own, sha256_file(path)


def load_adm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> ADMModel:
    """Load ``files.main`` and note ``files.companion``; see :func:`registry.load_model`."""
    net, card, digest = load_unet(card, files.main, device, dtype)
    if net.out_channels not in (card.channels, 2 * card.channels):
        raise UserError(
            f"{files.main} predicts {net.out_channels} channels where '{card.name}' needs "
            f"{card.channels}, or twice as many with a learned variance"
        )
    schedule = card.schedule
    if not isinstance(schedule, LinearVP):
        raise UserError(
            f"the noise_schedule on the card of '{card.name}' is {card.noise_schedule}; a model of "
            "this family has one of kind linear_vp"
        )
    return ADMModel(card, digest, net, schedule, files.companion)
