"""What preconditioning does to the predictor, mode by mode on Gaussians: the whole chain.

A Gaussian whose covariance is diagonal in Fourier space stays one: a mode of variance ``lam`` and
gain ``b = R^2`` goes from level s to r by ``v -> (1 - b (s^2 - r^2) / u)^2 v + b (s^2 - r^2)``,
``u = lam + s^2``.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from pds.chain import Chain, ve_levels
from pds.masks import load_mask
from pds.operators import Preconditioner, mirrored, to_filter
from plans.process import ForwardProcess
from solvers.driver import Meter
from solvers.types import Denoised
from tests.pds_problems import draw, matrix
from tests.tensors import gap


def variances(
    lam: Tensor, gain: Tensor, levels: Tensor, n_steps: int = 0, snr: float = 0.16
) -> Tensor:
    """Of every mode, the last predictor without its noise, from ``b sigma_max^2``.

    Corrector steps depend on the norms of a sample, which in many dimensions are their means.
    """
    v = gain * levels[0] ** 2
    for s, r in zip(levels, [*levels[1:], torch.zeros_like(levels[0])], strict=True):
        u, down = lam + s**2, s**2 - r**2
        for _ in range(n_steps):
            step = 2 * snr**2 * gain.sum() / (gain**2 * v / u**2).sum()
            v = (1 - step * gain / u) ** 2 * v + 2 * step * gain
        v = (1 - down * gain / u) ** 2 * v + (down * gain if r else 0)
    return v


def pull(lam: Tensor, gain: Tensor, levels: Tensor) -> Tensor:
    """What the predictor leaves of an offset from the mean, per mode."""
    down = levels**2 - torch.cat([levels[1:], levels.new_zeros(1)]) ** 2
    return (1 - down[:, None, None, None] * gain / (lam + levels[:, None, None, None] ** 2)).prod(0)


def circulant(spectrum: Tensor) -> Tensor:
    """The covariance whose variances along the Fourier modes are ``spectrum`` (C, H, W), even."""
    return matrix(lambda x: torch.fft.ifft2(spectrum * torch.fft.fft2(x)).real, spectrum.shape)


def test_the_covariance_of_the_predictor_is_the_recursion() -> None:
    """Exactly: the final state is linear in each draw, so its matrices give the covariance."""
    shape = (1, 4, 4)
    spectrum, mask = draw(*shape, seed=1).exp(), draw(*shape, seed=2).abs()
    spectrum, mask = spectrum + mirrored(spectrum), mask + mirrored(mask)
    mean = draw(*shape, seed=3)
    meter = Meter(GaussianDenoiser.from_covariance(mean, circulant(spectrum)))
    levels, _ = ve_levels(12, 0.05, 20.0)
    for alpha in (None, 1.5):
        operators = Preconditioner.of(None if alpha is None else mask, None, alpha or 5.0)
        chain = Chain(levels, levels, operators, n_steps=0)

        def final(name: tuple, z: Tensor, chain: Chain = chain) -> Tensor:
            """Of unit noise ``z`` in the draw ``name`` and none in the others."""
            still = torch.zeros_like(z)
            x = levels[0] * z if name == ("latent",) else still
            *_, last = chain.visit(
                meter, x, ForwardProcess(lambda other, name=name: z if other == name else still)
            )
            return last

        rest = final(("no draw",), torch.zeros(1, *shape, dtype=torch.float64))
        cov = torch.zeros(16, 16, dtype=torch.float64)
        for name in [("latent",), *(("predictor", i) for i in range(11))]:
            linear = matrix(lambda z, name=name, rest=rest: final(name, z) - rest, shape)
            cov += linear @ linear.T
        gain = torch.ones(shape).double() if alpha is None else to_filter(mask, alpha) ** 2
        assert gap(cov, circulant(variances(spectrum, gain, levels))) < 1e-10
        plain = variances(spectrum, torch.ones(shape).double(), levels)
        assert (gap(variances(spectrum, gain, levels), plain) > 0.1) == (alpha is not None)
        left = circulant(pull(spectrum, gain, levels)) @ mean.flatten()
        assert gap(rest, mean - left.reshape(shape)) < 1e-10  # the start is centred on 0


def test_many_iterations_of_the_predictor_alone_shrink_a_mode_by_b_over_2b_minus_1() -> None:
    """The reverse SDE is half flow, half Langevin; B belongs to the second alone."""
    gain = torch.tensor([1.0, 1.25, 1.5625], dtype=torch.float64)
    lam = torch.full_like(gain, 0.3)
    levels, _ = ve_levels(4000, 1e-3, 1e3)
    found = variances(lam, gain, levels) / lam
    assert gap(found, gain / (2 * gain - 1)) < 5e-3
    # Corrector steps at every level bring it back: what is left is their own step size.
    corrected = variances(lam, gain, levels, n_steps=3, snr=0.05) / lam
    assert gap(corrected, torch.ones_like(gain)) < 0.02


def test_few_iterations_leave_too_much_noise_and_preconditioning_takes_it_back() -> None:
    """A mode without data, at levels that fall by a factor: v / r^2 settles at
    b / (2 b - 1 - b^2 S), S = 1 - r^2 / s^2, which is 1 / (1 - S) for the plain chain."""
    levels, _ = ve_levels(51, 0.01, 50.0)
    share = 1 - (levels[1] / levels[0]) ** 2
    for b in (1.0, 1.25, 1.5625):
        gain = torch.tensor([b], dtype=torch.float64)
        v = gain * levels[0] ** 2
        for s, r in zip(levels, levels[1:], strict=False):
            v = (1 - b * (s**2 - r**2) / s**2) ** 2 * v + b * (s**2 - r**2)
        settled = b / (2 * b - 1 - b**2 * share)
        assert float(v / levels[-1] ** 2) == pytest.approx(float(settled), rel=1e-6)
    assert float(1 / (1 - share)) > 1.4 > 1.15 > float(settled)  # 40 % too much, 15 % too much


@dataclass(eq=False)
class Textures:
    """A Gaussian with the power spectrum of CIFAR-10 (of the bundled mask), in [-1, 1] units."""

    spectrum: Tensor  #: (C, H, W) variance of each mode
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        wiener = self.spectrum / (self.spectrum + sigma**2)
        return Denoised(torch.fft.ifft2(wiener * torch.fft.fft2(x)).real, None)


def textures() -> tuple[Textures, Tensor]:
    mask = load_mask("freq", "bundled", "cifar10-small", (3, 32, 32))
    assert mask is not None
    spectrum = 4 * torch.expm1(mask.values) / 32**2
    spectrum[:, 0, 0] = spectrum[:, 0, 1]  # it holds the mean image as well, which is no variance
    return Textures(spectrum), mask.values


def test_sampled_chains_have_the_variances_of_the_recursion() -> None:
    """Predictor and corrector, 24 chains: powers in bands within 4 % of the recursion."""
    model, mask = textures()
    levels, _ = ve_levels(30, 0.02, 100.0)
    bands = model.spectrum.flatten().argsort().reshape(4, -1)
    for alpha in (None, 5.0):
        gain = torch.ones_like(mask) if alpha is None else to_filter(mask, alpha) ** 2
        operators = Preconditioner.of(None if alpha is None else mask, None, alpha or 5.0)
        chain = Chain(levels, levels, operators, n_steps=1)
        generator = torch.Generator().manual_seed(1)

        def normal(name: tuple, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(24, 3, 32, 32, generator=generator, dtype=torch.float64)

        *_, last = chain.visit(Meter(model), levels[0] * normal(()), ForwardProcess(normal))
        power = (torch.fft.fft2(last).abs().square() / 32**2).mean(0).flatten()
        wanted = variances(model.spectrum, gain, levels, n_steps=1).flatten()
        for band in bands[:3]:  # the widest modes are too few to average
            assert float(power[band].sum() / wanted[band].sum()) == pytest.approx(1, abs=0.04)


def test_pds_wins_below_a_hundred_iterations_and_loses_above() -> None:
    """Squared Wasserstein-2 distance to the target, as a share of its total variance."""
    model, mask = textures()
    gains = {"plain": torch.ones_like(mask), "PDS": to_filter(mask, 5.0) ** 2}
    off: dict[tuple[str, int, int], float] = {}
    print()
    for iterations in (1000, 200, 100, 50, 30):
        levels, _ = ve_levels(iterations, 0.02, 100.0)
        for n_steps in (0, 1):
            for name, gain in gains.items():
                v = variances(model.spectrum, gain, levels, n_steps)
                distance = (v.sqrt() - model.spectrum.sqrt()).square().sum()
                off[name, n_steps, iterations] = float(distance / model.spectrum.sum())
            shown = ", ".join(
                f"{name} {1e5 * off[name, n_steps, iterations]:.1f}" for name in gains
            )
            print(f"{iterations} iterations, {n_steps} corrector steps: {shown} (1e-5)")
    for n_steps in (0, 1):
        for iterations in (50, 30):
            assert off["PDS", n_steps, iterations] < 0.5 * off["plain", n_steps, iterations]
        for iterations in (1000, 200):
            assert off["PDS", n_steps, iterations] > 2 * off["plain", n_steps, iterations]
        assert off["PDS", n_steps, 30] < off["plain", n_steps, 50]
