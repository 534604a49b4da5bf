"""NS solvers in closed form: on Gaussian data the best rows are known, and found."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoisers.analytic import GaussianDenoiser
from ns.calibrate import Latents, calibrate
from ns.coordinates import WhitenedTable
from ns.losses import spectral
from ns.search import final_error, middle_times, prior_table, search_times
from ns.spectrum import SpectralNorm, radial_mean
from runtime.dist import world
from solvers.driver import Meter, integrate
from solvers.grids import get_grid
from solvers.registry import make_solver
from teachers.curves import Curves
from tests.processes import together

HIGH, LOW = 20.0, 0.02
SHAPE = (2, 4, 4)
VARIANCES = torch.linspace(0.1, 4.0, 32, dtype=torch.float64).reshape(SHAPE)
PLAIN = SpectralNorm(torch.ones(4, 4, dtype=torch.float64))
LOSS = spectral(PLAIN)


def denoiser() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, VARIANCES)


def curves(count: int = 24, seed: int = 0, nodes: int = 40) -> Curves:
    """Exact solutions at the nodes of a fine grid."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    x = (VARIANCES + HIGH**2).sqrt() * noise
    times = get_grid("polynomial", nodes, LOW, HIGH)
    states = torch.stack([denoiser().solution(x, HIGH, t) for t in times])
    x0 = torch.stack([denoiser()(s, t).x0 for s, t in zip(states, times, strict=True)])
    return Curves(times, states, x0)


def latents(count: int = 24, seed: int = 0) -> Latents:
    return Latents([curves(count, seed)], [Meter(denoiser())])


def test_states_between_nodes_are_those_of_the_solution() -> None:
    """Cubic Hermite polynomials: the error falls with the fourth power of the width."""
    errors = []
    for nodes in (20, 40):
        fine = curves(4, nodes=nodes)
        exact = denoiser().solution(fine.x[0], HIGH, 0.7)
        errors.append(float((fine.at(0.7) - exact).abs().max()))
    assert errors[1] < 1e-4 and 8 < errors[0] / errors[1] < 40
    assert torch.allclose(fine.at(float(fine.times[3])), fine.x[3], atol=1e-13)
    with pytest.raises(ValueError, match="no state at 30"):
        fine.at(30.0)


def test_a_row_is_the_least_squares_solution() -> None:
    """Row by row against numpy's lstsq on the columns of the table's own walk."""
    fit = latents()
    prior = prior_table([7.0, 1.5, 0.3], HIGH, LOW)
    table = calibrate(prior, fit, PLAIN).table
    (fine,), seen = fit.curves, [fit.curves[0].x[0]]
    for k, row in enumerate(table.ragged):
        target = fine.images if k == 3 else fine.at(float(prior.times[k]))
        columns = torch.stack([part.flatten() for part in seen], dim=1)
        best = torch.linalg.lstsq(columns, target.flatten()[:, None]).solution[:, 0]
        found, least = (
            float((columns @ weights - target.flatten()).square().mean())
            for weights in (torch.tensor(row, dtype=torch.float64), best)
        )
        assert found == pytest.approx(least, rel=1e-3, abs=1e-12)
        state = (columns @ torch.tensor(row, dtype=torch.float64)).reshape(seen[0].shape)
        if k < 3:
            seen.append(denoiser()(state, prior.times[k]).x0)


def test_calibration_beats_the_solvers_on_its_nodes_on_other_latents() -> None:
    fit, other = latents(), latents(seed=1)
    prior = prior_table([7.0, 2.0, 0.6, 0.15], HIGH, LOW)
    table = calibrate(prior, fit, PLAIN).table
    assert final_error(table, other, LOSS) < 0.3 * final_error(prior, other, LOSS)
    euler = integrate(
        make_solver("euler"), denoiser(), other.curves[0].x[0], get_grid("polynomial", 5, LOW, HIGH)
    )
    error = (euler.x[-1] - other.curves[0].images).square().mean().sqrt()
    assert final_error(table, other, LOSS) < 0.2 * float(error)


def test_as_many_variances_as_unknowns_are_solved_exactly() -> None:
    """The last row has K + 1 weights, which fit K + 1 eigenvalues whatever the times."""
    variances = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    exact = GaussianDenoiser(0.0, variances)
    generator = torch.Generator().manual_seed(0)
    x = 20 * torch.randn(8, 3, 2, 2, generator=generator, dtype=torch.float64)
    times = get_grid("polynomial", 30, LOW, HIGH)
    states = torch.stack([exact.solution(x, HIGH, t) for t in times])
    fine = Curves(
        times, states, torch.stack([exact(s, t).x0 for s, t in zip(states, times, strict=True)])
    )
    norm = SpectralNorm(torch.ones(2, 2, dtype=torch.float64))
    found = calibrate(prior_table([5.0, 0.5], HIGH, LOW), Latents([fine], [Meter(exact)]), norm)
    assert float(found.errors[-1]) < 1e-4 * float(fine.images.square().mean().sqrt())


def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    prior = prior_table([7.0, 1.5], HIGH, LOW)
    parts = [curves(8, seed) for seed in (0, 1)]

    def work() -> None:
        with world("cpu") as here:
            found = calibrate(
                prior, Latents([parts[here.rank]], [Meter(denoiser())]), PLAIN, here.sum_
            )
            torch.save((found.table.rows, found.errors), tmp_path / f"{here.rank}.pt")

    done = together(work, tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    whole = calibrate(prior, Latents(parts, [Meter(denoiser())] * 2), PLAIN)
    for rank in (0, 1):
        rows, errors = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(rows, whole.table.rows, rtol=1e-6, atol=1e-9)
        assert torch.allclose(errors, whole.errors, rtol=1e-6)


def test_the_search_lowers_the_error_on_kept_out_latents() -> None:
    seen: list[float] = []
    times = search_times(2, latents(), latents(12, seed=2), PLAIN, 25, watch=seen.append)
    assert times == sorted(times, reverse=True) and all(LOW < t < HIGH for t in times)
    assert len(seen) == 25 == len(set(seen)) and min(seen[2:]) < 0.9 * min(seen[:2])


@pytest.mark.parametrize("calls", [1, 3, 10])
def test_the_first_guess_is_inside_the_models_levels_whatever_they_are(calls: int) -> None:
    for low, high in ((0.002, 80.0), (0.5, 2.0)):
        times = middle_times(calls, low, high)
        ratios = [a / b for a, b in pairwise(times)]
        assert len(times) == calls and low < times[-1] <= times[0] < high
        assert ratios == pytest.approx([ratios[0]] * (calls - 1)) if ratios else calls == 1
    assert math.prod(middle_times(calls + 1, 1e-4, 1e4)) == pytest.approx(1)


def test_whitened_coordinates_move_the_state_by_the_calibration_error() -> None:
    """A unit step in any direction of a row changes its state by e (root mean square)."""
    fit = latents()
    calibration = calibrate(prior_table([7.0, 1.5], HIGH, LOW), fit, PLAIN)
    whitened = WhitenedTable.around(calibration)
    assert torch.equal(whitened.table().rows, calibration.table.rows)
    *_, before = whitened.table().states(denoiser(), fit.curves[0].x[0])
    for direction in torch.eye(3, dtype=torch.float64):
        with torch.no_grad():
            whitened.delta[-1] = direction
        *_, after = whitened.table().states(denoiser(), fit.curves[0].x[0])
        moved = (after - before).detach().square().mean().sqrt().item()
        assert moved == pytest.approx(float(calibration.errors[-1]), rel=0.02)


def test_gradients_are_those_of_finite_differences() -> None:
    """Through every call, in the rows and in the times."""
    fit = latents(4)
    whitened = WhitenedTable.around(calibrate(prior_table([7.0, 1.5], HIGH, LOW), fit, PLAIN))

    def loss() -> Tensor:
        *_, image = whitened.table().states(denoiser(), fit.curves[0].x[0])
        return (image - fit.curves[0].images).square().mean()

    delta, shifts = torch.autograd.grad(loss(), [whitened.delta, whitened.shifts])
    for parameter, gradient in ((whitened.delta, delta), (whitened.shifts, shifts)):
        for index in (
            torch.ones_like(parameter).tril().nonzero() if parameter.ndim > 1 else range(2)
        ):
            at = tuple(index.tolist()) if parameter.ndim > 1 else index
            sides = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    parameter[at] += step
                sides.append(float(loss().detach()))
                with torch.no_grad():
                    parameter[at] -= step
            slope = (sides[0] - sides[1]) / 2e-4
            assert float(gradient[at]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_the_norm_of_white_noise_is_its_variance_and_filters_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64).cumsum(-1).cumsum(-2)
    )
    norm = SpectralNorm.of(images.split(16), 0.7)
    noise = torch.randn(4000, 1, 8, 8, generator=generator, dtype=torch.float64)
    assert float(norm.weights.mean()) == pytest.approx(1)
    assert float(norm(noise).mean()) == pytest.approx(1, abs=0.01)
    power = torch.fft.fft2(noise[:4], norm="ortho").abs().square()
    assert torch.allclose(norm(noise[:4]), (power * norm.weights).mean((1, 2, 3)))
    assert float(norm.weights[0, 0]) < float(norm.weights[4, 4])  # fine structure counts more
    assert torch.allclose(SpectralNorm.of([images], 0.0)(noise), noise.square().mean((1, 2, 3)))


def test_rings_keep_what_is_isotropic() -> None:
    y, x = torch.fft.fftfreq(8)[:, None], torch.fft.fftfreq(8)[None]
    ring = (torch.hypot(y, x) * 8).round().double()
    assert torch.equal(radial_mean(ring), ring)
    uneven = ring + torch.randn(
        8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert float(radial_mean(uneven).sum()) == pytest.approx(float(uneven.sum()))
