"""Any pipeline of ``diffusers`` whose U-Net predicts noise, velocity or the image.

Such a network was trained on ``y = alpha (x0 + sigma n)``, ``alpha = 1 / sqrt(1 + sigma^2)``, at
discrete steps; the adapter gives it ``x`` scaled by ``alpha`` and the step that belongs to
``sigma``, and turns what it says into ``x0`` (arXiv:2206.00927, section 2; v: arXiv:2202.00512,
appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.conditions import refuse_guidance
from denoisers.families.diffusers.files import WEIGHTED, describe, first_stage, noise_schedule
from denoisers.noise_schedules import DiscreteVP
from runtime.errors import UserError
from solvers.types import Denoised

DECODE_BATCH = 8  #: latents decoded at a time: images are 48 times as large


@dataclass(frozen=True)
class Prediction:
    """What a network is told of ``sigma``, and what its output means."""

    schedule: DiscreteVP
    kind: str  #: epsilon, v_prediction or sample
    clip: float | None  #: where the pipeline's own sampler cuts ``x0`` off

    @classmethod
    def of(cls, scheduler: Mapping[str, Any], source: str) -> Prediction:
        """From a scheduler's settings; UserError for a process of another kind."""
        _, schedule = noise_schedule(scheduler, source)
        clip = scheduler.get("clip_sample_range", 1.0) if scheduler.get("clip_sample") else None
        kind = scheduler.get("prediction_type", "epsilon")
        return cls(schedule, kind, clip)

    def network_time(self, sigma: Tensor) -> Tensor:
        """The step, a real number: ``N t - 1`` with t in (0, 1], float64 on the CPU, flat."""
        count = len(self.schedule.alphas_cumprod)
        return count * self.schedule.sigma_inv(sigma.cpu()).reshape(-1) - 1

    def scale(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The network's input: ``x`` with unit variance."""
        return x / (1 + sigma**2).sqrt()

    def x0(self, x: Tensor, sigma: Tensor, raw: Tensor) -> Tensor:
        """The clean image from the network's output ``raw``."""
        if self.kind == "epsilon":
            x0 = x - sigma * raw
        elif self.kind == "v_prediction":
            x0 = (x - sigma * (1 + sigma**2).sqrt() * raw) / (1 + sigma**2)
        else:
            x0 = raw
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


class Bottleneck:
    """Reads the channel mean of a U-Net's mid block, through a hook that stays on it."""

    def __init__(self, unet: Any) -> None:
        self._mean: Tensor | None = None
        middle = unet.mid_block  # some distilled models have none
        self._hook = None if middle is None else middle.register_forward_hook(self._read)

    def remove(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()

    def _read(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._mean = output.mean(1, dtype=torch.promote_types(output.dtype, torch.float32))

    def take(self, rows: int) -> Tensor | None:
        """The mean of the last ``rows`` of the last call, (rows, h, w); None without a mid block.

        Under classifier-free guidance the conditional half comes last, so this is its mean.  Which
        half the published AMED predictors of Stable Diffusion saw is not on record here.
        """
        mean, self._mean = self._mean, None
        return None if mean is None else mean[-rows:]


@dataclass(eq=False)
class PipelineDenoiser:
    """A network with prompts and guidance bound in.

    Under guidance both halves go through the network in one batch, the one without text first.
    """

    model: DiffusersModel
    guidance_rate: float | None
    condition: Mapping[str, Any]  #: what the network takes besides image and time

    @property
    def cost(self) -> int:
        return self.model.card.cost(self.guidance_rate)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype."""
        unet, prediction = self.model.pipe.unet, self.model.prediction
        batch, halves = len(x), self.cost
        embedding = self.condition.get("encoder_hidden_states")
        if embedding is not None and len(embedding) != batch * halves:
            raise ValueError(
                f"{len(embedding) // halves} prompts are bound but the batch has {batch}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        time = prediction.network_time(sigma).to(wide).to(unet.device)
        state, sigma = x.to(wide), sigma.to(wide).to(x.device)  # cast first: MPS has no float64
        inputs = prediction.scale(state, sigma).to(unet.dtype).to(unet.device)
        raw = unet(
            inputs.repeat(halves, 1, 1, 1),
            time.expand(batch).repeat(halves),
            **self.condition,
            return_dict=False,
        )[0]
        raw = raw.to(x.device).to(wide)
        if halves == 2:
            without, guided = raw.chunk(2)
            raw = without + self.guidance_rate * (guided - without)
        feat = self.model.bottleneck.take(batch)
        x0 = prediction.x0(state, sigma, raw).to(x.dtype)
        return Denoised(x0, None if feat is None else feat.to(x.device).to(wide))


@dataclass(frozen=True, eq=False)
class DiffusersModel:
    """A loaded pipeline."""

    card: Card
    sha256: str  #: of the weights that were loaded
    pipe: Any  #: a ``DiffusionPipeline``; its scheduler only gave its settings
    prediction: Prediction
    bottleneck: Bottleneck

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> PipelineDenoiser:
        """Fix the prompts, one per image, and the rate of classifier-free guidance.

        No rate or 1 is the conditional prediction alone, 0 the unconditional one alone; the images
        of a text model without prompts get the empty one.  Raises UserError for what the pipeline
        does not take.
        """
        name = self.card.name
        if labels is not None:
            raise UserError(f"'{name}' has no classes; leave the class out")
        if not self.card.text:
            if prompts is not None:
                raise UserError(f"'{name}' takes no text; leave the prompts out")
            refuse_guidance(self.card, guidance_rate)
            return PipelineDenoiser(self, None, {})
        if prompts is None:
            raise UserError(f"'{name}' is conditioned on text; give --prompt or --prompt_path")
        return PipelineDenoiser(self, guidance_rate, self._encode(list(prompts), guidance_rate))

    @torch.no_grad()
    def _encode(self, prompts: list[str], rate: float | None) -> dict[str, Any]:
        """Text embeddings: of the empty prompt, of the prompts, or of both in this order.

        The pipeline's own encoder decides what "empty" is: Stable Diffusion encodes it, SDXL
        takes zeros.
        """
        unet = self.pipe.unet
        found = self.pipe.encode_prompt(
            prompt=prompts,
            device=unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=rate not in (None, 1.0),
        )
        chosen = slice(0, 1) if rate in (None, 1.0) else slice(1, 2) if rate == 0 else slice(None)
        positive_last = [found[i : i + 2][chosen][::-1] for i in range(0, len(found), 2)]
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
    """A model from a pipeline that is already in memory, where and in the dtype that it is.

    Its weights stop requiring gradients.  Without a ``card`` one is made from its settings.
    """
    source = type(pipe).__name__
    if card is None:
        parts = {name: type(part).__name__ for name, part in pipe.components.items() if part}
        stage = first_stage(parts)
        facts = describe(
            parts,
            pipe.unet.config,
            pipe.scheduler.config,
            pipe.components[stage].config if stage else {},
            source,
        )
        card = Card(name=source, file="", url=None, sha256=None, **facts)
    for name, part in pipe.components.items():
        if name in WEIGHTED and part is not None:
            part.eval().requires_grad_(False)
    prediction = Prediction.of(pipe.scheduler.config, source)
    return DiffusersModel(card, sha256, pipe, prediction, Bottleneck(pipe.unet))
