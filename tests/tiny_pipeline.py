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
    for name, weight in module.named_parameters():
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:  # the weights of norms lie around 1
                weight.copy_(0.2 * noise + float(name.endswith("weight")))


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
    """Save a pipeline like Stable Diffusion v1 into ``folder``: images are twice the latents.

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
    return save(pipe, folder)


def stable_diffusion_xl(folder: Path) -> Path:
    """Two text encoders, and the sizes of the image as conditions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True, seed=4),
        tokenizer=tokenizer(folder / "tokenizer"),
        tokenizer_2=tokenizer(folder / "tokenizer_2"),
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        ),
        add_watermarker=False,
    )
    return save(pipe, folder)


def unconditional_unet(channels: int) -> Any:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    randomise(model, 5)
    return model.eval()


def unconditional(folder: Path) -> Path:
    """A DDPM on 3 x 8 x 8 images, which its own sampler clips to [-1, 1]."""
    from diffusers import DDPMPipeline, DDPMScheduler

    return save(DDPMPipeline(unconditional_unet(3), DDPMScheduler()), folder)


def latent_unconditional(folder: Path) -> Path:
    """A U-Net without text on the 3 x 8 x 8 latents of a VQ model."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    stage = VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=4,
    )
    randomise(stage, 6)
    pipe = LDMPipeline(stage.eval(), unconditional_unet(3), DDIMScheduler(**SCHEDULER))
    return save(pipe, folder)


def save(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


def single_file(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights of a ``stable_diffusion`` under the names of the original checkpoints."""
    names = {"unet": _ldm_unet, "vae": _ldm_vae, "text_encoder": _ldm_text}
    out = {}
    for part, rename in names.items():
        for key, value in getattr(pipe, part).state_dict().items():
            name = rename(key)
            if part == "vae" and ".attn_1." in name and value.ndim == 2:
                value = value[:, :, None, None]  # 1x1 convolutions there
            out[name] = value.detach().clone()
    return out


def _replace(key: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        key = key.replace(new, old)
    return key


def _ldm_unet(key: str) -> str:
    """Blocks are numbered through: one residual block and one change of size per level."""
    head, *rest = key.split(".")
    tail = ".".join(rest[3:])
    if head in ("down_blocks", "up_blocks"):
        level, kind, number = int(rest[0]), rest[1], int(rest[2])
        if head == "down_blocks":
            at = 1 + 2 * level + number + (kind == "downsamplers")
            place = f"input_blocks.{at}.{int(kind == 'attentions')}"
            tail = tail.replace("conv.", "op.") if kind == "downsamplers" else tail
        else:
            last = kind == "upsamplers"  # after the attention of the level, if it has one
            at = 2 * level + number + last
            place = f"output_blocks.{at}.{2 if last else int(kind == 'attentions')}"
        key = f"{place}.{tail}"
    elif head == "mid_block":
        key = f"middle_block.{1 if rest[0] == 'attentions' else 2 * int(rest[1])}."
        key += ".".join(rest[2:])
    else:
        tops = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
        tops |= {
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
        }
        return "model.diffusion_model." + _replace(key, tops)
    resnet = {"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0."}
    resnet |= {"conv2.": "out_layers.3.", "time_emb_proj": "emb_layers.1"}
    resnet["conv_shortcut"] = "skip_connection"
    attention = "transformer_blocks" in key
    return "model.diffusion_model." + (key if attention else _replace(key, resnet))


def _ldm_vae(key: str) -> str:
    head, *rest = key.split(".")
    if rest[0] == "up_blocks":
        rest[1] = str(1 - int(rest[1]))  # two levels, counted from the other end
    table = {
        "down_blocks": "down",
        "up_blocks": "up",
        "resnets": "block",
        "conv_norm_out": "norm_out",
    }
    table |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    table |= {"conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1"}
    table |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    table |= {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    order = sorted(table, key=len, reverse=True)  # "mid_block.resnets" before "resnets"
    return "first_stage_model." + _replace(".".join([head, *rest]), {k: table[k] for k in order})


def _ldm_text(key: str) -> str:
    return "cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")


if __name__ == "__main__":
    import sys

    logging.disable()
    print(stable_diffusion(Path(sys.argv[1])))
