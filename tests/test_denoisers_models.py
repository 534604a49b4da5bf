"""Cards, loading and binding; a recorded network as a model; the bundled one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from denoisers.cards import cards
from denoisers.families import edm
from denoisers.families.edm import EDMModel, load_edm
from denoisers.families.precond import build
from denoisers.protocol import Files
from denoisers.registry import load_model
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.noise import SeedNoise
from solvers.driver import integrate
from solvers.grids import get_grid
from solvers.registry import make_solver

CPU = torch.device("cpu")
TINY = {
    "class_name": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_type": "DhariwalUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
TINY_CARD = dataclasses.replace(
    cards()["imagenet64"],
    name="tiny", resolution=8, label_dim=4, bottleneck="4x4_block0", config=TINY,
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded(golden: Any) -> Any:
    return golden("net_edm_song_io")


@pytest.fixture(scope="module")
def weights(golden: Any, golden_json: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded SongUNet, smaller than the bundled one, with its settings beside it."""
    stored = golden("net_edm_song_weights")
    config = {"class_name": "EDMPrecond", "img_resolution": 32, "img_channels": 3}
    config |= golden_json("net_configs")["edm_song"]["kwargs"]
    path = tmp_path_factory.mktemp("weights") / "song.safetensors"
    tensors = {key: torch.tensor(stored[key]) for key in stored.files}
    save_file(tensors, path, {"config": json.dumps(config)})
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the settings of TINY, none of them zero."""
    torch.manual_seed(0)
    state = {name: torch.randn(v.shape) * 0.2 for name, v in build(TINY).state_dict().items()}
    state |= {n: v for n, v in build(TINY).state_dict().items() if n.endswith("resample_filter")}
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(state, path, {"config": json.dumps(TINY)})
    return path


def load_tiny(path: Path, dtype: torch.dtype = torch.float32) -> EDMModel:
    return load_edm(TINY_CARD, Files(path), CPU, dtype)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def noisy(batch: int, sigma: Tensor | float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator) * (0.25 + sigma**2) ** 0.5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-5), ("bfloat16", 2e-2)]
)
def test_a_model_matches_the_records_of_its_network(
    dtype: str, tolerance: float, recorded: Any, weights: Path
) -> None:
    denoiser = load_model("cifar10-small", device="cpu", dtype=dtype, model_path=weights).bind()
    assert denoiser.cost == 1
    for i, sigma in enumerate(recorded["sigmas"]):
        x = torch.tensor(recorded[f"x_{i}"])
        for shaped in (torch.tensor(sigma), torch.full((len(x), 1, 1, 1), sigma)):
            out = denoiser(x, shaped)
            assert out.feat is not None
            assert out.x0.dtype == torch.float32
            assert largest(out.x0, torch.tensor(recorded[f"D_{i}"])) < tolerance
            expected = torch.tensor(recorded[f"bottleneck_mean_{i}"])
            assert largest(out.feat, expected) < tolerance


def test_cards_agree_with_their_settings() -> None:
    for card in cards().values():
        if card.family != "edm":
            continue
        with torch.device("meta"):
            net = build(card.config, card.bottleneck)
        assert net.model.bottleneck == list(net.model.enc)[-1] and card.pfgmpp == net.D
        config = card.config
        assert (config["img_channels"], config["img_resolution"]) == card.shape[:2]
        assert config["label_dim"] == card.label_dim
        lowest = card.resolution >> (len(config["channel_mult"]) - 1)
        assert card.bottleneck == f"{lowest}x{lowest}_block{config['num_blocks'] - 1}"
        assert (card.sigma_min, card.sigma_max) == (0.002, 80)
        low = 0.14 if card.name in ("cifar10-small", "cifar10", "cifar10-pfgmpp") else 0.06
        assert card.restart_info == {"0": [3, 2, low, 0.30]}


def test_bundled_card_is_the_file() -> None:
    card = cards()["cifar10-small"]
    assert card.bundled is not None
    model = load_model("cifar10-small", device="cpu")
    assert model.card == card
    assert model.sha256 == card.sha256 == sha256_file(card.bundled)


def test_the_bundled_model_removes_noise() -> None:
    """From its own images, far better than the best linear estimate by mean and variance."""
    denoiser = load_model("cifar10-small", device="cpu").bind()
    noise = SeedNoise(range(8))
    ts = get_grid("polynomial", 10, 0.002, 80.0, 7.0)
    walk = integrate(make_solver("heun"), denoiser, noise.normal("latent", (3, 32, 32)) * 80.0, ts)
    clean = walk.x[-1]
    for sigma, gain in ((0.1, 1.5), (0.5, 4.0), (2.0, 3.0)):
        x = clean + sigma * noise.normal("test", clean.shape[1:])
        linear = clean.mean() + (x - clean.mean()) * clean.var() / (clean.var() + sigma**2)
        best = (linear - clean).square().mean()
        error = (denoiser(x, torch.tensor(sigma)).x0 - clean).square().mean()
        assert error * gain < best, (sigma, float(best / error))


def test_state_and_sigma_keep_their_own_dtype() -> None:
    """x0 comes back in the dtype of x; a float64 state loses nothing around a float32 network."""
    denoiser = load_model("cifar10-small", device="cpu").bind()
    x, sigma = noisy(2, 0.01), torch.tensor(0.01, dtype=torch.float64)
    low, high = denoiser(x, sigma), denoiser(x.double(), sigma)
    assert (low.x0.dtype, high.x0.dtype) == (torch.float32, torch.float64)
    assert largest(low.x0, high.x0) < 1e-6
    # c_skip x dominates at small sigma: moving x by 1e-9 moves D by as much, not in float32 steps.
    moved = denoiser(x.double() + 1e-9, sigma).x0 - high.x0
    assert 0.9e-9 < float(moved.median()) < 1.1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_samples_do_not_see_their_neighbours(dtype: str, tolerance: float) -> None:
    """Alone, in a batch, or beside garbage: the same image to the kernels' rounding."""
    denoiser = load_model("cifar10-small", device="cpu", dtype=dtype).bind()
    sigma = torch.tensor([0.1, 2.0, 30.0]).reshape(-1, 1, 1, 1)
    x = noisy(3, sigma)
    whole = denoiser(x, sigma)
    for i in range(3):
        alone = denoiser(x[i : i + 1], sigma[i, 0, 0, 0])
        assert largest(alone.x0, whole.x0[i : i + 1]) < tolerance
    spoiled = torch.cat([x[:1], torch.full_like(x[1:], 1e4)])
    assert largest(denoiser(spoiled, sigma).x0[:1], whole.x0[:1]) < tolerance


def test_micro_batches_keep_order_labels_and_noise_levels(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load_tiny(tiny, torch.float64).bind(torch.tensor([0, 1, 2, 3, 0]))
    x, levels = torch.randn(5, 3, 8, 8).double(), torch.linspace(0.1, 3, 5).reshape(-1, 1, 1, 1)
    for sigma in (levels, levels[:1], levels[0, 0, 0, 0]):
        whole = denoiser(x, sigma)
        monkeypatch.setattr(edm, "MICRO_BATCH", 2)
        split = denoiser(x, sigma)
        monkeypatch.undo()
        assert whole.feat is not None and split.feat is not None
        assert largest(split.x0, whole.x0) < 1e-12
        assert largest(split.feat, whole.feat) < 1e-12


def test_gradients_flow_but_not_to_the_weights(tiny: Path) -> None:
    model = load_tiny(tiny, torch.float64)
    denoiser = model.bind(torch.tensor([1, 3]))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    sigma = torch.full((2, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: denoiser(x, s).x0, (x, sigma), fast_mode=True)
    assert all(not p.requires_grad and p.grad is None for p in model.net.parameters())


def test_labels_choose_the_class(tiny: Path) -> None:
    model = load_tiny(tiny)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor(1.0)
    both = model.bind(torch.tensor([1, 3]))(x, sigma).x0
    one_hot = torch.eye(4)[[1, 3]]
    assert largest(both, model.net(x, sigma, one_hot).x0) == 0
    swapped = model.bind(torch.tensor([3, 1]))(x.flip(0), sigma).x0.flip(0)
    assert largest(both, swapped) < 1e-5
    assert largest(both, model.bind(torch.tensor([3, 1]))(x, sigma).x0) > 1e-2
    assert largest(model.bind()(x, sigma).x0, model.net(x, sigma, torch.zeros(2, 4)).x0) < 1e-5


def test_nonsense_labels_are_refused(tiny: Path) -> None:
    model = load_tiny(tiny)
    with pytest.raises(UserError, match="class 4 is not one of the 4 classes"):
        model.bind(torch.tensor([0, 4]))
    with pytest.raises(UserError, match="class -1 is not"):
        model.bind(torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match="2 labels are bound but the batch has 3"):
        model.bind(torch.tensor([0, 1]))(torch.zeros(3, 3, 8, 8), torch.tensor(1.0))
    with pytest.raises(UserError, match="'tiny' has no guidance, but the rate is 7.5"):
        model.bind(guidance_rate=7.5)
    with pytest.raises(UserError, match="'cifar10-small' has no classes"):
        load_model("cifar10-small", device="cpu").bind(torch.tensor([0]))


def test_unknown_names_list_the_known_ones() -> None:
    known = "cifar10-small, cifar10, cifar10-vp, cifar10-pfgmpp, ffhq, afhqv2, imagenet64, "
    with pytest.raises(UserError, match=f"unknown dataset 'cifar11'; known: {known}"):
        load_model("cifar11", device="cpu")
    with pytest.raises(UserError, match="unknown dtype 'int8'; known: float32"):
        load_model("cifar10-small", device="cpu", dtype="int8")


def test_weights_that_cannot_be_fetched_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError) as caught:
        load_model("cifar10", device="cpu", cache_dir=tmp_path)
    card = cards()["cifar10"]
    assert all(str(part) in str(caught.value) for part in (card.file, card.url, tmp_path))


def test_altered_bundled_weights_are_refused() -> None:
    known = cards()["cifar10-small"].sha256
    assert known is not None
    card = dataclasses.replace(cards()["cifar10-small"], sha256="0" * 64)
    assert card.bundled is not None
    with pytest.raises(UserError, match=f"has sha256 {known[:8]}.* where its card says"):
        load_edm(card, Files(card.bundled), CPU, torch.float32)


def test_other_weights_of_the_family_load_by_path(weights: Path, recorded: Any) -> None:
    """Another file under another card: settings from its metadata, the hash of that very file."""
    model = load_model("cifar10", device="cpu", model_path=weights)
    assert model.sha256 == sha256_file(weights)
    out = model.bind()(torch.tensor(recorded["x_2"]), torch.tensor(recorded["sigmas"][2]))
    assert largest(out.x0, torch.tensor(recorded["D_2"])) < 1e-5


def test_files_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    def attempt(state: dict[str, Tensor], config: dict[str, Any] = TINY) -> None:
        save_file(state, tmp_path / "w.safetensors", {"config": json.dumps(config)})
        load_tiny(tmp_path / "w.safetensors")

    good = build(TINY).state_dict()
    attempt(good)
    name = "model.out_conv.bias"
    with pytest.raises(UserError, match=f"lacks '{name}'; it holds the weights of"):
        attempt({k: v for k, v in good.items() if k != name})
    with pytest.raises(UserError, match=rf"'{name}' of shape \(4,\) where the network"):
        attempt(good | {name: torch.zeros(4)})
    with pytest.raises(UserError, match="has 'model.more', which the network lacks"):
        attempt(good | {"model.more": torch.zeros(1)})
    filters = {k: v * 2 for k, v in good.items() if k.endswith("resample_filter")}
    with pytest.raises(UserError, match="has other numbers in"):
        attempt(good | filters)
    with pytest.raises(UserError, match=r"is for samples \(3, 8, 8\) with 5 classes"):
        attempt(good, TINY | {"label_dim": 5})
    with pytest.raises(UserError, match="no weights at .*nowhere; check --model_path"):
        load_model("cifar10-small", device="cpu", model_path=tmp_path / "nowhere")
    (tmp_path / "text").write_text("these are no weights at all")
    with pytest.raises(UserError, match="text is not a safetensors file"):
        load_tiny(tmp_path / "text")
