"""Files of the EDM family, published and one's own: cards, settings, weights, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from denoisers.families import edm
from denoisers.families.edm import describe_edm, is_edm, load_edm
from denoisers.families.precond import build
from denoisers.protocol import Files
from denoisers.registry import ModelSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import sha256_file
from tests import published

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 2,
    "attn_resolutions": [4],
}


def cosine(j: int) -> float:
    """alpha-bar of iDDPM with M = 50, as table 1 of EDM counts."""
    return math.sin(0.5 * math.pi * j / 50 / 1.008) ** 2


#: kind -> (settings, lowest and highest noise level)
KINDS: dict[str, tuple[dict[str, Any], float, float]] = {
    "EDMPrecond": ({"augment_dim": 9, "sigma_data": 0.6}, 0.002, 80),
    "VPPrecond": ({"beta_d": 15.0}, 0.0009765625, math.sqrt(math.expm1(7.6))),
    "VEPrecond": ({"sigma_max": 50, "embedding_type": "fourier"}, 0.02, 50),
    "iDDPMPrecond": (
        {"M": 50},
        math.sqrt(cosine(50) / cosine(49) - 1),
        math.sqrt(cosine(50) / cosine(1) / 0.001 - 1),
    ),
}


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    return {"class_name": kind, **TINY, **KINDS[kind][0], **more}


def weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a random network, none of them zero."""
    torch.manual_seed(0)
    net = build(config).requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.2)
    return net.state_dict()


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], **at: Any) -> Path:
    """In the form that the suffix says; ``at`` are attributes of the network."""
    settings = {k: v for k, v in config.items() if k != "class_name"}
    if path.suffix == ".safetensors":
        save_file(dict(tensors), path, {"config": json.dumps({**config, **at})})
        return path
    net = published.network(config["class_name"], settings, tensors, **at)
    if path.suffix == ".pkl":
        path.write_bytes(published.pickled(published.snapshot(net)))
    else:
        with published.pretended():
            torch.save({"net": net, "ema": net, "optimizer_state": {"state": {}}}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_own_files_are_described_and_loaded(kind: str, suffix: str, tmp_path: Path) -> None:
    config = config_of(kind)
    tensors = weights(config)
    path = write(tmp_path / f"mine{suffix}", config, tensors)
    assert is_edm(path)
    card = describe_edm("mine", path)
    _, low, high = KINDS[kind]
    assert (card.name, card.family, card.file) == ("mine", "edm", f"mine{suffix}")
    assert (card.shape, card.label_dim, card.pfgmpp) == ((2, 8, 8), 3, None)
    assert card.bottleneck == "4x4_block1"
    assert abs(card.sigma_min / low - 1) < 0.01 and abs(card.sigma_max / high - 1) < 0.02
    model = load_edm(card, Files(path), CPU, torch.float64)
    assert model.card == card
    assert model.sha256 == card.sha256 == sha256_file(path)
    labels, sigma = torch.tensor([2, 0]), torch.tensor([0.7, 9.0]).reshape(-1, 1, 1, 1)
    x = torch.randn(2, 2, 8, 8)
    plain = build(config).eval()
    plain.load_state_dict(tensors)
    expected = plain.cast(torch.float64)(x, sigma, torch.eye(3)[labels])
    out = model.bind(labels)(x, sigma)
    assert torch.equal(out.x0, expected.x0)
    assert torch.equal(out.feat, expected.feat)
    assert all(not p.requires_grad for p in model.net.parameters())


def test_settings_that_a_file_does_not_hold_may_be_given(tmp_path: Path) -> None:
    """iDDPM's interpolated labels; and every setting of a bare file."""
    config = config_of("iDDPMPrecond")
    tensors = weights(config)
    path = write(tmp_path / "mine.pkl", config, tensors)
    plain = ModelSource("mine", str(path))
    asked = ModelSource("mine", str(path), model_settings='{"interpolate": true}')
    models = [source.load(World(0, 1, CPU)) for source in (plain, asked)]
    assert [model.card.config.get("interpolate") for model in models] == [None, True]
    assert models[0].sha256 == plain.known_sha256 == sha256_file(path)
    assert models[1].sha256 == asked.known_sha256 != models[0].sha256  # no common rows or folders
    labels, x = torch.tensor([2, 0]), torch.randn(2, 2, 8, 8)
    outs = [model.bind(labels)(x, torch.tensor(0.72)).x0 for model in models]
    assert float((outs[0] - outs[1]).abs().max()) > 1e-4
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    given = json.dumps({**config, "interpolate": True})
    source = ModelSource("mine", str(bare), model_family="edm", model_settings=given)
    again = source.load(World(0, 1, CPU)).bind(labels)(x, torch.tensor(0.72)).x0
    assert torch.equal(again, outs[1])
    for text, message in (
        ('{"M": 60}', "--model_settings has M = 60 where .*mine.pkl has 50: leave it out"),
        ('{"colour": 3}', "unexpected keyword argument 'colour'"),
        ('{"interpolate": 3}', "interpolate is 3, but it is true or false"),
        ("[1]", r"--model_settings \[1\] is not a JSON object of settings"),
        ("{" * 10**5, "is not a JSON object of settings"),
    ):
        with pytest.raises(UserError, match=message):
            ModelSource("mine", str(path), model_settings=text).card()
    with pytest.raises(UserError, match="'cifar10' has its settings on its card: leave --model_s"):
        ModelSource("cifar10", str(path), model_settings="{}").card()


def test_own_noise_levels_and_bottleneck_win(tmp_path: Path) -> None:
    """The file's over the defaults; those of a card over the file's."""
    config = config_of("EDMPrecond", sigma_min=0.01, sigma_max=30.0)
    path = tmp_path / "mine.safetensors"
    metadata = {"config": json.dumps(config), "bottleneck_module": "8x8_block0"}
    save_file(weights(config), path, metadata)
    card = describe_edm("mine", path)
    assert (card.sigma_min, card.sigma_max, card.bottleneck) == (0.01, 30.0, "8x8_block0")
    asked = dataclasses.replace(card, sigma_min=0.1, sigma_max=20.0, config={}, bottleneck="")
    model = load_edm(asked, Files(path), CPU, torch.float32)
    assert (model.card.sigma_min, model.card.sigma_max) == (0.1, 20.0)
    assert (model.card.config, model.card.bottleneck) == (config, "8x8_block0")
    out = model.bind()(torch.randn(1, 2, 8, 8), torch.tensor(1.0))
    assert out.feat.shape == (1, 8, 8)


def test_weights_are_not_read_to_describe_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("EDMPrecond")
    path = write(tmp_path / "mine.safetensors", config, weights(config))
    monkeypatch.setattr(edm, "read_safetensors", None)
    assert is_edm(path) and describe_edm("mine", path).config == config


def test_a_file_without_settings_takes_those_of_its_card(tmp_path: Path) -> None:
    config = config_of("VPPrecond")
    card = describe_edm("x", write(tmp_path / "a.safetensors", config, weights(config)))
    bare = tmp_path / "bare.safetensors"
    save_file(weights(config), bare)
    assert load_edm(card, Files(bare), CPU, torch.float32).card == card
    assert not is_edm(bare)
    with pytest.raises(UserError, match="bare.safetensors does not hold the settings"):
        describe_edm("mine", bare)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pt"])
def test_files_for_other_samples_are_refused(suffix: str, tmp_path: Path) -> None:
    config = config_of("EDMPrecond")
    path = write(tmp_path / f"w{suffix}", config, weights(config))
    card = describe_edm("mine", path)
    for change, has in (
        ({"resolution": 16}, r"\(2, 16, 16\) with 3 classes"),
        ({"channels": 1}, r"\(1, 8, 8\) with 3 classes"),
        ({"label_dim": 0}, r"\(2, 8, 8\) with 0 classes"),
        ({"pfgmpp": 128}, r"\(2, 8, 8\) with 3 classes and the D = 128 of PFGM\+\+"),
    ):
        message = rf"is for samples \(2, 8, 8\) with 3 classes where 'mine' has {has}; choose"
        with pytest.raises(UserError, match=message):
            load_edm(dataclasses.replace(card, **change), Files(path), CPU, torch.float32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pt"])
def test_wrong_contents_are_refused(suffix: str, tmp_path: Path) -> None:
    config = config_of("iDDPMPrecond")
    good = weights(config)
    card = describe_edm("mine", write(tmp_path / f"good{suffix}", config, good))
    name = "model.out_conv.bias"  # four outputs, twice the channels

    def attempt(tensors: dict[str, Tensor], config: dict[str, Any] = config) -> None:
        path = write(tmp_path / f"w{suffix}", config, tensors)
        load_edm(card, Files(path), CPU, torch.float32)

    attempt({**good, "u": good["u"] * 1.0004})  # the table of another machine
    for change, message in (
        ({name: torch.zeros(2)}, rf"'{name}' of shape \(2,\) where the network has \(4,\)"),
        ({"model.more": torch.zeros(1)}, "has 'model.more', which the network lacks"),
        ({"u": good["u"] * 1.01}, "has other numbers in 'u'"),
    ):
        with pytest.raises(UserError, match=message):
            attempt({**good, **change})
    with pytest.raises(UserError, match=f"lacks '{name}'; it holds the weights of"):
        attempt({k: v for k, v in good.items() if k != name})
    for wrong, message in (
        ({"class_name": "XPrecond"}, "'XPrecond' is not one of EDMPrecond, VPPrecond, VEPrecond, "),
        ({"model_type": "VGG"}, "model_type is 'VGG'; known: SongUNet, DhariwalUNet"),
        ({"colour": 3}, "unexpected keyword argument 'colour'"),
        ({"channel_mult": []}, r"channel_mult is \[\], where networks have 1 to 16"),
        ({"model_channels": -8}, ""),
        ({"model_channels": "many"}, ""),
        ({"M": 50.5}, ""),
        ({"class_name": "EDMPrecond", "M": 3}, "unexpected keyword argument 'M'"),
        ({"D": 7}, "unexpected keyword argument 'D'"),
    ):
        path = write(tmp_path / f"w{suffix}", {**config, **wrong}, good)
        with pytest.raises(UserError, match=f"w{suffix} has settings that make no net.*{message}"):
            describe_edm("mine", path)
    with pytest.raises(UserError, match=f"w{suffix} has settings that make no network"):
        load_edm(card, Files(path), CPU, torch.float32)


def test_other_files_are_not_of_this_family(tmp_path: Path) -> None:
    text = tmp_path / "text.pkl"
    text.write_text("these are no weights at all")
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(3)}, plain)
    predictor = tmp_path / "predictor.pkl"
    predictor.write_bytes(published.predictor({"fc_r.weight": torch.zeros(1, 2)}, {}))
    broken = tmp_path / "broken.safetensors"
    save_file({"a": torch.zeros(1)}, broken, {"config": "{"})
    for path, message in (
        (text, "text.pkl is not a safetensors file"),
        (plain, "plain.pt holds no network of the EDM family"),
        (
            predictor,
            r"predictor.pkl holds no network of the EDM family \(its keys: model, loss_fn\)",
        ),
        (broken, "config in the metadata of .*broken.safetensors is"),
    ):
        assert not is_edm(path)
        with pytest.raises(UserError, match=message):
            describe_edm("mine", path)
    path = tmp_path / "cut.pkl"
    config = config_of("EDMPrecond")
    whole = write(tmp_path / "whole.pkl", config, weights(config)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.pkl is damaged, cut short or no"):
        is_edm(path)
