"""Tiny random pipelines of ``diffusers``, made in a second: folders in the published formats.

All weights are drawn anew, so that layers which start at zero matter as well.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Of Stable Diffusion v1, as its ``scheduler_config.json`` says it.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
WIDTH = 16  #: of the text embedding
TOKENS = 12  #: in a prompt, the two ends included


def randomise(module: nn.Module, seed: int) -> None:
    """Draw all weights: matrices that keep the scale of their input, vectors near their start."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.add_(0.2 * noise)


def tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows the letters and nothing longer."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(projection: bool = False, seed: int = 1) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=190,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    model = getattr(transformers, name)(config)
    randomise(model, seed)
    return model.eval()


def unet(**settings: Any) -> Any:
    """A conditional U-Net on 4 x 8 x 8 latents, or with other ``settings``."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **settings,
        }
    )
    randomise(model, 2)
    return model.eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
    )
    randomise(model, 3)
    return model.eval()


def stable_diffusion(folder: Path, **scheduler: Any) -> Path:
    """Save a pipeline like Stable Diffusion v1 into ``folder``: 4 x 8 x 8 latents, 16 x 16 images.

    ``scheduler`` replaces entries of the scheduler's settings.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder / "tokenizer"),
        unet=unet(),
        scheduler=DDIMScheduler(**{**SCHEDULER, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    import sys

    logging.disable()
    print(stable_diffusion(Path(sys.argv[1])))
