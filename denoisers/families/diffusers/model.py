"""Any pipeline of ``diffusers`` whose U-Net predicts noise, velocity or the image.

Such a network was trained on ``y = alpha (x0 + sigma n)``, ``alpha = 1 / sqrt(1 + sigma^2)``, at
discrete steps.  Its input is ``x`` scaled by ``alpha`` and the step for ``sigma``, and its output
is converted to ``x0`` (arXiv:2206.00927, section 2; v: arXiv:2202.00512, appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.families.common import check_batch
from denoisers.families.diffusers.files import (
    WEIGHTED,
    first_stage,
    pipeline_card,
)
from denoisers.families.diffusers.process import Prediction
from denoisers.families.diffusers.prompts import PromptedModel
from denoisers.nets.layers import channel_mean
from denoisers.precision import widened
from solvers.types import Denoised

DECODE_BATCH = 8  #: latents decoded at a time: images are 48 times as large


class Bottleneck:
    """The channel mean of a U-Net's mid block, recorded by a hook until :meth:`remove`."""

    def __init__(self, unet: Any) -> None:
        self._mean: Tensor | None = None
        middle = unet.mid_block  # some distilled models have none
        self._hook = None if middle is None else middle.register_forward_hook(self._read)

    def remove(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()

    def _read(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._mean = channel_mean(output)

    def take(self, rows: int) -> Tensor | None:
        """The mean of the last ``rows`` of the last call, (rows, h, w); None without a mid block.

        Under classifier-free guidance the conditional half comes last, so this is its mean.  It is
        not documented which half the published AMED predictors of Stable Diffusion were trained on.
        """
        mean, self._mean = self._mean, None
        return None if mean is None else mean[-rows:]


@dataclass(eq=False)
class PipelineDenoiser:
    """A network with prompts and guidance bound in.

    With guidance, both halves are evaluated in one batch, the unconditional one first.
    """

    model: DiffusersModel
    guidance_rate: float | None
    condition: Mapping[str, Any]  #: arguments of the network besides image and time

    @property
    def cost(self) -> int:
        return self.model.card.cost(self.guidance_rate)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype."""
        unet, prediction = self.model.pipe.unet, self.model.prediction
        batch, halves = len(x), self.cost
        embedding = self.condition.get("encoder_hidden_states")
        check_batch(embedding, x, "prompts", copies=halves)
        state, level = widened(x, sigma)
        time = prediction.network_time(sigma).to(state.dtype).to(unet.device)
        inputs = prediction.scale(state, level).to(unet.dtype).to(unet.device)
        raw = unet(
            inputs.repeat(halves, 1, 1, 1),
            time.expand(batch).repeat(halves),
            **self.condition,
            return_dict=False,
        )[0]
        raw = raw.to(x.device).to(state.dtype)
        if halves == 2:
            without, guided = raw.chunk(2)
            raw = without + self.guidance_rate * (guided - without)
        feat = self.model.bottleneck.take(batch)
        x0 = prediction.x0(state, level, raw).to(x.dtype)
        return Denoised(x0, None if feat is None else feat.to(x.device).to(state.dtype))


@dataclass(frozen=True, eq=False)
class DiffusersModel(PromptedModel):
    """A loaded pipeline."""

    pipe: Any  #: a ``DiffusionPipeline``; of its scheduler only the settings are used
    prediction: Prediction
    bottleneck: Bottleneck

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> PipelineDenoiser:
        """With rate None or 1 the conditional prediction alone, with 0 the unconditional one."""
        if prompts is None:
            return PipelineDenoiser(self, None, {})
        return PipelineDenoiser(self, guidance_rate, self._encode(list(prompts), guidance_rate))

    @torch.no_grad()
    def _encode(self, prompts: list[str], rate: float | None) -> dict[str, Any]:
        """Text embeddings: of the empty prompt, of the prompts, or of both in this order.

        The pipeline's own encoder embeds the empty prompt: Stable Diffusion encodes it as text,
        SDXL uses zeros.
        """
        unet = self.pipe.unet
        encoded = self.pipe.encode_prompt(
            prompt=prompts,
            negative_prompt=None if self.negative is None else [self.negative] * len(prompts),
            device=unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=rate not in (None, 1.0),
        )
        chosen = slice(0, 1) if rate in (None, 1.0) else slice(1, 2) if rate == 0 else slice(None)
        positive_last = [encoded[i : i + 2][chosen][::-1] for i in range(0, len(encoded), 2)]
        embeddings = [torch.cat(parts).to(unet.dtype) for parts in positive_last]
        condition: dict[str, Any] = {"encoder_hidden_states": embeddings[0]}
        if unet.config.addition_embed_type == "text_time":  # SDXL: original size, crop, target size
            side = self.card.image_resolution
            times = embeddings[0].new_tensor([[side, side, 0, 0, side, side]])
            condition["added_cond_kwargs"] = {
                "text_embeds": embeddings[1],
                "time_ids": times.expand(len(embeddings[1]), -1),
            }
        return condition

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Final states (B, *card.shape) -> images (B, C, H, W) in [-1, 1], a few at a time."""
        stage = first_stage(self.pipe.components)
        if stage is None:
            return x
        vae = self.pipe.components[stage]
        shift = vae.config.get("shift_factor") or 0.0
        images = [
            vae.decode(part.to(vae.device).to(vae.dtype), return_dict=False)[0].clamp(-1, 1)
            for part in (x / vae.config.scaling_factor + shift).split(DECODE_BATCH)
        ]
        return torch.cat(images).to(x.device).to(x.dtype)


def from_pipeline(pipe: Any, card: Card | None = None, sha256: str = "") -> DiffusersModel:
    """A model from a pipeline in memory, with its device and dtype.

    Its weights no longer require gradients.  Without a ``card`` one is built from its settings.
    """
    source = type(pipe).__name__
    if card is None:
        parts = {name: type(part).__name__ for name, part in pipe.components.items() if part}
        stage = first_stage(parts)
        card = pipeline_card(
            source,
            parts,
            pipe.unet.config,
            pipe.scheduler.config,
            pipe.components[stage].config if stage else {},
            source,
        )
    for name, part in pipe.components.items():
        if name in WEIGHTED and part is not None:
            part.eval().requires_grad_(False)
    prediction = Prediction.of(pipe.scheduler.config, source)
    return DiffusersModel(card, sha256, pipe, prediction, Bottleneck(pipe.unet))
