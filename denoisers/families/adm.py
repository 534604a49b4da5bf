"""ADM: guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233) with classifier guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoints.snapshots import read_weights
from checkpoints.weights import filled
from denoisers.cards import Card
from denoisers.families.common import LoadedModel, check_batch, check_samples, require_labels
from denoisers.nets.openai import Classifier, UNet, settings_from
from denoisers.noise_schedules import LinearVP
from denoisers.precision import widened
from denoisers.protocol import Files
from denoisers.settings import weights_sha256
from runtime.errors import UserError
from runtime.log import note_once
from solvers.types import Denoised

LAST_STEP = 999  #: network time at the end of the process, t = 1


@dataclass(eq=False)
class ADMDenoiser:
    """A network with its classes and guidance bound in: one evaluation per call.

    The classifier does not count towards the cost: it is another, far smaller network, and
    published figures count evaluations of the denoiser alone.
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
        Differentiable in ``x`` and ``sigma``, including the guidance term.
        """
        check_batch(self.labels, x)
        state, sigma = widened(x, sigma)
        spread = (1 + sigma**2).sqrt()
        scaled = state / spread
        times = self.steps(sigma).reshape(-1).expand(len(x))
        raw, feat = self.net(scaled, times, self.labels)
        # Networks with a learned variance have twice the channels; an ODE does not need it.
        eps = raw[:, : x.shape[1]].to(x.device).to(state.dtype)
        if self.rate:
            eps = eps - self.rate * sigma / spread * self.pull(scaled, times)
        x0 = (state - sigma * eps).clamp(-1, 1)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(x.dtype))

    def steps(self, sigma: Tensor) -> Tensor:
        """The network time, 0 to 999: :meth:`LinearVP.sigma_inv` in the dtype of ``sigma``.

        In float32 this form loses digits at small sigma (2e-4 of a step at 0.05), but it is the
        published one, and the difference shows in the fifth digit of the network's output.
        """
        beta_d, beta_min = self.schedule.beta_d, self.schedule.beta_min
        root = (beta_min**2 + 2 * beta_d * (1 + sigma**2).log()).sqrt()
        return LAST_STEP * ((root - beta_min) / beta_d)

    def pull(self, scaled: Tensor, times: Tensor) -> Tensor:
        """The gradient of ``ln p(label | scaled, times)`` in ``scaled`` (B, C, H, W).

        Works under ``no_grad`` and in inference mode.  If gradients are enabled and ``scaled``
        requires them, the result can be differentiated again.
        """
        if torch.is_grad_enabled() and scaled.requires_grad:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                return self._log_gradient(scaled, times, self.labels, again=True)
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors created in inference mode cannot be part of a graph; their clones can.
            labels = None if self.labels is None else self.labels.clone()
            leaf = scaled.detach().clone().requires_grad_()
            return self._log_gradient(leaf, times.detach().clone(), labels, again=False)

    def _log_gradient(
        self, scaled: Tensor, times: Tensor, labels: Tensor | None, again: bool
    ) -> Tensor:
        assert self.classifier is not None and labels is not None  # checked when they were bound
        logs = self.classifier(scaled, times).log_softmax(dim=1)
        chosen = logs.gather(1, labels.to(logs.device)[:, None])
        return torch.autograd.grad(chosen.sum(), scaled, create_graph=again)[0]


@dataclass(frozen=True, eq=False)
class ADMModel(LoadedModel):
    """A loaded ADM; its classifier is read when guidance is first bound."""

    net: UNet
    schedule: LinearVP
    companion: Path | None  #: the classifier's file

    @property
    def network(self) -> nn.Module:
        return self.net

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> ADMDenoiser:
        """A rate of None or 0 means no guidance; a network without classes ignores the labels."""
        require_labels(self.card, labels, self.net.settings.num_classes)
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
        """The classifier of the companion file, on the network's device.

        In float32 at least, as its gradients are too small for half precision; the published one
        runs in float32 as well.
        """
        with torch.inference_mode(False):  # otherwise the weights could not be part of a graph
            net = self._read_classifier()
            net.cast(self.net.wide)
            return net.to(next(self.net.parameters()).device)

    def _read_classifier(self) -> Classifier:
        if self.companion is None:
            raise UserError(
                f"guidance of '{self.card.name}' needs its classifier: give its file with "
                "--companion_path, or leave the guidance out"
            )
        tensors, config = read_weights(self.companion)
        if "out.2.c_proj.weight" not in tensors:
            raise UserError(
                f"{self.companion} is no classifier of guided diffusion; give another "
                "--companion_path"
            )
        # Only U-Nets were published with another order of attention.
        base = {**self.card.config, "attention": "legacy", "image_size": self.card.resolution}
        settings = settings_from(tensors, {**base, **config})
        if self.card.url is None and not {"num_heads", "num_head_channels"} & set(config):
            note_once(
                f"note: {self.companion.name} does not tell its attention heads: taken are those "
                "of the network (a safetensors file may tell them, docs/models.md)"
            )
        channels, classes = settings["in_channels"], settings["out_channels"]
        if (channels, classes) != (self.card.channels, self.card.label_dim):
            raise UserError(
                f"{self.companion} tells {classes} classes of {channels}-channel images apart "
                f"where '{self.card.name}' has {self.card.label_dim} and {self.card.channels}; "
                "give another --companion_path"
            )
        return filled(lambda: Classifier(**settings), tensors, str(self.companion))


def resolved(card: Card, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Card:
    """``card`` with settings, channels and classes as in the network that ``tensors`` hold.

    ``config`` are settings stored in the same file.  What neither determines is taken from the
    card: the resolution and, for a network without classes, those of its classifier.
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
    """The network in a file, its card with the settings of the file, and the file's sha256.

    Raises UserError if the file is for other samples or classes than ``card``.
    """
    tensors, config = read_weights(path)
    own = resolved(card, tensors, config)
    check_samples(own, card, path)
    net = filled(lambda: UNet(**own.config), tensors, str(path))
    net.cast(dtype)
    return net.to(device), own, weights_sha256(path, card.settings)


def load_adm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> ADMModel:
    """Load ``files.main``; ``files.companion`` is read later; see :func:`registry.load_model`."""
    net, card, digest = load_unet(card, files.main, device, dtype)
    if net.settings.out_channels not in (card.channels, 2 * card.channels):
        raise UserError(
            f"{files.main} predicts {net.settings.out_channels} channels where '{card.name}' needs "
            f"{card.channels}, or twice as many with a learned variance"
        )
    schedule = card.schedule
    if not isinstance(schedule, LinearVP):
        raise UserError(
            f"the noise_schedule on the card of '{card.name}' is {card.noise_schedule}; a model of "
            "this family has one of kind linear_vp"
        )
    return ADMModel(card, digest, net, schedule, files.companion)
