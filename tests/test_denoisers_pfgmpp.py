"""PFGM++: its noise against closed forms, its limit, and its files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from denoisers.cards import Card
from denoisers.families.edm import describe_edm, load_edm
from denoisers.families.precond import build
from denoisers.prior import start, unit_noise
from denoisers.protocol import Files
from runtime.errors import UserError
from runtime.noise import SeedNoise
from tests import published
from tests.sampler_models import make_card

CPU = torch.device("cpu")
SEEDS = range(5000)
LIKELY, UNLIKELY = 1e-3, 1e-6  #: of a test statistic, if the distribution is the right one
CONFIG = {
    "class_name": "EDMPrecond",
    "img_resolution": 4,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def card(D: int | None, channels: int = 1, resolution: int = 2) -> Card:
    return dataclasses.replace(
        make_card(), channels=channels, resolution=resolution, pfgmpp=D, guidance=None
    )


def draws(D: int | None, sigma: float = 3.0) -> Tensor:
    """(5000, 4) states of four pixels, in units of sigma."""
    x = start(card(D), SeedNoise(SEEDS), sigma, torch.float64, CPU)
    return x.flatten(1) / sigma


def fits(sample: Tensor, distribution: stats.distributions.rv_frozen) -> float:
    """Probability of a Kolmogorov-Smirnov distance this large."""
    return float(stats.kstest(sample.numpy(), distribution.cdf).pvalue)


@pytest.mark.parametrize(("a", "b"), [(2.0, 5.0), (1536.0, 1024.0), (0.5, 0.5)])
def test_beta_draws_follow_their_distribution(a: float, b: float) -> None:
    drawn = SeedNoise(SEEDS).beta("norm", a, b)
    assert drawn.shape == (5000,) and drawn.dtype == torch.float64
    mean, var = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert abs(float(drawn.mean()) - mean) < 5 * math.sqrt(var / 5000)
    kurtosis = float(stats.beta(a, b).stats("k"))
    assert abs(float(drawn.var()) / var - 1) < 5 * math.sqrt((kurtosis + 2) / 5000)
    assert fits(drawn, stats.beta(a, b)) > LIKELY
    assert fits(drawn, stats.beta(a, b * 1.2)) < UNLIKELY


def test_beta_draws_belong_to_seed_and_name() -> None:
    whole = SeedNoise(range(10)).beta(("latent", "norm"), 2, 3)
    parts = [SeedNoise([seed]).beta(("latent", "norm"), 2, 3) for seed in range(10)]
    assert torch.equal(torch.cat(parts), whole)
    other = SeedNoise(SEEDS).beta("other", 2, 3), SeedNoise(SEEDS).beta("norm", 2, 3)
    assert abs(np.corrcoef(*other)[0, 1]) < 5 / math.sqrt(5000)
    assert SeedNoise([0]).beta("norm", 1536, 1024).item() == 0.605551187842722
    assert SeedNoise([]).beta("norm", 1, 1).shape == (0,)


@pytest.mark.parametrize("D", [3, 16, 2048])
def test_start_has_the_norms_and_directions_of_the_field(D: int) -> None:
    """``|x|^2 / (n sigma^2)`` has the F distribution of n and D degrees; each pixel Student's t."""
    x = draws(D)
    norm = x.norm(dim=1)
    assert fits(norm**2 / 4, stats.f(4, D)) > LIKELY
    assert fits(norm**2 / 4, stats.f(5, D + 1)) < UNLIKELY
    for pixel in x.T:
        assert fits(pixel, stats.t(D)) > LIKELY
    # Uniform directions, whatever the norm: second moments 1/n, fourth 3 / (n (n + 2)).
    unit = x / norm[:, None]
    error = 5 / math.sqrt(5000)
    assert float((unit.T @ unit / 5000 - torch.eye(4) / 4).abs().max()) < error / 4
    assert float(((unit**4).mean(0) - 3 / 24).abs().max()) < error / 4
    far = norm > norm.median()
    assert float((unit[far].mean(0) - unit[~far].mean(0)).abs().max()) < 2 * error


def test_prior_of_an_image_has_the_closed_form_moments() -> None:
    """CIFAR-10's n = 3072 with the published D = 2048."""
    n, D, sigma = 3072, 2048, 80.0
    x = start(card(D, 3, 32), SeedNoise(range(300)), sigma, torch.float32, CPU)
    assert x.shape == (300, 3, 32, 32) and x.dtype == torch.float32
    squares = (x.double() / sigma).flatten(1).square().sum(1)
    F = stats.f(n, D)
    assert abs(float(squares.mean()) / n - D / (D - 2)) < 5 * F.std() / math.sqrt(300)
    assert fits(squares / n, F) > LIKELY
    assert fits(squares / n, stats.f(n, 1e9)) < 1e-4  # norms of a Gaussian hardly differ


def test_many_dimensions_are_gaussian() -> None:
    """D to infinity, in distribution; and the same tests tell D = 3 apart."""
    for D, close in ((10**9, True), (None, True), (3, False)):
        x = draws(D)
        for p in (fits(x.norm(dim=1), stats.chi(4)), fits(x[:, 0], stats.norm())):
            assert (p > LIKELY) if close else (p < UNLIKELY)
    squares = draws(10**9).square().sum(1)
    assert abs(float(squares.mean()) - 4) < 5 * math.sqrt(8 / 5000)


@pytest.mark.parametrize("D", [None, 64])
def test_states_belong_to_their_seeds(D: int | None) -> None:
    own, seeds = card(D, 3, 8), [5, 0, 123456789012]
    whole = start(own, SeedNoise(seeds), 80.0, torch.float64, CPU)
    for i, seed in enumerate(seeds):
        alone = start(own, SeedNoise([seed]), torch.tensor(80.0), torch.float64, CPU)
        assert float((alone[0] - whole[i]).abs().max()) < 1e-12
    narrow = start(own, SeedNoise(seeds), 80.0, torch.float32, CPU)
    assert float((narrow - whole).abs().max()) < 1e-4
    named = unit_noise(own, SeedNoise(seeds), ("restart", 0), torch.float64, CPU)
    assert float((named - whole / 80).abs().max()) > 0.5
    ratio = named.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1) * 80
    assert float((ratio - 1).abs().min()) > 1e-4  # a draw of its own for the norm, too
    if D is None:
        gaussian = SeedNoise(seeds).normal("latent", own.shape, torch.float64)
        assert torch.equal(whole, gaussian * 80.0)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {k: v.clone() for k, v in build(CONFIG).state_dict().items()}


def training_state(path: Path, **attributes: object) -> Path:
    """What PFGM++ publishes: ``D`` is an attribute of the network, not one of its settings."""
    settings = {k: v for k, v in CONFIG.items() if k != "class_name"}
    net = published.network("EDMPrecond", settings, weights(), **attributes)
    with published.pretended():
        torch.save({"net": net, "ema": net, "optimizer_state": {"state": {}}}, path)
    return path


def test_training_state_brings_its_dimensions(tmp_path: Path) -> None:
    path = training_state(tmp_path / "training-state.pt", D=2048, sigma_min=0.0)
    own = describe_edm("mine", path)
    assert (own.pfgmpp, own.config["D"]) == (2048, 2048)
    assert (own.sigma_min, own.sigma_max, own.bottleneck) == (0.002, 80, "2x2_block0")
    model = load_edm(own, Files(path), CPU, torch.float32)
    assert model.card == own
    # In terms of sigma the network and what stands around it are EDM's.
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor(0.7)
    plain = build(CONFIG).eval().requires_grad_(False)  # as loaded: it may choose the kernels
    plain.load_state_dict(weights())
    assert torch.equal(model.bind()(x, sigma).x0, plain(x, sigma).x0)
    # ... and the start is not.
    n, noise = 16, SeedNoise(range(400))
    squares = start(model.card, noise, 1.0, torch.float64, CPU).flatten(1).square().sum(1)
    assert fits(squares / n, stats.f(n, 2048)) > LIKELY
    converted = tmp_path / "converted.safetensors"
    save_file(weights(), converted, {"config": json.dumps(own.config)})
    assert describe_edm("mine", converted).pfgmpp == 2048


def test_files_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    path = training_state(tmp_path / "state.pt", D=128)
    own = describe_edm("mine", path)
    for asked, has in ((2048, "0 classes and the D = 2048 of PFGM"), (None, "0 classes; choose")):
        wrong = dataclasses.replace(own, pfgmpp=asked)
        with pytest.raises(UserError, match=f"0 classes and the D = 128 of PFGM.*where.* {has}"):
            load_edm(wrong, Files(path), CPU, torch.float32)
    gaussian = training_state(tmp_path / "plain.pt")
    with pytest.raises(UserError, match="0 classes where 'mine' has .* the D = 128 of"):
        load_edm(own, Files(gaussian), CPU, torch.float32)
    for D, message in ((0, "D is 0"), ("many", "settings that make no network"), (7.5, "D is 7.5")):
        bad = training_state(tmp_path / "bad.pt", D=D)
        with pytest.raises(UserError, match=message):
            describe_edm("mine", bad)
