"""Unconditional latent diffusion (Rombach et al. 2022, arXiv:2112.10752): U-Net and first stage.

The network knows ``y = alpha (x0 + sigma n)``, ``alpha = 1 / sqrt(1 + sigma^2)``, at N discrete
steps and predicts the noise ``n``.  Between the steps it is called as published AMED calls all its
latent models: step i, counted from 0, sits at ``t = (i + 1) / N`` of the card's noise schedule, so
the network's time is ``N t - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from checkpoints.weights import filled
from denoisers.cards import Card
from denoisers.conditions import refuse_guidance
from denoisers.families.adm import check_conditions, read_openai
from denoisers.families.first_stage import VQDecoder, load_first_stage
from denoisers.files import Files
from denoisers.nets.openai import UNet, is_openai, settings_from
from denoisers.noise_schedules import DiscreteVP
from runtime.errors import UserError
from runtime.files import sha256_file
from solvers.types import Denoised

NETWORK = "model.diffusion_model."  #: prefixes in a checkpoint
AVERAGE = "model_ema."
FIRST_STAGE = "first_stage_model."
#: The averager sits one level above the network, and its entries have no dots in their names.
AVERAGED = "diffusion_model"
COUNTERS = ("decay", "num_updates")  #: its own


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
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = len(self.schedule.alphas_cumprod)
        times = steps * self.schedule.sigma_inv(sigma.cpu()).reshape(-1).expand(len(x)) - 1
        state, sigma = x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
        eps, feat = self.net(state / (1 + sigma**2).sqrt(), times)
        x0 = state - sigma * eps.to(x.device).to(wide)
        return Denoised(x0.to(x.dtype), feat.to(x.device).to(wide))


@dataclass(frozen=True, eq=False)
class LDMModel:
    """A loaded latent diffusion model."""

    card: Card
    sha256: str  #: of the file that holds the U-Net
    net: UNet
    schedule: DiscreteVP
    first_stage: VQDecoder
    scale_factor: float  #: what latents were multiplied by before training

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> LDMDenoiser:
        """Nothing can be fixed: UserError for labels, guidance or prompts."""
        refuse_guidance(self.card, guidance_rate)
        check_conditions(self.card, self.net, labels, prompts)
        return LDMDenoiser(self.net, self.schedule)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, *card.shape) of any dtype -> images (B, 3, H, W) in [-1, 1], likewise."""
        images = self.first_stage(x / self.scale_factor).clamp(-1, 1)
        return images.to(x.device).to(x.dtype)


def load_ldm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> LDMModel:
    """Load ``files.main``, and the first stage; see :func:`registry.load_model`.

    The first stage is that of ``files.companion`` where there is one, as a person who names a file
    means it, and otherwise the copy inside ``files.main``; the published two are the same weights,
    as the first stage is frozen while the U-Net is trained.  It runs in float32 at least.
    """
    source = str(files.main)
    tensors, config = read_openai(files.main)
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
        sha256_file(files.main),
        net.to(device),
        schedule,
        first_stage.to(torch.promote_types(dtype, torch.float32)).to(device),
        find_scale(tensors, source),
    )


def load_network(
    card: Card, tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str
) -> tuple[UNet, dict[str, Any]]:
    """The U-Net, with the averaged weights if there are any as in published sampling; settings.

    ``config`` holds settings that come with the file; those that neither it nor the tensors tell
    are the card's.
    """
    plain, average = part(tensors, NETWORK), part(tensors, AVERAGE)
    if not is_openai(plain):
        raise UserError(
            f"{source} holds no unconditional U-Net under '{NETWORK}'; give --model_path the "
            "checkpoint of an unconditional latent diffusion model"
        )
    base = {**card.config, "image_size": card.resolution, **config}
    settings = settings_from(plain, base)
    found = tuple(settings[name] for name in ("in_channels", "out_channels", "num_classes"))
    if found != (card.channels, card.channels, None):
        raise UserError(
            f"{source} takes {found[0]} channels, predicts {found[1]} and has {found[2] or 'no'} "
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
        alone, _ = read_openai(files.companion)
        return load_first_stage(part(alone, FIRST_STAGE) or alone, str(files.companion))
    inside = part(tensors, FIRST_STAGE)
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
        raise UserError(f"the card of '{card.name}' lacks a noise_schedule of discrete steps")
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
    """What latents were multiplied by: 1 unless the checkpoint measured it."""
    scale = tensors.get("scale_factor", torch.ones(()))
    if scale.numel() != 1 or not 0 < scale.item() < float("inf"):
        raise UserError(f"{source} has a 'scale_factor' that is no positive number; fetch it again")
    return scale.item()


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
