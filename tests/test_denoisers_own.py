"""Models of one's own: the family is seen from the file, and the commands take it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from denoisers.cards import cards
from denoisers.nets.openai import UNet
from denoisers.recognise import DESCRIBE, recognise
from denoisers.registry import FAMILIES, ModelSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder
from tests import tiny_pipeline
from tests.test_recipes import edm_checkpoint

HERE = World(0, 1, torch.device("cpu"))
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
    card = ModelSource("mine", str(path)).card()
    assert (card.name, card.family, card.shape) == ("mine", family, shape)
    assert (card.label_dim, card.guidance, card.schedule is not None) == (classes, guidance, time)
    assert ModelSource("mine", str(path), model_family=family).card() == card


def test_own_networks_are_called_under_their_own_name(tmp_path: Path) -> None:
    """The settings found in the file build the network that its weights belong to."""
    path = unet("lsun_bedroom", tmp_path / "m.pt", image_size=16, model_channels=64)
    source = ModelSource("mine", str(path))
    model = source.load(HERE)
    net = UNet(**dict(source.card().config)).eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor(0.7)
    total = sigma**2 + 0.25
    with torch.no_grad():
        raw, _ = net(x / total.sqrt(), 250 * sigma.log().expand(2), None)
    expected = 0.25 / total * x + 0.5 * sigma / total.sqrt() * raw
    assert float((model.bind()(x, sigma).x0 - expected).abs().max()) < 1e-5


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
