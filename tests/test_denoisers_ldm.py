"""Latent diffusion: checkpoints in the published format, the adapter and the first stage."""

from __future__ import annotations

import dataclasses
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from denoisers.cards import Card, cards
from denoisers.families.first_stage import Quantizer, VQDecoder
from denoisers.families.ldm import LDMModel, load_ldm
from denoisers.nets.openai import UNet, settings_from
from denoisers.protocol import Files
from runtime.errors import UserError
from runtime.files import sha256_file
from tests.tensors import gap

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 32,
}
STAGE: dict[str, Any] = {
    "codes": 16,
    "embed_dim": 3,
    "z_channels": 3,
    "out_channels": 3,
    "widths": (32, 64),
    "num_blocks": 2,
}
PUBLISHED = cards()["lsun_bedroom_ldm"]
CARD = dataclasses.replace(PUBLISHED, name="tiny", resolution=8, image_resolution=16)
#: Of the published training code: betas linear in their roots.
ABAR = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
SIGMAS = torch.tensor(np.sqrt(1 / ABAR - 1))  #: of the 1000 steps


def random_weights(module: torch.nn.Module, scale: float = 0.1) -> dict[str, Tensor]:
    return {name: torch.randn(v.shape) * scale for name, v in module.state_dict().items()}


def checkpoint() -> dict[str, Tensor]:
    """What the published ``state_dict`` holds: the network twice, the first stage, tables."""
    torch.manual_seed(0)
    net, stage = UNet(**SETTINGS), VQDecoder(**STAGE)
    tensors = {f"model.diffusion_model.{k}": v for k, v in random_weights(net).items()}
    averages = random_weights(net).items()
    tensors |= {"model_ema.diffusion_model" + k.replace(".", ""): v for k, v in averages}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    tensors |= {f"first_stage_model.{k}": v for k, v in random_weights(stage, 0.3).items()}
    tensors["first_stage_model.encoder.conv_in.weight"] = torch.zeros(2, 2)
    tensors["first_stage_model.loss.logvar"] = torch.zeros(())
    return tensors | {"alphas_cumprod": torch.tensor(ABAR, dtype=torch.float32)}


def write(path: Path, tensors: dict[str, Tensor]) -> Files:
    """As Lightning does, with a class of its own among the keys."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    package = {
        f"pytorch_lightning{end}": module
        for end in ("", ".callbacks", ".callbacks.model_checkpoint")
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, part in package.items():
            patch.setitem(sys.modules, name, part)
        torch.save({"epoch": 3, "callbacks": {callback: {}}, "state_dict": tensors}, path)
    return Files(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write(tmp_path_factory.mktemp("ldm") / "model.ckpt", checkpoint())


def load(files: Files, card: Card = CARD, dtype: torch.dtype = torch.float32) -> LDMModel:
    return load_ldm(card, files, CPU, dtype)


def plain_network(prefix: str) -> UNet:
    """The U-Net with one of the two copies in :func:`checkpoint`, loaded by hand."""
    net, tensors = UNet(**SETTINGS), checkpoint()
    own = {k: prefix + (k.replace(".", "") if "ema" in prefix else k) for k in net.state_dict()}
    net.load_state_dict({k: tensors[name] for k, name in own.items()})
    return net.eval().requires_grad_(False)


def test_sampling_takes_the_averaged_weights_at_the_published_time(tiny: Files) -> None:
    """Step i of the training is network time i; ``x0 = x - sigma eps``; feature of the middle."""
    model = load(tiny)
    assert model.sha256 == sha256_file(tiny.main)
    average, raw = (
        plain_network("model_ema.diffusion_model"),
        plain_network("model.diffusion_model."),
    )
    middle: list[Tensor] = []
    average.middle_block.register_forward_hook(lambda _m, _i, out: middle.append(out))
    x = torch.randn(2, 3, 8, 8)
    for step in (0, 1, 417, 999):
        sigma = SIGMAS[step]
        scaled = x / (1 + sigma.float() ** 2).sqrt()
        out = model.bind()(x * 1, sigma)
        eps, _ = average(scaled, torch.full((2,), float(step)))
        assert gap(out.x0, x - sigma.float() * eps) < 1e-5 * max(1, float(sigma))
        assert gap(out.feat, middle.pop().mean(1)) < 1e-5
        other, _ = raw(scaled, torch.full((2,), float(step)))
        assert gap(eps, other) > 0.05


def test_time_between_and_beyond_the_steps_is_linear_in_log_alpha(tiny: Files) -> None:
    model = load(tiny, dtype=torch.float64)
    seen: list[Tensor] = []
    model.net.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    logs = 0.5 * np.log(ABAR)
    alphas = np.exp(np.array([0.25 * logs[0] + 0.75 * logs[1], 1.5 * logs[999] - 0.5 * logs[998]]))
    sigma = torch.tensor(np.sqrt(1 / alphas**2 - 1)).reshape(2, 1, 1, 1)
    both = model.bind()(torch.zeros(2, 3, 8, 8, dtype=torch.float64), sigma)
    assert gap(seen[0], [0.75, 999.5]) < 1e-6
    alone = model.bind()(torch.zeros(1, 3, 8, 8, dtype=torch.float64), sigma[1, 0, 0, 0])
    assert gap(both.x0[1:], alone.x0) < 1e-9


def test_the_published_card() -> None:
    """Noise levels from the first beta alone to all of them; the size that the authors print."""
    low, high = float((0.0015 / 0.9985) ** 0.5), float(SIGMAS[-1])
    assert (PUBLISHED.sigma_min, PUBLISHED.sigma_max) == pytest.approx((low, high), rel=1e-9)
    ends = PUBLISHED.schedule.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([low, high], rel=1e-9)
    with torch.device("meta"):
        net = UNet(**PUBLISHED.config)
    size = sum(p.numel() for p in net.parameters())
    assert f"{size / 1e6:.2f} M" == "274.06 M"
    assert settings_from(net.state_dict(), PUBLISHED.config) == PUBLISHED.config


def test_zip_and_second_file(tiny: Files, tmp_path: Path) -> None:
    """A zip holds the checkpoint; a first stage in a file of its own replaces the one inside."""
    archive = tmp_path / "lsun_bedrooms.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tiny.main, "model.ckpt")
    x = torch.randn(1, 3, 8, 8)
    known, zipped = load(tiny), load(Files(archive))
    assert torch.equal(known.bind()(x, SIGMAS[9]).x0, zipped.bind()(x, SIGMAS[9]).x0)
    assert torch.equal(known.decode(x), zipped.decode(x))
    alone = random_weights(VQDecoder(**STAGE), 0.3)
    write(
        tmp_path / "vq.ckpt",
        alone | {"loss.logvar": torch.zeros(()), "quant_conv.bias": torch.zeros(3)},
    )
    stage = VQDecoder(**STAGE)
    stage.load_state_dict(alone)
    both = load(Files(archive, tmp_path / "vq.ckpt"))
    assert torch.equal(both.decode(x), stage(x).clamp(-1, 1))
    assert gap(both.decode(x), known.decode(x)) > 0.1


def test_a_checkpoint_without_averages_has_its_plain_weights(tmp_path: Path) -> None:
    tensors = {k: v for k, v in checkpoint().items() if not k.startswith("model_ema.")}
    model = load(write(tmp_path / "model.ckpt", tensors))
    expected = plain_network("model.diffusion_model.").state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.net.state_dict().items())
    assert not any(
        p.requires_grad for p in (*model.net.parameters(), *model.first_stage.parameters())
    )


def test_gradients_in_x_and_sigma(tiny: Files) -> None:
    denoiser = load(tiny, dtype=torch.float64).bind()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    for sigma in (torch.tensor(0.83), torch.tensor([0.3, 9.1]).reshape(2, 1, 1, 1)):
        sigma = sigma.double().requires_grad_()
        # fast mode: random projections of the Jacobian
        assert torch.autograd.gradcheck(
            lambda x, s: tuple(denoiser(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
        )


def test_half_precision_stays_inside_the_network(tiny: Files) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    exact = load(tiny, dtype=torch.float64).bind()(x, SIGMAS[300])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)):
        out = load(tiny, dtype=dtype).bind()(x, SIGMAS[300])
        assert (out.x0.dtype, out.feat.dtype) == (torch.float64, torch.float64)
        assert gap(out.x0, exact.x0) < tolerance
        assert gap(out.feat, exact.feat) < tolerance


def test_quantisation_picks_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantize = Quantizer(40, 3).requires_grad_(False)
    codes, z = quantize.embedding.weight, torch.randn(2, 3, 4, 5)
    codes[20:] += 5000  # a group far away, where the expanded square loses all digits in float32
    z[1] += 5000
    got = quantize(z)
    for b, i, j in np.ndindex(2, 4, 5):
        squares = ((codes.double() - z[b, :, i, j].double()) ** 2).sum(1)
        assert torch.equal(got[b, :, i, j], codes[squares.argmin()])
    assert len({tuple(v.tolist()) for v in got.permute(0, 2, 3, 1).flatten(0, 2)}) > 10


def test_decoding_is_per_image_scaled_and_bounded(tiny: Files, tmp_path: Path) -> None:
    model = load(tiny)
    z = torch.randn(6, 3, 8, 8) * 2
    images = model.decode(z)
    assert images.shape == (6, 3, 16, 16) and float(images.abs().max()) == 1.0
    assert float((images.abs() == 1).float().mean()) < 0.5
    for i in range(6):
        assert gap(images[i : i + 1], model.decode(z[i : i + 1])) < 1e-5
    assert gap(model.decode(z.double()).float(), images) == 0
    assert model.decode(z.half()).dtype == torch.float16
    assert torch.equal(load(tiny, dtype=torch.bfloat16).decode(z), images)  # not the first stage
    scaled = write(tmp_path / "model.ckpt", checkpoint() | {"scale_factor": torch.tensor(0.5)})
    assert torch.equal(load(scaled).decode(z / 2), images)


Converter = Callable[..., dict[str, Tensor]]


def converter(name: str) -> tuple[Any, Converter]:
    """``diffusers`` and one of its own readers of published checkpoints."""
    diffusers = pytest.importorskip("diffusers")
    module = pytest.importorskip("diffusers.loaders.single_file_utils")
    return diffusers, getattr(module, name)


def test_decoder_is_that_of_diffusers(tiny: Files) -> None:
    diffusers, convert = converter("convert_ldm_vae_checkpoint")
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=STAGE["widths"], layers_per_block=1, latent_channels=3,
        num_vq_embeddings=16, vq_embed_dim=3,
    )  # fmt: skip
    tensors = {k: v for k, v in checkpoint().items() if k.startswith("first_stage_model.")}
    known = convert(
        {k: v for k, v in tensors.items() if "conv_in" not in k or "decoder" in k}, model.config
    )
    known["quantize.embedding.weight"] = tensors["first_stage_model.quantize.embedding.weight"]
    missing, unknown = model.load_state_dict(known, strict=False)
    assert not unknown and {name.split(".")[0] for name in missing} == {"encoder", "quant_conv"}
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.decode(z).sample
    assert gap(load(tiny).first_stage(z), expected) < 1e-5 * float(expected.abs().max())


def test_network_is_that_of_diffusers(tiny: Files) -> None:
    """Averaged weights, names, order of the heads and of the time embedding."""
    diffusers, convert = converter("convert_ldm_unet_checkpoint")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=32, norm_eps=1e-5, downsample_padding=1,
        flip_sin_to_cos=True, freq_shift=0,
    )  # fmt: skip
    known = {}
    for name, tensor in convert(checkpoint(), model.config, extract_ema=True).items():
        if ".qkv." in name:  # heads first, each with its q, k and v
            for part, values in zip(
                "qkv", tensor.squeeze().unflatten(0, (-1, 3, 32)).unbind(1), strict=True
            ):
                known[name.replace("qkv", f"to_{part}")] = values.flatten(0, 1)
        elif "attentions" in name:
            name = name.replace(".norm.", ".group_norm.").replace("proj_out", "to_out.0")
            known[name] = tensor.squeeze()
        else:
            known[name] = tensor
    model.load_state_dict(known)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        eps = model(x / (1 + SIGMAS[123].float() ** 2).sqrt(), 123).sample
    got = load(tiny).bind()(x, SIGMAS[123]).x0
    assert gap(got, x - SIGMAS[123].float() * eps) < 1e-5


def without(prefix: str) -> dict[str, Tensor]:
    return {k: v for k, v in checkpoint().items() if not k.startswith(prefix)}


def changed(shapes: dict[str, Any]) -> dict[str, Tensor]:
    return checkpoint() | {name: torch.zeros(size) for name, size in shapes.items()}


AVERAGE_BIAS, STAGE_PREFIX = "model_ema.diffusion_modelout2bias", "first_stage_model."
MISFITS: list[tuple[dict[str, Tensor], str]] = [
    (without(AVERAGE_BIAS), r"\('model_ema.'\) lacks 'out.2.bias'; it holds the weights of"),
    (changed({AVERAGE_BIAS: 4}), r"'out.2.bias' of shape \(4,\) where the network has \(3,\)"),
    (changed({"model_ema.more": 1}), "has 'more', which the network lacks"),
    (without("model.diffusion_model."), "holds no unconditional U-Net under 'model.diffusion_mo"),
    (without("model.diffusion_model.middle_block.1.qkv"), "holds no unconditional U-Net under"),
    (changed({"model.diffusion_model.input_blocks.1.0.out_layers.3.weight": (48, 48, 3, 3)}),
     r"\('model_ema.'\) has weights that make no network: num_channels"),
    (without("first_stage_model."), "holds no first stage .* with --companion_path"),
    (without(STAGE_PREFIX + "quantize"), "has no 'quantize.embedding.weight'"),
    (without(STAGE_PREFIX + "decoder.up"), "has no 'decoder.up.0.block.0.conv1.weight'"),
    (without(STAGE_PREFIX + "decoder.mid.attn_1.q.bias"), "lacks 'decoder.mid.attn_1.q.bias'"),
    (changed({STAGE_PREFIX + "decoder.up.0.attn.0.norm.bias": 3}), "which the network lacks"),
    (checkpoint() | {"scale_factor": torch.zeros(())}, "'scale_factor' that is no positive number"),
    (checkpoint() | {"alphas_cumprod": torch.tensor(ABAR**0.9)}, "on other noise levels .* 'tiny'"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "sentence"), MISFITS, ids=range(len(MISFITS)))
def test_checkpoints_that_do_not_fit_are_refused(
    tensors: dict[str, Tensor], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(write(tmp_path / "model.ckpt", tensors))


def test_what_the_card_does_not_say_is_refused(tiny: Files) -> None:
    for fields, sentence in (
        (
            {"channels": 4},
            "takes 3 channels, predicts 3 and has no classes where 'tiny' has 4 channels",
        ),
        ({"image_resolution": 32}, "turns 3 channels into 16x16 pixels where .* 32 pixels"),
        ({"noise_schedule": None}, "card of 'tiny' lacks a noise_schedule of discrete steps"),
    ):
        with pytest.raises(UserError, match=sentence):
            load(tiny, dataclasses.replace(CARD, **fields))
    assert load(tiny, dataclasses.replace(CARD, image_resolution=None)).card.image_resolution == 16
    model = load(tiny)
    assert model.bind(guidance_rate=1.0).cost == model.card.cost(1.0) == 1
    with pytest.raises(UserError, match="'tiny' has no guidance, but the rate is 7.5"):
        model.bind(guidance_rate=7.5)
    with pytest.raises(UserError, match="'tiny' has no classes: leave --class 1 out"):
        model.bind(torch.tensor([1]))
    with pytest.raises(UserError, match="'tiny' takes no text: leave the prompts out"):
        model.bind(prompts=["a bedroom"])
