"""Pipelines with a transformer: which are known, how they are called, and their cards.

A pipeline's own ``__call__`` does everything around its network (`one_step`), so a kind tells no
more than the names of its arguments and the layout of its latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from denoisers.cards import Card
from denoisers.families.diffusers.process import noise_schedule
from denoisers.families.diffusers.sizes import upsampling, whole
from runtime.bounds import MOST_LAYERS, MOST_SIDE
from runtime.errors import UserError

EMBEDDED = 3.5  #: FLUX's own default of the guidance that its network is told
LAST, FIRST = 1e-3, 1 - 1e-3  #: times of an unshifted flow between which samplers work
GIVEN = ("height", "width", "true_cfg_scale")  #: what ``--model_settings`` may tell


@dataclass(frozen=True)
class PipelineKind:
    """How a pipeline is called, as far as pipelines differ."""

    rate: str = "guidance_scale"  #: its argument for the rate of classifier-free guidance
    offset: float = 0.0  #: the usual rate minus its own
    embedded: bool = False  #: its network may be told a scale, beside true guidance
    packed: bool = False  #: latents are sequences of 2x2 patches
    asks: bool = True  #: it asks its scheduler for equal steps from 1 to 1 / N
    side: int | None = None  #: of its latents by default; None if that of its network
    fixed: Mapping[str, Any] = field(default_factory=dict)  #: its other arguments

    def arguments(
        self, card: Card, rate: float | None, prompts: Sequence[str], negative: str | None
    ) -> dict[str, Any]:
        """Prompts and guidance, as this pipeline takes them; all lists are new ones.

        Raises UserError for a rate with which it would leave guidance out without a word.
        """
        others = [negative or ""] * len(prompts)
        said = {"prompt": list(prompts), **self.fixed}
        if self.embedded:
            told = {"guidance_scale": EMBEDDED if rate is None else rate}
            true = card.settings.get("true_cfg_scale")
            guided = {} if true is None else {"true_cfg_scale": true, "negative_prompt": others}
            return {**said, **told, **guided}
        if rate == 0:
            said["prompt"] = others
        elif rate not in (None, 1.0):
            if rate < 1:
                raise UserError(
                    f"--guidance_rate {rate:g} is below 1, where the pipeline of {card.name!r} "
                    "leaves guidance out: give 0, 1 or more"
                )
            return {**said, self.rate: rate - self.offset, "negative_prompt": others}
        return {**said, self.rate: 1 - self.offset}


_EXACT = {"use_resolution_binning": False}  # otherwise sizes are replaced by the nearest listed one
KINDS = {
    "StableDiffusion3Pipeline": PipelineKind(asks=False),
    "FluxPipeline": PipelineKind(embedded=True, packed=True, side=128),
    "ChromaPipeline": PipelineKind(packed=True, side=128),
    "QwenImagePipeline": PipelineKind("true_cfg_scale", packed=True, side=128),
    "ZImagePipeline": PipelineKind(offset=1.0, side=128),
    "SanaPipeline": PipelineKind(asks=False, fixed=_EXACT),
    "PixArtAlphaPipeline": PipelineKind(asks=False, fixed=_EXACT),
    "PixArtSigmaPipeline": PipelineKind(asks=False, fixed=_EXACT),
    "Lumina2Pipeline": PipelineKind(),
}
#: Text encoders of these pipelines.
ENCODERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "Gemma2Model",
    "Gemma2ForCausalLM", "Qwen3Model", "Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration",
)  # fmt: skip


def check_kind(kind: str, source: str) -> None:
    """Raise UserError for a pipeline with a transformer that is not known."""
    if kind not in KINDS:
        raise UserError(
            f"{source}: {kind} is not supported; of those with a transformer, {', '.join(KINDS)} "
            "are"
        )


def transformer_card(
    name: str,
    kind: str,
    network: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    stage: Mapping[str, Any],
    given: Mapping[str, Any],
    source: str,
) -> Card:
    """The card of a pipeline of a known class ``kind`` with these settings of its parts.

    ``given`` are the user's: the size of the images, and FLUX's true guidance.  Raises UserError
    for a setting that is not supported; ``source`` names it.
    """
    pipeline = KINDS[kind]
    factor = upsampling(stage, source)
    patch = _patch(pipeline, network, source)
    side = pipeline.side or whole(network, "sample_size", MOST_SIDE, source)
    settings = _given(given, pipeline, factor * patch, source)
    height = settings.get("height", side * factor) // factor
    width = settings.get("width", side * factor) // factor
    channels = whole(network, "in_channels", MOST_LAYERS, source)
    noise, schedule = noise_schedule(scheduler, source, height * width // patch**2)
    ends = torch.tensor([LAST, FIRST if noise["kind"] == "flow" else 1.0], dtype=torch.float64)
    low, high = schedule.sigma(ends).tolist()
    told = pipeline.embedded and bool(network.get("guidance_embeds"))
    return Card(
        name=name,
        family="diffusers",
        resolution=height,
        width=width,
        channels=channels // 4 if pipeline.packed else channels,
        label_dim=0,
        sigma_min=low,
        sigma_max=high,
        guidance=("embedded" if told else None) if pipeline.embedded else "cfg",
        text=True,
        noise_schedule=noise,
        image_resolution=height * factor,
        config={"pipeline": kind, "scheduler": dict(scheduler)},
        settings=settings,
    )


def _patch(pipeline: PipelineKind, network: Mapping[str, Any], source: str) -> int:
    """Latents along the side of a patch."""
    if pipeline.packed or "patch_size" not in network:
        return 2
    return whole(network, "patch_size", MOST_LAYERS, source)


def _given(
    given: Mapping[str, Any], pipeline: PipelineKind, multiple: int, source: str
) -> dict[str, Any]:
    """The user's settings, if this pipeline has them."""
    for name, value in given.items():
        if name not in GIVEN:
            raise UserError(
                f"--model_settings has {name!r}, and a pipeline takes {', '.join(GIVEN)} alone"
            )
        if name == "true_cfg_scale":
            if not pipeline.embedded:
                raise UserError(
                    f"{source} has guidance of its own: give --guidance_rate in the place of "
                    "true_cfg_scale"
                )
            if type(value) not in (int, float) or not 1 < value <= 1000:
                raise UserError(f"true_cfg_scale {value!r} is no rate above 1: give 4, or leave it")
        elif type(value) is not int or not 0 < value <= MOST_SIDE or value % multiple:
            raise UserError(
                f"{name} {value!r} is no multiple of {multiple} up to {MOST_SIDE} pixels, in which "
                f"{source} makes images"
            )
    return dict(given)
