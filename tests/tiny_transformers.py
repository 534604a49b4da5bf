"""Tiny random pipelines of ``diffusers`` with a transformer, made in a second each.

Text encoders and tokenizers are those of the published pipelines in kind, with two layers and a
vocabulary of characters.  All weights are drawn anew, so that layers which start at zero matter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny_pipeline import WIDTH, randomise, text_encoder, tokenizer

CHANNELS = 4  #: of the latents
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
FLOW = {"shift": 3.0}
#: Shifts that depend on the number of image tokens, as FLUX.1-dev and Qwen-Image have them.
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def characters(length: int = 40) -> Any:
    """A tokenizer whose words are characters, with an end of text and a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", "<s>"])}
    vocabulary |= {chr(c): len(vocabulary) + c - 10 for c in range(10, 127)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        bos_token="<s>", model_max_length=length, chat_template=CHAT,
    )  # fmt: skip


def drawn(kind: Any, config: Any, seed: int = 3) -> Any:
    model = kind(config)
    randomise(model, seed)
    return model.eval()


def t5(width: int = WIDTH) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=2
    )
    return drawn(T5EncoderModel, config)


#: Of a small decoder, under the names that its kinds share.
DECODER = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return drawn(Gemma2Model, Gemma2Config(**DECODER))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    return drawn(Qwen3Model, Qwen3Config(**DECODER))


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {k: v for k, v in DECODER.items() if k != "head_dim"} | {"rope_parameters": rope}
    vision = {
        "depth": 1, "hidden_size": WIDTH, "num_heads": 2, "intermediate_size": 2 * WIDTH,
        "out_hidden_size": WIDTH,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return drawn(Qwen2_5_VLForConditionalGeneration, config)


def vae(**settings: Any) -> Any:
    """Twice the size of the latents in pixels."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": CHANNELS,
            "norm_num_groups": 4,
            "sample_size": 16,
            "scaling_factor": 0.4,
            "shift_factor": 0.1,
            **settings,
        }
    )
    randomise(model, 4)
    return model.eval()


def flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{**FLOW, **settings})


def network(kind: str, **settings: Any) -> Any:
    import diffusers

    model = getattr(diffusers, kind)(**settings)
    randomise(model, 5)
    return model.eval()


def sd3(**scheduler: Any) -> Any:
    from diffusers import StableDiffusion3Pipeline

    transformer = network(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=CHANNELS, num_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=CHANNELS,
        pos_embed_max_size=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
        return StableDiffusion3Pipeline(
            transformer, flow(**scheduler), vae(), text_encoder(True), words,
            text_encoder(True, seed=6), words, t5(2 * WIDTH), characters(),
        )  # fmt: skip


def flux(guidance: bool = True, **scheduler: Any) -> Any:
    from diffusers import FluxPipeline

    transformer = network(
        "FluxTransformer2DModel", in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return FluxPipeline(
            flow(**{**DYNAMIC, **scheduler}), vae(), text_encoder(), tokenizer(Path(folder)), t5(),
            characters(), transformer,
        )  # fmt: skip


def chroma(**scheduler: Any) -> Any:
    from diffusers import ChromaPipeline

    transformer = network(
        "ChromaTransformer2DModel", in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(flow(**scheduler), vae(), t5(), characters(), transformer)


def qwen_image(**scheduler: Any) -> Any:
    from diffusers import QwenImagePipeline

    transformer = network(
        "QwenImageTransformer2DModel", in_channels=4 * CHANNELS, out_channels=CHANNELS,
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    stage = network(
        "AutoencoderKLQwenImage", base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2], num_res_blocks=1,
        temperal_downsample=[False], latents_mean=[0.1] * CHANNELS, latents_std=[1.5] * CHANNELS,
    )  # fmt: skip
    settings = {**DYNAMIC, "shift_terminal": 0.02, **scheduler}
    return QwenImagePipeline(flow(**settings), stage, qwen_vl(), characters(), transformer)


def z_image(**scheduler: Any) -> Any:
    from diffusers import ZImagePipeline

    transformer = network(
        "ZImageTransformer2DModel", in_channels=CHANNELS, dim=16, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 2, 2], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(flow(**scheduler), vae(), qwen3(), characters(), transformer)


def sana(**scheduler: Any) -> Any:
    from diffusers import SanaPipeline

    transformer = network(
        "SanaTransformer2DModel", in_channels=CHANNELS, out_channels=CHANNELS, sample_size=8,
        num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        timestep_scale=0.5,
    )  # fmt: skip
    stage = network(
        "AutoencoderDC", latent_channels=CHANNELS, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate", downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return SanaPipeline(characters(), gemma(), stage, transformer, flow(**scheduler))


def pixart(kind: str = "PixArtAlphaPipeline", **scheduler: Any) -> Any:
    import diffusers

    transformer = network(
        "PixArtTransformer2DModel", sample_size=8, num_layers=2, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    steps = diffusers.EulerDiscreteScheduler(beta_start=0.0001, beta_end=0.02, **scheduler)
    return getattr(diffusers, kind)(characters(), t5(), vae(), transformer, steps)


def pixart_sigma(**scheduler: Any) -> Any:
    return pixart("PixArtSigmaPipeline", **scheduler)


def lumina2(**scheduler: Any) -> Any:
    from diffusers import Lumina2Pipeline

    transformer = network(
        "Lumina2Transformer2DModel", sample_size=8, in_channels=CHANNELS, hidden_size=24,
        num_layers=2, num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1, multiple_of=8,
        ffn_dim_multiplier=1.0, cap_feat_dim=WIDTH, axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 64, 64),
    )  # fmt: skip
    stage = vae(**{
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    })  # fmt: skip
    return Lumina2Pipeline(transformer, flow(**scheduler), stage, gemma(), characters())


PIPELINES: dict[str, Callable[..., Any]] = {
    "sd3": sd3,
    "flux": flux,
    "chroma": chroma,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "sana": sana,
    "pixart": pixart,
    "pixart_sigma": pixart_sigma,
    "lumina2": lumina2,
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
