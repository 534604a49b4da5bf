"""Pipelines of ``diffusers`` with a transformer, as denoisers.

How latents are packed, times are scaled, prompts are embedded and guidance is mixed differs from
pipeline to pipeline.  All of it is in the pipeline's own ``__call__``, so that is what a denoiser
calls: for one step, with a scheduler that keeps the guided prediction.  Decoding is the same call
for no step at all.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.families.diffusers.kinds import KINDS, PipelineKind
from denoisers.families.diffusers.process import Prediction
from denoisers.families.diffusers.prompts import PromptedModel, RememberedPrompts
from denoisers.precision import wide_dtype, widened
from solvers.types import Denoised


class OneStep:
    """In the place of a pipeline's scheduler: steps at ``times``, keeping the last prediction."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], times: Tensor) -> None:
        self.config, self.timesteps = config, times
        self.output: Tensor | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | None = None,
        sigmas: object = None,
        mu: object = None,
    ) -> None:
        """The times are fixed; what a pipeline asks for is of no effect."""
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Of no effect."""

    def scale_model_input(self, sample: Tensor, timestep: object = None) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: object, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Keep the prediction; the state stays as it is, in the dtype that Z-Image checks for."""
        self.output = model_output
        return sample.float(), sample.float()


@dataclass(eq=False)
class StepDenoiser:
    """A pipeline with prompts and guidance bound in."""

    model: TransformerModel
    prompts: Sequence[str]
    guidance_rate: float | None

    @property
    def cost(self) -> int:
        return self.model.card.cost(self.guidance_rate)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype.

        A pipeline has one time for a batch, so samples at different levels are evaluated one by
        one.  There are no bottleneck features.
        """
        if len(self.prompts) != len(x):
            raise ValueError(f"{len(self.prompts)} prompts are bound but the batch has {len(x)}")
        state, level = widened(x, sigma)
        if bool((level == level.flatten()[0]).all()):
            x0 = self._x0(state, level.flatten()[0], self.prompts)
        else:
            rows = zip(state.split(1), level.flatten(), self.prompts, strict=True)
            x0 = torch.cat([self._x0(one, at, [prompt]) for one, at, prompt in rows])
        return Denoised(x0.to(x.dtype), None)

    def _x0(self, state: Tensor, level: Tensor, prompts: Sequence[str]) -> Tensor:
        model = self.model
        own = model.prediction.scale(state, level)
        time = model.prediction.network_time(level)
        said = model.kind.arguments(model.card, self.guidance_rate, prompts, model.negative)
        raw = model.predict(own, time, said)
        return model.prediction.x0(state, level, raw.to(state.device, state.dtype))


@dataclass(frozen=True, eq=False)
class TransformerModel(PromptedModel):
    """A loaded pipeline."""

    pipe: Any  #: a ``DiffusionPipeline``; of its scheduler only the settings are used
    kind: PipelineKind
    prediction: Prediction
    encode: RememberedPrompts  #: the pipeline's ``encode_prompt``

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> StepDenoiser:
        assert prompts is not None
        self.kind.arguments(self.card, guidance_rate, prompts, self.negative)  # or a sentence
        return StepDenoiser(self, list(prompts), guidance_rate)

    def predict(self, own: Tensor, time: Tensor, said: Mapping[str, Any]) -> Tensor:
        """What the network, guided, predicts for states of its own process at one time, (1,).

        Gradients reach ``own`` and ``time``.
        """
        network = self.pipe.transformer
        scheduler = OneStep(self.pipe.scheduler.config, time.to(wide_dtype(network.dtype)))
        latents = own.to(network.device, network.dtype)
        self._call(scheduler, self.encode, self._packed(latents), said, "latent")
        assert scheduler.output is not None
        return self._unpacked(scheduler.output).reshape(own.shape)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Final states (B, *card.shape) -> images (B, C, H, W) in [-1, 1], one at a time."""
        stage = self.pipe.vae
        encode = functools.partial(self.encode, in_dtype=stage.dtype)
        images = []
        for latent in x.to(stage.device, stage.dtype).split(1):
            scheduler = OneStep(self.pipe.scheduler.config, torch.zeros(0))
            said = self.kind.arguments(self.card, None, [""], None)
            image = self._call(scheduler, encode, self._packed(latent), said, "pt")
            images.append(2 * image - 1)
        return torch.cat(images).to(x.device, x.dtype)

    def _call(
        self,
        scheduler: OneStep,
        encode: Callable[..., Any],
        latents: Tensor,
        said: Mapping[str, Any],
        output: str,
    ) -> Tensor:
        """The pipeline's own ``__call__``, without its ``no_grad``, on a copy that shares parts."""
        pipe = copy.copy(self.pipe)
        vars(pipe).update(
            scheduler=scheduler,
            encode_prompt=encode,
            maybe_free_model_hooks=lambda: None,
            _progress_bar_config={"disable": True},
        )
        height, width = self.image_size
        images: tuple[Tensor] = inspect.unwrap(type(pipe).__call__)(
            pipe,
            **said,
            height=height,
            width=width,
            latents=latents,
            num_inference_steps=2,  # of which PixArt treats a single one in another way
            output_type=output,
            return_dict=False,
        )
        return images[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        _, height, width = self.card.shape
        assert self.card.image_resolution is not None
        factor = self.card.image_resolution // height
        return height * factor, width * factor

    def _packed(self, latents: Tensor) -> Tensor:
        if not self.kind.packed:
            return latents
        packed: Tensor = self.pipe._pack_latents(latents, len(latents), *self.card.shape)
        return packed

    def _unpacked(self, latents: Tensor) -> Tensor:
        if not self.kind.packed:
            return latents
        unpacked: Tensor = self.pipe._unpack_latents(
            latents, *self.image_size, self.pipe.vae_scale_factor
        )
        return unpacked


def from_transformer_pipeline(pipe: Any, card: Card, sha256: str = "") -> TransformerModel:
    """A model from a pipeline in memory; its weights no longer require gradients."""
    source = type(pipe).__name__
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    prediction = Prediction.of(pipe.scheduler.config, source)
    return TransformerModel(
        card, sha256, pipe, KINDS[source], prediction, RememberedPrompts(pipe.encode_prompt)
    )
