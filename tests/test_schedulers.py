"""Schedulers of diffusers around our denoisers: the same steps as our own solvers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from comparison.job import CompareOptions, prepare
from comparison.measure import measure
from comparison.rows import diffusers_rows
from denoisers.analytic import GaussianDenoiser
from denoisers.conditions import ConditionOptions
from evaluation.harness import Harness
from plans.plan import run_plan
from runtime.errors import UserError
from samplers.generate import generate
from samplers.sampler import Sampler
from samplers.schedulers import diffusers_samplers
from solvers.driver import integrate
from solvers.registry import make_solver
from solvers.types import Denoised, Denoiser, Solver
from tests.comparison_problems import CARD, OPTIONS, guided_card, make_harness
from tests.sampler_models import GaussianModel, make_card
from tests.solver_problem import mixture, relative_error, start

OURS: dict[str, Solver] = {
    "EDM-Euler": make_solver("euler"),
    "EDM-DPM++ 2M": make_solver("dpmpp", max_order=2),
    "EDM-DPM++ 3M": make_solver("dpmpp", max_order=3),
}


def samplers(budget: int = 5) -> dict[str, Sampler]:
    return diffusers_samplers(budget, make_card())


def ours_and_theirs(
    title: str, denoiser: Denoiser, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Our solver on the scheduler's noise levels and from its latents, and the scheduler."""
    plan, x = samplers()[title].plan, start(dtype=dtype)
    theirs = run_plan(plan, denoiser, x, lambda name: x)
    latents = x * (80**2 + 1) ** 0.5 / 80
    ts = theirs.t.clone()
    ts[0] = plan[0]._ready().sigmas[0]  # 80 to rounding
    return integrate(OURS[title], denoiser, latents, ts).x[1:], theirs.x[1:]


@pytest.mark.parametrize("title", OURS)
@pytest.mark.parametrize(
    "denoiser", [GaussianDenoiser(0.3, 0.09), mixture()], ids=["normal", "mix"]
)
def test_a_scheduler_makes_the_steps_of_our_solver(title: str, denoiser: Denoiser) -> None:
    ours, theirs = ours_and_theirs(title, denoiser, torch.float32)
    assert ours.dtype == theirs.dtype == torch.float32
    assert relative_error(theirs, ours) < 1e-5
    assert relative_error(theirs[-1], ours[-1]) < 1e-5


@pytest.mark.parametrize("title", ["EDM-DPM++ 2M", "EDM-DPM++ 3M"])  # Euler casts to float32
def test_only_the_coefficients_are_in_float32(title: str) -> None:
    ours, theirs = ours_and_theirs(title, mixture(), torch.float64)
    assert theirs.dtype == torch.float64
    assert relative_error(theirs, ours) < 1e-6


def test_a_scheduler_steps_with_our_data_prediction() -> None:
    """The last step, to 0, gives it back as it was."""
    seen: list[torch.Tensor] = []

    class Random:
        cost = 1

        def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> Denoised:
            seen.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(seen))))
            return Denoised(seen[-1], None)

    x = start(dtype=torch.float32)
    for sampler in samplers().values():
        end = run_plan(sampler.plan, Random(), x, lambda name: x).x[-1]
        assert relative_error(end, seen[-1]) < 1e-6
    assert len(seen) == 15


@pytest.mark.parametrize("budget", [1, 4, 7])
def test_the_network_is_called_as_often_as_planned(budget: int) -> None:
    for sampler in samplers(budget).values():
        model = GaussianModel()
        batch = next(generate(sampler, model, [0, 1], batch=2, device="cpu"))
        assert len(model.calls) == batch.nfe == sampler.nfe == budget
        times: Any = sampler.describe()["times"]
        assert times[0] == 80 and times[-1] == 0 and len(times) == budget + 1
        if budget > 1:
            assert times[-2] == pytest.approx(0.002, rel=1e-4)


def test_under_guidance_a_step_takes_two_evaluations() -> None:
    found = diffusers_samplers(10, guided_card(), 2.0)["EDM-Euler"]
    assert (found.nfe, found.cost, len(found.plan[0].times)) == (10, 2, 5)
    assert found.guidance_rate == 2.0
    assert diffusers_samplers(5, guided_card(), 2.0) == {}


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


def test_rows_are_named_after_diffusers_and_kept(harness, tmp_path, monkeypatch) -> None:
    rows = diffusers_rows(3, CARD)
    assert [row.method for row in rows] == [f"diffusers {title}" for title in OURS]
    assert len({row.key for row in rows}) == 3
    assert rows[1].detail == "EDMDPMSolverMultistepScheduler, 3 steps 80 -> 0"
    described: dict[str, Any] = rows[1].sampler.describe()
    assert described["scheduler"]["solver_order"] == 2 and described["diffusers"]
    first = measure(rows[1], harness, tmp_path, lambda n: None)
    assert first.nfe_metered == 3 and first.group == "diffusers"
    with monkeypatch.context() as patch:
        patch.setattr(Harness, "fid", None)  # an equal row is read
        assert measure(diffusers_rows(3, CARD)[1], harness, tmp_path, lambda n: None) == first
    extra = {**rows[1].sampler.extra, "diffusers": "0.1"}
    other = replace(rows[1], sampler=replace(rows[1].sampler, extra=extra))
    again = measure(other, harness, tmp_path, lambda n: None)
    assert again.identity != first.identity


def test_with_diffusers_adds_its_rows_at_the_budgets(tmp_path, monkeypatch) -> None:
    conditions = ConditionOptions()
    options = CompareOptions(replace(OPTIONS, conditions=conditions), budgets="3,5", num=12)
    options = replace(options, blocks=2, select="4", outdir=tmp_path)
    plain = prepare(options)
    job = prepare(replace(options, extra=("diffusers",)))
    for budget, rows in job.rows.items():
        assert len(rows) == len(plain.rows[budget]) + 3
        assert "diffusers EDM-DPM++ 3M" in [row.method for row in rows]
    with pytest.raises(UserError, match="--with diffusers has rows only at --budgets"):
        prepare(replace(options, budgets="none", extra=("diffusers",)))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert prepare(options).rows
    with pytest.raises(UserError, match=r"pip install 'amed-toolkit\[diffusion\]'"):
        prepare(replace(options, extra=("diffusers",)))
