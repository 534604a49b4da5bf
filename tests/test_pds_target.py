"""The corrector of PDS keeps its target, in closed form on Gaussians, and how fast it gets there.

On a Gaussian every update with a fixed step is affine, so its matrix, read off the code, carries
the mean and the covariance of all chains exactly.  Sampled chains stand beside that.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from pds.chain import langevin
from pds.operators import Preconditioner
from tests.pds_problems import SHAPE, SIZE, draw, matrix, preconditioners, random_masks
from tests.tensors import gap

KINDS = ("freq", "space", "both")


class Target(NamedTuple):
    """A Gaussian, and its score through a denoiser of ours at half its smallest deviation."""

    mean: Tensor  #: (D,)
    cov: Tensor  #: (D, D)

    def score(self) -> Callable[[Tensor], Tensor]:
        sigma = (torch.linalg.eigvalsh(self.cov).min() / 4).sqrt()
        inner = self.cov - sigma**2 * torch.eye(SIZE, dtype=torch.float64)
        denoiser = GaussianDenoiser.from_covariance(self.mean.reshape(SHAPE), inner)
        return lambda x: (denoiser(x, sigma).x0 - x) / sigma**2

    def whitened(self, cov: Tensor) -> Tensor:
        root = torch.linalg.cholesky(self.cov)
        half = torch.linalg.solve_triangular(root, cov, upper=False)
        return torch.linalg.solve_triangular(root, half.T, upper=False)


class Langevin(NamedTuple):
    """One step of the corrector with a fixed step size, as it acts on moments."""

    pull: Tensor  #: (D, D): offsets from the mean
    shake: Tensor  #: (D, D): noise

    @classmethod
    def of(cls, target: Target, operators: Preconditioner, step: float) -> "Langevin":
        mean, score = target.mean.reshape(SHAPE), target.score()

        def pull(x: Tensor) -> Tensor:
            g = operators.drift(score(x + mean))
            return langevin(x + mean, g, torch.zeros_like(x), step) - mean

        def shake(z: Tensor) -> Tensor:
            at_mean = mean.expand(z.shape)
            return langevin(at_mean, 0 * z, operators.noise(z), step) - mean

        return cls(matrix(pull), matrix(shake))

    def limit(self) -> Tensor:
        """The covariance after very many steps, by doubling."""
        pull, cov = self.pull, self.shake @ self.shake.T
        for _ in range(40):
            cov, pull = cov + pull @ cov @ pull.T, pull @ pull
        return cov

    def after(self, steps: int, cov: Tensor) -> tuple[Tensor, Tensor]:
        """(pull of all steps, covariance) after that many steps from ``cov``."""
        power, limit = torch.linalg.matrix_power(self.pull, steps), self.limit()
        return power, limit + power @ (cov - limit) @ power.T


def stiffness(target: Target, operators: Preconditioner) -> Tensor:
    """H = A^T Sigma^-1 A: what the chain is stiff in, in the coordinates A^-1 x."""
    a = matrix(operators.noise)
    return a.T @ torch.linalg.solve(target.cov, a)


def condition(symmetric: Tensor) -> float:
    values = torch.linalg.eigvalsh(symmetric)
    return float(values.max() / values.min())


def random_covariance(condition: float, seed: int = 3) -> Tensor:
    """Shares no basis with pixels or frequencies."""
    basis = torch.linalg.qr(draw(SIZE, SIZE, seed=seed))[0]
    values = torch.logspace(0, math.log10(condition), SIZE, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_langevin_keeps_every_gaussian_whatever_the_masks(kind: str) -> None:
    """The limit of steps ``step`` is A H^-1 (1 - step H / 2)^-1 A^T: Sigma, but for the step size.

    In the coordinates that whiten Sigma that is a factor of 1 / (1 - step h / 2) along the
    eigenvectors, for every A; so the target is kept as the step goes to 0, and known before.
    """
    operators = preconditioners(1.5)[kind]
    target = Target(draw(SIZE, seed=4), random_covariance(50.0))
    h = torch.linalg.eigvalsh(stiffness(target, operators))
    a = matrix(operators.noise)
    for share in (0.5, 1e-2, 1e-6):
        step = float(share / h.max())
        chain = Langevin.of(target, operators, step)
        bend = torch.eye(SIZE, dtype=torch.float64) - step / 2 * stiffness(target, operators)
        closed = a @ torch.linalg.inv(bend @ stiffness(target, operators)) @ a.T
        kept = chain.pull @ closed @ chain.pull.T + chain.shake @ chain.shake.T
        assert gap(kept, closed) < 1e-11 * closed.abs().max()
        factors = torch.linalg.eigvalsh(target.whitened(chain.limit()))
        assert gap(factors, (1 / (1 - step / 2 * h))) < 1e-7
        assert torch.linalg.eigvals(chain.pull).abs().max() < 1  # so that it is reached
    assert gap(chain.limit(), target.cov) < 1e-5  # the last step: the target itself


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_the_contraction_per_step_is_that_of_the_stiffness(kind: str) -> None:
    """Errors shrink by max |1 - step h|, at best by (kappa - 1) / (kappa + 1)."""
    operators = preconditioners(1.5)[kind]
    target = Target(draw(SIZE, seed=4), random_covariance(50.0))
    h = torch.linalg.eigvalsh(stiffness(target, operators))
    for step in (float(0.2 / h.max()), float(2 / (h.min() + h.max()))):
        chain = Langevin.of(target, operators, step)
        rate = float(torch.linalg.eigvals(chain.pull).abs().max())
        assert rate == pytest.approx(float((1 - step * h).abs().max()), abs=1e-10)
    kappa = condition(stiffness(target, operators))
    assert rate == pytest.approx((kappa - 1) / (kappa + 1), abs=1e-10)


def matched(kind: str) -> tuple[Target, Preconditioner]:
    """An ill-conditioned target that the masks are made for: large gains where it is wide."""
    operators = preconditioners(1.1)[kind]
    a = matrix(operators.noise)
    return Target(draw(SIZE, seed=4), a @ random_covariance(2.0) @ a.T), operators


def steps_needed(target: Target, chain: Langevin) -> int:
    """Until the mean is 1e-3 of its start away and the covariance 2 %, from a distant start."""

    def there(steps: int) -> bool:
        power, cov = chain.after(steps, 100 * target.cov)
        near = target.whitened(cov) - torch.eye(SIZE, dtype=torch.float64)
        return bool(torch.linalg.matrix_norm(power, 2) < 1e-3 and near.abs().max() < 0.02)

    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if there(middle) else (middle + 1, high)
    return low


@pytest.mark.parametrize("kind", KINDS)
def test_both_chains_reach_the_target_and_the_preconditioned_one_sooner(kind: str) -> None:
    target, operators = matched(kind)
    needed, kappas = {}, {}
    for name, chosen in (("plain", Preconditioner()), ("pds", operators)):
        h = stiffness(target, chosen)
        step = float(0.02 / torch.linalg.eigvalsh(h).max())
        chain = Langevin.of(target, chosen, step)
        kappas[name], needed[name] = condition(h), steps_needed(target, chain)
        power, cov = chain.after(needed[name] * 4, 100 * target.cov)
        assert power.abs().max() < 1e-9  # the mean is there
        bias = torch.linalg.eigvalsh(target.whitened(cov)) - 1
        assert bias.min() > -1e-9 and bias.max() < 0.0102  # and so is the covariance
    print(f"\n{kind}: condition {kappas['plain']:.1f}, preconditioned {kappas['pds']:.1f}; "
          f"steps {needed['plain']}, preconditioned {needed['pds']}")  # fmt: skip
    assert kappas["plain"] > 20 and kappas["pds"] == pytest.approx(2, rel=1e-6)
    gain = needed["plain"] / needed["pds"]
    assert gain > 5 and gain == pytest.approx(kappas["plain"] / kappas["pds"], rel=0.35)


def test_sampled_chains_have_the_exact_moments() -> None:
    """1,500 chains through the same code: moments within 5 standard errors of the exact ones.

    After as many steps as the preconditioned chain takes, the plain one is still far away.
    """
    target, operators = matched("both")
    score = target.score()
    count, steps, generator = 1500, 80, torch.Generator().manual_seed(0)
    for chosen, arrives in ((operators, True), (Preconditioner(), False)):
        step = float(0.1 / torch.linalg.eigvalsh(stiffness(target, chosen)).max())
        x = torch.zeros(count, *SHAPE, dtype=torch.float64)
        for _ in range(steps):
            z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = langevin(x, chosen.drift(score(x)), chosen.noise(z), step)
        power, cov = Langevin.of(target, chosen, step).after(
            steps, torch.zeros(SIZE, SIZE).double()
        )
        mean = target.mean - power @ target.mean
        spread = cov.diagonal().sqrt()
        found = x.flatten(1)
        assert ((found.mean(0) - mean) / spread).abs().max() < 5 / count**0.5
        normalised = (torch.cov(found.T) - cov) / torch.outer(spread, spread)
        assert normalised.abs().max() < 5 * (2 / count) ** 0.5
        off = (torch.linalg.eigvalsh(target.whitened(torch.cov(found.T))) - 1).abs().max()
        assert off < 0.45 if arrives else off > 0.9


def test_an_uneven_mask_with_the_real_part_trick_loses_the_target() -> None:
    """Continuous time: B Sigma^-1 C + C Sigma^-1 B = 2 A A^T is solved by Sigma for B = A A^T."""
    target = Target(draw(SIZE, seed=4), random_covariance(5.0))
    off = {}
    masks = random_masks(even=False)
    for name, trick in (("ours", False), ("published", True)):
        operators = Preconditioner.of(*masks, 1.2, real_part_trick=trick)
        a, b = matrix(operators.noise), matrix(operators.drift)
        drift = b @ torch.linalg.inv(target.cov)
        found = torch.from_numpy(solve_continuous_lyapunov(drift.numpy(), (2 * a @ a.T).numpy()))
        off[name] = float((torch.linalg.eigvalsh(target.whitened(found)) - 1).abs().max())
    assert off["ours"] < 1e-9
    assert off["published"] > 0.05
