"""Models of one's own: the family is seen from the file, and the commands take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from denoisers.cards import cards
from denoisers.nets.openai import UNet
from denoisers.recognise import DESCRIBE, recognise
from denoisers.registry import FAMILIES, ModelSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder
from runtime.log import note_once
from tests import tiny_pipeline
from tests.test_recipes import edm_checkpoint
from tools import convert

HERE = World(0, 1, torch.device("cpu"))
#: What weights do not show, as `unet` makes them.
UNTOLD: dict[str, dict[str, object]] = {
    "adm": {"image_size": 256, "num_head_channels": 32, "attention": "legacy"},
    "cm": {"image_size": 256, "num_head_channels": 32},
    "ldm": {"image_size": 64, "num_head_channels": 32, "attention": "legacy"},
}
SMALL = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1], "num_head_channels": 32}


def unet(name: str, path: Path, prefix: str = "", **changes: object) -> Path:
    settings = {**cards()[name].config, **SMALL, "attention_resolutions": [2], **changes}
    torch.manual_seed(0)
    net = UNet(**{"image_size": cards()[name].resolution, **settings})
    torch.save({prefix + k: torch.randn_like(v) * 0.1 for k, v in net.state_dict().items()}, path)
    return path


def adm(folder: Path) -> Path:
    return unet("imagenet256", folder / "m.pt", num_classes=7)


def cm(folder: Path) -> Path:
    return unet("lsun_bedroom", folder / "m.pt")


def ldm(folder: Path) -> Path:
    return unet("lsun_bedroom_ldm", folder / "m.ckpt", "model.diffusion_model.")


def edm(folder: Path) -> Path:
    return edm_checkpoint("cifar10", folder / "m.pkl")


@pytest.mark.parametrize(
    ("make", "shape", "classes", "guidance", "time"),
    [
        (edm, (3, 32, 32), 0, None, False),
        (adm, (3, 256, 256), 7, "cg", True),
        (cm, (3, 256, 256), 0, None, False),
        (ldm, (3, 64, 64), 0, "uncond", True),
        (tiny_pipeline.stable_diffusion, (4, 8, 8), 0, "cfg", True),
    ],
)
def test_a_file_makes_its_own_card(
    make: Callable[[Path], Path],
    shape: tuple[int, ...],
    classes: int,
    guidance: str | None,
    time: bool,
    tmp_path: Path,
) -> None:
    path = make(tmp_path)
    family = recognise(path)
    assert family == {"stable_diffusion": "diffusers"}.get(make.__name__, make.__name__)
    told = json.dumps(UNTOLD[family]) if family in UNTOLD else None
    card = ModelSource("mine", str(path), model_settings=told).card()
    assert (card.name, card.family, card.shape) == ("mine", family, shape)
    assert (card.label_dim, card.guidance, card.schedule is not None) == (classes, guidance, time)
    again = ModelSource("mine", str(path), model_family=family, model_settings=told)
    assert again.card() == card


def test_own_networks_are_called_under_their_own_name(tmp_path: Path) -> None:
    """The settings found in the file build the network that its weights belong to."""
    path = unet("lsun_bedroom", tmp_path / "m.pt", image_size=16, model_channels=64)
    told = json.dumps({"image_size": 16, "num_head_channels": 32})
    source = ModelSource("mine", str(path), model_settings=told)
    model = source.load(HERE)
    net = UNet(**dict(source.card().config)).eval()
    assert net.settings.image_size == 16 and net.settings.num_head_channels == 32
    net.load_state_dict(torch.load(path, weights_only=True))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor(0.7)
    total = sigma**2 + 0.25
    with torch.no_grad():
        raw, _ = net(x / total.sqrt(), 250 * sigma.log().expand(2), None)
    expected = 0.25 / total * x + 0.5 * sigma / total.sqrt() * raw
    assert float((model.bind()(x, sigma).x0 - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("make", [adm, cm, ldm])
def test_what_weights_do_not_show_is_asked_for(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Every setting left out is named, with the published value; what was given is used."""
    path, family = make(tmp_path), make.__name__
    told = UNTOLD[family]
    with pytest.raises(UserError, match=f"does not tell {' and '.join(told)} of its network"):
        ModelSource("mine", str(path)).card()
    for name in told:
        rest = json.dumps({k: v for k, v in told.items() if k != name})
        with pytest.raises(UserError, match=f"does not tell {name} of its network.*{name}"):
            ModelSource("mine", str(path), model_settings=rest).card()
    for changes in ({"model_channels": 64}, {"num_classes": 3}, {"colour": 1}):
        given = json.dumps({**told, **changes})
        with pytest.raises(UserError, match=next(iter(changes))):
            ModelSource("mine", str(path), model_settings=given).card()
    heads = {k: v for k, v in told.items() if k != "num_head_channels"} | {"num_heads": 4}
    card = ModelSource("mine", str(path), model_settings=json.dumps(heads)).card()
    net = UNet(**dict(card.config))
    assert net.middle_block[1].heads == 4 and net.settings.num_head_channels is None


@pytest.mark.parametrize(("make", "order"), [(adm, "new"), (cm, None)])
@torch.no_grad()  # where rounding does not depend on where a file's weights lie in memory
def test_given_settings_change_the_images(
    make: Callable[[Path], Path], order: str | None, tmp_path: Path
) -> None:
    """So they make another model of the same file, also after a conversion that keeps them."""
    path, target = make(tmp_path), tmp_path / "converted.safetensors"
    weights = torch.load(path, weights_only=True)
    torch.save(
        {k: v * 30 if "qkv.w" in k or "_out.w" in k else v for k, v in weights.items()}, path
    )
    base = {**UNTOLD[make.__name__], "image_size": 16, "num_head_channels": 8}
    other = base | ({"attention": order} if order else {"num_head_channels": 32})
    x, sigma = torch.randn(1, 3, 16, 16), torch.tensor(0.7)
    labels = torch.tensor([2]) if make is adm else None
    outs, digests = [], set()
    for settings in (base, other):
        source = ModelSource("mine", str(path), model_settings=json.dumps(settings))
        model = source.load(HERE)
        assert model.sha256 == source.known_sha256
        digests.add(model.sha256)
        outs.append(model.bind(labels)(x, sigma).x0)
    assert len(digests) == 2
    assert float((outs[0] - outs[1]).norm() / outs[0].norm()) > 1e-2
    arguments = [str(path), str(target), "--model_settings", json.dumps(other)]
    done = CliRunner().invoke(convert.main, arguments, catch_exceptions=False)
    assert target.with_suffix(".card.json").exists(), done.output
    converted = ModelSource("mine", str(target)).load(HERE).bind(labels)(x, sigma).x0
    assert torch.equal(converted, outs[1])


def test_conventions_of_training_that_no_file_tells_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for make, words in ((adm, "linear VP process (beta 0.1 to 20)"), (cm, "sigma_data 0.5")):
        note_once.cache_clear()
        (tmp_path / make.__name__).mkdir()
        path = make(tmp_path / make.__name__)
        told = json.dumps(UNTOLD[make.__name__])
        ModelSource("mine", str(path), model_settings=told).card()
        assert words in capsys.readouterr().err


def test_what_tells_no_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"nothing in .*m\.safetensors tells its family"):
        ModelSource("mine", str(path)).card()
    with pytest.raises(UserError, match="--model_family gan is unknown; choose one of"):
        ModelSource("mine", str(path), model_family="gan").card()
    for family in ("adm", "cm", "ldm"):
        with pytest.raises(UserError, match=f"holds no network of the family '{family}'"):
            ModelSource("mine", str(path), model_family=family).card()
    with pytest.raises(UserError, match="no weights at .*nowhere; check --model_path"):
        ModelSource("mine", str(tmp_path / "nowhere")).card()
    with pytest.raises(UserError, match="a model of your own takes any other name"):
        ModelSource("mine").card()
    with pytest.raises(UserError, match="'cifar10' is of the family edm, not adm"):
        ModelSource("cifar10", str(path), model_family="adm").card()
    assert set(DESCRIBE) == set(FAMILIES)


def test_second_files_and_files_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def download(url: str, folder: Path, sha256: str | None) -> Path:
        fetched.append(url)
        return Path(folder) / url.rsplit("/", 1)[1]

    monkeypatch.setattr("denoisers.registry.download", download)
    own = tmp_path / "own.pt"
    own.touch()
    card = cards()["imagenet256"]
    assert card.companion is not None

    both = ModelSource("imagenet256", cache_dir=str(tmp_path)).files(card)
    assert both.main == tmp_path / card.file and both.companion is not None
    assert sorted(fetched) == sorted([str(card.url), str(card.companion["url"])])
    fetched.clear()
    alone = ModelSource("imagenet256", str(own)).files(card)
    assert (alone.main, alone.companion, fetched) == (own, None, [])
    pair = ModelSource("imagenet256", str(own), companion_path=str(own)).files(card)
    assert (pair.companion, fetched) == (own, [])
    with pytest.raises(UserError, match="'cifar10' has no second file: leave"):
        ModelSource("cifar10", companion_path=str(own)).files(cards()["cifar10"])
    with pytest.raises(UserError, match=r"'cifar10-pfgmpp' cannot be fetched.*by"):
        ModelSource("cifar10-pfgmpp").files(cards()["cifar10-pfgmpp"])


def test_one_cache_for_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "a"))
    assert cache_folder(tmp_path / "b") == tmp_path / "b" and cache_folder() == tmp_path / "a"
    monkeypatch.delenv("AMED_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "amed-toolkit"
