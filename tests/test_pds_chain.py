"""The chain of PDS: the recorded run, units, step sizes, neighbours, evaluations."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser, MixtureDenoiser
from pds.chain import Chain, langevin, langevin_step, ve_levels
from pds.operators import Preconditioner
from plans.process import ForwardProcess
from solvers.driver import Meter
from solvers.types import Denoised
from tests.pds_problems import SHAPE, draw, preconditioners, random_masks
from tests.tensors import gap


def named(batch: int = 3, seed: int = 0) -> Callable[[tuple], Tensor]:
    """Draws that belong to a sample and a name."""

    def normal(name: tuple) -> Tensor:
        key = sum(ord(c) * 31**i for i, c in enumerate(repr(name))) % 2**31
        return torch.stack([draw(*SHAPE, seed=seed + key + b) for b in range(batch)])

    return normal


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser(draw(2, *SHAPE, seed=5), 0.3)


def run(chain: Chain, x: Tensor, normal: Callable[[tuple], Tensor] | None = None) -> list[Tensor]:
    return list(chain.visit(Meter(mixture()), x, ForwardProcess(normal or named(len(x)))))


def test_recorded_run(golden) -> None:
    """Both masks, steps averaged over the batch; corrector before predictor in every iteration."""
    file, problem = golden("pds"), golden("denoiser")
    freq, space = (torch.from_numpy(file[f"{kind}_mask_raw"][0]) for kind in ("freq", "space"))
    operators = Preconditioner.of(freq, space, 5.0, real_part_trick=True)
    random = np.random.RandomState(5)
    sizes: list[int] = []

    class Told(MixtureDenoiser):
        def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
            network_sigma.append(float(sigma))
            return super().__call__(x, sigma)

    def noise(name: tuple = ()) -> Tensor:
        sizes.append(len(name))
        return torch.from_numpy(random.randn(4, 3, 8, 8))

    network_sigma: list[float] = []
    levels, labels = ve_levels(20, 0.01, 50.0, eps=5e-4)
    assert gap(levels.flip(0), torch.from_numpy(file["discrete_sigmas_N20_f64"])) < 1e-10
    chain = Chain(levels, labels, operators, snr=0.16, n_steps=1, batch_coupled=True)
    denoiser = Told(torch.from_numpy(problem["means"]), 0.25)
    states = list(chain.visit(Meter(denoiser), 50 * noise(), ForwardProcess(noise)))
    recorded = {key: torch.from_numpy(file[f"both|N20|f64|{key}"]) for key in
                ("x", "x_mean", "predictor0_x", "predictor1_x")}  # fmt: skip
    assert gap(torch.tensor(network_sigma), torch.from_numpy(file["both|N20|f64|labels"])) < 1e-5
    assert gap(states[0], recorded["predictor0_x"]) < 1e-6
    assert gap(states[1], recorded["predictor1_x"]) < 1e-6
    assert gap(states[-1], recorded["x_mean"]) < 1e-6
    with_noise = states[-1] + 0.01 * operators.noise(noise())  # published beside the mean
    assert gap(with_noise, recorded["x"]) < 1e-6
    assert sizes[1:5] == [3, 2, 3, 2]  # ("corrector", i, k), ("predictor", i)


def test_levels_are_geometric_and_the_network_is_told_a_hair_more() -> None:
    levels, network_sigma = ve_levels(1000, 0.002, 80.0)
    ratio = torch.tensor((0.002 / 80) ** (1 / 999), dtype=torch.float64)
    assert gap(levels[1:] / levels[:-1], ratio) < 1e-12
    assert network_sigma[0] == 80 and 1 < network_sigma[-1] / levels[-1] < 1.001
    assert torch.equal(*ve_levels(50, 0.01, 50.0, eps=0.0))
    chain = Chain(levels, network_sigma)
    assert [chain.start, *chain.times] == [*levels.tolist(), 0.0]


def test_the_chain_is_the_same_in_the_units_of_the_published_models() -> None:
    """Their data lie in [0, 1], ours in [-1, 1]: y = (x + 1) / 2, and sigma halves.

    Starts are those of centred noise in either; a mask whose largest entry is the zero frequency
    leaves a constant alone.
    """
    freq = random_masks()[0]
    freq[:, 0, 0] = freq.max() + 1
    operators = Preconditioner.of(freq, None, 5.0)
    means = draw(2, *SHAPE, seed=5)
    ours = Chain(*ve_levels(30, 0.02, 100.0), operators)
    theirs = Chain(*ve_levels(30, 0.01, 50.0), operators)
    x = 100 * draw(3, *SHAPE)
    one = list(ours.visit(Meter(MixtureDenoiser(means, 0.3)), x, ForwardProcess(named())))
    two = list(
        theirs.visit(
            Meter(MixtureDenoiser((means + 1) / 2, 0.15)), (x + 1) / 2, ForwardProcess(named())
        )
    )
    for a, b in zip(one, two, strict=True):
        assert gap((a + 1) / 2, b) < 1e-10 * float(x.abs().max())


def test_the_last_state_is_the_denoised_one() -> None:
    """Without preconditioning the last predictor lands on D (Tweedie), as given at the level."""
    levels, _ = ve_levels(4, 0.01, 50.0)
    meter = Meter(mixture())
    *_, before, last = Chain(levels, levels, n_steps=0).visit(
        meter, draw(3, *SHAPE), ForwardProcess(named())
    )
    assert gap(last, mixture()(before, levels[-1]).x0) < 1e-12


@pytest.mark.parametrize("kind", ["plain", "freq", "space", "both"])
def test_a_sample_does_not_depend_on_its_neighbours(kind: str) -> None:
    chain = Chain(*ve_levels(10, 0.01, 50.0), preconditioners(1.5)[kind])
    x = 50 * draw(3, *SHAPE)
    whole = run(chain, x)[-1]
    alone = run(chain, x[:1])[-1]
    assert gap(whole[:1], alone) < 1e-10
    assert gap(whole[0], whole[1]) > 0.1


def test_coupled_steps_do_depend_on_neighbours() -> None:
    """Why ``--batch_coupled`` is refused where a run has more than one batch."""
    chain = Chain(*ve_levels(10, 0.01, 50.0), batch_coupled=True)
    x = 50 * draw(3, *SHAPE)
    assert gap(run(chain, x)[-1][:1], run(chain, x[:1])[-1]) > 1e-3
    single = Chain(chain.levels, chain.network_sigma)
    assert gap(run(chain, x[:1])[-1], run(single, x[:1])[-1]) < 1e-12  # alone they agree


def test_a_step_is_that_of_its_own_norms() -> None:
    """2 (snr |z| / |g|)^2, for the batch 2 (snr mean |z| / mean |g|)^2."""
    z, g = torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2)
    z[0, 0, 0], z[1, 0, 0] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])
    g[0, 0, 0], g[1, 0, 0] = torch.tensor([0.0, 10.0]), torch.tensor([2.0, 0.0])
    assert torch.allclose(langevin_step(g, z, 0.1).flatten(), torch.tensor([0.005, 0.005]))
    z[1] *= 4
    assert torch.allclose(langevin_step(g, z, 0.1).flatten(), torch.tensor([0.005, 0.08]))
    coupled = langevin_step(g, z, 0.1, coupled=True)
    assert coupled.shape == (1, 1, 1, 1) and torch.allclose(coupled, torch.tensor(0.02 * 0.5625))


def test_the_corrector_does_not_see_the_scale_of_the_preconditioner() -> None:
    """A to 3 A and B to 9 B: the step shrinks by 9, and the same state comes out."""
    x, g, z = draw(3, *SHAPE), draw(3, *SHAPE, seed=1), draw(3, *SHAPE, seed=2)
    once = langevin(x, g, z, langevin_step(g, z, 0.2))
    scaled = langevin(x, 9 * g, 3 * z, langevin_step(9 * g, 3 * z, 0.2))
    assert gap(once, scaled) < 1e-12
    assert gap(once, x) > 0.01


def test_without_the_predictor_langevin_steps_alone_go_from_level_to_level() -> None:
    """The step that brings the state of one level to the next one is left out, to the last."""
    levels, network = ve_levels(5, 0.01, 50.0)
    operators, model, normal = preconditioners(1.5)["both"], mixture(), named()
    chain = Chain(levels, network, operators, snr=0.2, n_steps=2, predictor=False)
    assert chain.times == levels.tolist() and "predictor" not in str(chain)
    start = 50 * draw(3, *SHAPE)
    states = list(chain.visit(Meter(model), start, ForwardProcess(normal)))
    x = operators.noise(start)
    for i, level in enumerate(network):
        for k in range(2):
            g = operators.drift((model(x, level).x0 - x) / level**2)
            z = operators.noise(normal(("corrector", i, k)))
            step = 2 * 0.2**2 * (z**2).sum((1, 2, 3)) / (g**2).sum((1, 2, 3))
            step = step[:, None, None, None]
            x = x + step * g + (2 * step).sqrt() * z
        assert gap(states[i], x) < 1e-12 * float(x.abs().max())


@pytest.mark.parametrize(("n_steps", "predictor"), [(0, True), (1, True), (3, True), (2, False)])
def test_planned_evaluations_are_metered_and_draws_have_their_own_names(
    n_steps: int, predictor: bool
) -> None:
    chain = Chain(*ve_levels(7, 0.01, 50.0), n_steps=n_steps, predictor=predictor)
    for cost in (1, 2):
        meter = Meter(GaussianDenoiser(0.0, 1.0, cost=cost))
        names: list[tuple] = []

        def normal(name: tuple, names: list[tuple] = names) -> Tensor:
            names.append(name)
            return draw(3, *SHAPE)

        states = list(chain.visit(meter, draw(3, *SHAPE), ForwardProcess(normal)))
        assert meter.nfe == chain.nfe(cost) == 7 * (n_steps + predictor) * cost
        assert len(states) == len(chain.times)
        assert len(set(names)) == len(names) == 7 * n_steps + 6 * predictor
