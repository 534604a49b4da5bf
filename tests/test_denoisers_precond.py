"""The four preconditionings of the EDM family against what their networks were trained to say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from denoisers.families.precond import EDMPrecond, IDDPMPrecond, build
from denoisers.families.precond_base import Precond
from denoisers.noise_schedules import DiscreteVP
from tests.tensors import gap

MEAN, VAR = 0.3, 0.09  # of the data; EDM assumes 0 and 0.25
TINY: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 2,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
KINDS = ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"]
LEVELS = [0.03, 0.2, 0.8, 3.0, 17.0, 70.0]  # inside the range of all four


def tiny(kind: str, **settings: Any) -> Precond:
    """Random weights, none of them zero, in float64."""
    torch.manual_seed(0)
    net = build({"class_name": kind, **TINY, **settings}).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.2)
    return net.cast(torch.float64)


def iddpm(**settings: Any) -> IDDPMPrecond:
    net = tiny("iDDPMPrecond", **settings)
    assert isinstance(net, IDDPMPrecond)
    return net


# What a perfect network says of N(MEAN, VAR), from the definition of its input and target alone.


def edm_says(x: Tensor, label: Tensor) -> Tensor:
    """The clean image less c_skip x, both at unit variance if the data's is 0.25."""
    sigma = (4 * label).exp()
    noisy = x * (sigma**2 + 0.25).sqrt()
    skip = 0.25 / (0.25 + sigma**2)  # of the least-squares fit of x0 by a multiple of x ...
    left = ((1 - skip) ** 2 * 0.25 + skip**2 * sigma**2).sqrt()  # ... and what that leaves over
    return (clean(noisy, sigma) - skip * noisy) / left


def noise_in(y: Tensor, alpha: Tensor) -> Tensor:
    """E[n | y] for y = alpha x0 + sqrt(1 - alpha^2) n."""
    rest = 1 - alpha**2
    return rest.sqrt() * (y - alpha * MEAN) / (alpha**2 * VAR + rest)


def vp_says(y: Tensor, label: Tensor) -> Tensor:
    t = label / 999
    return noise_in(y, (-(19.9 * t**2 / 4 + 0.1 * t / 2)).exp())


def ve_says(x: Tensor, label: Tensor) -> Tensor:
    sigma = 2 * label.exp()
    return sigma * -(x - MEAN) / (VAR + sigma**2)


def alphas_bar() -> Tensor:
    """Of the 1000 steps of the cosine schedule, least noise first: products of bounded ratios."""
    bare = (0.5 * math.pi * torch.arange(1001).double() / 1000 / 1.008).sin() ** 2
    return (bare[:-1] / bare[1:]).clamp(min=0.001).flip(0).cumprod(0)


def iddpm_says(y: Tensor, label: Tensor) -> Tensor:
    assert gap(label, label.round()) < 1e-3  # in this test: at the trained levels
    eps = noise_in(y, alphas_bar()[label.round().long()].sqrt())
    return torch.cat([eps, torch.full_like(eps, math.nan)], 1)  # variances, which nobody may read


def clean(x: Tensor, sigma: Tensor) -> Tensor:
    return (VAR * x + sigma**2 * MEAN) / (VAR + sigma**2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_makes_the_analytic_denoiser(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = dict(zip(KINDS, (edm_says, vp_says, ve_says, iddpm_says), strict=True))[kind]
    net = tiny(kind)
    shape = (-1, 1, 1, 1)
    monkeypatch.setattr(
        net, "network", lambda x, noise, *_: (says(x, noise.reshape(shape)), x[:, 0])
    )
    sigma = torch.tensor(LEVELS, dtype=torch.float64).reshape(shape)
    tolerance = 1e-12
    if isinstance(net, IDDPMPrecond):
        # The recursion in float32 shifts its lowest levels, and with them the noise, by 5e-4.
        sigma, tolerance = net.u[[3, 40, 400, 800, 950, 990, 999]].double().reshape(shape), 1e-4
    torch.manual_seed(1)
    x = MEAN + (VAR + sigma**2).sqrt() * torch.randn(len(sigma), 2, 8, 8, dtype=torch.float64)
    assert gap(net(x, sigma).x0, clean(x, sigma)) < tolerance
    one = net(x, sigma[2, 0, 0, 0])
    assert gap(one.x0, clean(x, sigma[2])) < tolerance * 100  # x was made for other levels


def test_edm_scales_keep_unit_variance_and_are_the_best() -> None:
    """Appendix B.6: the input and the target have variance 1, and no other c_skip has less."""
    net = EDMPrecond(8, 2, sigma_data=0.7, model_channels=8, channel_mult=[1], num_blocks=1)
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = net.coefficients(sigma)
    assert gap(c_in**2 * (sigma**2 + 0.49), torch.ones(6)) < 1e-14

    def left(skip: Tensor) -> Tensor:
        return (1 - skip) ** 2 * 0.49 + skip**2 * sigma**2

    assert gap(c_out**2 / left(c_skip), torch.ones(6)) < 1e-12
    assert bool((left(c_skip) < left(c_skip * 1.01)).all())
    assert bool((left(c_skip) < left(c_skip * 0.99)).all())
    assert gap((4 * c_noise).exp(), sigma) < 1e-12


def test_vp_label_is_the_time_of_the_level() -> None:
    """Back and forth; in float32 as well, where the textbook inverse loses all digits."""
    net = tiny("VPPrecond")
    t = torch.logspace(-5, 0, 60, dtype=torch.float64)
    sigma = torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()
    assert gap(net.coefficients(sigma).c_noise / (999 * t), torch.ones(60)) < 1e-12
    low = net.coefficients(sigma.float())
    assert low.c_noise.dtype == torch.float32
    assert gap(low.c_noise.double() / (999 * t), torch.ones(60)) < 1e-6
    other = tiny("VPPrecond", beta_d=7.0, beta_min=0.3, M=11, epsilon_t=0.01)
    sigma = torch.expm1(7.0 * t**2 / 2 + 0.3 * t).sqrt()
    assert gap(other.coefficients(sigma).c_noise, 10 * t) < 1e-12
    assert abs(other.sigma_min - math.sqrt(math.expm1(7e-4 / 2 + 3e-3))) < 1e-6
    assert abs(other.sigma_max - math.sqrt(math.expm1(3.8))) < 1e-5


def test_iddpm_levels_are_those_of_the_cosine_schedule() -> None:
    net = iddpm()
    exact = (1 / alphas_bar() - 1).sqrt()
    u = net.u.double().flip(0)
    assert u[0] == 0 and len(u) == 1001
    assert gap(u[1:] / exact, torch.ones(1000)) < 1e-3  # float32, as published
    assert gap((u[1:] / exact)[100:], torch.ones(900)) < 1e-5
    other = iddpm(M=50, C_1=0.01, C_2=0.02)
    bare = [math.sin(0.5 * math.pi * j / 50 / 1.02) ** 2 for j in range(51)]
    abar = 1.0
    for j in range(50, 0, -1):
        abar *= max(bare[j - 1] / bare[j], 0.01)
        assert abs(float(other.u[j - 1]) / math.sqrt(1 / abar - 1) - 1) < 1e-4


def test_iddpm_labels_are_those_of_the_nearest_level() -> None:
    """As published: label M - 1 - j of the level u_j nearest to sigma, the final 0 among them."""
    net = iddpm()
    u = net.u.double()
    whole = 999 - torch.arange(1001).double()
    assert gap(net.coefficients(u).c_noise, whole) == 0
    assert gap(net.coefficients(u[:-1].float()).c_noise.double(), whole[:-1]) == 0
    torch.manual_seed(3)
    sigma = (torch.rand(500, dtype=torch.float64) * 15 - 5.5).exp().float().double()
    nearest = torch.stack([(u - one).abs().argmin() for one in sigma])
    for shape in ((-1,), (-1, 1, 1, 1)):
        label = net.coefficients(sigma.reshape(shape)).c_noise
        assert torch.equal(label, (999 - nearest).double().reshape(shape))
    one = net.coefficients(sigma[7])  # alone as in a batch
    assert one.c_noise.shape == () and one.c_noise == 999 - nearest[7]
    assert net.coefficients(torch.tensor([1e-3, 1e6])).c_noise.tolist() == [-1, 999]


def test_iddpm_networks_see_the_nearest_level_unless_asked_otherwise() -> None:
    """The published formula around the network itself; interpolated, it says something else."""
    net, other = iddpm(), iddpm(interpolate=True)
    u = net.u.double()
    torch.manual_seed(4)
    for j in (100, 400, 700):
        sigma = 0.6 * u[j] + 0.4 * u[j + 1]
        x = torch.randn(2, 2, 8, 8, dtype=torch.float64) * (1 + sigma**2).sqrt()
        scaled, label = x / (1 + sigma**2).sqrt(), torch.tensor([999.0 - j])
        expected = x - sigma * net.model(scaled, label.double(), None, None)[0][:, :2]
        assert gap(net(x, sigma).x0, expected) < 1e-12 * float(sigma)
        assert gap(other(x, sigma).x0, expected) > 1e-4 * float(sigma)
        assert gap(other(x, u[j]).x0, net(x, u[j]).x0) < 1e-6 * float(sigma)
    with pytest.raises(ValueError, match="interpolate is 'yes', but it is true or false"):
        iddpm(interpolate="yes")


def test_iddpm_labels_are_whole_at_the_levels_and_between_them_in_between() -> None:
    net = iddpm(interpolate=True)
    u = net.u.double()
    whole = 999 - torch.arange(1000).double()
    assert gap(net.coefficients(u[:-1]).c_noise, whole) < 1e-9
    assert gap(net.coefficients(u[:-1].float()).c_noise.double(), whole) < 1e-2
    between = (u[1:-1] * u[:-2]).sqrt().requires_grad_()
    label = net.coefficients(between).c_noise
    assert bool(((label > whole[1:]) & (label < whole[:-1])).all())
    # linear in ln alpha: the rule by which DDPM's steps are made continuous elsewhere
    own = DiscreteVP(1 / (1 + u[:-1].flip(0) ** 2))
    assert gap(label, 1000 * own.sigma_inv(between.detach()) - 1) < 1e-8
    label.sum().backward()
    assert between.grad is not None and bool((between.grad > 0).all())
    ends = net.coefficients(torch.tensor([1e-4, 1e6], dtype=torch.float64)).c_noise
    assert ends.tolist() == [0, 999]


@pytest.mark.parametrize("name", ["vp_song", "ve_ncsnpp", "iddpm_dhariwal", "edm_ncsnpp_skip"])
def test_noise_levels_are_the_published_ones(name: str, golden_json: Callable[[str], Any]) -> None:
    entry = golden_json("net_configs")[name]
    config = {"class_name": entry["class"], "img_resolution": 32, "img_channels": 3}
    net = build(config | entry["kwargs"])
    recorded = (entry["sigma_min"], float(entry["sigma_max"]))
    # iDDPM's come from 1000 steps in float32, whose last digit depends on the machine
    assert (net.sigma_min, net.sigma_max) == pytest.approx(recorded, rel=1e-6)
    assert type(net).__name__.lower() == entry["class"].lower()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_x_and_sigma(kind: str) -> None:
    net = tiny(kind)
    torch.manual_seed(1)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    for shape in ((), (2, 1, 1, 1)):
        sigma = torch.full(shape, 0.8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, s: tuple(net(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
        )
    assert all(not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_inside_the_network(kind: str, dtype: torch.dtype) -> None:
    net = tiny(kind, use_fp16=True)
    torch.manual_seed(1)
    sigma = torch.tensor([0.05, 2.0, 60.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64) * (0.25 + sigma**2).sqrt()
    exact, labels = net(x, sigma), []
    net.cast(dtype)
    net.model.map_noise.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[0]))
    half = net(x, sigma)
    # what comes from the network is coarse, but not as coarse as a label of 999 in bfloat16
    error = gap(half.x0 / sigma, exact.x0 / sigma)
    assert 1e-6 < error < 0.15
    assert labels[0].dtype == torch.float32
    assert gap(labels[0].double(), net.coefficients(sigma).c_noise.flatten()) < 1e-3
    # what does not is as fine as the state: c_skip x at a level of almost no noise
    tiny_level = torch.tensor(1e-9, dtype=torch.float64)
    moved = net(x + 1e-9, tiny_level).x0 - net(x, tiny_level).x0
    assert gap(moved, 1e-9) < 5e-11


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_samples_have_no_augmentation(model_type: str) -> None:
    """No labels are the zero labels; others change the image."""
    net = tiny("EDMPrecond", augment_dim=9, label_dim=3, model_type=model_type)
    torch.manual_seed(1)
    x, sigma = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor(0.8)
    plain = net(x, sigma).x0
    assert gap(net(x, sigma, None, torch.zeros(2, 9)).x0, plain) < 1e-12
    assert gap(net(x, sigma, torch.zeros(2, 3), None).x0, plain) < 1e-12
    assert gap(net(x, sigma, None, torch.eye(9)[:2]).x0, plain) > 1e-3


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_labels_are_dropped_in_training_only(model_type: str) -> None:
    net = tiny("EDMPrecond", label_dim=3, label_dropout=0.5, dropout=0.0, model_type=model_type)
    x, sigma = torch.ones(64, 2, 8, 8, dtype=torch.float64), torch.tensor(0.8)
    labels = torch.eye(3)[[1] * 64]
    kept, dropped = net(x[:1], sigma, labels[:1]).x0, net(x[:1], sigma).x0
    assert gap(net(x, sigma, labels).x0, kept) < 1e-10
    trained = net.train()(x, sigma, labels).x0
    is_kept = (trained - kept).abs().amax((1, 2, 3)) < 1e-10
    is_dropped = (trained - dropped).abs().amax((1, 2, 3)) < 1e-10
    assert bool((is_kept ^ is_dropped).all())
    assert 16 < int(is_kept.sum()) < 48


def test_settings_that_make_no_network_are_refused() -> None:
    with pytest.raises(ValueError, match="'XPrecond' is not one of EDMPrecond"):
        build({"class_name": "XPrecond", **TINY})
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=f"D is {wrong}, but PFGM.. adds a whole number"):
            build({"class_name": "EDMPrecond", **TINY, "D": wrong})
    for kind, settings, message in (
        ("VEPrecond", {"sigma_min": 3.0, "sigma_max": 2.0}, "levels go from 3.0 up to 2.0"),
        ("EDMPrecond", {"sigma_min": math.nan}, "levels go from nan up to inf"),
        ("EDMPrecond", {"sigma_data": 0.0}, "sigma_data is 0.0, but a deviation is positive"),
        ("VPPrecond", {"M": 1}, "M is 1; the process needs two steps or more"),
        ("VPPrecond", {"beta_min": -0.1}, "beta_min = -0.1 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            build({"class_name": kind, **TINY, **settings})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        build({"class_name": "VEPrecond", **TINY, "colour": 1})
