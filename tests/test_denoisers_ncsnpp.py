"""NCSN++: recorded outputs, a second implementation, published names, files and units."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.pickles.files import read
from denoisers.cards import Card, cards
from denoisers.convert import convert
from denoisers.families.edm import EDMModel
from denoisers.families.ncsnpp import describe_ncsnpp, load_ncsnpp
from denoisers.families.precond import build
from denoisers.nets.ncsnpp import published, settings_from
from denoisers.protocol import Files
from denoisers.recognise import recognise
from denoisers.registry import ModelSource, load_model
from runtime.errors import UserError
from tests.ncsnpp_problem import (
    KINDS,
    RANGE,
    ScoreNetwork,
    checkpoint,
    empty,
    settings,
    weights,
)  # fmt: skip
from tests.tensors import gap

Golden = Callable[[str], Any]
CPU = torch.device("cpu")
PUBLISHED = ("cifar10-ncsnpp", "lsun_bedroom-ncsnpp", "lsun_church-ncsnpp", "ffhq1024-ncsnpp")


def load(path: Path, dtype: torch.dtype = torch.float32) -> EDMModel:
    return load_ncsnpp(describe_ncsnpp("mine", path), Files(path), CPU, dtype)


def translated(meta: dict[str, Any]) -> dict[str, Any]:
    """Published settings in our words."""
    config = meta["config"]
    inputs = {"residual": "residual", "input_skip": "skip", "none": "standard"}
    outputs = {"none": "standard", "output_skip": "skip"}
    return settings(
        img_resolution=config["image_size"],
        model_channels=config["nf"],
        channel_mult=config["ch_mult"],
        num_blocks=config["num_res_blocks"],
        attn_resolutions=config["attn_resolutions"],
        resample_filter=config["fir_kernel"],
        encoder_type=inputs[config["progressive_input"]],
        decoder_type=outputs[config["progressive"]],
    )


@pytest.mark.parametrize("name", ["ncsnpp_cifar", "ncsnpp_ffhq"])
def test_names_order_and_shapes_are_the_published_ones(name: str, golden_json: Golden) -> None:
    meta = golden_json("net_ncsnpp_meta")[name]
    with torch.device("meta"):
        own = published(empty(translated(meta)))
        shapes = {name: torch.empty(shape) for name, shape in meta["params"]}
    assert [[k, list(v.shape)] for k, v in own.items()] == meta["params"]
    # The list of averages lacks the frequencies, which are never trained, and nothing else.
    assert [k for k in own if k != "all_modules.0.W"] == meta["requires_grad_order"]
    assert settings_from(shapes, {}, "it") == translated(meta)


def test_score_matches_the_recorded_network(
    golden: Golden, golden_weights: Golden, tmp_path: Path
) -> None:
    """The published file holds the average as a list, and something else under its names."""
    io, path = golden("net_ncsnpp_io"), checkpoint(tmp_path / "c.pth", golden_weights("ncsnpp"))
    model = load(path)
    assert (model.card.sigma_min, model.card.sigma_max) == RANGE
    for i, sigma in enumerate(io["sigmas"]):
        x, score = torch.tensor(io[f"x_{i}"]), torch.tensor(io[f"score_{i}"])
        level = torch.tensor(2 * sigma, dtype=torch.float32)
        raw, _ = model.net.network(2 * x - 1, (level / 2).log().reshape(1))
        assert gap(raw / sigma, score) < 1e-5 * max(1.0, float(score.abs().max()))
        expected = 2 * (x.double() + sigma**2 * score.double()) - 1
        assert gap(model.bind()(2 * x - 1, level).x0, expected) < 1e-5 * max(1.0, sigma)


def test_the_second_implementation_is_the_recorded_network(
    golden: Golden, golden_json: Golden, golden_weights: Golden
) -> None:
    """So it may judge networks that were not recorded."""
    config = translated(golden_json("net_ncsnpp_meta")["ncsnpp_cifar"])
    io, reference = golden("net_ncsnpp_io"), ScoreNetwork(golden_weights("ncsnpp"), config)
    for i, sigma in enumerate(io["sigmas"]):
        score, _ = reference(torch.tensor(io[f"x_{i}"]), float(sigma))
        assert gap(score, io[f"score_{i}"]) < 1e-5 * float(score.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_networks_are_those_of_the_second_implementation(
    kind: str, num_blocks: int, tmp_path: Path
) -> None:
    config = settings(kind, num_blocks=num_blocks, channel_mult=[1, 1, 2])
    tensors = weights(config)
    model = load(checkpoint(tmp_path / "c.pth", tensors), torch.float64)
    assert model.card.bottleneck == "4x4_in1"
    torch.manual_seed(1)
    for sigma in (0.02, 1.5, 40.0):
        x = torch.rand(2, 3, 16, 16).double() + sigma * torch.randn(2, 3, 16, 16).double()
        score, middle = ScoreNetwork(tensors, config)(x, sigma)
        one = torch.tensor(2 * sigma, dtype=torch.float64)
        for level in (one, one.expand(2, 1, 1, 1)):
            out = model.bind()(2 * x - 1, level)
            assert out.feat is not None
            assert gap(out.x0, 2 * (x + sigma**2 * score) - 1) < 1e-11
            assert gap(out.feat, middle) < 1e-11


def test_derivatives_in_state_and_level(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c.pth", weights(settings("ffhq")))
    denoiser = load(path, torch.float64).bind()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    sigma = torch.full((2, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: tuple(denoiser(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_half_precision(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """Relative to what the network adds; embeddings stay in float32, where phases need them."""
    path = checkpoint(tmp_path / "c.pth", weights(settings("ffhq")))
    model, half = load(path), load(path, dtype)
    dtypes = {k: v.dtype for k, v in half.net.model.state_dict().items()}
    assert dtypes["dec.16x16_aux_conv.weight"] == dtype
    assert dtypes["map_noise.freqs"] == torch.float32
    torch.manual_seed(0)
    for sigma in (0.05, 2.0):
        x = torch.randn(2, 3, 16, 16) * sigma
        exact, out = (m.bind()(x, torch.tensor(sigma)) for m in (model, half))
        assert out.x0.dtype == torch.float32
        scale = float((exact.x0 - x).abs().max())
        assert 0 < gap(out.x0, exact.x0) < tolerance * scale


def test_cards_are_the_published_settings() -> None:
    known = {name: cards()[name] for name in PUBLISHED}
    ranges = {name: (card.sigma_min, card.sigma_max) for name, card in known.items()}
    assert list(ranges.values()) == [(0.02, 100), (0.02, 756), (0.02, 760), (0.02, 2696)]
    assert [card.shape for card in known.values()] == [
        (3, 32, 32), (3, 256, 256), (3, 256, 256), (3, 1024, 1024),
    ]  # fmt: skip
    assert [card.langevin["N"] for card in known.values()] == [1000, 2000, 2000, 2000]
    assert [card.langevin["n_steps"] for card in known.values()] == [1, 1, 1, 1]
    assert [card.langevin["snr"] for card in known.values()] == [0.16, 0.075, 0.075, 0.15]
    for name in PUBLISHED:
        with pytest.raises(UserError, match=f"'{name}' cannot be fetched from a"):
            ModelSource(name).files(known[name])


@pytest.mark.parametrize("name", ["cifar10-ncsnpp", "ffhq1024-ncsnpp"])
def test_published_sizes_without_their_memory(name: str) -> None:
    """From the card to names, and from names and shapes alone back to the card."""
    card = cards()[name]
    with torch.device("meta"):
        net = build(card.config, card.bottleneck)
        own = published(net.model)
    assert settings_from(own, {}, "it") == card.config
    assert card.config["img_resolution"] == card.resolution
    # Features, two layers, a convolution; blocks, resampling and its pyramid, attention, an end.
    depth, per_level = len(card.config["channel_mult"]), card.config["num_blocks"]
    ends = depth if card.config["decoder_type"] == "skip" else 1
    attention = per_level + 1 + 1
    count = 4 + depth * (2 * per_level + 1) + 2 + 3 * (depth - 1) + attention + 2 * ends
    assert len({name.split(".")[1] for name in own}) == count
    made = [tensor for tensor in own.values() if not tensor.is_meta]
    assert sum(tensor.numel() for tensor in made) < 1000  # frequencies and filters


def test_own_files_make_their_own_card(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoint_3.pth", weights(settings(channel_mult=[1, 1, 2])))
    assert recognise(path) == "ncsnpp"
    card = ModelSource("mine", str(path)).card()
    assert (card.family, card.shape, card.label_dim) == ("ncsnpp", (3, 16, 16), 0)
    assert (card.sigma_min, card.sigma_max, card.bottleneck) == (*RANGE, "4x4_in1")
    # Attention at the second of three levels: images of twice 16 pixels.
    config = settings(channel_mult=[1, 1, 2], img_resolution=32)
    path = checkpoint(tmp_path / "checkpoint_4.pth", weights(config))
    assert ModelSource("mine", str(path)).card().shape == (3, 32, 32)
    model = load_model("cifar10-ncsnpp", device="cpu", model_path=path)
    assert model.card.langevin["snr"] == 0.16 and model.card.config["model_channels"] == 8


def test_converted_files_are_the_same_network(tmp_path: Path) -> None:
    config = settings(channel_mult=[1, 1], img_resolution=32)
    path = checkpoint(tmp_path / "c.pth", weights(config))
    target = tmp_path / "own.safetensors"
    assert convert(read(path), path, target) == [target, tmp_path / "own.card.json"]
    assert recognise(target) == "ncsnpp"
    entry = json.loads((tmp_path / "own.card.json").read_text())["own"]
    assert Card(name="own", **entry) == describe_ncsnpp("own", target)
    x, sigma = torch.randn(1, 3, 32, 32), torch.tensor(3.0)
    assert torch.equal(load(target).bind()(x, sigma).x0, load(path).bind()(x, sigma).x0)
    for published_name, has in (
        ("lsun_church-ncsnpp", "resolutions"),
        ("cifar10-ncsnpp", "model_"),
    ):
        with pytest.raises(UserError, match=f"is another model: {path} has .*{has}.* where"):
            convert(read(path), path, tmp_path / "b.safetensors", published_name)
    assert not (tmp_path / "b.safetensors").exists()


def refusal(path: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    """What is said of a file with these weights, and with settings if there are any."""
    if config:
        path = path.with_suffix(".safetensors")
        save_file(tensors, path, {"config": json.dumps(config)})
    else:
        checkpoint(path, tensors)
    with pytest.raises(UserError) as caught:
        load(path)
    return str(caught.value)


def test_other_networks_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path, good = tmp_path / "c.pth", weights(settings())

    def without(*names: str) -> dict[str, Tensor]:
        return {k: v for k, v in good.items() if not k.endswith(names)}

    assert "lacks the noise levels ('sigmas')" in refusal(path, without("sigmas"))
    assert "no Fourier features" in refusal(path, without("all_modules.0.W"))
    assert "10 residual blocks, 1 of which" in refusal(path, without("all_modules.6.Conv_2.weight"))
    assert "lacks 'all_modules.4.GroupNorm_1.bias'" in refusal(path, without("4.GroupNorm_1.bias"))
    wide = good | {"all_modules.5.NIN_1.W": torch.zeros(8, 9)}
    assert "of shape (8, 9) where the network has (8, 8)" in refusal(path, wide)
    more = good | {"all_modules.99.weight": torch.zeros(2, 2)}
    assert "'all_modules.99.weight', which the network lacks" in refusal(path, more)
    assert "num_blocks 1 where its settings say 4" in refusal(path, good, num_blocks=4)
    assert "class_name VEPrecond where" in refusal(path, good, class_name="EDMPrecond")
    assert "settings that make no network" in refusal(path, good, depth=4)
    lone = weights(settings(attn_resolutions=[]))
    assert "nothing in" in refusal(path, lone) and "img_resolution" in refusal(path, lone)
    with pytest.raises(UserError, match=r"for samples \(3, 16"):
        load_model("lsun_church-ncsnpp", device="cpu", model_path=checkpoint(path, good))
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no network of the family 'ncsnpp'"):
        ModelSource("mine", str(path), model_family="ncsnpp").card()


def test_trained_weights_never_stand_in_for_averages(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c.pth", weights(settings()))
    content = torch.load(path, weights_only=True)
    del content["ema"]["shadow_params"][-1]
    torch.save(content, path)
    with pytest.raises(UserError, match="averaged weights, too few for its model"):
        load(path)
    del content["ema"]
    torch.save(content, path)
    with pytest.raises(UserError, match="holds no network of the family 'ncsnpp'"):
        load(path)


def test_metadata_tell_what_weights_cannot(tmp_path: Path) -> None:
    """No attention outside the middle: the images' size has to be said."""
    config = settings(attn_resolutions=[])
    path = tmp_path / "m.safetensors"
    said = {"img_resolution": 16, "attn_resolutions": []}
    save_file(weights(config), path, {"config": json.dumps(said)})
    assert describe_ncsnpp("mine", path).config == config | dict(
        zip(("sigma_min", "sigma_max"), RANGE, strict=True)
    )
