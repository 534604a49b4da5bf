"""Unconditional latent diffusion (Rombach et al. 2022, arXiv:2112.10752): U-Net and first stage.

The network was trained on ``y = alpha (x0 + sigma n)``, ``alpha = 1 / sqrt(1 + sigma^2)``, at N
discrete steps, and predicts the noise ``n``.  Between the steps it is evaluated as published AMED
does for all latent models: step i, counted from 0, is at ``t = (i + 1) / N`` of the card's noise
schedule, so the network time is ``N t - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.snapshots import read_weights
from checkpoints.weights import filled, under
from denoisers.cards import Card
from denoisers.families.common import LoadedModel
from denoisers.families.first_stage import VQDecoder, load_first_stage
from denoisers.nets.openai import UNet, is_openai, settings_from
from denoisers.noise_schedules import DiscreteVP
from denoisers.precision import wide_dtype, widened
from denoisers.protocol import Files
from denoisers.settings import weights_sha256
from runtime.errors import UserError
from solvers.types import Denoised

NETWORK = "model.diffusion_model."  #: prefixes in a checkpoint
AVERAGE = "model_ema."
FIRST_STAGE = "first_stage_model."
#: Averaged weights belong to the module above the network, and their names have no dots.
AVERAGED = "diffusion_model"
COUNTERS = ("decay", "num_updates")  #: other entries of the average


@dataclass(eq=False)
class LDMDenoiser:
    """One evaluation of the U-Net per call, on latents."""

    net: UNet
    schedule: DiscreteVP
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype.

        ``D = x - sigma eps(x / sqrt(1 + sigma^2); N t(sigma) - 1)``; the feature is the channel
        mean of the middle block, in float32 at least.
        """
        times = self.schedule.network_time(sigma).expand(len(x))
        state, sigma = widened(x, sigma)
        eps, feat = self.net(self.schedule.own_state(state, sigma), times)
        x0 = state - sigma * eps.to(x.device).to(state.dtype)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(state.dtype))


@dataclass(frozen=True, eq=False)
class LDMModel(LoadedModel):
    """A loaded latent diffusion model, which takes no conditions."""

    net: UNet
    schedule: DiscreteVP
    first_stage: VQDecoder
    scale_factor: float  #: what latents were multiplied by before training

    @property
    def network(self) -> nn.Module:
        return self.net

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> LDMDenoiser:
        return LDMDenoiser(self.net, self.schedule)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, *card.shape) -> images (B, 3, H, W) in [-1, 1], in the dtype of ``x``."""
        images = self.first_stage(x / self.scale_factor).clamp(-1, 1)
        return images.to(x.device).to(x.dtype)


def load_ldm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> LDMModel:
    """Load ``files.main``, and the first stage; see :func:`registry.load_model`.

    The first stage is that of ``files.companion`` if there is one, as it was given explicitly, and
    otherwise the copy inside ``files.main``; the published two are the same weights, since the
    first stage is frozen while the U-Net is trained.  It runs in float32 at least.
    """
    source = str(files.main)
    tensors, config = read_weights(files.main)
    schedule = check_schedule(card, tensors, source)
    net, settings = load_network(card, tensors, config, source)
    first_stage = find_first_stage(tensors, files)
    side = card.resolution * first_stage.factor
    if first_stage.embed_dim != card.channels or card.image_resolution not in (None, side):
        raise UserError(
            f"the first stage in {files.companion or source} turns {first_stage.embed_dim} "
            f"channels into {side}x{side} pixels where '{card.name}' has {card.channels} "
            f"channels and {card.image_resolution} pixels; give the one it was trained on"
        )
    net.cast(dtype)
    return LDMModel(
        replace(card, image_resolution=side, config=settings),
        weights_sha256(files.main, card.settings),
        net.to(device),
        schedule,
        first_stage.to(wide_dtype(dtype)).to(device),
        find_scale(tensors, source),
    )


def load_network(
    card: Card, tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> tuple[UNet, dict[str, Any]]:
    """The U-Net and its settings; with the averaged weights, if any, as in published sampling.

    ``config`` are settings stored in the same file.  What neither they nor the tensors determine
    is taken from the card.
    """
    plain, average = under(NETWORK, tensors), under(AVERAGE, tensors)
    if not is_openai(plain):
        raise UserError(
            f"{source} holds no unconditional U-Net under '{NETWORK}'; give --model_path the "
            "checkpoint of an unconditional latent diffusion model"
        )
    base = {**card.config, "image_size": card.resolution, **config}
    settings = settings_from(plain, base)
    inputs, outputs, classes = (
        settings[name] for name in ("in_channels", "out_channels", "num_classes")
    )
    if (inputs, outputs, classes) != (card.channels, card.channels, None):
        raise UserError(
            f"{source} takes {inputs} channels, predicts {outputs} and has {classes or 'no'} "
            f"classes where '{card.name}' has {card.channels} channels and no classes; choose the "
            "dataset it belongs to"
        )
    dotted = {AVERAGED + name.replace(".", ""): name for name in plain}
    average = {dotted.get(k, k): v for k, v in average.items() if k not in COUNTERS}
    where = f"{source} ('{AVERAGE if average else NETWORK}')"
    return filled(lambda: UNet(**settings), average or plain, where), settings


def find_first_stage(tensors: Mapping[str, Tensor], files: Files) -> VQDecoder:
    """From the companion file, with or without prefix, or from the model's own ``tensors``."""
    if files.companion is not None:
        alone, _ = read_weights(files.companion)
        return load_first_stage(under(FIRST_STAGE, alone) or alone, str(files.companion))
    inside = under(FIRST_STAGE, tensors)
    if not inside:
        raise UserError(
            f"{files.main} holds no first stage ('{FIRST_STAGE}'), so its latents cannot be "
            "decoded: give the file of one with --companion_path"
        )
    return load_first_stage(inside, f"{files.main} ('{FIRST_STAGE}')")


def check_schedule(card: Card, tensors: Mapping[str, Tensor], source: str) -> DiscreteVP:
    """The card's schedule; UserError if the checkpoint was trained on another."""
    schedule = card.schedule
    if not isinstance(schedule, DiscreteVP):
        raise UserError(
            f"the card of '{card.name}' lacks a noise_schedule of discrete steps; add one of kind "
            "discrete_vp"
        )
    own, known = tensors.get("alphas_cumprod"), schedule.alphas_cumprod
    if own is not None and not (
        own.shape == known.shape and torch.allclose(own.to(known), known, rtol=1e-3, atol=0)
    ):
        raise UserError(
            f"{source} was trained on other noise levels ('alphas_cumprod') than those of "
            f"'{card.name}'; choose the dataset it belongs to"
        )
    return schedule


def find_scale(tensors: Mapping[str, Tensor], source: str) -> float:
    """What latents were multiplied by: 1 unless the checkpoint stores a measured factor."""
    scale = tensors.get("scale_factor", torch.ones(()))
    if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
        raise UserError(f"{source} has a 'scale_factor' that is no positive number; fetch it again")
    return scale.item()
