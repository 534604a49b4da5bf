"""The synthetic experiment: distances, data, errors, and interrupted runs."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import toy.experiment
import toy.network
from denoisers.analytic import GaussianDenoiser
from denoisers.families.precond import build
from plans.plan import Jump
from runtime.errors import UserError
from runtime.record import RunRecord
from solvers.types import Denoised
from tools import restart_toy as script
from toy.data import Mixture, point_denoiser
from toy.distances import Cloud, PathErrors, Process, wasserstein1
from toy.experiment import Point, Results, Settings, run
from toy.network import recipe, train_network
from toy.processes import FAMILIES, Levels, candidates
from toy.report import Mean, claims, frontier, rows, table, write_report

ROOT = Path(__file__).resolve().parent.parent
LEVELS = Levels()
SMALL = Mixture(dims=5, components=3)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The distance


def test_in_one_dimension_the_matching_is_that_of_the_sorted_points() -> None:
    a, b = normal(0, 60, 1), 2 * normal(1, 60, 1) + 1
    sorted_pairs = (a.sort(0).values - b.sort(0).values).abs().mean()
    assert wasserstein1(a, b) == pytest.approx(float(sorted_pairs), rel=1e-12)
    assert wasserstein1(a, b) < 0.9 * float((a - b).abs().mean())


def test_a_translated_copy_is_as_far_as_its_translation() -> None:
    a, shift = normal(0, 40, 7, 1, 1), normal(1, 7, 1, 1)
    moved = (a + shift)[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    assert wasserstein1(a, moved) == pytest.approx(float(shift.norm()), rel=1e-12)
    assert wasserstein1(a, a.flip(0)) == 0


def test_no_matching_is_shorter() -> None:
    a, b = normal(0, 6, 3), normal(1, 6, 3)
    distance = torch.cdist(a, b)
    best = min(float(distance[range(6), p].mean()) for p in itertools.permutations(range(6)))
    assert wasserstein1(a, b) == pytest.approx(best, rel=1e-12)
    with pytest.raises(ValueError, match="cannot be matched"):
        wasserstein1(a, b[:5])


# The data


def test_the_closed_form_is_the_score_of_the_noised_mixture() -> None:
    """``(D - x) / t^2`` against autograd through torch's own mixture at level t."""
    mixture, t = Mixture(), 0.7
    x = normal(0, 8, 20).requires_grad_()
    means = mixture.means.flatten(1).double()
    deviation = math.hypot(mixture.std, t)
    density = MixtureSameFamily(
        Categorical(torch.ones(8, dtype=torch.float64)),
        Independent(Normal(means, torch.full_like(means, deviation)), 1),
    )
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    level = torch.tensor(t, dtype=torch.float64)
    closed = mixture.denoiser()(x.detach()[..., None, None], level).x0.flatten(1)
    assert ((closed - x.detach()) / t**2 - score).abs().max() < 1e-10 * score.abs().max()


def test_the_points_are_of_the_mixture() -> None:
    points = Mixture().sample(range(2000)).flatten(1)
    means = Mixture().means.flatten(1)
    within, component = torch.cdist(points, means).min(1)
    assert stats.chisquare(component.bincount(minlength=8)).pvalue > 1e-3
    assert stats.kstest((within / 0.15) ** 2, stats.chi2(20).cdf).pvalue > 1e-3
    assert torch.equal(points[7:9], Mixture().sample([7, 8]).flatten(1))
    assert float(points.std()) == pytest.approx(0.5, abs=0.05)  # EDM's sigma_data
    with pytest.raises(UserError, match="std is -1"):
        Mixture(std=-1)


def test_the_exact_cloud_is_the_data_convolved_with_noise() -> None:
    """Its projection on any line has the distribution function ``mean Phi((s - v y_i) / t)``."""
    data = SMALL.sample(range(400))
    cloud = Cloud.make(data, point_denoiser(data), 1, LEVELS.sigma_max, LEVELS.t_max)
    for k in range(3):
        line = torch.nn.functional.normalize(normal(k, 5), dim=0)
        centres = (data.flatten(1).double() @ line).numpy()
        projected = (cloud.exact.flatten(1).double() @ line).numpy()

        def distribution(s: Any, centres: Any = centres) -> Any:
            return stats.norm.cdf((s[:, None] - centres) / LEVELS.t_max).mean(1)

        assert stats.kstest(projected, distribution).pvalue > 1e-3
        assert stats.kstest(1.5 * projected, distribution).pvalue < 1e-3  # the test can fail


# The processes


@pytest.mark.parametrize("budget", [19, 31, 55])
def test_every_process_spends_its_budget(budget: int) -> None:
    calls = 0

    class Counted(GaussianDenoiser):
        def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
            nonlocal calls
            calls += 1
            return super().__call__(x, sigma)

    data = SMALL.sample(range(3))
    denoiser = Counted(0.0, 0.25)
    cloud = Cloud.make(data, denoiser, 0, LEVELS.sigma_max, LEVELS.t_max)
    processes = candidates(LEVELS, budget)
    assert {c.family for c in processes} == set(FAMILIES)
    assert len({c.label for c in processes}) == len(processes)
    for candidate in processes:
        calls = 0
        cloud.ends(candidate.process, denoiser)
        # the body is run once, on both clouds together
        assert calls == candidate.process.nfe == budget
    with pytest.raises(UserError, match="20 NFE has no 'ode' process"):
        candidates(LEVELS, 20)


def test_processes_stay_in_the_interval() -> None:
    def lifts(*plan: Any) -> list[Jump]:
        return [part for part in plan if isinstance(part, Jump)]

    low, high = LEVELS.t_min, LEVELS.t_max
    assert not lifts(*LEVELS.ode(6))
    assert [(j.t_from, j.t_to) for j in lifts(*LEVELS.restart(4, 3))] == [(low, high)] * 3
    sde = lifts(*LEVELS.sde(12, 0.3))
    assert len(sde) > 5 and all(j.t_to == pytest.approx(1.3 * j.t_from) for j in sde)
    assert all(low < j.t_from and j.t_to <= high for j in sde)
    wide = lifts(*LEVELS.sde(12, 0.3, wide=True))
    assert len(wide) == 12 and wide[0].t_to == pytest.approx(1.3 * high)
    with pytest.raises(UserError, match="t_min 2, t_max 1, sigma_max 80"):
        Levels(t_min=2)


# The errors


def test_the_difference_of_the_two_runs_does_not_depend_on_the_noise() -> None:
    """On Gaussian data every process is linear, so with shared draws p - q is a multiple."""
    data = 0.5 * normal(0, 40, 5, 1, 1).float()
    denoiser = GaussianDenoiser(0.0, 0.25)
    start = data + normal(1, 40, 5, 1, 1).float()
    cloud = Cloud(data, start, 1, LEVELS.sigma_max)
    ratios, lengths = {}, {}
    for name, body in (("ode", LEVELS.ode(2)), ("restart", LEVELS.restart(9, 4))):
        p, q = cloud.ends(Process(LEVELS.head(4), body), denoiser)
        ratios[name], lengths[name] = (p - q) / (p - q)[0, 0], float((p - q).norm())
    torch.testing.assert_close(ratios["ode"], ratios["restart"], rtol=1e-3, atol=1e-4)
    # each of the four descents scales by sqrt((v + t_min^2) / (v + t_max^2))
    shrink = math.sqrt((0.25 + LEVELS.t_min**2) / (0.25 + LEVELS.t_max**2)) ** 4
    assert lengths["restart"] == pytest.approx(shrink * lengths["ode"], rel=0.02)


@pytest.mark.parametrize("family", ["ode", "sde", "restart"])
def test_with_the_exact_score_only_the_floor_of_sampling_is_left(family: str) -> None:
    """Fine steps and the data's own denoiser draw points with replacement: so does bootstrap."""
    data = SMALL.sample(range(120))
    ideal = point_denoiser(data)
    cloud = Cloud.make(data, ideal, 1, LEVELS.sigma_max, LEVELS.t_max)
    fine = {"ode": LEVELS.ode(12), "sde": LEVELS.sde(16, 0.3), "restart": LEVELS.restart(9, 2)}
    errors = cloud.errors(Process(LEVELS.head(40), fine[family]), ideal)
    generator = torch.Generator().manual_seed(0)
    draws = [
        wasserstein1(data[torch.randint(120, (120,), generator=generator)], data) for _ in range(30)
    ]
    floor = Mean.of(draws)
    deviation = floor.error * math.sqrt(len(draws))
    assert abs(errors.total - floor.value) < 4 * deviation
    assert abs(errors.additional - floor.value) < 4 * deviation
    assert errors.contracted < 0.1 * floor.value  # the same latents, the same noise
    assert errors.total <= errors.contracted + errors.additional + 1e-9
    wrong = cloud.errors(Process(LEVELS.head(40), fine[family]), GaussianDenoiser(0.0, 0.25))
    assert min(wrong.total, wrong.additional) > floor.value + 8 * deviation  # the test can fail


def test_errors_are_named_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"data": 0.0, "p": 3.0, "q": 1.0}
    cloud = Cloud(torch.full((4, 1), at["data"]), torch.zeros(4, 1), 1, 80.0)
    ends = (torch.full((4, 1), at["p"]), torch.full((4, 1), at["q"]))
    monkeypatch.setattr(Cloud, "ends", lambda *_: ends)
    process = Process(LEVELS.head(4), LEVELS.ode(1))
    errors = cloud.errors(process, GaussianDenoiser(0.0, 1.0))
    assert errors == PathErrors(total=3.0, contracted=2.0, additional=1.0)


# The network


def test_the_network_learns_the_mixture(tmp_path: Path) -> None:
    """Closer to the ideal denoiser than the best linear one is, by a factor of two."""
    data = SMALL.sample(range(300))
    denoiser = train_network(tmp_path, data, 32, replace(recipe(30, 128, 0), lr=0.01))
    level = torch.tensor(0.4)
    x = data + level * normal(0, *data.shape).float()
    ideal = SMALL.denoiser()(x, level).x0
    covariance = data.flatten(1).T.cov().double()
    linear = GaussianDenoiser.from_covariance(data.mean(0).double(), covariance)
    with torch.no_grad():
        error = (denoiser(x, level).x0 - ideal).square().mean()
    assert error < (linear(x.double(), level).x0 - ideal).square().mean() / 4


def test_invalid_networks_raise(tmp_path: Path) -> None:
    points = SMALL.sample(range(20))
    with pytest.raises(UserError, match="--batch 20 or less"):
        train_network(tmp_path, points, 8, recipe(1, 32, 0))
    vector = {"class_name": "EDMPrecond", "model_type": "MLP", "img_resolution": 1}
    for settings, reason in (
        ({"label_dim": 3}, "label_dim is 3, but an MLP takes no classes"),
        ({"layers": 1}, "1 layers of width 64"),
    ):
        with pytest.raises(ValueError, match=reason):
            build({**vector, "img_channels": 5, **settings})
    with pytest.raises(ValueError, match="bottleneck is 'enc'; known: hidden"):
        build({**vector, "img_channels": 5}, "enc")


# Runs

TINY = Settings(
    budgets=(19,), points=24, choosing=2, blocks=2, kimg=0.16, batch=16, width=8, mixture=SMALL
)


def recording(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return wrapper


def interrupted_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = itertools.count(calls, -1)

    def wrapper(*arguments: Any) -> Any:
        if next(left) == 0:
            raise KeyboardInterrupt
        return function(*arguments)

    return wrapper


def test_an_interrupted_run_continues_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(TINY, tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(toy.network, "batch", interrupted_after(toy.network.batch, 5))
        with pytest.raises(KeyboardInterrupt):
            run(TINY, folder)
    assert not (folder / "points").exists()
    with monkeypatch.context() as patch:
        steps: list[Any] = []
        patch.setattr(toy.network, "batch", recording(toy.network.batch, steps))
        patch.setattr(Cloud, "errors", interrupted_after(Cloud.errors, 6))
        with pytest.raises(KeyboardInterrupt):
            run(TINY, folder)
    assert [step[2] for step in steps] == list(range(80, 160, 16))  # not from the beginning
    assert len(list((folder / "points").iterdir())) == 6
    measured: list[Any] = []
    monkeypatch.setattr(Cloud, "errors", recording(Cloud.errors, measured))
    again = run(TINY, folder)
    assert (again.swept, again.chosen, again.floor) == (whole.swept, whole.chosen, whole.floor)
    assert len(measured) == len(whole.swept) + len(whole.chosen) - 6
    for point in whole.swept + whole.chosen:
        assert point.total <= point.contracted + point.additional + 1e-9
    with pytest.raises(UserError, match="is of a run with seed 0, not 1"):
        run(replace(TINY, seed=1), folder)


def test_points_of_other_levels_are_not_mixed_in(tmp_path: Path) -> None:
    first = run(TINY, tmp_path)
    other = run(replace(TINY, levels=Levels(t_max=1.5)), tmp_path)
    assert all(a.total != b.total for a, b in zip(first.swept, other.swept, strict=True))


def test_the_best_of_the_sweep_is_reported_on_other_blocks(tmp_path: Path) -> None:
    results = run(TINY, tmp_path)
    blocks = {p.block for p in results.swept}, {p.block for p in results.chosen}
    assert blocks == ({0, 1}, {2, 3})
    for family in FAMILIES:
        mine = [row for row in rows(results.swept) if row.family == family]
        best = min(mine, key=lambda row: row.total.value)
        assert {p.label for p in results.chosen if p.family == family} == {best.label}
    paths = write_report(tmp_path, results)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["swept"]) == len(results.swept) and len(saved["claims"]) == 3
    assert paths[-1].read_bytes()[:4] == b"\x89PNG" and paths[-1].stat().st_size < 100_000


def made_up(restart: float) -> Results:
    """Totals per block: ODE 5 and 5, SDE 2 and 4, Restart as given; all at 19 NFE."""
    totals = {"ode": (5, 5), "sde": (2, 4), "restart": (restart,) * 2, "sde-wide": (1, 1)}
    chosen = [
        Point(family, f"{family} 4 | x", 19, block, total, total / 2, 1.0)
        for family, pair in totals.items()
        for block, total in enumerate(pair, start=1)
    ]
    return Results(chosen, chosen, [0.5, 0.7], RunRecord.make("toy", {}, {}, {}))


def test_claims_are_the_inequalities_of_the_paper() -> None:
    over_ode, over_sde, contracted = claims(made_up(2.5))
    assert over_ode.holds and over_ode.margin == Mean(2.5, 0.0)
    assert over_sde.holds and over_sde.margin == Mean(0.5, 1.0)  # of -0.5 and 1.5
    assert contracted.holds and contracted.margin == Mean(1.25, 0.0)
    assert [c.holds for c in claims(made_up(3.5))] == [True, False, True]
    assert [c.holds for c in claims(made_up(6))] == [False, False, False]
    text = table(made_up(3.5))
    assert "| 19 | Restart | 4 then x | 3.500 +- 0.000 | 1.750 +- 0.000 | 1.000 +- 0.000 |" in text
    assert "FAILS: 19 NFE: total error of Restart < that of the SDE, by -0.500 +- 1.000" in text
    assert [row.family for row in rows(made_up(1).chosen)] == list(FAMILIES)


def test_the_pareto_frontier() -> None:
    pairs = [(3.0, 1.0), (1.0, 3.0), (2.0, 3.5), (2.0, 2.0), (3.0, 2.0), (4.0, 1.0)]
    assert frontier(pairs) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_dry_runs_and_errors_of_the_script(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    plan = ["--budgets=19,23", f"--outdir={folder}"]
    assert script.main([*plan, "--dry-run"], standalone_mode=False) == 0
    assert "restart 4 | 2 x 3 nodes" in capsys.readouterr().out and not folder.exists()
    for flag, reason in (
        ("--budgets=a", "--budgets 'a' is not a list of whole numbers"),
        ("--budgets=20", "20 NFE has no"),
        ("--kimg=-1", "-1.0 is not in the range"),
    ):
        with pytest.raises((UserError, click.UsageError), match=reason):
            script.main([flag, f"--outdir={folder}"], standalone_mode=False)
    assert not folder.exists()


@pytest.mark.parametrize(("restart", "code"), [(1.0, 0), (3.5, 1)])
def test_the_script_fails_if_a_claim_does_not_hold(
    restart: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "run", lambda *_: made_up(restart))
    assert script.main([f"--outdir={tmp_path}"], standalone_mode=False) == code


def test_the_recipe_runs_the_script() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch.sh"), "toy", "--dry-run"], capture_output=True, text=True
    )
    line = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and line.endswith("python -m tools.restart_toy --outdir=exps/toy")
